"""Atomic files, and the record store: what survives, what is refused, and what is said of it."""

import logging
import os
import resource
import shutil
import signal
import sqlite3
import stat
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support.serving import eventually, exit_code_in_a_child

from atropos_verl.errors import StorageDamagedError, StorageWriteError
from atropos_verl.storage import RecordStore, network_file_system, write_atomic

TABLES = {"bodies": int, "notes": str}


def opened(directory: Path, fsync: bool = False) -> RecordStore:
    return RecordStore(directory / "store.sqlite", TABLES, owner="test", fsync=fsync)


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


def test_a_torn_write_is_gone_and_what_came_before_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "live").mkdir()
    store = opened(tmp_path / "live")
    store.write([("bodies", 1, b"whole")]).result()
    store.write([("bodies", 2, b"torn"), ("notes", "torn", b"x")]).result()
    shutil.copytree(tmp_path / "live", tmp_path / "copy")  # as a process that died leaves it
    store.close()
    wal = tmp_path / "copy" / "store.sqlite-wal"
    os.truncate(wal, wal.stat().st_size - 7)
    store = opened(tmp_path / "copy")
    assert rows(store) == {1: b"whole"}
    store.close()
    assert not caplog.records


def test_a_damaged_wal_is_named_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "live").mkdir()
    store = opened(tmp_path / "live")
    for number in range(4):
        store.write([("bodies", number, b"body %d" % number * 10_000)]).result()
    shutil.copytree(tmp_path / "live", tmp_path / "copy")
    store.close()
    wal = tmp_path / "copy" / "store.sqlite-wal"
    data = bytearray(wal.read_bytes())
    data[data.index(b"body 2") + 103] ^= 1
    wal.write_bytes(data)
    store = opened(tmp_path / "copy")
    assert [key for key, _ in store.read("bodies")] == [0, 1]
    store.close()
    assert "store.sqlite-wal is damaged after frame" in caplog.text
    assert wal.with_name(f"{wal.name}.damaged").read_bytes() == bytes(data)


def test_a_damaged_row_is_named_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(tmp_path)
    store.write([("bodies", number, b"body %d" % number * 20_000) for number in (1, 2, 3)]).result()
    store.close()
    path = tmp_path / "store.sqlite"
    data = bytearray(path.read_bytes())
    data[data.index(b"body 2") + 103] ^= 1
    path.write_bytes(data)
    store = opened(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert [key for key, _ in store.read("bodies")] == [1, 3]
    assert store.damaged == [("bodies", 2)]
    assert "row 2 of table bodies is damaged" in caplog.text
    assert len(list(store.read("bodies"))) == 2 and len(caplog.records) == 1
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT source, key, length(value) FROM damaged").fetchall() == [("bodies", 2, 120_000)]


def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"somebody's own file, which is long enough to have a header " * 40)
    before = path.read_bytes()
    with pytest.raises(StorageDamagedError, match=r"store\.sqlite is damaged, or is not a database of this test"):
        opened(tmp_path)
    assert path.read_bytes() == before
    path.unlink()
    store = opened(tmp_path)
    store.write([("bodies", number, b"x" * 50_000) for number in range(20)]).result()
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(2 * 32_768, len(data), 32_768):
        data[page : page + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(StorageDamagedError, match="restore it from a backup"):
        store = opened(tmp_path)
        rows(store)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    store.close()
    with pytest.raises(StorageDamagedError, match="is of version 7"):
        opened(tmp_path)


def test_a_second_process_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(StorageDamagedError, match=rf"in use by another process \(test, pid {os.getpid()}\)"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageWriteError, match="cannot use data directory"):
        opened(tmp_path / "file")


def test_a_network_disk_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("atropos_verl.storage.network_file_system", lambda path: "nfs4")
    store = opened(tmp_path)
    store.write([("bodies", 1, b"1")]).result()
    store.close()
    assert "is on a network file system (nfs4)" in caplog.text and "local disk" in caplog.text


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


def test_a_change_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first, bad = store.write([("bodies", 1, b"1")]), store.write([("nowhere", 1, b"1")])
    assert first.exception() is None and "no such table" in str(bad.exception())
    store.recover()
    assert rows(store) == {1: b"1"}
    store.close()


def test_the_wal_is_moved_into_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atropos_verl.storage._CHECKPOINT_BYTES", 200_000)
    store = opened(tmp_path)
    for number in range(60):
        store.write([("bodies", number, b"x" * 50_000), ("bodies", number - 1, None)]).result()
    assert store.size < 2_000_000
    assert [key for key, _ in store.read("bodies")] == [59]
    store.close()


def test_a_store_that_was_emptied_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_FREE_PAGES", 4), ("_IDLE_SECONDS", 0.001), ("_IDLE_CHECKPOINT_BYTES", 0)):
        monkeypatch.setattr(f"atropos_verl.storage.{name}", value)
    store = opened(tmp_path)
    store.write([("bodies", number, b"x" * 100_000) for number in range(40)]).result()
    eventually(lambda: (tmp_path / "store.sqlite").stat().st_size > 4_000_000, "the WAL is moved")
    store.write([("bodies", number, None) for number in range(39)]).result()
    eventually(lambda: (tmp_path / "store.sqlite").stat().st_size < 500_000, "the database is short again")
    assert [key for key, _ in store.read("bodies")] == [39]
    store.close()
