"""No process of Ray is left when what started it dies: gcs, raylet, agents, actors, and what actors start.

They leave the process group and the session of the driver; the mark in their environment is what they are found by.
The other way round, a launch on Ray goes on when any of its services is killed, the trainer included.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.runs import LaunchRun, summary_of
from support.serving import eventually

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
def test_nothing_of_ray_is_left_after_a_kill(owner: subprocess.Popen[str], tmp_path: Path, victim: str) -> None:
    assert owner.stdout is not None
    token, driver = owner.stdout.readline().split()
    log = tmp_path / "ray.log"
    eventually(lambda: log.exists() and "READY" in log.read_text(), "an actor of Ray", 200.0)
    running = "\n".join(names(token))
    for part in ("gcs_server", "raylet", "ray::Actor", "time.sleep(1000)"):
        assert part in running
    os.kill(owner.pid if victim == "launcher" else int(driver), signal.SIGKILL)
    eventually(lambda: names(token) == [], "the end of every process of Ray", 60.0)
    if victim == "driver":
        assert owner.stdout.readline() == "noticed\n"


_ALONE = """
import os, runpy, sys
from atropos_verl.launch.orphan_reaper import TOKEN_VARIABLE
from atropos_verl.launch.process import ended_with_this_process

with ended_with_this_process():
    print(os.environ[TOKEN_VARIABLE], flush=True)
    runpy.run_path(sys.argv[1])
"""


@pytest.mark.slow
def test_nothing_of_ray_is_left_of_a_killed_command_that_nobody_watches(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(_DRIVER)
    command = [sys.executable, "-c", _ALONE, str(tmp_path / "driver.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        token = process.stdout.readline().strip()
        assert "READY\n" in iter(process.stdout.readline, ""), "Ray also prints"
        assert "raylet" in "\n".join(names(token))
        process.kill()
    eventually(lambda: names(token) == [], "the end of every process of Ray", 60.0)


STEPS = 8
WORDS = (
    "backend=ray",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "atropos.eval.before=false",
    "supervise.backoff=0.2",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_services_and_a_killed_trainer_on_ray_are_restarted_and_the_run_completes(tmp_path: Path) -> None:
    with LaunchRun(WORDS, run_dir=tmp_path / "run") as run:
        run.wait_for_trained(2)
        for service in ("demo", "trajectory_api"):
            run.kill_and_wait_for_restart(service)
            run.wait_for_more(1)
        assert run.service("trainer")["restarts"] == 0, "it waits for its API"
        run.send("trainer", signal.SIGKILL)
        run.must_end(0)
        assert run.service("trainer")["restarts"] == 1
        lines = run.metrics()
        assert [line["step"] for line in lines] == [line["policy_version"] for line in lines]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert all(line["data/unmatched_span_rate"] == 0.0 for line in lines), "also of groups from before a restart"
        score = summary_of(tmp_path / "run")["held_out_after"]
        assert f"held-out mean reward after training: demo {score:.3f}" in run.stdout
