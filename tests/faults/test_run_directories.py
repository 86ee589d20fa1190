"""The directory of a run: one run at a time, moved, damaged; and what a run leaves elsewhere: nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.runs import LAUNCH, MAIN, SMALL, TrainingRun, checkpointed_step, metrics_of, refused
from support.trajectory_server import ServerProcess

pytestmark = pytest.mark.slow


def test_one_run_per_directory_and_a_refused_one_touches_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with ServerProcess(tmp_path, "--second-trainer", "share") as api:
        words = [f"atropos.api_url={api.url}", "steps=7"]
        with TrainingRun([*words, *SMALL], run_dir=run_dir) as run:
            run.wait_for_output("environments are to use the gateway at")
            files = (path for path in run_dir.rglob("*") if path.suffix in (".json", ".yaml"))
            # The run that goes on writes its state.
            before = {path: path.stat().st_mtime_ns for path in files if path.name != "state.json"}
            for script in (MAIN, LAUNCH):
                said = refused(script, *SMALL, f"atropos.api_url={api.url}", "steps=9", f"run_dir={run_dir}")
                assert f"run_dir: {run_dir} is in use by a training run, pid {run.popen.pid} on " in said
                assert "end it, or choose another one" in said
            assert {path: path.stat().st_mtime_ns for path in before} == before
            run.popen.kill()
            run.must_end(-signal.SIGKILL)
        assert json.loads((run_dir / "config.json").read_text())["steps"] == 7
        with TrainingRun([*words, *SMALL], run_dir=run_dir) as run:  # the lock died with its holder
            run.wait_for_output("environments are to use the gateway at")
            run.popen.send_signal(signal.SIGTERM)
            run.must_end(130)
    assert (run_dir / "lock").read_text() == ""


def test_a_moved_run_with_a_damaged_checkpoint_goes_on_when_its_terminal_closes(tmp_path: Path) -> None:
    """Its temporary directory and its home stay as they were, whatever ended its processes."""
    home, temporary = tmp_path / "home", tmp_path / "temp"
    home.mkdir()
    temporary.mkdir()
    env = {"HOME": str(home), "TMPDIR": str(temporary), "MPLCONFIGDIR": str(tmp_path / "fonts")}
    words = ["save_freq=2", *SMALL]
    first, moved = tmp_path / "first", tmp_path / "moved"
    with TrainingRun(["steps=4", *words], run_dir=first, env=env) as run:
        run.must_end(0)
    shard = first / "checkpoints" / "global_step_4" / "actor" / "optim_world_size_1_rank_0.pt"
    shard.write_bytes(shard.read_bytes()[:-1000])
    shutil.copytree(first, tmp_path / "copy")
    shutil.move(first, moved)
    for run_dir in (moved, tmp_path / "copy"):
        with TrainingRun(["steps=1000", *words], run_dir=run_dir, env=env) as run:
            run.wait_for_step(5)
            assert f"{run_dir / shard.relative_to(first)} has " in run.stdout
            assert "were written; global_step_2 is used" in run.stdout
            assert "2 batches fetched before the interruption are trained first" in run.stdout
            os.kill(run.popen.pid, signal.SIGHUP)
            run.must_end(130)
            step = metrics_of(run_dir)[-1]["step"]
            assert checkpointed_step(run_dir) == step
            assert f"(steps up to {step} are saved in " in run.stderr or step % 2 == 0
        assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, step + 1))
        assert not (run_dir / "launch" / "tmp").exists()
    assert [*home.rglob("*")] == [*temporary.rglob("*")] == []


@pytest.mark.parametrize("how", ["its reader ends", "it was never open"])
def test_a_standard_output_that_is_closed_ends_nothing(tmp_path: Path, how: str) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(MAIN), *SMALL, "steps=2", "save_freq=-1", f"run_dir={run_dir}"]
    if how == "it was never open":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        if how == "its reader ends":
            process.stdout.readline()
        process.stdout.close()
        watch = threading.Timer(200.0, process.kill)
        watch.start()
        assert process.wait() == 0
        watch.cancel()
    finally:
        process.kill()
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2]
    dropped = "cannot be written any more" in (run_dir / "logs" / "trainer.log").read_text()
    assert dropped == (how == "its reader ends")


_SAVES = """
import sys
from pathlib import Path
import torch
from atropos_verl.errors import CheckpointError
from atropos_verl.training.checkpoint_state import find_checkpoint, new_checkpoint
root = Path(sys.argv[1])
with new_checkpoint(root, 1, 1) as directory:
    torch.save(torch.zeros(100_000), directory / "model.pt")
try:
    with new_checkpoint(root, 2, 1) as directory:
        torch.save(torch.zeros(3_000_000), directory / "model.pt")
except CheckpointError as error:
    print(error)
print(sorted(path.name for path in root.iterdir()), find_checkpoint(root, "auto").name)
"""


def test_a_checkpoint_that_fills_the_disk_names_it_and_leaves_the_one_before(tmp_path: Path) -> None:
    """On a file system of 4 MB, in a mount namespace of its own; torch's own words are "unexpected pos"."""
    inside = f'mount -t tmpfs -o size=4m none {tmp_path} && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", inside, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no private mounts")
    script = [sys.executable, "-c", _SAVES, str(tmp_path / "checkpoints")]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=120, check=True)
    error, left = done.stdout.splitlines()
    assert error.startswith(
        f"cannot write the checkpoint {tmp_path}/checkpoints/global_step_2: No space left on device ("
    )
    assert left == "['global_step_1', 'latest_checkpointed_iteration.txt'] global_step_1"
