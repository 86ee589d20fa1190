"""Atomic files, and the record store: what survives, what is refused, and what is said of it."""

import errno
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.serving import eventually, exit_code_in_a_child

from atropos_verl.errors import StorageDamagedError, StorageWriteError
from atropos_verl.storage import RecordStore, network_file_system, write_atomic

TABLES = {"bodies": int, "notes": str}


DATABASES = ("store.sqlite", "store-copy.sqlite")


def opened(directory: Path, fsync: bool = False) -> RecordStore:
    return RecordStore(directory / "store.sqlite", TABLES, owner="test", fsync=fsync, large="bodies")


def rows(store: RecordStore) -> dict[object, bytes]:
    return {key: value for table in TABLES for key, value in store.read(table)}


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new", durable=durable, private=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "file", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "kind"), [("/home", None), ("/mnt/my share/run", "nfs4"), ("/mnt/my share/local/run", None)]
)
def test_a_network_file_system_is_known_by_its_mount(
    monkeypatch: pytest.MonkeyPatch, path: str, kind: str | None
) -> None:
    mounts = [("/", "ext4"), ("/mnt/my share", "nfs4"), ("/mnt/my share/local", "xfs")]
    found = [SimpleNamespace(mountpoint=point, fstype=fstype) for point, fstype in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    assert network_file_system(Path(path)) == kind


@pytest.mark.parametrize("fsync", [False, True])
def test_what_is_written_is_there_after_a_restart_in_the_order_of_keys(tmp_path: Path, fsync: bool) -> None:
    store = opened(tmp_path, fsync)
    writes = [store.write([("bodies", number, b"%d" % number), ("notes", "last", b"%d" % number)]) for number in (3, 1)]
    writes.append(store.write([("bodies", 2, b"2"), ("bodies", 3, None)]))
    wait(writes)
    store.close()
    store.close()
    store = opened(tmp_path, fsync)
    assert list(store.read("bodies")) == [(1, b"1"), (2, b"2")]
    assert (store.get("notes", "last"), store.get("notes", "none")) == (b"1", None)
    assert store.size > 0
    store.close()
    with pytest.raises(StorageWriteError, match="is closed"):
        store.write([("bodies", 4, b"4")]).result()


def body(number: int) -> bytes:
    return b"body %d" % number * 1000


def killed(directory: Path, commits: int = 6) -> Path:
    """What a process leaves that wrote bodies 0 to ``commits`` - 1, one a commit, and was killed."""
    store = opened(directory / "live")
    for number in range(commits):
        store.write([("bodies", number, body(number)), ("notes", "last", b"%d" % number)]).result()
    shutil.copytree(directory / "live", directory / "killed")
    store.close()
    return directory / "killed"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("what", ["a bit of the WAL", "half the WAL", "a bit", "half", "nothing left", "gone"])
def test_damage_to_one_database_is_named_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, database: str, what: str
) -> None:
    """One bit of a WAL makes SQLite drop all commits from there on, and it says nothing."""
    directory = killed(tmp_path)
    if "WAL" not in what:
        opened(directory).close()  # which moves the WAL into the database
    path = directory / (f"{database}-wal" if "WAL" in what else database)
    size = path.stat().st_size
    if "bit" in what:
        flip(path, size // 2 if "WAL" in what else path.read_bytes().rindex(b"last"))
    elif what == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if what == "nothing left" else size // 2)
    before = path.read_bytes() if path.exists() and path.stat().st_size else None
    store = opened(directory)
    assert rows(store) == {**{number: body(number) for number in range(6)}, "last": b"5"}
    assert (store.damaged, store.lost_rows) == ([], False)
    store.close()
    [message] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert message.startswith(f"{directory / database} ") and "made anew" in message
    assert before is None or before in [kept.read_bytes() for kept in (directory / "damaged").iterdir()]
    caplog.clear()
    opened(directory).close()
    assert not caplog.records


@pytest.mark.parametrize("cut", [None, 20_000, 0])
def test_a_damaged_large_value_costs_itself_and_what_is_left_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int | None
) -> None:
    directory = killed(tmp_path)
    path = directory / "store.bodies"
    if cut is None:
        flip(path, len(body(0)) + 3)
    else:
        os.truncate(path, cut)
    lost = [1] if cut is None else [number for number in range(6) if (number + 1) * len(body(0)) > cut]
    store = opened(directory)
    assert [key for key, _ in store.read("bodies")] == [number for number in range(6) if number not in lost]
    assert store.damaged == [("bodies", number) for number in lost]
    assert all(store.get("bodies", number) is None for number in lost)
    for number in lost:
        assert f"row {number} of table bodies is damaged" in caplog.text
        assert len((directory / "damaged" / f"bodies-{number}.1").read_bytes()) <= len(body(number))
    caplog.clear()
    assert len(list(store.read("bodies"))) == 6 - len(lost) and not caplog.records
    store.write([("bodies", number, body(number)) for number in lost]).result()
    assert len(list(store.read("bodies"))) == 6
    store.close()


def test_of_two_damaged_databases_all_that_can_be_read_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = killed(tmp_path)
    opened(directory).close()
    for database in DATABASES:
        with sqlite3.connect(directory / database) as db:
            db.execute("UPDATE notes SET value = ?", (database.encode(),))
    with sqlite3.connect(directory / DATABASES[0]) as db:
        db.execute("DELETE FROM bodies WHERE key = 3")
    store = opened(directory)
    assert rows(store) == {number: body(number) for number in range(6)}
    assert store.lost_rows
    assert "store.sqlite and its copy are both damaged: 6 of 7 rows can be read" in caplog.text
    store.close()
    assert all((directory / "damaged" / f"{database}.1").exists() for database in DATABASES)
    caplog.clear()
    (directory / DATABASES[1]).unlink()  # it is made of the other one
    for _ in range(2):
        store = opened(directory)  # who has not seen to it at the first opening still can
        assert store.lost_rows and "are both damaged" not in caplog.text
        store.close()


def test_a_place_that_two_rows_name_is_given_to_no_third(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in range(3):
        store.write([("bodies", number, body(number)), ("notes", "last", b"1")]).result()
    store.close()
    before = (tmp_path / DATABASES[1]).read_bytes()
    store = opened(tmp_path)
    store.write([("bodies", 1, None)]).result()
    store.write([("bodies", 7, body(7))]).result()
    store.close()
    (tmp_path / DATABASES[1]).write_bytes(before)
    for database in DATABASES:
        with sqlite3.connect(tmp_path / database) as db:
            db.execute("UPDATE notes SET value = x'00'")
    store = opened(tmp_path)  # of both what can be read: row 1 is back, and its place is that of row 7
    assert [key for key, _ in store.read("bodies")] == [0, 2, 7]
    store.write([("bodies", 1, None)]).result()
    store.write([("bodies", 8, body(8))]).result()
    assert (store.get("bodies", 7), store.get("bodies", 8)) == (body(7), body(8))
    store.close()


def test_newer_rows_of_a_damaged_copy_are_kept_beside_an_older_database(tmp_path: Path) -> None:
    directory = killed(tmp_path)
    os.truncate(directory / "store.sqlite-wal", (directory / "store.sqlite-wal").stat().st_size // 2)
    with sqlite3.connect(directory / "store-copy.sqlite") as db:
        db.execute("UPDATE bodies SET value = x'00' WHERE key = 1")
    store = opened(directory)
    assert rows(store) == {**{number: body(number) for number in range(6)}, "last": b"5"}
    assert store.lost_rows
    store.close()


def test_values_whose_databases_are_gone_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = killed(tmp_path)
    before = (directory / "store.bodies").read_bytes()
    for path in directory.glob("*sqlite*"):
        path.unlink()
    store = opened(directory)
    assert rows(store) == {}
    store.close()
    assert "store.sqlite and its copy are gone" in caplog.text
    assert (directory / "damaged" / "store.bodies.1").read_bytes() == before


def test_a_copy_that_a_dying_process_left_one_commit_behind_is_brought_up_to_date(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = killed(tmp_path, 4)
    copy = tmp_path / "later"
    shutil.copytree(directory, copy)
    store = opened(copy)
    store.write([("notes", "last", b"later")]).result()
    for suffix in ("", "-wal"):
        shutil.copy(copy / f"store.sqlite{suffix}", directory / f"store.sqlite{suffix}")
    store.close()
    store = opened(directory)
    assert store.get("notes", "last") == b"later"
    store.close()
    assert not caplog.records and not (directory / "damaged").exists()
    with sqlite3.connect(directory / DATABASES[1]) as db:
        assert db.execute("SELECT value FROM notes").fetchall() == [(b"later",)]


def test_a_foreign_or_later_file_is_refused_by_name_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"somebody's own file, which is long enough to have a header " * 40)
    before = path.read_bytes()
    with pytest.raises(StorageDamagedError, match=r"store\.sqlite is damaged, or is not a database of this test"):
        opened(tmp_path)
    assert path.read_bytes() == before
    path.unlink()
    opened(tmp_path).close()
    for database in DATABASES:
        with sqlite3.connect(tmp_path / database) as db:
            db.execute("PRAGMA user_version = 7")
    before = path.read_bytes()
    with pytest.raises(StorageDamagedError, match=r"is of version 7; this program reads 2; go on with the program"):
        opened(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("most", [100, 3], ids=["catches up", "is given up until a restart"])
def test_a_copy_that_cannot_be_written_lags_behind_and(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("atropos_verl.storage._MOST_NOT_COPIED", most)
    store = opened(tmp_path)
    with sqlite3.connect(tmp_path / DATABASES[1]) as other:
        store._copy.execute("PRAGMA busy_timeout = 0")
        other.execute("BEGIN IMMEDIATE")  # another program holds it
        for note in "abc":
            store.write([("notes", note, b"1")]).result()
    assert caplog.text.count("lags behind") == 1
    assert caplog.text.count("is not kept any more") == (most == 3) == (store._not_copied is None)
    store.write([("notes", "a", None)]).result()
    if most == 3:
        store.close()
        store = opened(tmp_path)
    with sqlite3.connect(tmp_path / DATABASES[1]) as other:
        assert other.execute("SELECT key, value FROM notes").fetchall() == [("b", b"1"), ("c", b"1")]
    store.close()


def test_room_of_values_that_are_gone_is_used_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
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
            store.close()
            store = opened(tmp_path)
    assert (tmp_path / "store.bodies").stat().st_size < 100_000
    store.close()


def test_a_directory_that_is_in_use_or_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(StorageDamagedError, match=rf"is in use by test, pid {os.getpid()} on "):
        opened(tmp_path)
    store.close()
    with pytest.raises(StorageWriteError, match="cannot use data directory"):
        opened(tmp_path / "store.sqlite")


class Refusing:
    """A connection whose calls of ``what`` fail as SQLite's do."""

    def __init__(self, database: Any, what: str, code: int) -> None:
        self.database, self.what, self.code = database, what, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self.database, name)

    def execute(self, sql: str, *arguments: Any) -> Any:
        if self.what in sql:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self.code
            raise error
        return self.database.execute(sql, *arguments)


@pytest.mark.parametrize("what", ["COMMIT", "wal_checkpoint"])
@pytest.mark.parametrize("which", ["_db", "_copy"])
def test_no_write_is_confirmed_after_sqlite_could_not_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, which: str
) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 0)  # after each commit
    store = opened(tmp_path)
    store.write([("notes", "a", b"1")]).result()
    database = getattr(store, which)
    setattr(store, which, Refusing(database, what, sqlite3.SQLITE_IOERR_FSYNC))
    first = store.write([("notes", "b", b"2")]).exception()
    store.recover()
    setattr(store, which, database)
    assert (first is None) is (what == "wal_checkpoint")
    assert "until then nothing is stored" in str(store.write([("notes", "c", b"3")]).exception())
    assert "c" not in rows(store)
    store.close()
    store = opened(tmp_path)
    assert store.write([("notes", "c", b"3")]).exception() is None
    store.close()


def test_a_large_value_that_the_disk_cannot_read_is_named_and_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    store.write([("bodies", number, body(number)) for number in range(3)]).result()
    pread = os.pread

    def bad_sector(handle: int, length: int, offset: int) -> bytes:
        if offset == len(body(0)):
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, length, offset)

    monkeypatch.setattr(os, "pread", bad_sector)
    assert [key for key, _ in store.read("bodies")] == [0, 2]
    assert "cannot be read at byte 6000: Input/output error" in caplog.text and store.damaged == [("bodies", 1)]
    store.close()


def test_a_network_disk_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("atropos_verl.storage.network_file_system", lambda path: "nfs4")
    directory = killed(tmp_path)
    flip(directory / "store.sqlite-wal", 30_000)
    store = opened(directory)
    assert len(rows(store)) == 7
    store.close()
    assert "is on a network file system (nfs4)" in caplog.text and "local disk" in caplog.text
    assert "store.sqlite ends at change" in caplog.text


def test_a_full_disk_refuses_the_write_and_all_after_it_until_recovery(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk."""
    assert exit_code_in_a_child(lambda: _fill_up(tmp_path)) == 0
    store = opened(tmp_path)
    assert rows(store) == {1: b"1", 4: b"4", "note": b"kept"}
    store.close()


def _fill_up(directory: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = opened(directory)
    store.write([("bodies", 1, b"1"), ("notes", "note", b"kept")]).result()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    refused = [store.write([("bodies", 2, b"2" * 2**21), ("notes", "note", None)]), store.write([("bodies", 3, b"3")])]
    for future in refused:
        if "free some space" not in str(future.exception()):
            return 2
    store.recover()
    store.write([("bodies", 4, b"4")]).result()
    store.close()
    return 0


def test_a_change_that_cannot_be_stored_leaves_those_before(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([("bodies", 1, b"1")]).result()
    assert "no such table" in str(store.write([("nowhere", 1, b"1")]).exception())
    store.recover()
    assert rows(store) == {1: b"1"}
    store.close()


@pytest.mark.parametrize("failing", ["_commit", "_move_wals"])
def test_a_writer_that_fails_as_none_should_refuses_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 0)
    store = opened(tmp_path)
    monkeypatch.setattr(store, failing, fail)
    first = store.write([("bodies", 1, b"1")])
    assert isinstance(first.exception(20.0), StorageWriteError if failing == "_commit" else type(None))
    eventually(lambda: store._sync_failure is not None, "the failure to be noted")
    refused = store.write([("bodies", 2, b"2")]).exception(20.0)
    assert isinstance(refused, StorageWriteError) and "its writer failed (MemoryError('no room'))" in str(refused)
    store.close()


def test_the_wal_is_moved_into_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 100_000)
    store = opened(tmp_path)
    for number in range(60):
        store.write([("bodies", number, b"x" * 50_000), ("bodies", number - 1, None)]).result()
    assert store.size < 1_000_000
    assert [key for key, _ in store.read("bodies")] == [59]
    store.close()


def test_the_wal_of_processes_that_were_killed_is_moved_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may end before it has written enough."""
    directory = killed(tmp_path, 40)
    wal, sizes = directory / "store.sqlite-wal", list[int]()
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", wal.stat().st_size)
    store = opened(directory)
    for number in range(4):
        store.write([("notes", "last", b"%d" % number)]).result()
        sizes.append(wal.stat().st_size)
    assert max(sizes[1:]) <= sizes[0]  # the second one begins it anew
    store.close()


def test_a_store_that_was_emptied_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atropos_verl.storage._FREE_BYTES", 1000)
    store = opened(tmp_path)
    store.write([("bodies", number, b"x" * 100_000) for number in range(40)]).result()
    assert (tmp_path / "store.bodies").stat().st_size == 4_000_000
    store.write([("bodies", number, None) for number in range(1, 40)]).result()
    eventually(lambda: (tmp_path / "store.bodies").stat().st_size == 100_000, "the file is short again")
    assert [key for key, _ in store.read("bodies")] == [0]
    store.close()


def test_rows_are_fetched_at_any_time(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "a.sqlite", {"t": int}, owner="test")
    for key in range(5):
        store.write([("t", key, b"%d" % key)])
    assert store.fetch("t", 1, 3).result() == [(key, b"%d" % key) for key in (1, 2, 3)]
    store.write([("t", 2, None)])
    assert [key for key, _ in store.fetch("t", 0, 9).result()] == [0, 1, 3, 4]
    store.close()
    with pytest.raises(StorageWriteError, match="is closed"):
        store.fetch("t", 0, 9).result()
