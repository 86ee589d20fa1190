"""Our API under ``kill -9``, of itself and of the trainer, at random moments and under load from eight environments:
what the run ends up with holds every accepted group once. And beside clients that connect and say nothing, with fewer
file descriptors than they have connections.

The trainer is this file as a process, with the real client, journal and leases. It has no model: it "trains" by noting
group numbers, and checkpoints them every few steps. ``ATROPOS_CRASH_ROUNDS`` sets the number of rounds (8; the bar is
200).
"""

import itertools
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from support.runs import TrainingRun, journalled
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
        self.run_dir, self.path = run_dir, run_dir / "checkpoint.json"
        patience = {"retry_attempts": 30, "retry_delay": 0.02, "max_wait_time": 0.3}
        self.client = AtroposClient(url, timeout=10.0, lease_seconds=LEASE, **patience)
        self.client._batch_headers.pop("Accept", None)  # JSON, which this reads itself
        self.batches = LeasedBatches(self.client, BatchJournal(run_dir / "journal"))
        saved = json.loads(self.path.read_text()) if self.path.exists() else {"step": 0, "trained": []}
        self.step, self.trained = saved["step"], saved["trained"]

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
                with suppress(AtroposAPIError):  # the client has waited before it gave up
                    client.post_scored_data_list([made], idempotency_key=f"group-{identity}")
                    posted.append(identity)


@contextmanager
def under_load(url: str) -> Iterator[list[list[int]]]:
    """The groups of each environment that were accepted."""
    stop, posted = threading.Event(), [list[int]() for _ in range(ENVIRONMENTS)]
    with ThreadPoolExecutor(ENVIRONMENTS) as pool:
        environments = [pool.submit(post_until, stop, url, n, own) for n, own in enumerate(posted)]
        try:
            yield posted
        finally:
            stop.set()
    for environment in environments:
        environment.result()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_group_is_trained_once_whoever_is_killed(tmp_path: Path) -> None:
    rng, run_dir, path = random.Random(0), tmp_path / "run", os.pathsep.join(sys.path)
    run_dir.mkdir()
    trainers: list[subprocess.Popen[bytes]] = []

    def start_trainer() -> None:
        with (run_dir / "trainer.log").open("ab") as log:
            command, environment = [sys.executable, __file__, server.url, str(run_dir)], {"PYTHONPATH": path}
            trainers.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))

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


SILENT = 2000
SAID = (b"", b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
PREFIX = ("sh", "-c", 'ulimit -n 1024; exec "$@"', "sh")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Holds our end of the connections: this process may open enough files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 3 * SILENT)), before[1]))
    with ExitStack() as stack:
        yield stack
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_api_goes_on_beside_2000_silent_connections_at_1024_files(stack: ExitStack, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data"))
    server.prefix = PREFIX
    stack.enter_context(server)
    client = stack.enter_context(AtroposClient(server.url, timeout=60.0, retry_attempts=100))
    client.register(TrainerRegistration(**registration(4)))
    for number in range(SILENT):
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60.0))
        silent.sendall(SAID[number % 2])
        if number % 100 == 0:
            client.post_scored_data_list([group_bytes(number, 4)], idempotency_key=str(number))
            assert client.get_batch(max_wait_time=60.0) is not None
    assert server.process.poll() is None
    assert server.log_path.stat().st_size < 50_000


@pytest.mark.skipif(not os.environ.get("ATROPOS_VERL_SILENT_RUN"), reason="a whole run: ATROPOS_VERL_SILENT_RUN=1")
def test_a_run_goes_on_beside_silent_connections_at_1024_files(stack: ExitStack, tmp_path: Path) -> None:
    """2000 at its gateway, 2000 at its API."""
    run = stack.enter_context(TrainingRun(["steps=12", "save_freq=6"], run_dir=tmp_path / "run", prefix=PREFIX))
    run.wait_for_step(1)
    [file] = (run.run_dir / "launch").glob("environment*.yaml")
    told = yaml.safe_load(file.read_text())
    for url in (told["openai"][0]["base_url"], told["env"]["rollout_server_url"]):
        for _ in range(SILENT):
            stack.enter_context(socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=60.0))
    beside = run.trained()
    run.must_end(0)
    assert beside + 3 <= run.trained() == 12
    assert sum(path.stat().st_size for path in (run.run_dir / "logs").iterdir()) < 500_000


if __name__ == "__main__":
    try:
        LightTrainer(sys.argv[1], Path(sys.argv[2])).run()
    except AtroposAPIError as error:
        sys.exit(str(error))
