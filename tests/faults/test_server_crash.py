"""``kill -9`` at random moments, under load from eight environments and a leasing trainer: nothing is lost, nothing is
acked twice.

``ATROPOS_CRASH_ROUNDS`` sets the number of kills (12; the bar is 100).
"""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.trajectory_server import ServerProcess, group, registration

from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

logger = logging.getLogger(__name__)

ROUNDS = int(os.environ.get("ATROPOS_CRASH_ROUNDS", "12"))
ENVIRONMENTS = 8
WAIT = 60.0
"""Seconds within which a request must get through once the server is left alone."""


@dataclass(frozen=True)
class Answer:
    status: int
    lease_id: str | None
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Load:
    """The clients' record. Each thread only adds to its own lists."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.stop = threading.Event()
        self.accepted: list[list[int]] = [[] for _ in range(ENVIRONMENTS)]
        self.acked: list[list[int]] = []
        self.outcomes: dict[str, int] = {}
        self.failures: list[BaseException] = []

    def persist(self, method: str, path: str, fields: object = None, **headers: str) -> Answer:
        """Send until it is answered, whatever happens to the server; 5xx would be a failure of the test."""
        deadline = time.monotonic() + WAIT
        body = None if fields is None else json.dumps(fields)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10.0)
                try:
                    connection.request(method, path, body, sent)
                    response = connection.getresponse()
                    answer = Answer(response.status, response.getheader("x-atropos-lease-id"), response.read())
                finally:
                    connection.close()
                assert answer.status < 500, answer.body
                return answer
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline, f"{method} {path} did not get through in {WAIT} s"
                time.sleep(0.02)

    def environment(self, number: int) -> None:
        rng = random.Random(number)
        for count in itertools.count():
            if self.stop.is_set():
                return
            identity = number * 1_000_000 + count
            posted = group(identity, rng.choice([2, 4, 4, 6]), env_id=number, images=["x" * rng.randrange(3000)])
            answer = self.persist("POST", "/scored_data", posted, Idempotency_Key=f"group {identity}")
            assert answer.status == 200, answer.body
            self.accepted[number].append(identity)
            time.sleep(rng.random() * 0.02)

    def trainer(self) -> None:
        rng = random.Random(99)
        while not self.stop.is_set():
            lease = rng.choice([0.3, 30.0, 30.0, 30.0])
            answer = self.persist("GET", "/batch", X_Atropos_Lease=str(lease))
            batch = answer.fields["batch"]
            if batch is None:
                time.sleep(0.01)
                continue
            if lease < 1:  # the trainer is slow, or dies: sometimes it acks too late, sometimes never
                time.sleep(rng.random() * 0.6)
                if rng.random() < 0.3:
                    continue
            acked = self.persist("POST", "/batch/ack", {"lease_id": answer.lease_id})
            outcome = str(acked.fields.get("ack", acked.status))
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if acked.status == 200:
                self.acked.append([made["tokens"][0][0] for made in batch])
            else:
                assert acked.status == 409, acked.body

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


@pytest.mark.timeout(600)
def test_kill_9_loses_nothing_and_acks_nothing_twice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rng = random.Random(7)
    with ServerProcess(tmp_path, "--data-dir", str(data)) as server:
        load = Load(server.port)
        load.persist("POST", "/register", registration(16))
        load.persist("GET", "/batch")
        for _ in range(ENVIRONMENTS):
            hello = {"max_token_length": 64, "desired_name": "e", "weight": 1.0, "group_size": 4}
            load.persist("POST", "/register-env", hello)
        threads = [load.run(load.environment, number) for number in range(ENVIRONMENTS)]
        threads.append(load.run(load.trainer))
        for _ in range(ROUNDS):
            time.sleep(0.05 + rng.random() * 0.3)
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
