"""``SegmentLog``: an append-only log in files of bounded size. What is written survives the death of the process.

::

    data_dir/
      lock                     held (flock) by the one process that writes
      segment-000007.log       header, then records: length u32, CRC-32 u32, payload
      segment-000008.log       begins with a snapshot of everything but the groups' bodies

A record is one ``write``: it is there as a whole or it is the torn end of the last file, which is cut off at the next
start. An older file is deleted when no group in it is needed any more, because every file begins with a snapshot.

Chosen by measurement over SQLite in WAL mode: a group of 544 KB takes 0.15 ms here, 0.7 to 1.7 ms there (and the
same again to delete it); with an fsync each, 1.9 ms here, 6.3 ms there.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from atropos_verl.errors import AtroposVerlError

__all__ = ["LogDamagedError", "LogWriteError", "SegmentLog"]

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<II")
_MOST_PARTS = 1024
"""That one ``writev`` takes (IOV_MAX)."""
_NAME = re.compile(r"segment-(\d{6,})\.log")


class LogWriteError(AtroposVerlError):
    """The log cannot be written (disk full, no permission): nothing was stored."""


class LogDamagedError(AtroposVerlError):
    """A record in the middle of the log is damaged, or another process holds it."""


class SegmentLog:
    """The records of one data directory. One process at a time; not thread-safe but for ``sync``."""

    def __init__(
        self, directory: Path, *, fsync: bool = False, magic: bytes = b"ATRLOG1\n", owner: str = "server"
    ) -> None:
        """Take the lock; nothing is read yet.

        Args:
            magic: first bytes of every file, which tell what its records are.
            owner: whose log it is, for messages.

        Raises:
            LogDamagedError: another process uses the directory.
            LogWriteError: it cannot be created.
        """
        self.directory = Path(directory)
        self.fsync = fsync
        self._magic, self._owner = magic, owner
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LogWriteError(f"cannot use data directory {self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            reason = f"data directory {self.directory} is in use by another process; end it, or choose another one"
            raise LogDamagedError(reason) from error
        self.segment = 0
        """Number of the file that is written."""
        self.size = 0
        """Its bytes."""
        self.sizes: dict[int, int] = {}
        """Bytes of every older file."""
        self._fd: int | None = None
        self._broken: str | None = None
        self._appended = 0
        self._synced = 0
        self._syncing: asyncio.Task[None] | None = None

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> Iterator[tuple[int, memoryview]]:
        """(segment, payload) of every record, oldest first. Cuts off the torn end of the last file.

        Raises:
            LogDamagedError: a record that is not the last does not match its checksum.
        """
        numbers = sorted(
            int(match.group(1)) for path in self.directory.iterdir() if (match := _NAME.fullmatch(path.name))
        )
        for number in numbers:
            content = memoryview(self._path(number).read_bytes())
            end = yield from self._records(number, content, is_last=number == numbers[-1])
            self.sizes[number] = end
            if end <= len(self._magic):  # a new file whose snapshot was not finished: the older ones hold everything
                self.delete(number)
        self.segment = max(numbers, default=0)

    def _records(
        self, number: int, content: memoryview, *, is_last: bool
    ) -> Generator[tuple[int, memoryview], None, int]:
        position = len(self._magic)
        if bytes(content[:position]) != self._magic:
            if len(content) >= position:
                raise LogDamagedError(f"{self._path(number)} is not a log of this {self._owner}; move it away to start")
            return 0
        while position < len(content):
            start = position + _HEADER.size
            length, checksum = _HEADER.unpack_from(content, position) if start <= len(content) else (0, 0)
            payload = content[start : start + length]
            whole = start <= len(content) and len(payload) == length and length > 0
            if not whole or zlib.crc32(payload) != checksum:
                self._torn(
                    number, position, len(content), is_last=is_last and (not whole or start + length == len(content))
                )
                break
            yield number, payload
            position = start + length
        return position

    def _torn(self, number: int, position: int, length: int, *, is_last: bool) -> None:
        path = self._path(number)
        if not is_last:
            raise LogDamagedError(
                f"{path} is damaged at byte {position} of {length}; restore it from a backup, or cut it off there "
                f"(truncate -s {position} {path}) and lose what follows"
            )
        logger.warning(
            "%s: its last %d bytes are a torn write (never confirmed to anybody); cut off", path, length - position
        )
        with path.open("r+b") as file:
            file.truncate(position)

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, *parts: bytes | memoryview) -> None:
        """Write one record, made of ``parts``. After it returns, the death of the process does not lose it.

        Raises:
            LogWriteError: it could not be written; the log is as it was before.
        """
        if self._broken is not None:
            raise LogWriteError(self._broken)
        if self._fd is None:
            raise LogWriteError("the log is not open: rotate() first")
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        header = _HEADER.pack(sum(len(part) for part in parts), checksum)
        whole = (header, *parts)  # joined, a long payload would be copied once more
        if len(whole) > _MOST_PARTS:
            whole = (b"".join(whole),)
        length = sum(len(part) for part in whole)
        try:
            written = os.writev(self._fd, whole)
            if written < length:
                record = memoryview(b"".join(whole))
                while written < length:
                    written += os.write(self._fd, record[written:])
        except OSError as error:
            self._undo()
            reason = f"cannot write {self._path(self.segment)}: {error.strerror}; free some space in {self.directory}"
            raise LogWriteError(reason) from error
        self.size += length
        self._appended += 1

    def _undo(self) -> None:
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, self.size)
            os.lseek(self._fd, self.size, os.SEEK_SET)
        except OSError as error:
            self._broken = (
                f"{self._path(self.segment)} holds half a record ({error.strerror}); restart the {self._owner}"
            )

    def rotate(self, snapshot: bytes) -> None:
        """Begin a new file with ``snapshot``. The older ones stay until ``delete``.

        Raises:
            LogWriteError: it could not be written; the current file stays.
        """
        number = self.segment + 1
        path = self._path(number)
        record = self._magic + _HEADER.pack(len(snapshot), zlib.crc32(snapshot)) + snapshot
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                written = 0
                while written < len(record):
                    written += os.write(fd, record[written:])
                if self.fsync:
                    os.fdatasync(fd)
                    self._sync_directory()
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise LogWriteError(f"cannot write {path}: {error.strerror}; free some space") from error
        if self._fd is not None:
            if self.fsync:
                os.fdatasync(self._fd)
            os.close(self._fd)
            self.sizes[self.segment] = self.size
        self._fd, self.segment, self.size = fd, number, len(record)
        self._broken = None

    def delete(self, number: int) -> None:
        """Remove an older file; a failure is logged, and costs only space."""
        try:
            self._path(number).unlink(missing_ok=True)
            self.sizes.pop(number, None)
        except OSError as error:
            logger.warning("cannot delete %s: %s", self._path(number), error.strerror)

    async def sync(self) -> None:
        """With ``fsync``: return once everything appended so far is on the disk. Callers that wait share a sync.

        Raises:
            LogWriteError: the disk refused.
        """
        target = self._appended
        while self.fsync and self._synced < target:
            if self._syncing is None:
                self._syncing = asyncio.create_task(self._sync_now())
                self._syncing.add_done_callback(self._sync_done)
            try:
                await asyncio.shield(self._syncing)
            except OSError as error:
                raise LogWriteError(f"cannot sync {self._path(self.segment)}: {error.strerror}") from error

    async def _sync_now(self) -> None:
        if self._fd is None:
            return
        mark = self._appended
        fd = os.dup(self._fd)  # rotate() may close the other one meanwhile
        try:
            await asyncio.to_thread(os.fdatasync, fd)
        finally:
            os.close(fd)
        self._synced = max(self._synced, mark)

    def _sync_done(self, _: object) -> None:
        self._syncing = None

    def close(self) -> None:
        """Sync, close, and let go of the lock. Idempotent."""
        if self._fd is not None:
            _quietly(os.fsync, self._fd)
            _quietly(os.close, self._fd)
            self._fd = None
        if self._lock >= 0:
            _quietly(os.close, self._lock)
            self._lock = -1

    def _path(self, number: int) -> Path:
        return self.directory / f"segment-{number:06d}.log"

    def _sync_directory(self) -> None:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _quietly(call: Callable[[int], None], fd: int) -> None:
    try:
        call(fd)
    except OSError as error:
        logger.warning("closing the log: %s", error.strerror)
