"""Atomic files, locks, and the record store: what survives, what is refused, and what is said of it."""

import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from support.serving import eventually, exit_code_in_a_child

from atropos_verl.errors import StorageDamagedError, StorageInUseError, StorageWriteError
from atropos_verl.storage import RecordStore, locked, write_atomic

Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
Open = Callable[..., RecordStore]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new", durable=True, private=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_names_its_file_and_changes_none(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "file", b"x")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))  # names none
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/file'"):
        write_atomic(tmp_path / "file", b"content", durable=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with locked(path, "somebody"):
        said = f"{path.parent} is in use by somebody, pid {os.getpid()} on {socket.gethostname()}; end it, or choose"
        with pytest.raises(StorageInUseError, match=re.escape(said)), locked(path, "me"):
            pytest.fail("it was free")
    assert path.read_text() == ""
    with locked(path, "me"):
        assert path.read_text().startswith("me, pid ")


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: Patch, caplog: Log) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with locked(tmp_path / "lock", "me"):
        assert "lock cannot be locked (No locks available): nothing keeps a second process out" in caplog.text


TABLES = {"bodies": int, "notes": str}
DATABASES = ("store.sqlite", "store-copy.sqlite")


def a_store(directory: Path, fsync: bool = False) -> RecordStore:
    return RecordStore(directory / "store.sqlite", TABLES, owner="test", fsync=fsync, large="bodies")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the store of a directory, again after the one before was closed."""
    stores: dict[Path, RecordStore] = {}

    def open_again(directory: Path = tmp_path, fsync: bool = False) -> RecordStore:
        if directory in stores:
            stores[directory].close()
        stores[directory] = a_store(directory, fsync)
        return stores[directory]

    yield open_again
    for store in stores.values():
        store.close()


def body(number: int) -> bytes:
    return b"body %d" % number * 1000


BODIES = {number: body(number) for number in range(6)}


@pytest.fixture
def killed(opened: Open, tmp_path: Path) -> Path:
    """What a process leaves that wrote bodies 0 to 5, one a commit, and was killed."""
    store = opened(tmp_path / "live")
    for number, value in BODIES.items():
        store.write([("bodies", number, value), ("notes", "last", b"%d" % number)]).result()
    shutil.copytree(tmp_path / "live", tmp_path / "killed")
    return tmp_path / "killed"


def rows(store: RecordStore) -> dict[object, bytes]:
    return {key: value for table in TABLES for key, value in store.read(table)}


def keys(store: RecordStore) -> list[object]:
    return [key for key, _ in store.read("bodies")]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def execute(path: Path, statement: str, *arguments: object) -> list[Any]:
    with sqlite3.connect(path) as db:
        return db.execute(statement, arguments).fetchall()


@pytest.mark.parametrize("fsync", [False, True])
def test_what_is_written_is_there_after_a_restart(opened: Open, tmp_path: Path, fsync: bool) -> None:
    store = opened(fsync=fsync)
    for number in (3, 1):
        store.write([("bodies", number, b"%d" % number), ("notes", "last", b"%d" % number)])
    store.write([("bodies", 2, b"2"), ("bodies", 3, None), ("notes", "a", b"0")])
    assert store.fetch("notes", "b", "m").result() == [("last", b"1")]
    store = opened(fsync=fsync)
    assert list(store.read("bodies")) == [(1, b"1"), (2, b"2")]
    assert (store.get("notes", "last"), store.get("notes", "none")) == (b"1", None)
    assert store.fetch("notes", "a", "z").result() == [("a", b"0"), ("last", b"1")]
    assert store.size > 0
    store.close()
    for refused in (store.write([("bodies", 4, b"4")]), store.fetch("notes", "a", "z")):
        with pytest.raises(StorageWriteError, match="is closed"):
            refused.result()
    with pytest.raises(StorageWriteError, match="cannot use data directory"):
        a_store(tmp_path / "store.sqlite")


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("what", ["a bit of the WAL", "half the WAL", "a bit", "half", "nothing left", "gone"])
def test_one_damaged_database_costs_nothing(opened: Open, killed: Path, caplog: Log, database: str, what: str) -> None:
    """One bit of a WAL makes SQLite drop all commits from there on, and it says nothing."""
    if "WAL" not in what:
        opened(killed).close()  # which moves the WAL into the database
    path = killed / (f"{database}-wal" if "WAL" in what else database)
    size = path.stat().st_size
    if "bit" in what:
        flip(path, size // 2 if "WAL" in what else path.read_bytes().rindex(b"last"))
    elif what == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if what == "nothing left" else size // 2)
    before = path.read_bytes() if path.exists() and path.stat().st_size else None
    store = opened(killed)
    assert rows(store) == {**BODIES, "last": b"5"}
    assert (store.damaged, store.lost_rows) == ([], False)
    [message] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert message.startswith(f"{killed / database} ") and "made anew" in message
    assert before is None or before in [kept.read_bytes() for kept in (killed / "damaged").iterdir()]
    caplog.clear()
    opened(killed)
    assert not caplog.records


@pytest.mark.parametrize(
    ("lost", "damage"),
    [
        ([1], lambda path: flip(path, len(body(0)) + 3)),
        ([3, 4, 5], lambda path: os.truncate(path, 20_000)),
        ([0, 1, 2, 3, 4, 5], lambda path: os.truncate(path, 0)),
        ([2], None),  # the disk cannot read it
    ],
)
def test_a_damaged_large_value_costs_itself(
    opened: Open, killed: Path, caplog: Log, monkeypatch: Patch, lost: list[int], damage: Any
) -> None:
    pread, bad = os.pread, 2 * len(body(0))

    def read(handle: int, length: int, offset: int) -> bytes:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, length, offset)

    if damage:
        damage(killed / "store.bodies")
    else:
        monkeypatch.setattr(os, "pread", read)
    store = opened(killed)
    assert keys(store) == [number for number in BODIES if number not in lost]
    assert store.damaged == [("bodies", number) for number in lost]
    assert damage or f"cannot be read at byte {bad}: Input/output error" in caplog.text
    for number in lost:
        assert store.get("bodies", number) is None
        assert f"row {number} of table bodies is damaged" in caplog.text
        assert len((killed / "damaged" / f"bodies-{number}.1").read_bytes()) <= len(body(number))
    caplog.clear()
    assert len(keys(store)) == 6 - len(lost) and "is damaged" not in caplog.text
    monkeypatch.setattr(os, "pread", pread)
    store.write([("bodies", number, body(number)) for number in lost]).result()
    assert len(keys(store)) == 6


def test_of_two_damaged_databases_all_that_can_be_read_is_kept(opened: Open, killed: Path, caplog: Log) -> None:
    opened(killed).close()
    for database in DATABASES:
        execute(killed / database, "UPDATE notes SET value = ?", database.encode())
    execute(killed / DATABASES[0], "DELETE FROM bodies WHERE key = 3")
    store = opened(killed)
    assert rows(store) == BODIES
    assert store.lost_rows
    assert "store.sqlite and its copy are both damaged: 6 of 7 rows can be read" in caplog.text
    assert all((killed / "damaged" / f"{database}.1").exists() for database in DATABASES)
    store.close()
    caplog.clear()
    (killed / DATABASES[1]).unlink()  # it is made of the other one
    for _ in range(2):  # who has not seen to it at the first opening still can
        assert opened(killed).lost_rows and "are both damaged" not in caplog.text


def test_a_place_that_two_rows_name_is_given_to_no_third(opened: Open, tmp_path: Path) -> None:
    store = opened()
    for number in range(3):
        store.write([("bodies", number, body(number)), ("notes", "last", b"1")])
    store.close()
    before = (tmp_path / DATABASES[1]).read_bytes()
    store = opened()
    store.write([("bodies", 1, None)]).result()
    store.write([("bodies", 7, body(7))])
    store.close()
    (tmp_path / DATABASES[1]).write_bytes(before)
    for database in DATABASES:
        execute(tmp_path / database, "UPDATE notes SET value = x'00'")
    store = opened()  # of both what can be read: row 1 is back, and its place is that of row 7
    assert keys(store) == [0, 2, 7]
    store.write([("bodies", 1, None)]).result()
    store.write([("bodies", 8, body(8))]).result()
    assert (store.get("bodies", 7), store.get("bodies", 8)) == (body(7), body(8))


def test_newer_rows_of_a_damaged_copy_are_kept_beside_an_older_database(opened: Open, killed: Path) -> None:
    os.truncate(killed / "store.sqlite-wal", (killed / "store.sqlite-wal").stat().st_size // 2)
    execute(killed / DATABASES[1], "UPDATE bodies SET value = x'00' WHERE key = 1")
    store = opened(killed)
    assert rows(store) == {**BODIES, "last": b"5"}
    assert store.lost_rows


def test_values_whose_databases_are_gone_are_kept(opened: Open, killed: Path, caplog: Log) -> None:
    before = (killed / "store.bodies").read_bytes()
    for path in killed.glob("*sqlite*"):
        path.unlink()
    assert rows(opened(killed)) == {}
    assert "store.sqlite and its copy are gone" in caplog.text
    assert (killed / "damaged" / "store.bodies.1").read_bytes() == before


def test_a_copy_that_lacks_the_last_commit_gets_it(opened: Open, killed: Path, tmp_path: Path, caplog: Log) -> None:
    opened(tmp_path / "live").write([("notes", "last", b"later")]).result()
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / "live" / f"store.sqlite{suffix}", killed / f"store.sqlite{suffix}")
    store = opened(killed)
    assert store.get("notes", "last") == b"later"
    store.close()
    assert not caplog.records and not (killed / "damaged").exists()
    assert execute(killed / DATABASES[1], "SELECT value FROM notes") == [(b"later",)]


def test_a_foreign_or_later_file_is_refused_by_name_and_not_touched(opened: Open, tmp_path: Path) -> None:
    def must_be_refused(message: str) -> None:
        before = (tmp_path / DATABASES[0]).read_bytes()
        with pytest.raises(StorageDamagedError, match=message):
            opened()
        assert (tmp_path / DATABASES[0]).read_bytes() == before

    (tmp_path / DATABASES[0]).write_bytes(b"somebody's own file, which is long enough to have a header " * 40)
    must_be_refused(r"store\.sqlite is damaged, or is not a database of this test")
    (tmp_path / DATABASES[0]).unlink()
    opened().close()
    for database in DATABASES:
        execute(tmp_path / database, "PRAGMA user_version = 7")
    must_be_refused(r"is of version 7; this program reads 2; go on with the program")


@pytest.mark.parametrize("most", [100, 3], ids=["catches up", "is given up until a restart"])
def test_a_copy_that_cannot_be_written(
    opened: Open, tmp_path: Path, caplog: Log, monkeypatch: Patch, most: int
) -> None:
    monkeypatch.setattr("atropos_verl.storage._MOST_NOT_COPIED", most)
    store = opened()
    with sqlite3.connect(tmp_path / DATABASES[1]) as other:
        store._copy.execute("PRAGMA busy_timeout = 0")
        other.execute("BEGIN IMMEDIATE")  # another program holds it
        for note in "abc":
            store.write([("notes", note, b"1")]).result()
    assert caplog.text.count("lags behind") == 1
    assert caplog.text.count("is not kept any more") == (most == 3) == (store._not_copied is None)
    store.write([("notes", "a", None)]).result()
    if most == 3:
        opened()
    assert execute(tmp_path / DATABASES[1], "SELECT key, value FROM notes") == [("b", b"1"), ("c", b"1")]


def test_room_of_values_that_are_gone_is_used_again(opened: Open, tmp_path: Path) -> None:
    store = opened()
    rng = random.Random(3)
    kept: dict[int, bytes] = {}
    for number in range(400):
        gone = rng.sample(sorted(kept), min(len(kept), rng.randrange(3)) if len(kept) < 12 else 3)
        kept[number] = rng.randbytes(rng.randrange(3000))
        store.write([("bodies", number, kept[number]), *(("bodies", key, None) for key in gone)]).result()
        for key in gone:
            del kept[key]
        if number % 100 == 99:
            assert dict(store.read("bodies")) == kept
            store = opened()
    assert (tmp_path / "store.bodies").stat().st_size < 100_000


@pytest.mark.parametrize("what", ["COMMIT", "wal_checkpoint"])
@pytest.mark.parametrize("which", ["_db", "_copy"])
def test_no_write_is_confirmed_after_a_failed_sync(opened: Open, monkeypatch: Patch, what: str, which: str) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 0)  # after each commit
    store = opened()
    store.write([("notes", "a", b"1")]).result()
    database, error = getattr(store, which), sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    def execute_or_fail(sql: str, *arguments: Any) -> Any:
        if what in sql:
            raise error
        return database.execute(sql, *arguments)

    setattr(store, which, Mock(wraps=database, execute=execute_or_fail))
    first = store.write([("notes", "b", b"2")]).exception()
    store.recover()
    setattr(store, which, database)
    assert (first is None) is (what == "wal_checkpoint")
    assert "until then nothing is stored" in str(store.write([("notes", "c", b"3")]).exception())
    assert "c" not in rows(store)
    assert opened().write([("notes", "c", b"3")]).exception() is None


def test_a_network_disk_is_told_of(opened: Open, killed: Path, monkeypatch: Patch, caplog: Log) -> None:
    mounts = {"/": "ext4", str(killed.parent): "nfs4", str(killed.parent / "live"): "xfs"}
    found = [SimpleNamespace(mountpoint=point, fstype=fstype) for point, fstype in mounts.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    opened(killed.parent / "live")
    assert not caplog.records
    flip(killed / "store.sqlite-wal", 30_000)
    assert len(rows(opened(killed))) == 7
    assert "is on a network file system (nfs4)" in caplog.text and "local disk" in caplog.text
    assert "store.sqlite ends at change" in caplog.text


def test_a_full_disk_refuses_the_write_and_all_after_it_until_recovery(opened: Open, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk."""

    def fill_up() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = a_store(tmp_path)
        store.write([("bodies", 1, b"1"), ("notes", "note", b"kept")]).result()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        refused = [store.write([("bodies", 2, b"2" * 2**21), ("notes", "note", None)])]
        refused.append(store.write([("bodies", 3, b"3")]))
        said = [str(future.exception()) for future in refused]
        store.recover()
        store.write([("bodies", 4, b"4")]).result()
        store.close()
        return sum("free some space" in text for text in said)

    assert exit_code_in_a_child(fill_up) == 2
    assert rows(opened()) == {1: b"1", 4: b"4", "note": b"kept"}


@pytest.mark.parametrize("failing", ["_commit", "_move_wals"])
def test_a_writer_that_fails_keeps_nobody_waiting(opened: Open, monkeypatch: Patch, failing: str) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 0)
    store = opened()
    monkeypatch.setattr(store, failing, Mock(side_effect=MemoryError("no room")))
    first = store.write([("bodies", 1, b"1")])
    assert isinstance(first.exception(20.0), StorageWriteError if failing == "_commit" else type(None))
    eventually(lambda: store._sync_failure is not None, "the failure to be noted")
    refused = store.write([("bodies", 2, b"2")]).exception(20.0)
    assert isinstance(refused, StorageWriteError) and "its writer failed (MemoryError('no room'))" in str(refused)


def test_the_wal_is_moved_into_the_database(opened: Open, monkeypatch: Patch) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 100_000)
    store = opened()
    for number in range(60):
        store.write([("bodies", number, b"x" * 50_000), ("bodies", number - 1, None)]).result()
    assert store.size < 1_000_000
    assert keys(store) == [59]


def test_the_wal_of_killed_processes_is_moved(opened: Open, killed: Path, monkeypatch: Patch) -> None:
    """Each of them may end before it has written enough."""
    wal, sizes = killed / "store.sqlite-wal", list[int]()
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", wal.stat().st_size)
    store = opened(killed)
    for number in range(4):
        store.write([("notes", "last", b"%d" % number)]).result()
        sizes.append(wal.stat().st_size)
    assert max(sizes[1:]) <= sizes[0]  # the second one begins it anew


def test_an_emptied_store_gives_its_room_back(opened: Open, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("atropos_verl.storage._FREE_BYTES", 1000)
    store = opened()
    store.write([("bodies", number, b"x" * 100_000) for number in range(40)]).result()
    assert (tmp_path / "store.bodies").stat().st_size == 4_000_000
    store.write([("bodies", number, None) for number in range(1, 40)]).result()
    eventually(lambda: (tmp_path / "store.bodies").stat().st_size == 100_000, "the file is short again")
    assert keys(store) == [0]
