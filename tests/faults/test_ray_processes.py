"""No process of Ray is left when what started it dies: gcs, raylet, agents, actors, and what actors start.

They leave the process group and the session of the driver; the mark in their environment is what they are found by.
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

from atropos_verl.launch.watcher import carriers

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
