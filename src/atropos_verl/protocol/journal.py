"""``BatchJournal``: every batch on disk before anything else happens to it, because the API has forgotten it.

::

    directory/
      batch_000001.json         the answer of GET /batch, byte for byte
      batch_000001.meta.json    its length, the caller's notes, the step that trained on it (null: none yet), and the
                                lease under which the API gave it out, with whether it was acked
      batch_000001.NAME         what the caller keeps beside it (``attach``)
      batch_000002.json.tmp     torn: the process died while writing; removed, and said in the log

A batch exists once its ``.json`` has its final name: content is written under another name and synced first, so it
survives ``kill -9`` and a power cut. Its ``.meta.json`` is written before it, so that no batch is ever without the
lease that it came with. A batch without a ``.meta.json`` was not trained on yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atropos_verl.errors import CheckpointError

__all__ = ["BatchJournal", "JournalEntry"]

logger = logging.getLogger(__name__)

_BATCH = re.compile(r"batch_(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One journalled batch."""

    sequence: int
    """Counts the batches of a run directory from 1, in the order they were fetched."""
    path: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    """The training step that consumed it (the trainer's step after it); None: none so far."""
    lease_id: str | None = None
    """Under which the API gave it out; None: for good, as an upstream API does."""
    acked: bool = False
    """The API knows that this run keeps it."""

    @property
    def is_owed(self) -> bool:
        """The API still waits for an ack."""
        return self.lease_id is not None and not self.acked


class BatchJournal:
    """The batches of one run directory. Safe to call from several threads; one process writes at a time.

    Nothing is created or cleaned up before the first call, so that a process that only holds one does no harm.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._last = 0
        self._clean = False

    def record(self, body: bytes, meta: Mapping[str, Any] | None = None, lease_id: str | None = None) -> JournalEntry:
        """Write ``body`` durably; ``meta`` is any JSON object. After this returns, no kill loses the batch.

        Raises:
            CheckpointError: it cannot be written (disk full, no permission); names the file and the cause.
        """
        with self._lock:
            self._prepare()
            entry = JournalEntry(self._last + 1, self._path(self._last + 1), dict(meta or {}), lease_id=lease_id)
            self._write_meta(entry, len(body))
            try:
                self._write(entry.path, body)
            except CheckpointError:
                self._remove(_meta_path(entry.path))
                raise
            self._last = entry.sequence
        return entry

    def assign(self, entry: JournalEntry, step: int) -> JournalEntry:
        """Note that training step ``step`` consumed ``entry``; again for a replayed batch. Returns the new entry.

        Raises:
            CheckpointError: the batch is not in the journal (any more), or the note cannot be written.
        """
        with self._lock:
            assigned = replace(self._read_entry(entry.sequence, entry.path), step=step)
            self._write_meta(assigned, self._size(entry))
        return assigned

    def note_acked(self, entry: JournalEntry) -> JournalEntry:
        """Note that the API has given the batch up, unless it has come again under another lease since ``entry`` was
        read. Lost in a power cut at worst: acking again does no harm. Returns the entry as it is now.

        Raises:
            CheckpointError: the batch is not in the journal (any more), or the note cannot be written.
        """
        with self._lock:
            now = self._read_entry(entry.sequence, entry.path)
            if now.lease_id == entry.lease_id:
                now = replace(now, acked=True)
                self._write_meta(now, self._size(entry), durable=False)
        return now

    def change_lease(self, entry: JournalEntry, lease_id: str) -> JournalEntry:
        """Note durably that the API has given the batch out again, to this run, as ``lease_id``.

        Raises:
            CheckpointError: the batch is not in the journal (any more), or the note cannot be written.
        """
        with self._lock:
            changed = replace(self._read_entry(entry.sequence, entry.path), lease_id=lease_id, acked=False)
            self._write_meta(changed, self._size(entry))
        return changed

    def find(self, lease_ids: Collection[str]) -> JournalEntry | None:
        """The batch that came under one of ``lease_ids``."""
        with self._lock:
            return next((entry for entry in self._entries() if entry.lease_id in lease_ids), None)

    def current(self, entry: JournalEntry) -> JournalEntry:
        """``entry`` as it is on disk now."""
        with self._lock:
            return self._read_entry(entry.sequence, entry.path)

    def owed(self) -> list[JournalEntry]:
        """Batches whose lease was not acked yet, trained on or not, in the order fetched."""
        with self._lock:
            return [entry for entry in self._entries() if entry.is_owed]

    def drop(self, entry: JournalEntry) -> None:
        """Delete a batch that somebody else holds."""
        with self._lock:
            self._delete(entry)

    def discard_through(self, step: int) -> int:
        """Delete the batches that steps up to and including ``step`` consumed, a durable checkpoint holding their
        effect. Returns how many. Those that the API still waits for an ack of stay."""
        with self._lock:
            done = [entry for entry in self._entries() if entry.step is not None and entry.step <= step]
            done = [entry for entry in done if not entry.is_owed]
            for entry in done:
                self._delete(entry)
        return len(done)

    def pending(self, after_step: int) -> list[JournalEntry]:
        """What a run that resumes at ``after_step`` is to train on first, in the order fetched: batches that no step
        up to ``after_step`` consumed (later steps did, and were lost with the process, or none did)."""
        with self._lock:
            return [entry for entry in self._entries() if entry.step is None or entry.step > after_step]

    def read(self, entry: JournalEntry) -> bytes:
        """The batch as it was recorded.

        Raises:
            CheckpointError: the file is gone, cannot be read, or has not the length it was written with.
        """
        try:
            body = entry.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the journalled batch {entry.path}: {error.strerror}") from error
        expected = self._load_meta(entry.path).get("bytes")
        if expected is not None and expected != len(body):
            raise CheckpointError(
                f"{entry.path} has {len(body)} bytes, but {expected} were written; delete it to go on"
            )
        return body

    def attach(self, entry: JournalEntry, name: str, content: bytes, *, durable: bool = False) -> None:
        """Keep ``content`` beside the batch, as long as that; ``name`` is the file's ending. Not ``durable``: a power
        cut may lose it.

        Raises:
            CheckpointError: it cannot be written.
        """
        with self._lock:
            self._write(entry.path.with_suffix(f".{name}"), content, durable=durable)

    def attachment(self, entry: JournalEntry, name: str) -> bytes | None:
        """What ``attach`` kept, or None when there is none (or it cannot be read: then the log says why)."""
        path = entry.path.with_suffix(f".{name}")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error)
            return None

    def _path(self, sequence: int) -> Path:
        return self.directory / f"batch_{sequence:06d}.json"

    def _size(self, entry: JournalEntry) -> int:
        try:
            return entry.path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"no journalled batch {entry.path}: {error.strerror}") from error

    def _prepare(self) -> None:
        """Once: create the directory, remove what a killed process left half written, find the last number."""
        if self._clean:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create the batch journal {self.directory}: {error.strerror}") from error
        for torn in sorted(self.directory.glob("batch_*.tmp")):
            logger.warning("%s is torn (the process died while writing it); removed", torn)
            self._remove(torn)
        for beside in sorted(self.directory.glob("batch_*")):
            if not beside.with_name(f"{beside.name.split('.', 1)[0]}.json").exists():
                self._remove(beside)
        self._last = max((entry.sequence for entry in self._scan()), default=0)
        self._clean = True

    def _entries(self) -> list[JournalEntry]:
        if not self.directory.is_dir():
            return []
        self._prepare()
        return self._scan()

    def _scan(self) -> list[JournalEntry]:
        found = []
        for path in self.directory.iterdir():
            match = _BATCH.fullmatch(path.name)
            if match:
                found.append(self._read_entry(int(match.group(1)), path))
        return sorted(found, key=lambda entry: entry.sequence)

    def _read_entry(self, sequence: int, path: Path) -> JournalEntry:
        note = self._load_meta(path)
        return JournalEntry(
            sequence,
            path,
            note.get("meta") or {},
            note.get("step"),
            lease_id=note.get("lease_id"),
            acked=note.get("acked") is True,
        )

    def _delete(self, entry: JournalEntry) -> None:
        # The batch first: without its note it would count as not trained on.
        self._remove(entry.path)
        for beside in self.directory.glob(f"{entry.path.stem}.*"):
            self._remove(beside)

    def _load_meta(self, path: Path) -> dict[str, Any]:
        try:
            note = json.loads(_meta_path(path).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); the batch counts as not trained on", _meta_path(path), error)
            return {}
        return note if isinstance(note, dict) else {}

    def _write_meta(self, entry: JournalEntry, size: int, *, durable: bool = True) -> None:
        note: dict[str, Any] = {"sequence": entry.sequence, "bytes": size, "step": entry.step, "meta": dict(entry.meta)}
        if entry.lease_id is not None:
            note |= {"lease_id": entry.lease_id, "acked": entry.acked}
        self._write(_meta_path(entry.path), json.dumps(note).encode(), durable=durable)

    def _write(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write the journalled batch {path} ({len(content)} bytes): {error.strerror}; "
                "free some space, or choose another run_dir"
            ) from error

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot delete {path}: {error.strerror}") from error


def _meta_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.meta.json")


def _sync_directory(directory: Path) -> None:
    """Make a rename durable (the name is the directory's content)."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
