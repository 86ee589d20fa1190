"""Files that survive the process: atomic writes, and ``RecordStore``, a small transactional store on SQLite.

A ``RecordStore`` keeps the same rows in two databases in WAL mode, large values in a file of their own. Each row has
a checksum of its table, key and value, and the row of the table ``mark`` says what a database must hold. One thread
writes: large values, the database, then the copy. It commits all changes that wait at once, so callers share a
transaction and, with ``fsync``, a wait for the disk. What holds after a crash, a power cut, a failed sync, a full disk
or damage: docs/internals.md.
"""

import bisect
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeVar

import psutil
import xxhash

from atropos_verl.errors import StorageDamagedError, StorageInUseError, StorageWriteError

logger = logging.getLogger(__name__)

Key: TypeAlias = int | str
Change: TypeAlias = tuple[str, Key, bytes | None]
"""Table, key, and the new value. None deletes the row."""
_Row: TypeAlias = tuple[str, Key, bytes | None, int]
"""Table, key, value (None: no such row) and checksum."""
_T = TypeVar("_T")

_VERSION: Final = 2
_LOST_ROWS: Final = 0x6C6F7374
"""``application_id`` of a database that was made of what two damaged ones still held."""
_PAGE_BYTES: Final = 4096
_CHECKPOINT_BYTES: Final = 16 * 2**20
_FREE_BYTES: Final = 32 * 2**20
"""Bytes that the end of the file of large values may hold unused. More are given back when nothing waits."""
_MOST_NOT_COPIED: Final = 100_000
"""Rows that wait for a copy that cannot be written, before it is given up."""
_HOLES_TRIED: Final = 500
_NETWORK_TYPES: Final = (
    "9p afs beegfs ceph cifs fuse.ceph fuse.glusterfs fuse.sshfs glusterfs gpfs lustre nfs nfs4 smb3 smbfs"
)
_PLACE: Final = struct.Struct("<QQQ")  # row of a large value: offset, length, checksum
_SYNC_ERRORS: Final = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)
_NO_DAMAGE: Final = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
    # Shared memory:
    sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMLOCK,
    sqlite3.SQLITE_IOERR_SHMMAP,
)  # fmt: skip


def write_atomic(path: Path, data: bytes | str, *, private: bool = False, durable: bool = False) -> None:
    """Replace ``path`` with ``data``: a reader sees the old file or the new one, also when the process dies half-way.
    ``private``: only the owner can read the file (mode 0600); ``durable``: return after it is on the disk. Raises
    ``OSError`` (a full disk, a directory that is missing or not writable); the old file stays."""
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
    """Holds the lock file ``path`` while the block runs, or this process lives. Its content names ``holder``. Raises
    ``StorageInUseError``, with who holds it, and ``OSError``."""
    make_directory(path.parent)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            raise StorageInUseError(f"{path.parent} is in use by {other}; end it, or choose another one") from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing keeps a second process out", path, error.strerror)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{holder}, pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, on the disk when this returns. Raises ``OSError``."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    sync_to_disk(*(one.parent for one in missing))


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that holds ``path``, or None on a local disk."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    holder = next((parent for parent in (path.resolve() / "_").parents if parent in mounts), None)
    return mounts[holder] if holder is not None and mounts[holder] in _NETWORK_TYPES.split() else None


class _Mark(NamedTuple):
    """What a database must hold."""

    number: int = 0  # commits since the store was made
    rows: int = 0
    checksums: int = 0  # XOR of those of all rows


class _Found(NamedTuple):
    """A database as it was found."""

    path: Path
    exists: bool
    mark: _Mark
    damage: str | None  # None: it is whole


class RecordStore:
    """Key-value tables in a directory. One process at a time. ``write`` may be called from any thread.

    Args:
        path: the database. Its directory is made when it is missing.
        tables: name → type of the key, ``int`` or ``str``.
        owner: who uses the store, for messages.
        fsync: a write is done when it is on the disk. Otherwise it survives the process, but not a power failure.
        large: the table whose values are large.

    Raises ``StorageError``: another process uses the directory, or the file is no store of this version."""

    def __init__(
        self,
        path: Path,
        tables: Mapping[str, type[int] | type[str]],
        *,
        owner: str,
        fsync: bool = False,
        large: str | None = None,
    ):
        self.path = path
        self.damaged: list[tuple[str, Key]] = []
        """Large values that ``read`` found damaged: table and key."""
        self.lost_rows = False  # neither database was whole, now or at an earlier opening
        self._paths = (path, path.with_name(f"{path.stem}-copy{path.suffix}"))
        self._tables = tables
        self._owner, self._fsync, self._large = owner, fsync, large
        self._writer = ThreadPoolExecutor(1, f"{owner} storage")
        self._waiting: deque[tuple[Sequence[Change], Future[None]]] = deque()
        """Changes that nobody has begun to store, and what is told when they are."""
        self._failure: StorageWriteError | None = None
        self._sync_failure: str | None = None
        self._not_copied: list[_Row] | None = []
        """Rows of the database that the copy lacks. None: it is given up."""
        self.is_closed = False
        self._closing = threading.Lock()
        self._lock = contextlib.ExitStack()
        try:
            make_directory(path.parent)
            self._lock.enter_context(locked(path.parent / "lock", owner))
        except OSError as error:
            raise StorageWriteError(f"cannot use data directory {path.parent}: {error.strerror}") from error
        self._network = network_file_system(path.parent)
        try:
            self._db, self._copy = self._open_both()
            self._mark = _read_mark(self._db)
            wals = (_beside(path, "-wal") for path in self._paths)  # of processes that were killed
            self._unmoved_bytes = sum(wal.stat().st_size for wal in wals if wal.exists())
            self._bodies = None
            if large is not None:
                places = (_PLACE.unpack(value)[:2] for (value,) in self._db.execute(f"SELECT value FROM {large}"))
                self._bodies = _Bodies(path.with_suffix(".bodies"), places)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise self._write_error(error) from error
            raise

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.stem}*") if file.is_file())

    def read(self, table: str) -> Iterator[tuple[Key, bytes]]:
        """Rows in the order of their keys. Read only before the first write, or after ``recover``. A large value that
        is damaged is logged, copied to ``damaged/``, and not returned; its row stays. Raises ``StorageDamagedError``
        when the disk does not give a row that it gave when the store was opened."""
        try:
            for key, value in self._db.execute(f"SELECT key, value FROM {table} ORDER BY key"):
                body, is_whole = self._whole(table, value)
                if is_whole:
                    yield key, body
                elif (table, key) not in self.damaged:
                    self.damaged.append((table, key))
                    kept = self._aside(f"{table}-{key}")
                    with contextlib.suppress(OSError):  # a full disk
                        kept.write_bytes(body)
                    text = "%s: row %r of table %s is damaged; the %d bytes that are left are in %s"
                    logger.error(text, self.path.with_suffix(".bodies"), key, table, len(body), kept)
        except sqlite3.DatabaseError as error:
            raise self._read_error(error) from error

    def get(self, table: str, key: Key) -> bytes | None:
        """The value of one row; None where there is none, or it is damaged. The rule of ``read`` holds."""
        row = self._db.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
        body, is_whole = (b"", False) if row is None else self._whole(table, row[0])
        return body if is_whole else None

    def _whole(self, table: str, value: bytes) -> tuple[bytes, bool]:
        """What is stored of the value of a row, and whether it is all of it."""
        return (value, True) if self._bodies is None or table != self._large else self._bodies.get(value)

    def write(self, changes: Sequence[Change]) -> Future[None]:
        """Store all ``changes`` or none. The future is done when they are stored; changes are stored in call order. It
        raises ``StorageWriteError`` when the disk refuses, or refused an earlier write since the last ``recover``."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a caller that is cancelled does not undo a write
        with self._closing:
            if self.is_closed:
                done.set_exception(StorageWriteError(f"{self.path} is closed"))
            else:
                self._waiting.append((changes, done))
                self._writer.submit(self._store_waiting)
        return done

    def fetch(self, table: str, first: Key, last: Key) -> Future[list[tuple[Key, bytes]]]:
        """Rows with keys from ``first`` to ``last``, in order, after the writes so far; at any time, from any thread.
        Not for the large table. The future raises ``StorageWriteError`` after ``close``, ``StorageDamagedError``."""

        def rows() -> list[tuple[Key, bytes]]:
            text = f"SELECT key, value FROM {table} WHERE key BETWEEN ? AND ? ORDER BY key"
            try:
                return self._db.execute(text, (first, last)).fetchall()
            except sqlite3.DatabaseError as error:
                raise self._read_error(error) from error

        return self._submit(rows)

    def recover(self) -> None:
        """Wait for the writes so far, then accept writes again after one was refused."""
        self._submit(lambda: setattr(self, "_failure", None)).result()

    def close(self) -> None:
        """Finish the writes that wait, and let go of the directory. Idempotent."""
        with self._closing:
            if self.is_closed:
                return
            self.is_closed = True
        self._writer.shutdown()
        for database in (self._db, self._copy):
            database.close()
        if self._bodies is not None:
            self._bodies.close()
        self._lock.close()

    # --- opening -----------------------------------------------------------------------------------------------------

    def _open_both(self) -> list[sqlite3.Connection]:
        """Raises ``StorageError``, ``OSError`` or ``sqlite3.Error``."""
        if self._network is not None:
            text = "the death of this machine or of the network may damage it; move the directory to a local disk"
            logger.warning("%s is on a network file system (%s): %s", self.path, self._network, text)
        found = [self._examine(path) for path in self._paths]
        newest = max((one for one in found if not one.damage), key=lambda one: one.mark.number, default=None)
        if newest is None or any(one.mark.number > newest.mark.number for one in found):
            is_new = not any(one.exists for one in found)
            rows = [] if is_new else self._salvage(found)
            bodies = self.path.with_suffix(".bodies")
            if is_new and bodies.exists() and bodies.stat().st_size:
                kept = bodies.rename(self._aside(bodies.name))
                logger.error("%s and its copy are gone; the values that they named are in %s", self.path, kept)
            for one in found:
                why = None if is_new else one.damage or "is not complete"
                self._replace(one, why, rows, max(one.mark.number for one in found))
        else:
            with self._read_only(newest.path) as db:
                self.lost_rows = db.execute("PRAGMA application_id").fetchone()[0] == _LOST_ROWS
            for one in found:
                # A process that dies between its two commits leaves a copy that lacks the last one.
                lacks_last = one is found[1] and one.mark.number == newest.mark.number - 1
                ends = None if lacks_last else f"ends at change {one.mark.number} of {newest.mark.number}"
                if one.damage or one.mark != newest.mark:
                    self._replace(one, one.damage or ends, self._rows(newest.path), newest.mark.number)
        databases: list[sqlite3.Connection] = []
        for one, other in (found, found[::-1]):
            try:
                databases.append(self._connect(one.path))
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                # Reading did not show it: a header that forbids writing, say.
                self._replace(one, str(error), self._rows(other.path), self._examine(other.path).mark.number)
                databases.append(self._connect(one.path))
        return databases

    def _examine(self, path: Path) -> _Found:
        """Read a database without changing it. Raises ``sqlite3.Error`` for anything but damage."""
        exists = any(file.exists() and file.stat().st_size for file in (path, _beside(path, "-wal")))
        if not path.exists() or not path.stat().st_size:  # with the WAL alone, SQLite would delete that
            return _Found(path, exists, _Mark(), "is missing or empty")
        mark, rows, checksums = _Mark(), 0, 0
        try:
            with self._read_only(path) as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version != _VERSION:
                    return _Found(path, exists, mark, f"is of version {version}; this program reads {_VERSION}")
                mark = _read_mark(db)
                for table, key, value, checksum in self._rows(path):
                    if value is None or _checksum(table, key, value) != checksum:
                        return _Found(path, exists, mark, f"has a damaged row: {key!r} of table {table}")
                    rows, checksums = rows + 1, checksums ^ checksum
                checked = str(db.execute("PRAGMA quick_check(1)").fetchone()[0]).splitlines()[-1]
        except (sqlite3.DatabaseError, ValueError, TypeError, struct.error) as error:
            if not _is_damage(error):
                raise
            return _Found(path, exists, mark, f"cannot be read ({error})")
        if (rows, checksums) != mark[1:]:
            checked = f"{rows} of {mark.rows} rows"
        return _Found(path, exists, mark, None if checked == "ok" else f"is damaged ({checked})")

    @contextlib.contextmanager
    def _read_only(self, path: Path) -> Iterator[sqlite3.Connection]:
        """A connection that changes neither the database nor its WAL."""
        with contextlib.ExitStack() as stack:
            if self._network is not None:  # a reader needs shared memory beside the file
                here = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
                for suffix in ("", "-wal"):
                    if _beside(path, suffix).exists():
                        shutil.copyfile(_beside(path, suffix), _beside(here, suffix))
                path = here
            uri = f"{path.absolute().as_uri()}?mode=ro"
            yield stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True)))

    def _rows(self, path: Path) -> Iterator[_Row]:
        with self._read_only(path) as db:
            for table in self._tables:
                for key, value, checksum in db.execute(f"SELECT key, value, checksum FROM {table}"):
                    yield table, key, value, checksum

    def _salvage(self, found: Sequence[_Found]) -> Sequence[_Row]:
        """The rows of both databases that can be read; where both have one, that of the newer database."""
        rows: dict[tuple[str, Key], _Row] = {}
        for one in sorted(found, key=lambda one: one.mark.number):
            if one.damage and one.damage.startswith("is of version"):
                text = f"go on with the program that wrote it, or move {self.path.parent} away to start anew"
                raise StorageDamagedError(f"{one.path} {one.damage}; {text}")
            for table in self._tables:
                for order in ("ASC", "DESC"):  # from both ends, up to what is damaged
                    with contextlib.suppress(sqlite3.DatabaseError, OSError), self._read_only(one.path) as db:
                        text = f"SELECT key, value, checksum FROM {table} ORDER BY key {order}"
                        for key, value, checksum in db.execute(text):
                            if isinstance(value, bytes) and _checksum(table, key, value) == checksum:
                                rows[table, key] = (table, key, value, checksum)
        if not rows:
            text = f"is damaged, or is not a database of this {self._owner}"
            why = next(one.damage for one in found if one.exists)
            advice = f"restore {self.path.parent} from a backup, or move it away to start anew"
            raise StorageDamagedError(f"{self.path} {text} ({why}); {advice}")
        self.lost_rows = True
        most = max(one.mark.rows for one in found)
        logger.error("%s and its copy are both damaged: %d of %d rows can be read", self.path, len(rows), most)
        return list(rows.values())

    def _replace(self, old: _Found, why: str | None, rows: Iterable[_Row], number: int) -> None:
        """Make a database of ``rows``, complete before it gets its name. What is there is kept in ``damaged/``."""
        fresh = old.path.with_name(f".{old.path.name}.tmp")
        fresh.unlink(missing_ok=True)
        os.close(os.open(fresh, os.O_RDWR | os.O_CREAT, 0o600))
        count = checksums = 0
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as db:
            for pragma in (f"page_size = {_PAGE_BYTES}", "journal_mode = OFF", f"user_version = {_VERSION}"):
                db.execute(f"PRAGMA {pragma}")
            if self.lost_rows:
                db.execute(f"PRAGMA application_id = {_LOST_ROWS}")
            db.execute("BEGIN")
            for name, kind in {**self._tables, "mark": int}.items():
                key, rest = ("INTEGER", "") if kind is int else ("TEXT", " WITHOUT ROWID")
                columns = f"key {key} PRIMARY KEY, value BLOB NOT NULL, checksum INTEGER NOT NULL"
                db.execute(f"CREATE TABLE {name} ({columns}){rest}")
            for row in rows:
                _apply(db, row)
                count, checksums = count + 1, checksums ^ row[3]
            _apply(db, _mark_row(_Mark(number, count, checksums)))
            db.execute("COMMIT")
        sync_to_disk(fresh)
        kept = self._aside(old.path.name) if why and old.exists else None
        for suffix in ("-shm", "-wal", ""):
            file = _beside(old.path, suffix)
            if kept and suffix != "-shm" and file.exists():
                file.rename(_beside(kept, suffix))
            file.unlink(missing_ok=True)
        sync_to_disk(old.path.parent)  # a WAL that is still there would be read into the new database
        fresh.replace(old.path)
        sync_to_disk(old.path.parent)
        if why:
            text = "%s %s. It was made anew from what is whole%s"
            logger.error(text, old.path, why, f"; the old one is {kept}" if kept else "")

    def _aside(self, name: str) -> Path:
        """A free name in ``damaged/``."""
        directory = self.path.parent / "damaged"
        directory.mkdir(exist_ok=True)
        return next(path for number in range(1, 10**9) if not (path := directory / f"{name}.{number}").exists())

    def _connect(self, path: Path) -> sqlite3.Connection:
        # Autocommit: transactions begin and end where this class says so.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            if self._network is not None:  # WAL needs shared memory unless one process holds the file alone
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            # The copy is there for damage, not for power cuts: it need not wait for the disk.
            db.execute(f"PRAGMA synchronous = {'FULL' if self._fsync and path == self.path else 'NORMAL'}")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            db.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_BYTES}")
            db.execute("UPDATE mark SET value = value")  # it can be written
        except BaseException:
            db.close()
            raise
        return db

    # --- the writer thread -------------------------------------------------------------------------------------------

    def _submit(self, job: Callable[[], _T]) -> Future[_T]:
        with self._closing:
            if not self.is_closed:
                return self._writer.submit(job)
        refused: Future[_T] = Future()
        refused.set_exception(StorageWriteError(f"{self.path} is closed"))
        return refused

    def _store_waiting(self) -> None:
        """Store all changes that wait, or none."""
        jobs = [self._waiting.popleft() for _ in range(len(self._waiting))]
        changes = [change for job, _ in jobs for change in job]
        try:
            if changes and self._failure is None and self._sync_failure is not None:
                self._failure = StorageWriteError(self._sync_failure)
            elif changes and self._failure is None:
                self._failure = self._commit(changes)
            for _, done in jobs:
                if self._failure is None:
                    done.set_result(None)
                else:
                    done.set_exception(self._failure)
            if self._unmoved_bytes > _CHECKPOINT_BYTES:
                self._move_wals()
            if self._bodies is not None and not self._waiting:
                self._bodies.shrink()
        except Exception as error:
            logger.exception("%s: its writer failed", self.path)
            self._sync_failure = f"{self.path}: its writer failed ({error!r}); nothing is stored until a restart"
            for _, done in jobs:
                if not done.done():  # nobody is left waiting
                    done.set_exception(StorageWriteError(self._sync_failure))

    def _read_error(self, error: Exception) -> StorageDamagedError:
        return StorageDamagedError(f"{self.path} cannot be read any more ({error}); restart to repair it")

    def _commit(self, changes: Sequence[Change]) -> StorageWriteError | None:
        db, rows = self._db, list[_Row]()
        taken, freed = list[tuple[int, int]](), list[tuple[int, int]]()
        number, count, checksums = self._mark
        try:
            db.execute("BEGIN IMMEDIATE")
            for table, key, value in changes:
                old = db.execute(f"SELECT value, checksum FROM {table} WHERE key = ?", (key,)).fetchone()
                if old is not None:
                    count, checksums = count - 1, checksums ^ old[1]
                if self._bodies is not None and table == self._large:
                    freed += [] if old is None else [_PLACE.unpack(old[0])[:2]]
                    if value is not None:
                        taken.append(self._bodies.room(len(value)))
                        value = self._bodies.put(taken[-1][0], value)
                row = (table, key, value, 0 if value is None else _checksum(table, key, value))
                if value is not None:
                    count, checksums = count + 1, checksums ^ row[3]
                rows.append(row)
                _apply(db, row)
            mark = _Mark(number + 1, count, checksums)
            rows.append(_mark_row(mark))
            _apply(db, rows[-1])
            if self._bodies is not None and taken and self._fsync:
                self._bodies.sync()
            db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the futures carry it to the callers
            if db.in_transaction:
                db.rollback()
            if self._bodies is not None:
                self._bodies.free(taken)
            return self._write_error(error)
        self._mark = mark
        self._unmoved_bytes += len(rows) * _PAGE_BYTES
        if self._bodies is not None:
            self._bodies.free(freed)
        return self._commit_copy(rows)

    def _commit_copy(self, rows: Sequence[_Row]) -> StorageWriteError | None:
        """Bring the copy up to date. A disk that is too full for it does not refuse what the database holds."""
        if self._not_copied is None:
            return None
        self._not_copied += rows
        try:
            self._copy.execute("BEGIN IMMEDIATE")
            for row in self._not_copied:
                _apply(self._copy, row)
            self._copy.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - as in ``_commit``
            if self._copy.in_transaction:
                self._copy.rollback()
            refused = self._write_error(error)
            if len(self._not_copied) == len(rows):
                logger.warning("%s lags behind the database: %s", self._paths[1], refused)
            if len(self._not_copied) > _MOST_NOT_COPIED:
                logger.error("%s is not kept any more; a restart makes it anew", self._paths[1])
                self._not_copied = None
            return refused if self._sync_failure else None
        self._not_copied = []
        return None

    def _write_error(self, error: Exception) -> StorageWriteError:
        if isinstance(error, _SyncError) or getattr(error, "sqlite_errorcode", 0) in _SYNC_ERRORS:
            self._sync_failure = (
                f"{self.path.parent}: the disk did not confirm a write ({error}). Whether it holds that write is known "
                "after a restart; until then nothing is stored. See what the disk reports (dmesg), then restart; what "
                "was refused may be sent again"
            )
            return StorageWriteError(self._sync_failure)
        full = sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR
        is_full = isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in full
        advice = f"; free some space in {self.path.parent}" if is_full else ""
        return StorageWriteError(f"cannot write {self.path}: {error}{advice}")

    def _move_wals(self) -> None:
        """Copy the WALs into the databases, so that the next write begins them anew."""
        self._unmoved_bytes = 0
        for path, db in zip(self._paths, (self._db, self._copy), strict=True):
            try:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                logger.warning("%s: its WAL is not shortened: %s", path, self._write_error(error))


class _SyncError(OSError):
    """The disk did not confirm."""


class _Bodies:
    """Large values, one after another in a file. The room of one that the database forgot is used again."""

    def __init__(self, path: Path, places: Iterable[tuple[int, int]]) -> None:
        """``places``: (offset, length) of the values that the file holds. Raises ``OSError``."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        sync_to_disk(path.parent)
        self._end = 0
        self._free: list[tuple[int, int]] = []
        """(start, end) of each hole before ``_end``, in order; no two touch."""
        self._frees = True
        """False: places overlap, of rows that damage brought back. As one of them goes, the other's is not free."""
        for start, length in sorted(places):
            self._frees &= start >= self._end
            if start > self._end:
                self._free.append((self._end, start))
            self._end = max(self._end, start + length)

    def room(self, length: int) -> tuple[int, int]:
        """A place: a hole that is large enough, of the first ones, or the end."""
        for index, (start, end) in enumerate(islice(self._free, _HOLES_TRIED)):
            if end - start >= length:
                self._free[index : index + 1] = [(start + length, end)] if end - start > length else []
                return start, length
        start, self._end = self._end, self._end + length
        return start, length

    def put(self, start: int, value: bytes) -> bytes:
        """Write a value. Returns its row. Raises ``OSError``."""
        written = 0
        while written < len(value):
            written += os.pwrite(self._file, memoryview(value)[written:], start + written)
        return _PLACE.pack(start, len(value), xxhash.xxh3_64_intdigest(value))

    def get(self, row: bytes) -> tuple[bytes, bool]:
        """What the file holds of a value, and whether that is the value."""
        start, length, checksum = _PLACE.unpack(row)
        try:
            value = os.pread(self._file, length, start)
        except OSError as error:
            logger.error("%s cannot be read at byte %d: %s", self.path, start, error.strerror)
            return b"", False
        return value, len(value) == length and xxhash.xxh3_64_intdigest(value) == checksum

    def free(self, places: Iterable[tuple[int, int]]) -> None:
        """They may be used again."""
        for start, length in places if self._frees else ():
            end, index = start + length, bisect.bisect(self._free, (start, start))
            if index < len(self._free) and self._free[index][0] == end:
                end = self._free.pop(index)[1]
            if index and self._free[index - 1][1] == start:
                index -= 1
                start = self._free.pop(index)[0]
            if end == self._end:
                self._end = start
            elif end > start:
                self._free.insert(index, (start, end))

    def sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise _SyncError(*error.args) from error

    def shrink(self) -> None:
        if os.fstat(self._file).st_size > self._end + _FREE_BYTES:
            with contextlib.suppress(OSError):  # it is tried again
                os.ftruncate(self._file, self._end)

    def close(self) -> None:
        os.close(self._file)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _apply(db: sqlite3.Connection, row: _Row) -> None:
    table, key, value, checksum = row
    if value is None:
        db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
    else:
        db.execute(f"REPLACE INTO {table} VALUES (?, ?, ?)", (key, value, checksum))


def _mark_row(mark: _Mark) -> _Row:
    value = struct.pack("<QQQ", *mark)
    return "mark", 0, value, _checksum("mark", 0, value)


def _read_mark(db: sqlite3.Connection) -> _Mark:
    """Raises ``ValueError`` where it is damaged."""
    rows = db.execute("SELECT value, checksum FROM mark").fetchall()
    if len(rows) != 1 or _checksum("mark", 0, rows[0][0]) != rows[0][1]:
        raise ValueError("the table 'mark' is damaged")
    return _Mark(*struct.unpack("<QQQ", rows[0][0]))


def _checksum(table: str, key: Key, value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(f"{table}\0{key}\0".encode() + value) >> 1  # SQLite's integers are signed


def _is_damage(error: Exception) -> bool:
    """False for what a damaged file does not bring about: no space, no memory, another program's lock."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or not {code, code & 0xFF} & {*_NO_DAMAGE}
