"""``kill -9`` of the trainer and of the API at random groups: what the run ends up with holds every group once.

The trainer is a process with the real client, journal and leases; only the model is left out
(``support/light_trainer.py``). ``ATROPOS_KILL_ROUNDS`` sets the number of kills (12).
"""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.runs import REPOSITORY, journalled
from support.serving import eventually
from support.trajectory_server import ServerProcess, group_bytes, registration

from atropos_verl.errors import AtroposAPIError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration

ROUNDS = int(os.environ.get("ATROPOS_KILL_ROUNDS", "12"))
pytestmark = pytest.mark.slow
LEASE = 1.0
"""Seconds: shorter than 75 groups take, so that leases end while nobody lives to renew them."""


def post_until(stop: threading.Event, url: str, posted: list[int]) -> None:
    """An environment that sends each group until it is taken, once (idempotency key)."""
    for number in itertools.count():
        if stop.wait(0.02):
            return
        while len(posted) == number:
            try:
                with AtroposClient(url, timeout=5.0, retry_delay=0.02) as client:
                    client.post_scored_data_list([group_bytes(number)], idempotency_key=f"group-{number}")
                posted.append(number)
            except AtroposAPIError:
                continue  # the client has waited before it gave up


def started(url: str, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "support.light_trainer", url, str(run_dir), str(LEASE)]
    with (run_dir / "trainer.log").open("ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY / "tests", stdout=log, stderr=log)


def test_every_group_is_trained_once_whoever_is_killed(tmp_path: Path) -> None:
    rng = random.Random(0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stop, posted = threading.Event(), []

    def wait_for_groups(count: int) -> None:
        goal = len(posted) + count
        eventually(lambda: len(posted) >= goal, f"{count} more groups", 60.0)

    with ServerProcess(tmp_path, "--data-dir", str(tmp_path / "api")) as server:
        with AtroposClient(server.url) as client:
            client.register(TrainerRegistration(**registration()))
        environment = threading.Thread(target=post_until, args=(stop, server.url, posted))
        environment.start()
        trainer = started(server.url, run_dir)
        try:
            for _ in range(ROUNDS):
                wait_for_groups(rng.randint(10, 60))
                if rng.random() < 0.3:
                    server.kill()
                    server.start()
                if rng.random() < 0.8:
                    trainer.kill()
                    trainer.wait()
                    wait_for_groups(rng.choice([0, 0, 75]))
                if trainer.poll() is not None:
                    trainer = started(server.url, run_dir)
            stop.set()
            environment.join(timeout=60.0)
            (run_dir / "stop").touch()
            assert trainer.wait(timeout=120.0) == 0, (run_dir / "trainer.log").read_text()[-3000:]
        finally:
            stop.set()
            trainer.kill()
            trainer.wait()
            environment.join(timeout=60.0)
    saved = json.loads((run_dir / "checkpoint.json").read_text())
    assert sorted(saved["trained"]) == sorted(posted), "a group was lost, or trained twice"
    assert journalled(run_dir) == []
