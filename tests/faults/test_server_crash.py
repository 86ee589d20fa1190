"""``kill -9`` at random moments, under load from eight environments and a leasing trainer: nothing is lost, nothing is
acked twice.

``ATROPOS_CRASH_ROUNDS`` sets the number of kills (12; the bar is 200).
"""

import itertools
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from support.serving import eventually
from support.trajectory_server import ServerProcess, group, registration

from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

logger = logging.getLogger(__name__)

ROUNDS = int(os.environ.get("ATROPOS_CRASH_ROUNDS", "12"))
ENVIRONMENTS = 8
WAIT = 60.0
"""Seconds within which a request must get through once the server is left alone."""


class Load:
    """The clients' record. Each thread only adds to its own lists."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=10.0, limits=httpx.Limits(max_keepalive_connections=0))
        self.stop = threading.Event()
        self.accepted: list[list[int]] = [[] for _ in range(ENVIRONMENTS)]
        self.acked: list[list[int]] = []
        self.outcomes: Counter[str] = Counter()
        self.failures: list[BaseException] = []

    def persist(self, method: str, path: str, fields: object = None, **headers: str) -> httpx.Response:
        """Send until it is answered, whatever happens to the server; 5xx would be a failure of the test."""
        deadline = time.monotonic() + WAIT
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        while True:
            try:
                answer = self.client.request(method, path, json=fields, headers=sent)
            except httpx.HTTPError:
                assert time.monotonic() < deadline, f"{method} {path} did not get through in {WAIT} s"
                time.sleep(0.02)
            else:
                assert answer.status_code < 500, answer.text
                return answer

    def answers(self) -> int:
        return sum(map(len, self.accepted)) + len(self.acked)

    def environment(self, number: int) -> None:
        rng = random.Random(number)
        for count in itertools.count():
            if self.stop.is_set():
                return
            identity = number * 1_000_000 + count
            posted = group(identity, rng.choice([2, 4, 4, 6]), env_id=number, images=["x" * rng.randrange(3000)])
            answer = self.persist("POST", "/scored_data", posted, Idempotency_Key=f"group {identity}")
            assert answer.status_code == 200, answer.text
            self.accepted[number].append(identity)
            time.sleep(rng.random() * 0.02)

    def trainer(self) -> None:
        rng = random.Random(99)
        while not self.stop.is_set():
            lease = rng.choice([0.3, 30.0, 30.0, 30.0])
            answer = self.persist("GET", "/batch", X_Atropos_Lease=str(lease))
            batch = answer.json()["batch"]
            if batch is None:
                time.sleep(0.01)
                continue
            if lease < 1:  # the trainer is slow, or dies: sometimes it acks too late, sometimes never
                time.sleep(rng.random() * 0.6)
                if rng.random() < 0.3:
                    continue
            acked = self.persist("POST", "/batch/ack", {"lease_id": answer.headers["x-atropos-lease-id"]})
            outcome = str(acked.json().get("ack", acked.status_code))
            self.outcomes[outcome] += 1
            if acked.status_code == 200:
                self.acked.append([made["tokens"][0][0] for made in batch])
            else:
                assert acked.status_code == 409, acked.text

    def run(self, target: object, *arguments: object) -> threading.Thread:
        def guarded() -> None:
            try:
                target(*arguments)  # type: ignore[operator]
            except BaseException as error:  # noqa: BLE001 - a thread's boundary: the test raises it
                self.failures.append(error)
                self.stop.set()

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread


@pytest.mark.timeout(3600)
def test_kill_9_loses_nothing_and_acks_nothing_twice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rng = random.Random(7)
    with ServerProcess(tmp_path, "--data-dir", str(data)) as server:
        load = Load(server.url)
        load.persist("POST", "/register", registration(16))
        load.persist("GET", "/batch")
        for _ in range(ENVIRONMENTS):
            hello = {"max_token_length": 64, "desired_name": "e", "weight": 1.0, "group_size": 4}
            load.persist("POST", "/register-env", hello)
        threads = [load.run(load.environment, number) for number in range(ENVIRONMENTS)]
        threads.append(load.run(load.trainer))
        for _ in range(ROUNDS):
            before = load.answers()
            eventually(lambda: load.answers() > before + 2 or bool(load.failures), "answers", WAIT)  # noqa: B023
            time.sleep(rng.random() * 0.3)
            server.kill()
            server.start()
            assert not load.failures, load.failures
        load.stop.set()
        for thread in threads:
            thread.join(timeout=WAIT)
            assert not thread.is_alive()
        server.kill()
    assert not load.failures, load.failures
    check_books(load, data)


def check_books(load: Load, data: Path) -> None:
    """Every accepted group was acked once, or is still there once."""
    store = Store(ServerSettings(data_dir=data))
    held = [json.loads(stored.raw)["tokens"][0][0] for stored in store.groups.values()]
    store.close()
    accepted = sorted(identity for own in load.accepted for identity in own)
    acked = sorted(identity for batch in load.acked for identity in batch)
    logger.info("%s", {"accepted": len(accepted), "acked": len(acked), "held": len(held), "acks": load.outcomes})
    assert len(accepted) > 10 * ROUNDS
    assert len(acked) > 5 * ROUNDS
    assert len(set(accepted)) == len(accepted)
    assert sorted(acked + held) == accepted
