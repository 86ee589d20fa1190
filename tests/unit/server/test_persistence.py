"""What a restart finds: the same state after any sequence of events, through rotations, torn writes and full disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.trajectory_server import Clock, group_bytes, registration

from atropos_verl.protocol.schema import check_group
from atropos_verl.protocol.wire_model import EnvRegistration, Registration
from atropos_verl.segment_log import LogDamagedError, LogWriteError, SegmentLog
from atropos_verl.server import ServerSettings
from atropos_verl.server.batches import ConflictError, UnknownLeaseError
from atropos_verl.server.store import Store


def opened(directory: Path, clock: Clock | None = None, **settings: Any) -> Store:
    return Store(ServerSettings(data_dir=directory, **settings), now=clock or Clock())


def post(store: Store, number: int, size: int = 4, env_id: int | None = None, key: str | None = None) -> None:
    checked = check_group(group_bytes(number, size, env_id), environments=len(store.state.environments))
    store.accept([checked], lambda _: b"{}", key, checked.digest)


def content(store: Store) -> dict[str, Any]:
    """Everything that must survive, bodies and queue included."""
    state = store.state
    saved = msgspec.to_builtins(state.snapshot())
    for environment in saved["environments"]:
        environment.pop("heard_at")
    # Older ones are forgotten when somebody looks.
    saved["recent"] = [entry for entry in saved["recent"] if entry[2] > store.now() - store.settings.dedupe_window]
    return {
        **saved,
        "bodies": {seq: group.raw for seq, group in state.groups.items()},
        "classes": {str(key): [group.seq for group in members] for key, members in state.queue.classes.items()},
        "waiting": (state.queue.groups, state.queue.sequences, state.queue.waiting_sequences()),
        "held": (state.held_bytes, state.held_tokens),
        "deadlines": {lease: batch.deadline for lease, batch in state.outstanding.items()},
    }


def one_thing(store: Store, rng: random.Random, clock: Clock, leases: list[str], number: int) -> None:
    """A random command; what it refuses is part of the game."""
    state = store.state
    clock.pass_(rng.random() * 3)
    match rng.randrange(12):
        case 0 | 1 | 2 | 3 | 4:
            env_id = rng.choice([None, *range(len(state.environments))])
            post(store, number, rng.randint(1, 6), env_id, rng.choice([None, f"key{number}"]))
        case 5 | 6:
            batch = store.batches.next_batch(rng.choice([2.0, 20.0]))
            if batch is not None:
                leases.append(batch.lease_id)
        case 7 | 8 if leases:
            with contextlib.suppress(ConflictError, UnknownLeaseError):
                store.batches.ack(rng.choice(leases))
        case 9 if leases:
            store.batches.take_back(rng.choice(leases), "test")
        case 10:
            if state.started and len(state.environments) < 3:
                store.register_env(EnvRegistration(max_token_length=64, group_size=4))
            elif state.environments:
                store.disconnect_env(rng.randrange(len(state.environments)))
        case 11 if rng.random() < 0.2:
            store.register(Registration(**registration(rng.choice([6, 8]), starting_step=rng.randrange(5))))


@pytest.mark.parametrize("seed", range(12))
def test_a_restart_at_any_moment_finds_the_same_state(tmp_path: Path, seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    leases: list[str] = []
    store = opened(tmp_path, clock, segment_bytes=4000)
    store.register(Registration(**registration(8)))
    number = 0
    for _ in range(15):
        for _ in range(rng.randint(1, 25)):
            number += 1
            one_thing(store, rng, clock, leases, number)
        before = content(store)
        store.persistence.close()
        store = opened(tmp_path, clock, segment_bytes=4000)
        assert content(store) == before
    store.persistence.close()


def test_a_response_that_was_under_way_comes_back_after_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.register(Registration(**registration(8)))
    post(store, 0), post(store, 1), post(store, 2), post(store, 3)
    unleased, leased = store.batches.next_batch(None), store.batches.next_batch(60.0)
    assert unleased is not None and leased is not None
    store.persistence.close()
    store = opened(tmp_path)
    again = store.batches.next_batch(60.0)
    assert again is not None
    assert (again.seqs, again.step, again.deliveries) == (unleased.seqs, 1, 2)
    assert store.batches.ack(leased.lease_id) == "acked"
    store.persistence.close()


def test_what_was_acked_leaves_the_disk(tmp_path: Path) -> None:
    store = opened(tmp_path, segment_bytes=20_000)
    store.register(Registration(**registration(8)))
    for number in range(400):
        post(store, number)
        batch = store.batches.next_batch(60.0)
        if batch is not None:
            store.batches.ack(batch.lease_id)
    files = sorted(path.name for path in tmp_path.glob("segment-*.log"))
    assert len(files) == 1
    assert store.persistence.log_bytes < 50_000
    store.persistence.close()


def test_a_group_that_waits_for_long_does_not_keep_old_files(tmp_path: Path) -> None:
    store = opened(tmp_path, segment_bytes=20_000)
    store.register(Registration(**registration(8, batch_fill="exact")))
    post(store, 9999, 3)  # never fits
    for number in range(400):
        post(store, number)
        batch = store.batches.next_batch(60.0)
        if batch is not None:
            store.batches.ack(batch.lease_id)
    assert len(list(tmp_path.glob("segment-*.log"))) <= 2
    store.persistence.close()
    store = opened(tmp_path)
    assert [group.size for group in store.state.groups.values()] == [3]
    assert store.state.groups[0].raw.startswith(b'{"tokens": [[9999,')
    store.persistence.close()


@pytest.mark.parametrize("cut", [1, 5, 8, 40])
def test_a_torn_write_is_cut_off(tmp_path: Path, cut: int) -> None:
    store = opened(tmp_path)
    store.register(Registration(**registration(8)))
    post(store, 0)
    before = content(store)
    post(store, 1)
    store.persistence.close()
    last = max(tmp_path.glob("segment-*.log"))
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - cut)
    store = opened(tmp_path)
    assert content(store) == before
    post(store, 2)
    assert sorted(store.state.groups) == [0, 1]
    store.persistence.close()
    store = opened(tmp_path)
    assert sorted(store.state.groups) == [0, 1]
    store.persistence.close()


def test_damage_in_the_middle_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.register(Registration(**registration(8)))
    post(store, 0), post(store, 1)
    store.persistence.close()
    last = max(tmp_path.glob("segment-*.log"))
    data = bytearray(last.read_bytes())
    data[data.index(b'{"tokens": [[0,') + 3] ^= 1
    last.write_bytes(data)
    with pytest.raises(LogDamagedError, match=r"segment-\d+\.log is damaged at byte \d+ of \d+; restore it"):
        opened(tmp_path)


def test_two_servers_cannot_share_a_directory(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(LogDamagedError, match="is in use by another process"):
        opened(tmp_path)
    store.persistence.close()
    opened(tmp_path).persistence.close()


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "segment-000001.log").write_bytes(b"somebody's own log file\n")
    with pytest.raises(LogDamagedError, match="is not a log of this server; move it away"):
        opened(tmp_path)
    assert (tmp_path / "segment-000001.log").read_bytes() == b"somebody's own log file\n"


def test_a_full_disk_refuses_the_group_and_keeps_the_rest(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: a write stops in the middle, and the next one fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _fill_up(tmp_path)
        finally:
            os._exit(code)
    _, result = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(result) == 0
    store = opened(tmp_path)
    assert len(store.state.groups) == store.state.next_seq > 3
    store.persistence.close()


def _fill_up(directory: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    store = opened(directory)
    store.register(Registration(**registration(8)))
    for number in range(100):
        count = len(store.state.groups)
        try:
            post(store, number)
        except LogWriteError as error:
            return 0 if "free some space" in str(error) and len(store.state.groups) == count else 2
    return 3


async def test_with_fsync_waiting_callers_share_a_sync(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, fsync=True)
    list(log.read())
    log.rotate(b"snapshot")
    for number in range(20):
        log.append(b"record %d" % number)
    await asyncio.gather(*(log.sync() for _ in range(20)))
    log.append(b"last")
    await log.sync()
    log.close()
    log = SegmentLog(tmp_path)
    assert [bytes(payload) for _, payload in log.read()] == [
        b"snapshot",
        *(b"record %d" % number for number in range(20)),
        b"last",
    ]
    log.close()
