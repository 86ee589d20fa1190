"""What is checked before a run writes anything: who holds its directory, and whether its trackers can start."""

import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError, StorageInUseError
from atropos_verl.launch.plan import take_run_dir
from atropos_verl.launch.train import TrainingServices, _check_trackers, _train_locally
from atropos_verl.report.console import ProgressReporter
from atropos_verl.storage import locked, write_atomic
from atropos_verl.training.checkpoint_state import RunState, new_checkpoint

_HOLDER = """
import sys
from pathlib import Path
from atropos_verl.storage import locked
with locked(Path(sys.argv[1]), "somebody"):
    print("holds it", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    for end in ("in order", "by kill -9"):
        command = [sys.executable, "-c", _HOLDER, str(path)]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"holds it\n"
        said = f"{path.parent} is in use by somebody, pid {holder.pid} on {socket.gethostname()}; end it, or choose"
        with pytest.raises(StorageInUseError, match=re.escape(said)), locked(path, "me"):
            pytest.fail("it was free")
        holder.kill() if end == "by kill -9" else holder.stdin.close()
        holder.wait(timeout=60)
        holder.stdout.close()
        with locked(path, "me"):
            assert path.read_text().startswith("me, pid ")
        assert path.read_text() == ""


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path / "lock", "me"):
        assert "lock cannot be locked (No locks available): nothing keeps a second process out" in caplog.text


def test_a_run_and_a_launch_keep_each_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_VERL_LAUNCH_OF", "")
    monkeypatch.setattr("atropos_verl.launch.environments._TMPDIR_BYTES", 1000)  # however long pytest's path is
    for holder_is_launch in (False, True):
        with ExitStack() as holder:
            take_run_dir(holder, tmp_path, is_launch=holder_is_launch)
            (tmp_path / "launch" / "tmp" / "left").touch()
            monkeypatch.setenv("ATROPOS_VERL_LAUNCH_OF", "")  # what comes next is not of that launch
            for is_launch in (False, True):
                with pytest.raises(ConfigError, match=rf"run_dir: .* is in use by a .*, pid {os.getpid()} on "):
                    take_run_dir(ExitStack(), tmp_path, is_launch=is_launch)
            if holder_is_launch:
                monkeypatch.setenv("ATROPOS_VERL_LAUNCH_OF", str(tmp_path))
                with ExitStack() as trainer:
                    take_run_dir(trainer, tmp_path)
                assert (tmp_path / "launch" / "tmp" / "left").exists(), "the launch's, whose environments live"
        assert not (tmp_path / "launch" / "tmp").exists()


@pytest.mark.parametrize("name", ["tmp", "api"])
def test_directories_of_the_user_in_a_run_directory_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("atropos_verl.launch.environments._TMPDIR_BYTES", 1000)
    monkeypatch.setattr("atropos_verl.launch.train.Supervisor.start_api", lambda _: None)
    precious = tmp_path / name / "precious"
    precious.parent.mkdir()
    precious.touch()
    with ExitStack() as stack:
        take_run_dir(stack, tmp_path)
        config = RunConfig.from_mapping({"run_dir": str(tmp_path), "resume": "disable"})
        TrainingServices(config, 1).start_api(ProgressReporter(1))
    assert precious.exists()


def test_a_write_that_fails_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")  # the system's own word names none

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/file'"):
        write_atomic(tmp_path / "file", b"content", durable=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "variables", "netrc", "fault"),
    [
        (["console", "wandb"], {}, "machine example.com login x password y", "there is no API key for wandb: run"),
        (["wandb"], {"WANDB_BASE_URL": "https://example.com"}, "machine example.com login x password y", None),
        (["wandb"], {}, f"machine api.wandb.ai login user password {'x' * 40}", None),
        (["wandb"], {}, f"machine api.forge.coreweave.com login user password {'x' * 40}", None),  # where login writes
        (["wandb"], {}, "not a netrc file", "there is no API key for wandb: run 'wandb login'"),
        (["swanlab"], {}, "", "swanlab is not installed: pip install swanlab"),
        (["wandb"], {"WANDB_MODE": "offline"}, "", None),
        (["wandb"], {"WANDB_API_KEY": "x" * 40}, "", None),
        (["console", "file"], {}, "", None),
    ],
)
def test_a_tracker_that_cannot_start_is_named_before_anything_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], variables: dict[str, str], netrc: str, fault: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in {"NETRC": str(tmp_path / "netrc"), **variables}.items():
        monkeypatch.setenv(name, value)
    if fault is None:
        _check_trackers(names)
        return
    with pytest.raises(ConfigError, match=rf"trainer.logger: {fault}"):
        _check_trackers(names)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n\n")
    if "wandb" in names:
        _check_trackers(names)
        assert os.environ["WANDB_MODE"] == "offline", "what 'wandb offline' has stored holds"


@pytest.mark.parametrize("summarised", [None, 3, 6])
def test_a_run_that_was_interrupted_after_its_last_step_gets_its_summary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    summarised: int | None,
) -> None:
    caplog.set_level(logging.WARNING, "atropos_verl")  # is put back at the end
    config = RunConfig.from_mapping({"run_dir": str(tmp_path / "run"), "steps": 6})
    with new_checkpoint(tmp_path / "run" / "checkpoints", 6, None) as directory:
        RunState(step=6).save(directory, config)
    if summarised is not None:
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": summarised}))
    monkeypatch.setattr(TrainingServices, "start_api", lambda self, _: self.config)
    monkeypatch.setattr(TrainingServices, "start_environment", lambda _: pytest.fail("there is nothing to train"))

    def run(_: RunConfig, *, start_environment: Any, **__: Any) -> Any:
        start_environment()
        return {"steps": 6}, {"after": 0.5}

    monkeypatch.setattr("atropos_verl.backends.local.run.run", run)
    assert _train_locally(config) == 0
    logging.getLogger().handlers.pop().close()
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found.get("held_out_after") == (None if summarised == 6 else 0.5)
    assert ("is complete at step 6" in capsys.readouterr().out) == (summarised == 6)
