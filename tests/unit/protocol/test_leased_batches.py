"""A run that is killed anywhere trains every batch once.

A killed process is one whose lease keeper stopped and whose objects are made anew from the run directory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
from support.scripted_api import random_batches, scripted_api
from support.serving import eventually
from support.trajectory_server import Clock, TrajectoryServer, group_bytes, registration

from atropos_verl.errors import AtroposConnectionError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.server.settings import ServerSettings

LEASE = 60.0
"""Seconds on the server's clock, which the tests move on."""


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.time = time.time()
    return clock


@pytest.fixture
def server(tmp_path: Path, clock: Clock) -> Iterator[TrajectoryServer]:
    with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api")) as running:
        running.app.store.now = clock
        yield running


Runs = Callable[..., AbstractContextManager[LeasedBatches]]


@pytest.fixture
def process(server: TrajectoryServer, tmp_path: Path) -> Runs:
    """Makes what a trainer's process has."""

    @contextmanager
    def made(name: str = "run", lease: float = LEASE) -> Iterator[LeasedBatches]:
        options: dict[str, Any] = {"timeout": 5.0, "retry_delay": 0.01, "max_wait_time": 5.0}
        with (
            AtroposClient(server.url, lease_seconds=lease, **options) as client,
            closing(LeasedBatches(client, BatchJournal(tmp_path / name))) as run,
        ):
            yield run

    return made


def register(run: LeasedBatches, *groups: int) -> None:
    """And groups with these numbers are posted, as by environments."""
    run.client.register(TrainerRegistration(**registration(4)))
    run.client.post_scored_data_list([group_bytes(number) for number in groups])


def number_of(held: HeldBatch) -> int:
    [group] = decode_batch(held.body)
    return int(group.token_ids[0][0])


def train(run: LeasedBatches, held: HeldBatch, step: int) -> str:
    run.trained(held.entry, step)
    return run.ack(held.entry)


def rest_of(run: LeasedBatches) -> list[int]:
    """The numbers of what the API still has, in order."""
    numbers = []
    while (held := run.poll()) is not None:
        numbers.append(number_of(held))
        assert train(run, held, 99) == "acked"
    return numbers


@pytest.mark.parametrize("outlive", [False, True], ids=["lease runs", "lease ended"])
@pytest.mark.parametrize("point", ["unjournalled", "journalled", "stepped", "acked", "covered"])
def test_killed_anywhere_every_batch_is_trained_once(
    process: Runs, server: TrajectoryServer, clock: Clock, point: str, outlive: bool
) -> None:
    """Batch 1 is trained and covered by a checkpoint (step 1); the process dies somewhere around batch 2."""
    with process() as first:
        register(first, 1, 2, 3)
        assert train(first, first.fetch(), 1) == "acked"
        first.journal.discard_through(1)
        if point == "unjournalled":
            assert first.client.poll_batch() is not None
        else:
            held = first.fetch()
            if point != "journalled":
                first.trained(held.entry, 2)
            if point == "acked":
                assert [first.ack(held.entry) for _ in range(2)] == ["acked", "already"]
    with process() as second:
        if outlive and point != "acked":
            clock.pass_(LEASE + 1)  # batch 2 is back at the API, before batch 3
            assert second.client.status().queue_size == 2
        replayed = second.resume(2 if point == "covered" else 1)
        register(second)
        trained = [number_of(held) for held in replayed]
        assert all(train(second, held, 2) == "already" for held in replayed)
        if point == "unjournalled" and not outlive:
            clock.pass_(LEASE + 1)
        trained += rest_of(second)
        assert trained == ([3] if point == "covered" else [2, 3])
        second.journal.discard_through(99)
        assert list(first.journal.directory.iterdir()) == []
    assert server.app.store.totals["acks"] == 3


def test_a_batch_that_another_trainer_got_is_dropped_on_resume(process: Runs, clock: Clock) -> None:
    with process("dead") as dead:
        register(dead, 1)
        dead.fetch()
    with process("other") as other:
        clock.pass_(LEASE + 1)
        held = other.fetch()
        with process("dead") as resumed:
            assert [resumed.resume(0) for _ in range(2)] == [[], []]
            assert resumed.outcomes == {"lost": 1}
        assert other.ack(held.entry) == "acked"


def test_a_trained_batch_that_comes_again_is_acked_and_not_taken(process: Runs, clock: Clock) -> None:
    """A process that was suspended for longer than its lease holds two batches, and asks for a third."""
    with process() as run:
        register(run, 1, 2)
        first, second = run.fetch(), run.fetch()
        run.close()  # nobody renews
        run.trained(first.entry, 1)
        clock.pass_(LEASE + 1)
        run.client.post_scored_data_list([group_bytes(3)])
        assert number_of(run.fetch()) == 3
        assert train(run, second, 2) == "acked", "under its new lease"
        assert rest_of(run) == []


def test_a_lease_is_renewed_while_its_holder_lives(
    process: Runs, server: TrajectoryServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a renewal that failed as none should: it must not end the thread."""
    short = 0.3
    with process(lease=short) as run:
        register(run, 1)
        renew = Mock(wraps=run.client.renew, side_effect=chain([MemoryError()], repeat(DEFAULT)))
        monkeypatch.setattr(run.client, "renew", renew)
        held = run.fetch()
        eventually(lambda: renew.called, "the first renewal")
        for _ in range(4):  # in all more than twice the lease
            clock.pass_(0.2)
            [batch] = server.app.store.outstanding.values()
            eventually(lambda: batch.deadline == clock.time + short, "the lease to be renewed")  # noqa: B023
        assert run.client.status().queue_size == 0
        assert run.ack(held.entry) == "acked"


def test_an_ack_that_does_not_get_through_is_made_good(process: Runs, server: TrajectoryServer, tmp_path: Path) -> None:
    with process() as run:
        register(run, 1, 2)
        held = run.fetch()
        server.stop()
        assert train(run, held, 1) == "owed"
        with pytest.raises(AtroposConnectionError):
            run.fetch(max_wait_time=0.1)
        port = int(server.url.rpartition(":")[2])
        with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api"), port=port):
            assert number_of(run.fetch()) == 2
        assert run.outcomes == {"acked": 1}


def test_an_api_that_forgot_everything_leaves_the_journal_as_the_only_copy(process: Runs) -> None:
    with process() as run:
        register(run, 1)
        run.fetch()
        run.client.reset_data()
    with process() as resumed:
        assert [number_of(held) for held in resumed.resume(0)] == [1]
        assert resumed.outcomes == {"forgotten": 1}


def test_what_is_not_trained_is_given_back(process: Runs) -> None:
    with process() as run:
        register(run, 1, 2)
        run.release(run.fetch().entry)
        assert run.journal.pending(0) == []
        assert rest_of(run) == [1, 2]


def test_a_batch_without_a_lease_stays_in_the_journal(tmp_path: Path) -> None:
    bodies = random_batches(1, groups=1, group_size=4)
    with scripted_api(bodies, batch_size=4, max_token_len=64) as api, AtroposClient(api.url, lease_seconds=9) as client:
        run = LeasedBatches(client, BatchJournal(tmp_path))
        assert run.poll() is None
        held = run.fetch()
        run.release(held.entry)  # cannot be: it exists nowhere else
        assert [again.body for again in run.resume(0)] == bodies
        assert train(run, held, 1) == "none"


@pytest.mark.parametrize("acked", [False, True])
def test_a_damaged_batch_comes_again_or_is_lost(process: Runs, caplog: pytest.LogCaptureFixture, acked: bool) -> None:
    with process() as run:
        register(run, 1, 2, 3)
        first, second = run.fetch(), run.fetch()
        assert not acked or train(run, first, 1) == "acked"
    first.entry.path.write_bytes(first.body.replace(b"7", b"8", 1))
    with process() as run:
        assert [held.body for held in run.resume(0)] == [second.body]
        fate, left = "it is lost" if acked else "the API hands it out again", "damaged/batch_000001.json"
        assert f"{first.entry.path} is not what was written: its checksum differs. " in caplog.text
        assert f"{fate}. What is left is {run.journal.directory / left}" in caplog.text
        register(run)
        assert rest_of(run) == ([3] if acked else [1, 3])
