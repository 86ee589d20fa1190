"""No process of Ray is left when what started it dies: gcs, raylet, agents, actors, and what actors start.

They leave the process group and the session of the driver; the mark in their environment is what they are found by.
The other way round, a run on Ray whose service dies ends by itself, with every step that was trained saved.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.runs import TrainingRun, checkpointed_step, metrics_of

from atropos_verl.launch.orphan_reaper import carriers

_DRIVER = """
import ray, subprocess, sys, time
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)

@ray.remote
class Actor:
    def start(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)

actor = Actor.options(name="a", lifetime="detached").remote()
ray.get(actor.start.remote())
print("READY", flush=True)
time.sleep(1000)
"""
_OWNER = """
import sys, time
from pathlib import Path
from atropos_verl.launch.process import ManagedProcess, ServiceSpec

directory = Path(sys.argv[1])
command = (sys.executable, str(directory / "driver.py"))
process = ManagedProcess(ServiceSpec(name="ray", command=command, cwd=directory, log_path=directory / "ray.log"))
process.start()
print(process._token, process.pid, flush=True)
while process.is_running():
    time.sleep(0.1)
print("noticed", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "driver.py").write_text(_DRIVER)
    command = [sys.executable, "-c", _OWNER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process
    process.kill()
    process.wait(timeout=10.0)


def names(token: str) -> list[str]:
    found = []
    for pid in carriers(token):
        try:
            found.append(" ".join(psutil.Process(pid).cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "driver"])
def test_nothing_of_ray_is_left_ten_seconds_after_a_kill(
    owner: subprocess.Popen[str], tmp_path: Path, victim: str
) -> None:
    assert owner.stdout is not None
    token, driver = owner.stdout.readline().split()
    log, deadline = tmp_path / "ray.log", time.monotonic() + 90.0
    while not log.exists() or "READY" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
    running = "\n".join(names(token))
    for part in ("gcs_server", "raylet", "ray::Actor", "time.sleep(1000)"):
        assert part in running
    os.kill(owner.pid if victim == "launcher" else int(driver), signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while (left := names(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    if victim == "driver":
        assert owner.stdout.readline() == "noticed\n"


_WORDS = (
    "backend=ray",
    "trainer.total_training_steps=100000",
    "trainer.save_freq=100",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "atropos.off_policy.max_staleness=null",
    "atropos.eval.before=false",
    "atropos.eval.after=false",
    "supervise.backoff=0.2",
)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_killed_services_of_a_run_on_ray_are_restarted(tmp_path: Path) -> None:
    """It is stopped then, and the second run goes on from what the first one saved."""
    run_dir = tmp_path / "run"
    with TrainingRun(_WORDS, run_dir=run_dir) as run:
        run.wait_for_step(2, 240.0)
        for service in ("environment", "trajectory_api"):
            run.process_of(service).kill()
            run.wait_for_output(f"{service} was killed by SIGKILL")
            run.wait_for_step(metrics_of(run_dir)[-1]["step"] + 2)
        run.interrupt(signal.SIGTERM)
        assert run.wait(120.0) == 130
        run.assert_nothing_left(within=30.0)
        assert run.stdout.count("restarting it in ") >= 2, "an environment may end with its API"
        assert "Traceback" not in run.stderr
        saved = checkpointed_step(run_dir)
        assert f"steps up to {saved} are saved in {run_dir}/checkpoints" in run.stdout
    with TrainingRun([*_WORDS, f"trainer.total_training_steps={saved + 2}"], run_dir=run_dir) as run:
        assert run.wait(240.0) == 0, run.stderr
        assert f"resumed at step {saved}" in run.stdout
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, saved + 3))
    assert all(line["data/unmatched_span_rate"] == 0.0 for line in lines), "also of groups from before the restart"
