"""A run that is killed anywhere trains every batch once, against our API; upstream's batches stay in the journal.

A killed process is one whose lease keeper stopped and whose objects are made anew from the run directory.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support.scripted_api import random_batches, scripted_api
from support.serving import eventually
from support.trajectory_server import Clock, TrajectoryServer, group_bytes, registration

from atropos_verl.errors import AtroposConnectionError, AtroposTimeoutError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

LEASE = 60.0
"""Seconds on the server's clock, which the tests move on."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrajectoryServer]:
    with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api")) as running:
        store_of(running).now = clock = Clock()
        clock.time = time.time()
        yield running


def throw(error: Exception) -> None:
    raise error


def store_of(server: TrajectoryServer) -> Store:
    return server.app.store


def move_on(server: TrajectoryServer, seconds: float) -> float:
    """Returns the server's time afterwards."""
    clock = store_of(server).now
    assert isinstance(clock, Clock)
    clock.pass_(seconds)
    return clock.time


@dataclass
class Run:
    """A trainer's process: a client and its leased batches over one run directory."""

    client: AtroposClient
    batches: LeasedBatches

    def register(self, *groups: int) -> None:
        """Registers, and posts groups with these numbers as environments would."""
        self.client.register(TrainerRegistration(**registration(4)))
        self.offer(*groups)

    def offer(self, *groups: int) -> None:
        for number in groups:
            self.client.post_scored_data_list([group_bytes(number)])


@contextmanager
def run_of(api: Any, tmp_path: Path, name: str = "run", lease: float = LEASE) -> Iterator[Run]:
    options: dict[str, Any] = {"timeout": 5.0, "retry_delay": 0.01, "max_wait_time": 5.0}
    journal = BatchJournal(tmp_path / name / "journal")
    with (
        AtroposClient(api.url, lease_seconds=lease, **options) as client,
        closing(LeasedBatches(client, journal)) as batches,
    ):
        yield Run(client, batches)


def number_of(held: HeldBatch) -> int:
    """The number of the one group of the batch."""
    [group] = decode_batch(held.body)
    return int(group.token_ids[0][0])


def rest_of(run: Run) -> list[int]:
    """The numbers of what the API still has, in order."""
    numbers = []
    while (held := run.batches.poll()) is not None:
        numbers.append(number_of(held))
        run.batches.trained(held.entry, 99)
        run.batches.ack(held.entry)
    return numbers


def test_a_fetch_asks_once_and_is_answered_when_the_batch_is_there(
    server: TrajectoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_of(server, tmp_path) as run, ThreadPoolExecutor() as executor:
        run.register()
        before, store, waits = server.app.counters.requests["/batch", 200], server.app.store, Event()
        next_batch = store.next_batch

        def observed(seconds: float | None) -> Any:
            waits.set()
            return next_batch(seconds)

        monkeypatch.setattr(store, "next_batch", observed)
        monkeypatch.setattr("atropos_verl.protocol.client._WAIT_SECONDS", 50.0)
        run.client.timeout = run.client.max_wait_time = 120.0
        waiting = executor.submit(run.batches.fetch)
        waits.wait()
        run.offer(7)
        assert number_of(waiting.result()) == 7
        assert server.app.counters.requests["/batch", 200] == before + 1


def test_steps_are_acked_once_each_and_nothing_comes_again(server: TrajectoryServer, tmp_path: Path) -> None:
    with run_of(server, tmp_path) as run:
        run.register(1, 2)
        for step in (1, 2):
            held = run.batches.fetch()
            assert number_of(held) == step
            run.batches.trained(held.entry, step)
            assert run.batches.ack(held.entry) == "acked"
            assert run.batches.ack(held.entry) == "already"
        assert rest_of(run) == []
        assert run.batches.journal.discard_through(2) == 2
    assert store_of(server).totals["acks"] == 2


@pytest.mark.parametrize("outlive", [False, True], ids=["lease runs", "lease ended"])
@pytest.mark.parametrize("point", ["unjournalled", "journalled", "stepped", "acked", "covered"])
def test_killed_anywhere_every_batch_is_trained_once(
    server: TrajectoryServer, tmp_path: Path, point: str, outlive: bool
) -> None:
    """Batch 1 is trained and covered by a checkpoint (step 1); the process dies somewhere around batch 2."""
    with run_of(server, tmp_path) as first:
        first.register(1, 2, 3)
        held = first.batches.fetch()
        first.batches.trained(held.entry, 1)
        first.batches.ack(held.entry)
        first.batches.journal.discard_through(1)
        if point == "unjournalled":
            assert first.client.poll_batch() is not None
        else:
            held = first.batches.fetch()
            if point != "journalled":
                first.batches.trained(held.entry, 2)
            if point == "acked":
                assert first.batches.ack(held.entry) == "acked"
    with run_of(server, tmp_path) as second:
        if outlive and point != "acked":
            move_on(server, LEASE + 1)  # batch 2 is back at the API, before batch 3
            assert second.client.status().queue_size == 2
        checkpoint = 2 if point == "covered" else 1
        replayed = second.batches.resume(checkpoint)
        second.register()
        trained = [number_of(held) for held in replayed]
        for held in replayed:
            second.batches.trained(held.entry, 2)
            assert second.batches.ack(held.entry) == "already"
        if point == "unjournalled" and not outlive:
            move_on(server, LEASE + 1)
        trained += rest_of(second)
        assert trained == ([3] if point == "covered" else [2, 3])
        second.batches.journal.discard_through(99)
        assert list((tmp_path / "run" / "journal").iterdir()) == []


def test_a_batch_that_another_trainer_got_is_dropped_on_resume(server: TrajectoryServer, tmp_path: Path) -> None:
    with run_of(server, tmp_path, "dead") as dead:
        dead.register(1)
        dead.batches.fetch()
    with run_of(server, tmp_path, "other") as other:
        move_on(server, LEASE + 1)
        held = other.batches.fetch()
        with run_of(server, tmp_path, "dead") as resumed:
            assert resumed.batches.resume(0) == []
            assert resumed.batches.outcomes == {"lost": 1}
            assert resumed.batches.resume(0) == []
        assert other.batches.ack(held.entry) == "acked"


def test_a_trained_batch_that_comes_again_is_acked_and_not_taken(server: TrajectoryServer, tmp_path: Path) -> None:
    """A process that was suspended for longer than its lease holds two batches, and asks for a third."""
    with run_of(server, tmp_path) as run:
        run.register(1, 2)
        first, second = run.batches.fetch(), run.batches.fetch()
        run.batches.close()  # nobody renews
        run.batches.trained(first.entry, 1)
        move_on(server, LEASE + 1)
        run.offer(3)
        assert number_of(run.batches.fetch()) == 3
        assert run.batches.ack(second.entry) == "acked", "under its new lease"
        run.batches.trained(second.entry, 2)
        assert rest_of(run) == []


def test_a_lease_is_renewed_while_its_holder_lives(
    server: TrajectoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a renewal that failed as none should: it must not end the thread."""
    short = 0.3
    with run_of(server, tmp_path, lease=short) as run:
        run.register(1)
        renew, failures = run.client.renew, [MemoryError()]
        monkeypatch.setattr(run.client, "renew", lambda *a: renew(*a) if not failures else throw(failures.pop()))
        held = run.batches.fetch()
        eventually(lambda: not failures, "the first renewal")
        for _ in range(4):  # in all more than twice the lease
            now = move_on(server, 0.2)
            (batch,) = store_of(server).outstanding.values()
            eventually(lambda: batch.deadline == now + short, "the lease to be renewed")  # noqa: B023
        assert run.client.status().queue_size == 0
        assert run.batches.ack(held.entry) == "acked"


def test_an_ack_that_does_not_get_through_is_made_good_before_the_next_fetch(
    server: TrajectoryServer, tmp_path: Path
) -> None:
    with run_of(server, tmp_path) as run:
        run.register(1, 2)
        held = run.batches.fetch()
        run.batches.trained(held.entry, 1)
        server.stop()
        assert run.batches.ack(held.entry) == "owed"
        with pytest.raises(AtroposConnectionError):
            run.batches.fetch(max_wait_time=0.1)
        port = int(server.url.rpartition(":")[2])
        with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api"), port=port):
            assert number_of(run.batches.fetch()) == 2
        assert run.batches.outcomes == {"acked": 1}


def test_an_api_that_forgot_everything_leaves_the_journal_as_the_only_copy(tmp_path: Path) -> None:
    with TrajectoryServer() as api, run_of(api, tmp_path) as run:
        run.register(1)
        run.batches.fetch()
        store_of(api).reset()
        with run_of(api, tmp_path) as resumed:
            assert [number_of(held) for held in resumed.batches.resume(0)] == [1]
            assert resumed.batches.outcomes == {"forgotten": 1}


def test_what_is_not_trained_is_given_back(server: TrajectoryServer, tmp_path: Path) -> None:
    with run_of(server, tmp_path) as run:
        run.register(1, 2)
        held = run.batches.fetch()
        run.batches.release(held.entry)
        assert BatchJournal(tmp_path / "run" / "journal").pending(0) == []
        assert rest_of(run) == [1, 2]


def test_an_upstream_api_knows_no_leases_and_the_journal_keeps_its_batches(tmp_path: Path) -> None:
    bodies = random_batches(2, groups=2, group_size=4)
    with scripted_api(bodies, batch_size=8, max_token_len=64) as api:
        with run_of(api, tmp_path) as run:
            run.register()
            assert run.client.features == frozenset()
            held = run.batches.fetch()
            assert held.entry.lease_id is None
            run.batches.trained(held.entry, 1)
            assert run.batches.ack(held.entry) == "none"
            second = run.batches.fetch()
            run.batches.release(second.entry)  # cannot be: it exists nowhere else
        with run_of(api, tmp_path) as resumed:
            assert [held.body for held in resumed.batches.resume(1)] == [second.body]
            with pytest.raises(AtroposTimeoutError):
                resumed.batches.fetch(max_wait_time=0.1)


@pytest.mark.parametrize("acked", [False, True])
def test_a_batch_that_is_damaged_at_a_resume_comes_again_or_is_named_as_lost(
    server: TrajectoryServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, acked: bool
) -> None:
    with run_of(server, tmp_path) as run:
        run.register(1, 2, 3)
        first, second = run.batches.fetch(), run.batches.fetch()
        if acked:
            run.batches.trained(first.entry, 1)
            assert run.batches.ack(first.entry) == "acked"
    first.entry.path.write_bytes(first.body.replace(b"7", b"8", 1))
    with run_of(server, tmp_path) as run:
        assert [held.body for held in run.batches.resume(0)] == [second.body]
        fate = "it is lost" if acked else "the API hands it out again"
        assert f"{first.entry.path} is not what was written: its checksum differs. " in caplog.text
        assert (
            f"{fate}. What is left is {tmp_path / 'run' / 'journal' / 'damaged' / 'batch_000001.json'}" in caplog.text
        )
        run.register()
        assert rest_of(run) == ([3] if acked else [1, 3])
