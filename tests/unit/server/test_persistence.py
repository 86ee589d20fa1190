"""A restart finds the same state after any sequence of commands; torn writes, damage and full disks."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from support.trajectory_server import Clock, join, post, registration, take

from atropos_verl.errors import ConfigError, StorageDamagedError, StorageWriteError
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import _TABLES, ARRIVALS_FILE, STORE_FILE, RequestError, Store
from atropos_verl.storage import RecordStore

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
DATABASES = (STORE_FILE, "store-copy.sqlite")
STEP = int(os.environ.get("ATROPOS_DAMAGE_DRILL", "0"))
"""1: the drill of damage tries every byte of a small store, not 25 of each file; 10: every tenth."""


def opened(directory: Path, clock: Clock | None = None) -> Store:
    return Store(ServerSettings(data_dir=directory), now=clock or Clock())


def started(directory: Path, batch_size: int = 8, clock: Clock | None = None, **fields: Any) -> Store:
    """With environment 0, which it has heard of."""
    store = opened(directory, clock)
    store.register(TrainerRegistration(**registration(batch_size, **fields)))
    assert store.next_batch(60.0) is None
    join(store)
    return store


def restarted(store: Store) -> Store:
    store.close()
    return Store(store.settings, now=store.now)


KEPT = "next_seq step started registration totals groups outstanding returned leases keys held_bytes held_tokens"


def content(store: Store) -> dict[str, Any]:
    """Everything that must survive, bodies and queue included."""
    found = deepcopy({name: getattr(store, name) for name in KEPT.split()})
    found["environments"] = [msgspec.structs.replace(environment, heard_at=0.0) for environment in store.environments]
    # Older ones are forgotten when somebody looks.
    found["recent"] = {key for key, at in store.recent.items() if at > store.now() - store.settings.dedupe_window}
    found["queue"] = deepcopy((store.queue.classes, store.queue.groups, store.queue.sequences, store.queue.in_classes))
    return found


def one_thing(store: Store, rng: random.Random, clock: Clock, leases: list[str], number: int) -> None:
    """A random command; what it refuses is part of the game."""
    clock.pass_(rng.random() * 3)
    match rng.randrange(12):
        case 0 | 1 | 2 | 3 | 4:
            env_id = rng.choice([None, *range(len(store.environments))])
            post(store, number, rng.randint(1, 6), env_id, rng.choice([None, f"key{number}"]))
        case 5 | 6:
            batch = store.next_batch(rng.choice([2.0, 20.0]))
            if batch is not None:
                leases.append(batch.lease_id)
        case 7 | 8 if leases:
            with contextlib.suppress(RequestError):
                store.ack(rng.choice(leases))
        case 9 if leases:
            store.settle(rng.choice(leases), "test")
        case 10:
            if store.started and len(store.environments) < 3:
                join(store)
            elif store.environments:
                store.disconnect_env(rng.randrange(len(store.environments)))
        case 11 if rng.random() < 0.2:
            if rng.random() < 0.1:
                store.reset()
            store.register(TrainerRegistration(**registration(rng.choice([6, 8]), starting_step=rng.randrange(5))))


@pytest.mark.parametrize("seed", range(6))
def test_a_restart_at_any_moment_finds_the_same_state(tmp_path: Path, seed: int) -> None:
    rng, clock, leases, number = random.Random(seed), Clock(), list[str](), 0
    store = started(tmp_path, 8, clock)
    for _ in range(15):
        for _ in range(rng.randint(1, 25)):
            number += 1
            one_thing(store, rng, clock, leases, number)
        before = content(store)
        store = restarted(store)
        assert content(store) == before
    store.close()
    with sqlite3.connect(tmp_path / STORE_FILE) as db:  # what was acked is gone
        for table in ("groups", "bodies"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (len(store.groups),)


def test_a_response_that_was_under_way_comes_back_after_a_restart(tmp_path: Path) -> None:
    store = started(tmp_path)
    post(store, 0), post(store, 1), post(store, 2), post(store, 3)
    unleased, leased = take(store, None), take(store)
    store = restarted(store)
    again = take(store)
    assert (again.seqs, again.step, again.deliveries) == (unleased.seqs, 1, 2)
    assert store.ack(leased.lease_id) == "acked"
    store.close()


def test_a_damaged_group_is_named_and_the_others_go_on(tmp_path: Path, caplog: Log) -> None:
    store = started(tmp_path, 4)
    post(store, 0, 2, env_id=0), post(store, 1, 2, env_id=0), post(store, 2, 4, env_id=0)
    partly, store_path = take(store, 1e6), tmp_path / "store.bodies"
    store.close()
    for lost in (0, 1):
        with store_path.open("r+b") as file:
            file.seek(store_path.read_bytes().index(b'{"tokens": [[%d,' % lost))
            file.write(b"!")
        store = opened(tmp_path)
        assert f"row {lost} of table bodies is damaged" in caplog.text and f"group {lost} is lost" in caplog.text
        assert sorted(store.groups) == [*range(lost + 1, 3)]
        assert store.held_bytes == sum(len(group.raw) for group in store.groups.values())
        if lost == 0:
            assert store.outstanding[partly.lease_id].seqs == [1]
        else:  # nothing of it is left
            assert not store.outstanding and not store.returned
            with pytest.raises(RequestError, match="no lease"):
                store.ack(partly.lease_id)
        store.close()
        caplog.clear()
    store = opened(tmp_path)
    assert "damaged" not in caplog.text
    assert [post(store, number, size, env_id=0)["duplicates"] for number, size in ((0, 2), (2, 4))] == [0, 1]
    store.close()


@pytest.mark.parametrize("state", ["killed", "closed"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
@pytest.mark.timeout(7200)
def test_no_damage_is_silent(memory: Path, monkeypatch: Patch, caplog: Log, state: str, damage: str) -> None:
    """Of what a killed process leaves, or an orderly end: a batch was acked, one is out, a group waits. Two changes are
    in the WALs alone."""
    monkeypatch.setattr("atropos_verl.storage._PAGE_BYTES", 512)
    store = started(memory / "closed", 2, clock := Clock())
    post(store, 0, 2, 0, "key0"), post(store, 1, 2, None, "key1")
    store.ack(take(store).lease_id)
    store = restarted(store)
    post(store, 2, 2, 0, "key2")
    asyncio.run(store.synced())  # a commit of its own
    take(store)
    asyncio.run(store.synced())
    shutil.copytree(memory / "closed", memory / "killed")
    expected = content(store)
    store.close()
    rng, work = random.Random(f"{state} {damage}"), memory / "work"
    files = {path.name: path.read_bytes() for path in sorted((memory / state).iterdir())}
    for name, whole in files.items():
        size, every = len(whole), STEP and not name.endswith("-shm")
        for position in range(0, size, STEP) if every else sorted(rng.sample(range(size), min(25, size))):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << rng.randrange(8)
            shutil.copytree(memory / state, work)
            (work / name).write_bytes(flipped if damage == "flip" else whole[:position])
            caplog.clear()
            store = opened(work, clock)
            found = content(store)
            store.close()
            where = f"{name}, {damage} at {position} of {size}"
            if name != "store.bodies":
                assert found == expected, where
            else:
                lost = set(expected["groups"]) - set(found["groups"])
                assert all(f"group {seq} is lost" in caplog.text for seq in lost), where
                assert len(lost) <= 1 or damage == "truncate", where
                assert {seq: group for seq, group in expected["groups"].items() if seq not in lost} == found["groups"]
                assert found["environments"] == expected["environments"]
            shutil.rmtree(work)


@pytest.mark.parametrize("table", ["state", "environments"])
def test_damage_that_nothing_makes_up_for_refuses_the_start_again_and_again(tmp_path: Path, table: str) -> None:
    store = started(tmp_path)
    join(store)
    post(store, 0)
    store.close()
    for database in DATABASES:
        with sqlite3.connect(tmp_path / database) as db:
            db.execute(f"UPDATE {table} SET value = '{{}}' WHERE key = (SELECT min(key) FROM {table})")
    for _ in range(2):
        with pytest.raises(StorageDamagedError, match="lacks rows without which it cannot be used"):
            opened(tmp_path)


def test_data_of_another_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    opened(tmp_path).close()
    records = RecordStore(tmp_path / STORE_FILE, _TABLES, owner="test", large="bodies")
    records.write([("batches", "lease", b'["later version"]')]).result()
    records.close()
    with pytest.raises(StorageDamagedError, match="holds a row that this version cannot read"):
        opened(tmp_path)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "segment-000001.log").write_bytes(b"ATRLOG1\n")
    with pytest.raises(ConfigError, match=r"is of version 0\.1\.0 \(segment-\*\.log\)"):
        opened(earlier)
    assert [path.name for path in earlier.iterdir()] == ["segment-000001.log"]


def test_each_batch_is_one_line_with_the_times_of_its_groups_also_across_a_restart(tmp_path: Path) -> None:
    store = started(tmp_path, 8, clock := Clock())
    assert not (tmp_path / ARRIVALS_FILE).exists()  # nothing was handed out
    for number, env_id in enumerate([0, None, 0, 0]):
        clock.pass_(0.25)
        post(store, number, env_id=env_id)
    clock.pass_(1.0)
    store.release(take(store).lease_id)
    assert take(store).deliveries == 2  # the same batch again: it came only once
    store = restarted(store)
    clock.pass_(1.0)
    take(store)
    store.close()
    lines = [json.loads(line) for line in (tmp_path / ARRIVALS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 1, "at": 1_000_002.0, "groups": [[1_000_000.25, 0, 4, 12], [1_000_000.5, None, 4, 12]]},
        {"step": 2, "at": 1_000_003.0, "groups": [[1_000_000.75, 0, 4, 12], [1_000_001.0, 0, 4, 12]]},
    ]


def test_arrivals_that_cannot_be_written_stop_no_batch(tmp_path: Path, caplog: Log) -> None:
    (tmp_path / ARRIVALS_FILE).mkdir()
    store = started(tmp_path, 4)
    post(store, 0), post(store, 1)
    take(store), take(store)
    store.close()
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message.count(ARRIVALS_FILE) for message in warned] == [1]


@contextlib.contextmanager
def full_disk() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(RecordStore, "_commit", lambda self, changes: StorageWriteError("no space"))
        yield disk


async def test_a_refused_ack_has_not_happened_and_can_be_repeated(tmp_path: Path) -> None:
    store = started(tmp_path, 8, clock := Clock())
    post(store, 0, env_id=0), post(store, 1, env_id=0), post(store, 2, env_id=0)
    batch = take(store)
    await store.synced()
    before = content(store)
    with full_disk():
        assert store.ack(batch.lease_id) == "acked"
        post(store, 3)
        # Two that wait for the same write are both told.
        told = await asyncio.gather(store.synced(), store.synced(), return_exceptions=True)
        assert [str(error) for error in told] == ["no space"] * 2
    with pytest.raises(StorageWriteError, match="no space"):
        post(store, 3)  # refused without a try
    assert content(store) == before and store.groups[0].raw.startswith(b'{"tokens": [[0,')
    assert [environment.heard_at for environment in store.environments] == [store.now()]
    assert store.ack(batch.lease_id) == "acked"
    clock.pass_(2.0)
    post(store, 4)
    await store.synced()
    store = restarted(store)
    assert sorted(store.groups) == [2, 3]
    store.close()


async def test_what_cannot_be_read_again_is_kept_by_refusing_everything_until_a_restart(tmp_path: Path) -> None:
    store = started(tmp_path, clock=(clock := Clock()))
    post(store, 0, env_id=0)
    await store.synced()
    before = content(store)

    with full_disk() as disk:
        disk.setattr(RecordStore, "read", Mock(side_effect=sqlite3.OperationalError("disk I/O error")))
        post(store, 1, env_id=0)
        with pytest.raises(StorageWriteError, match="no space"):
            await store.synced()
    for number in (2, 3):
        clock.pass_(2.0)
        post(store, number, env_id=0)
        with pytest.raises(StorageWriteError, match=r"cannot be read again \(disk I/O error\): restart the server"):
            await store.synced()
    store = restarted(store)
    assert all(content(store)[name] == before[name] for name in ("groups", "environments"))
    store.close()


async def test_a_delivery_that_a_full_disk_undoes_is_settled_later(tmp_path: Path) -> None:
    """Nobody asks again: the client has gone."""
    store = started(tmp_path, 4)
    post(store, 0), post(store, 1)
    arrived, lost = take(store, None), take(store, None)
    await store.synced()
    with full_disk():
        for _ in range(2):
            store.settle(arrived.lease_id), store.settle(lost.lease_id, "the client has gone")
            with pytest.raises(StorageWriteError):
                await store.synced()
            assert set(store.outstanding) == {arrived.lease_id, lost.lease_id}
    store.expire()
    await store.synced()
    assert (list(store.groups), [batch.lease_id for batch in store.returned]) == ([1], [lost.lease_id])
    store.expire()
    assert not store._settled
    store.close()


async def test_a_disk_that_does_not_confirm_stops_the_store(tmp_path: Path, monkeypatch: Patch) -> None:
    store = Store(ServerSettings(data_dir=tmp_path, fsync=True), now=(clock := Clock()))
    store.register(TrainerRegistration(**registration(4)))
    post(store, 0)
    await store.synced()
    before, posted = content(store), threading.Event()

    def no_disk(handle: int) -> None:
        posted.wait()
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fdatasync", no_disk)
        loads, load = [], store._load
        disk.setattr(store, "_load", lambda *words: (loads.append(1), load(*words)))
        waiting = []
        for number in range(1, 6):
            post(store, number)
            waiting.append(asyncio.ensure_future(store.synced()))
            await asyncio.sleep(0)
        posted.set()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, StorageWriteError) and "the disk did not confirm a write" in str(error)
        assert len(loads) == 1  # memory was read from the file once
    for attempt in (lambda: post(store, 2), lambda: store.next_batch(60.0), lambda: store.next_batch(None)):
        clock.pass_(2.0)
        attempt()
        with pytest.raises(StorageWriteError, match="until then nothing is stored"):
            await store.synced()
        assert content(store) == before
    store = restarted(store)
    assert 0 in store.groups and 2 not in store.groups
    store.close()


def test_setting_the_clock_moves_no_lease_and_nobodys_last_sign_of_life(monkeypatch: Patch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    store = Store(ServerSettings())
    assert store.now() == 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: 5.0)
    monkeypatch.setattr(time, "monotonic", lambda: 80.0)
    assert store.now() == 1_000_030.0


def test_after_a_restart_with_the_clock_set_back_a_lease_lasts_no_longer_than_it_did(tmp_path: Path) -> None:
    store = started(tmp_path, 4, clock := Clock())
    post(store, 0, env_id=0), post(store, 1, 3, env_id=0)
    batch = take(store, 30.0)
    clock.pass_(-3600.0)
    store = restarted(store)
    assert store.outstanding[batch.lease_id].deadline == clock.time + 30.0
    assert store.groups[1].arrived == store.queue.last_arrival == clock.time
    clock.pass_(31.0)
    store.expire()
    assert [back.lease_id for back in store.returned] == [batch.lease_id]
    clock.pass_(store.settings.dedupe_window - 30.0)
    assert post(store, 0, env_id=0) == {"duplicates": 0}
    store.close()
