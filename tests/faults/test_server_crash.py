"""``kill -9`` of the API and of the trainer at random moments, under load from eight environments: what the run ends up
with holds every accepted group once.

The trainer is this file as a process, with the real client, journal and leases. It has no model: it "trains" by noting
group numbers, and checkpoints them every few steps. ``ATROPOS_CRASH_ROUNDS`` sets the number of rounds (8; the bar is
200).
"""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import REPOSITORY, journalled
from support.serving import eventually
from support.trajectory_server import ServerProcess, group_bytes, registration

from atropos_verl.errors import AtroposAPIError, AtroposTimeoutError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.messages import TrainerRegistration

ROUNDS = int(os.environ.get("ATROPOS_CRASH_ROUNDS", "8"))
ENVIRONMENTS = 8
SAVE_EVERY = 3
LEASE = 1.0
"""Seconds: a trainer that is not started again for longer has lost its lease."""


class LightTrainer:
    """What a run ends up with is ``checkpoint.json``, as the weights of a real one would be. It stops when ``stop``
    exists and nothing is left."""

    def __init__(self, url: str, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.client = AtroposClient(
            url, timeout=10.0, retry_attempts=30, retry_delay=0.02, max_wait_time=0.3, lease_seconds=LEASE
        )
        self.client._batch_headers.pop("Accept", None)  # JSON, which this reads itself
        self.batches = LeasedBatches(self.client, BatchJournal(run_dir / "journal"))
        self.path = run_dir / "checkpoint.json"
        saved: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"step": 0, "trained": []}
        self.step: int = saved["step"]
        self.trained: list[int] = saved["trained"]

    def run(self) -> None:
        replayed = self.batches.resume(self.step)
        self.client.register(TrainerRegistration(**registration(16, starting_step=self.step, num_steps=10**6)))
        for held in replayed:
            self.train(held)
        while True:
            try:
                self.train(self.batches.fetch())
            except AtroposTimeoutError:
                if (self.run_dir / "stop").exists() and self.client.status().queue_size == 0:
                    break
        self.save()

    def train(self, held: HeldBatch) -> None:
        self.trained += [group["tokens"][0][0] for group in json.loads(held.body)["batch"]]
        self.step += 1
        self.batches.trained(held.entry, self.step)
        self.batches.ack(held.entry)
        if self.step % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": self.step, "trained": self.trained}))
        temporary.replace(self.path)
        self.batches.journal.discard_through(self.step)


def post_until(stop: threading.Event, url: str, number: int, posted: list[int]) -> None:
    """An environment that sends each group until it is taken, once (idempotency key)."""
    rng = random.Random(number)
    with AtroposClient(url, timeout=5.0, retry_delay=0.02) as client:
        for identity in itertools.count(number * 1_000_000):
            if stop.wait(rng.random() * 0.1):
                return
            made = group_bytes(identity, rng.choice([2, 4, 4, 6]), images=["x" * rng.randrange(3000)])
            while identity not in posted[-1:]:
                with contextlib.suppress(AtroposAPIError):  # the client has waited before it gave up
                    client.post_scored_data_list([made], idempotency_key=f"group-{identity}")
                    posted.append(identity)


@contextlib.contextmanager
def under_load(url: str) -> Iterator[list[list[int]]]:
    """The groups of each environment that were accepted."""
    stop, posted = threading.Event(), [list[int]() for _ in range(ENVIRONMENTS)]
    threads = [threading.Thread(target=post_until, args=(stop, url, n, own)) for n, own in enumerate(posted)]
    for thread in threads:
        thread.start()
    try:
        yield posted
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_group_is_trained_once_whoever_is_killed(tmp_path: Path) -> None:
    rng, run_dir = random.Random(0), tmp_path / "run"
    run_dir.mkdir()
    trainers: list[subprocess.Popen[bytes]] = []

    def start_trainer() -> None:
        with (run_dir / "trainer.log").open("ab") as log:
            command, path = [sys.executable, __file__, server.url, str(run_dir)], os.pathsep.join(sys.path)
            environment = {**os.environ, "PYTHONPATH": path}
            trainers.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))

    with ServerProcess(tmp_path, "--data-dir", str(tmp_path / "api")) as server:
        with AtroposClient(server.url) as client:
            client.register(TrainerRegistration(**registration(16)))
        start_trainer()
        try:
            with under_load(server.url) as posted:

                def wait_for_groups(count: int) -> None:
                    goal = sum(map(len, posted)) + count
                    eventually(lambda: sum(map(len, posted)) >= goal, f"{count} more groups", 60.0)

                for _ in range(ROUNDS):
                    wait_for_groups(rng.randint(20, 120))
                    if rng.random() < 0.6:
                        server.kill()
                        server.start()
                    if rng.random() < 0.6:
                        trainers[-1].kill()
                        trainers[-1].wait()
                        wait_for_groups(rng.choice([0, 0, 300]))
                    if trainers[-1].poll() is not None:
                        start_trainer()
            (run_dir / "stop").touch()
            assert trainers[-1].wait(timeout=120.0) == 0, (run_dir / "trainer.log").read_text()[-3000:]
        finally:
            trainers[-1].kill()
            trainers[-1].wait()
    saved = json.loads((run_dir / "checkpoint.json").read_text())
    assert sorted(saved["trained"]) == sorted(itertools.chain(*posted)), "a group was lost, or trained twice"
    assert journalled(run_dir) == []
    assert len(saved["trained"]) > 20 * ROUNDS and len(trainers) > ROUNDS // 3


if __name__ == "__main__":
    try:
        LightTrainer(sys.argv[1], Path(sys.argv[2])).run()
    except AtroposAPIError as error:
        sys.exit(str(error))
