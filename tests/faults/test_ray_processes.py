"""No process of Ray is left when what started it dies: gcs, raylet, agents, actors, and what actors start.

They leave the process group and the session of the driver; the mark in their environment is what they are found by.
The other way round, a launch on Ray goes on when any of its services is killed, the trainer included.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.runs import LaunchRun, summary_of
from support.serving import eventually

from atropos_verl.launch.orphan_reaper import carriers

pytestmark = pytest.mark.slow

DRIVER = """
import ray, subprocess, sys, time
from atropos_verl.verl_plugin.shims import start_ray

start_ray(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)

@ray.remote
class Actor:
    def start(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)

actor = Actor.options(name="a", lifetime="detached").remote()
ray.get(actor.start.remote())
print("READY", flush=True)
time.sleep(1000)
"""
OWNER = """
import sys, time
from pathlib import Path
from atropos_verl.launch.process import ManagedProcess, ServiceSpec

command = (sys.executable, "driver.py")
process = ManagedProcess(ServiceSpec(name="ray", command=command, cwd=Path.cwd(), log_path=Path("ray.log")))
process.start()
Path("token").write_text(f"{process._token} {process.pid}")
while process.is_running():
    time.sleep(0.1)
print("noticed", flush=True)
time.sleep(1000)
"""
ALONE = """
import os, runpy
from pathlib import Path
from atropos_verl.launch.orphan_reaper import TOKEN_VARIABLE
from atropos_verl.launch.process import ended_with_this_process

with ended_with_this_process():
    Path("token").write_text(f"{os.environ[TOKEN_VARIABLE]} {os.getpid()}")
    runpy.run_path("driver.py")
"""


def names(token: str) -> str:
    found = []
    for pid in carriers(token):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(psutil.Process(pid).cmdline()))
    return "\n".join(found)


@pytest.mark.parametrize(
    ("program", "victim"),
    [(OWNER, "launcher"), (OWNER, "driver"), (ALONE, "driver")],
    ids=["launcher", "driver", "a command that nobody watches"],
)
def test_nothing_of_ray_is_left_after_a_kill(tmp_path: Path, program: str, victim: str) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)

    def logs() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.log"))

    with (tmp_path / "own.log").open("wb") as log:
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, start_new_session=True)
    try:
        eventually(lambda: "READY" in logs(), "an actor of Ray", 600.0)
        token, driver = (tmp_path / "token").read_text().split()
        running = names(token)
        for part in ("gcs_server", "raylet", "ray::Actor", "time.sleep(1000)"):
            assert part in running
        os.kill(process.pid if victim == "launcher" else int(driver), signal.SIGKILL)
        eventually(lambda: names(token) == "", "the end of every process of Ray", 120.0)
        if program == OWNER and victim == "driver":
            eventually(lambda: "noticed" in logs(), "the launcher to notice", 120.0)
    finally:
        process.kill()
        process.wait(timeout=10.0)


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


def test_what_is_killed_on_ray_is_restarted_and_the_run_completes(tmp_path: Path) -> None:
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
        assert [(line["step"], line["policy_version"]) for line in lines] == [(n, n) for n in range(1, STEPS + 1)]
        assert all(line["data/unmatched_span_rate"] == 0.0 for line in lines), "also of groups from before a restart"
        score = summary_of(tmp_path / "run")["held_out_after"]
        assert f"held-out mean reward after training: demo {score:.3f}" in run.stdout
