"""Files that survive the process: atomic writes, and ``RecordStore``, a small transactional store on SQLite.

A ``RecordStore`` is one database in WAL mode; each table holds ``key``, ``value`` and the XXH3 ``checksum`` of the
value. One thread writes. It commits all changes that wait at once, so callers share a transaction and, with ``fsync``,
a wait for the disk. What holds after a crash, a power cut, a full disk or damage: docs/internals.md.
"""

import contextlib
import fcntl
import logging
import os
import queue
import secrets
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeAlias

import psutil
import xxhash

from atropos_verl.errors import StorageDamagedError, StorageInUseError, StorageWriteError

logger = logging.getLogger(__name__)

Key: TypeAlias = int | str
Change: TypeAlias = tuple[str, Key, bytes | None]
"""Table, key, and the new value. None deletes the row."""
_Job: TypeAlias = tuple[Sequence[Change] | None, Future[None]]
"""Changes to store (None: accept changes again), and what is told when that is done."""

_VERSION: Final = 1
_PAGE_BYTES: Final = 32 * 2**10
"""Measured with a group of 544 KB and four small rows: 0.25 ms to store, p90 1.2 ms. Pages of 4 KiB: 0.40, p90 5.5."""
_CHECKPOINT_BYTES: Final = 64 * 2**20
_IDLE_CHECKPOINT_BYTES: Final = 8 * 2**20
_IDLE_SECONDS: Final = 0.25
_FREE_PAGES: Final = 1024
"""Pages that the database may hold unused. More are given back when there is nothing else to do."""
_NETWORK_TYPES: Final = (
    "9p afs beegfs ceph cifs fuse.ceph fuse.glusterfs fuse.sshfs glusterfs gpfs lustre nfs nfs4 smb3 smbfs"
)


def write_atomic(path: Path, data: bytes | str, *, private: bool = False, durable: bool = False) -> None:
    """Replace ``path`` with ``data``: a reader sees the old file or the new one, also when the process dies half-way.

    Args:
        private: only the owner can read the file (mode 0600).
        durable: return after the file is on the disk.

    Raises ``OSError`` when the disk is full, or the directory is missing or not writable. The old file stays.
    """
    # A rename is atomic only within one file system. Hence no tempfile, which may be on another one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_to_disk(path.parent)  # the new name
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write or sync names no file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_to_disk(*paths: Path) -> None:
    """Wait until each file's content, and each directory's list of names, is on the disk. Raises ``OSError``."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Holds the lock file ``path`` while the block runs, or this process lives. Its content names ``holder``.

    Raises ``StorageInUseError``, with who holds it, and ``OSError``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            raise StorageInUseError(f"{path.parent} is in use by {other}; end it, or choose another one") from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{holder}, pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that holds ``path``, or None on a local disk."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    holder = next((parent for parent in (path.resolve() / "_").parents if parent in mounts), None)
    return mounts[holder] if holder is not None and mounts[holder] in _NETWORK_TYPES.split() else None


class RecordStore:
    """Key-value tables in one SQLite file. One process at a time. ``write`` may be called from any thread.

    Args:
        path: the database. Its directory is made when it is missing.
        tables: name → type of the key, ``int`` or ``str``.
        owner: who uses the store, for messages.
        fsync: a write is done when it is on the disk. Otherwise it survives the process, but not a power failure.

    Raises:
        StorageError: another process uses the directory, the file is no store of this version, or it cannot be made.
    """

    def __init__(self, path: Path, tables: Mapping[str, type[int] | type[str]], *, owner: str, fsync: bool = False):
        self.path = path
        self.damaged: list[tuple[str, Key]] = []
        """Rows that ``read`` has moved aside: table and key."""
        self._owner = owner
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        """None: the store is closed."""
        self._failure: StorageWriteError | None = None
        self._unmoved_bytes = 0
        self._closed = False
        self._lock = self._take_lock()
        try:
            self._db = self._open(tables, fsync)
        except BaseException:
            os.close(self._lock)
            raise
        self._thread = threading.Thread(target=self._run, name=f"{owner} storage", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def read(self, table: str) -> Iterator[tuple[Key, bytes]]:
        """Rows in the order of their keys. Read only before the first write, or after ``recover``.

        A row whose value does not match its checksum is logged, moved to the table ``damaged``, and not returned.

        Raises:
            StorageDamagedError: the database itself cannot be read.
        """
        bad: list[Key] = []
        try:
            for key, value, checksum in self._db.execute(f"SELECT key, value, checksum FROM {table} ORDER BY key"):
                if isinstance(value, bytes) and _checksum(value) == checksum:
                    yield key, value
                else:
                    bad.append(key)
            for key in bad:
                self.damaged.append((table, key))
                why = "is damaged; it was moved to the table 'damaged'"
                logger.error("%s: row %r of table %s %s", self.path, key, table, why)
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._db.execute(f"INSERT INTO damaged SELECT '{table}', * FROM {table} WHERE key = ?", (key,))
                    self._db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error

    def get(self, table: str, key: Key) -> bytes | None:
        """The value of one row, without a check. The rule of ``read`` holds."""
        row = self._db.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def write(self, changes: Sequence[Change]) -> Future[None]:
        """Store all ``changes`` or none. The future is done when they are stored; changes are stored in call order.

        The future raises ``StorageWriteError`` when the disk refuses, or when an earlier write was refused since the
        last ``recover``.
        """
        return self._submit(changes)

    def recover(self) -> None:
        """Wait for the writes so far, then accept writes again after one was refused."""
        self._submit(None).result()

    def close(self) -> None:
        """Finish the writes that wait, and let go of the directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        self._db.close()
        os.close(self._lock)

    # --- opening -----------------------------------------------------------------------------------------------------

    def _take_lock(self) -> int:
        directory = self.path.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageWriteError(f"cannot use data directory {directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 200).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise StorageInUseError(
                f"data directory {directory} is in use by another process ({holder}); end it, or choose another one"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{self._owner}, pid {os.getpid()}\n".encode(), 0)
        return lock

    def _open(self, tables: Mapping[str, type[int] | type[str]], fsync: bool) -> sqlite3.Connection:
        network = network_file_system(self.path.parent)
        wal = self.path.with_name(f"{self.path.name}-wal")
        last_commit = _last_commit(wal)
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            # Autocommit: transactions begin and end where this class says so.
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageWriteError(f"cannot open {self.path}: {error}") from error
        try:
            if not self.path.stat().st_size:
                db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            if network is not None:
                # WAL needs shared memory unless one process holds the file alone.
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
                text = (
                    "the death of this process loses nothing, but the death of this machine or of the network may "
                    "damage the file, and a second machine may not see the lock. Move the directory to a local disk"
                )
                logger.warning("%s is on a network file system (%s): %s", self.path, network, text)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            db.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_BYTES}")
            frames = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
            if last_commit > frames:
                kept = Path(shutil.copyfile(wal, f"{wal}.damaged"))
                lost = f"the changes up to frame {last_commit} are lost; {kept} is a copy of it"
                logger.error("%s is damaged after frame %d: %s", wal, frames, lost)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise StorageDamagedError(f"{self.path} is of version {version}; this program reads {_VERSION}")
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA user_version = {_VERSION}")
                for name, kind in tables.items():
                    key, rest = ("INTEGER", "") if kind is int else ("TEXT", " WITHOUT ROWID")
                    columns = f"key {key} PRIMARY KEY, value BLOB NOT NULL, checksum INTEGER NOT NULL"
                    db.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns}){rest}")
                db.execute("CREATE TABLE IF NOT EXISTS damaged (source TEXT, key, value BLOB, checksum INTEGER)")
        except BaseException as error:
            db.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise self._write_error(error) if _is_full(error) else self._unreadable(error) from error
            raise
        return db

    def _unreadable(self, error: sqlite3.Error) -> StorageDamagedError:
        return StorageDamagedError(
            f"{self.path} is damaged, or is not a database of this {self._owner} ({error}); restore it from a backup, "
            f"try 'sqlite3 {self.path.name} .recover', or move it away to start anew"
        )

    # --- the writer thread -------------------------------------------------------------------------------------------

    def _submit(self, changes: Sequence[Change] | None) -> Future[None]:
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a caller that is cancelled does not undo a write
        if self._closed:
            done.set_exception(StorageWriteError(f"{self.path} is closed"))
        else:
            self._jobs.put((changes, done))
        return done

    def _run(self) -> None:
        closing = False
        while not closing:
            group: list[_Job] = []
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=_IDLE_SECONDS)
                while job is not None:
                    group.append(job)
                    job = self._jobs.get_nowait()
                closing = True
            self._process(group)
            if self._unmoved_bytes > (_CHECKPOINT_BYTES if group else _IDLE_CHECKPOINT_BYTES):
                self._move_wal(shrink=not group)

    def _process(self, group: list[_Job]) -> None:
        together = [change for changes, _ in group for change in changes or ()]
        stored = self._failure is None and (not together or self._commit(together) is None)
        for changes, done in group:  # one by one, where that failed: those before the one that fails are stored
            if changes is None:
                self._failure = None
            elif not stored and self._failure is None:
                self._failure = self._commit(changes)
            if self._failure is None:
                done.set_result(None)
            else:
                done.set_exception(self._failure)

    def _commit(self, changes: Sequence[Change]) -> StorageWriteError | None:
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for table, key, value in changes:
                    if value is None:
                        self._db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
                    else:
                        self._db.execute(f"REPLACE INTO {table} VALUES (?, ?, ?)", (key, value, _checksum(value)))
                    self._unmoved_bytes += len(value or b"") + _PAGE_BYTES
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the futures carry it to the callers
            return self._write_error(error)
        return None

    def _write_error(self, error: Exception) -> StorageWriteError:
        advice = f"; free some space in {self.path.parent}" if _is_full(error) else ""
        return StorageWriteError(f"cannot write {self.path}: {error}{advice}")

    def _move_wal(self, *, shrink: bool) -> None:
        """Copy the WAL into the database, so that the next write begins the WAL anew."""
        self._unmoved_bytes = 0
        try:
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            if shrink and self._db.execute("PRAGMA freelist_count").fetchone()[0] > _FREE_PAGES:
                self._db.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES})")
                self._unmoved_bytes = _IDLE_CHECKPOINT_BYTES + 1  # again at the next occasion
        except sqlite3.Error as error:
            logger.warning("%s: its WAL is not shortened: %s", self.path, error)


def _last_commit(wal: Path) -> int:
    """The last frame of a WAL that ends a transaction and has another frame behind it, or 0. (One that has none may be
    a torn write.) See "WAL File Format" at sqlite.org: header of 32 bytes, frames of 24 bytes and a page."""
    last = commit = number = 0
    with contextlib.suppress(FileNotFoundError), wal.open("rb") as file:
        header = file.read(32)
        page_bytes, salts = int.from_bytes(header[8:12]), header[16:24]
        while len(frame := file.read(24)) == 24:
            number += 1
            if frame[8:16] == salts:  # others are left from before the WAL began anew
                last = commit
                commit = number if any(frame[4:8]) else commit
            file.seek(page_bytes, os.SEEK_CUR)
    return last


def _checksum(value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(value) >> 1  # SQLite's integers are signed


def _is_full(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
