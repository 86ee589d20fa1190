"""``BatchJournal``: every batch on disk before anything else happens to it, because the API has forgotten it.

``batch_N.json`` is the answer of ``GET /batch``, byte for byte, under its final name only when it is complete and
synced; ``batch_N.meta.json``, written before it and deleted after it, has its checksum, its lease and the step that
trained on it (docs/internals.md). ``kept/`` holds batches that a checkpoint covers: for a look at them, and to go back
to the checkpoint before."""

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from atropos_verl.errors import CheckpointError
from atropos_verl.storage import sync_to_disk, write_atomic

logger = logging.getLogger(__name__)

_BATCH = re.compile(r"batch_(\d{6,})\.json")
_NOTES = (".meta.json", ".copy.meta.json")


class DamagedBatchError(CheckpointError):
    """A journalled batch is not what was recorded."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One journalled batch."""

    sequence: int  # counts the batches of a run directory from 1, in the order they were fetched
    path: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    """The training step that consumed it (the trainer's step after it); None: none so far."""
    lease_id: str | None = None
    """Under which the API gave it out; None: for good, as an upstream API does."""
    acked: bool = False
    # As recorded; None: the note is lost. (0.2.0 noted no checksum.)
    size: int | None = None
    checksum: str | None = None

    @property
    def is_owed(self) -> bool:
        """An ack is."""
        return self.lease_id is not None and not self.acked


class BatchJournal:
    """The batches of one run directory. Safe to call from several threads; one process writes at a time. Nothing is
    created or cleaned up before the first call. Every method raises ``CheckpointError``, with the file and the
    cause."""

    def __init__(self, directory: Path, keep: int = 0) -> None:
        self.directory = Path(directory)
        self._kept = self.directory / "kept"
        self._keep = keep
        self._covered = self._covered_before = 0
        """Steps of the newest checkpoint, and of the one before, as far as this process knows."""
        self._lock = threading.RLock()
        self._last, self._least = 0, 1
        self._clean = False

    def record(self, body: bytes, meta: Mapping[str, Any] | None = None, lease_id: str | None = None) -> JournalEntry:
        """Write ``body`` durably; ``meta`` is any JSON object. After this returns, no kill loses the batch."""
        with self._lock:
            self._prepare()
            sequence = max(self._last + 1, self._least)
            path = self.directory / f"batch_{sequence:06d}.json"
            size, checksum = len(body), xxhash.xxh3_64_hexdigest(body)
            entry = JournalEntry(sequence, path, dict(meta or {}), None, lease_id, size=size, checksum=checksum)
            try:
                self._write_meta(entry)
                self._write(path, body)
            except CheckpointError:
                for suffix in _NOTES:
                    _remove(path.with_suffix(suffix))
                raise
            self._last = sequence
        return entry

    def number_from(self, sequence: int) -> None:
        """Batches that are recorded from now on have at least this number."""
        with self._lock:
            self._least = sequence

    def note_acked(self, entry: JournalEntry) -> JournalEntry:
        """Note that the API has given the batch up, unless it has come again under another lease since ``entry`` was
        read. Returns the entry as it is now."""
        with self._lock:
            now = entry_at(entry.path)
            return self.change(now, acked=True) if now.lease_id == entry.lease_id else now

    def change(self, entry: JournalEntry, **changes: Any) -> JournalEntry:
        """Write the note durably with ``changes``. Raises ``CheckpointError`` for a batch that is not here."""
        with self._lock:
            if not entry.path.exists():
                raise CheckpointError(f"no journalled batch {entry.path}")
            changed = replace(entry_at(entry.path), **changes)
            self._write_meta(changed)
            return changed

    def find(self, lease_ids: Collection[str]) -> JournalEntry | None:
        """The batch that came under one of ``lease_ids``."""
        return next(iter(self._select(lambda entry: entry.lease_id in lease_ids)), None)

    def owed(self) -> list[JournalEntry]:
        """Batches whose lease was not acked yet, trained on or not, in the order fetched."""
        return self._select(lambda entry: entry.is_owed)

    def pending(self, after_step: int) -> list[JournalEntry]:
        """What a run that resumes at ``after_step`` trains on first, in the order fetched: batches that no step up to
        ``after_step`` consumed (later steps did, and were lost with the process, or none did)."""
        return self._select(lambda entry: entry.step is None or entry.step > after_step)

    def drop(self, entry: JournalEntry) -> None:
        """Delete a batch that nobody needs from here."""
        self._move([entry], None)

    def discard_through(self, step: int) -> int:
        """Forget the batches that steps up to and including ``step`` consumed, a durable checkpoint holding their
        effect. Returns how many. Those that the API still waits for an ack of stay. With ``keep`` they go to ``kept/``,
        which holds that many, and those that the checkpoint before does not hold."""
        with self._lock:
            done = self._select(lambda entry: entry.step is not None and entry.step <= step and not entry.is_owed)
            if step > self._covered:
                self._covered, self._covered_before = step, self._covered
            self._move(done, self._kept if self._keep else None)
            before = self._covered_before
            old = [entry for entry in self._scan(self._kept) if entry.step is None or entry.step <= before]
            self._move(old[: max(0, len(old) - self._keep)], None)
        return len(done)

    def bring_back(self, after_step: int) -> int:
        """Make kept batches pending again that no step up to ``after_step`` consumed. Returns how many."""
        with self._lock:
            undone = [entry for entry in self._scan(self._kept) if entry.step is not None and entry.step > after_step]
            for entry in undone:  # a batch that is in both places is brought back again
                for path in sorted(self._kept.glob(f"{entry.path.stem}.*"), key=lambda path: path == entry.path):
                    self._write(self.directory / path.name, path.read_bytes())
            self._move(undone, None)
        return len(undone)

    def set_aside(self, entry: JournalEntry) -> Path:
        """Move a batch that is damaged to ``damaged/``. Returns its new path."""
        self._move([entry], self.directory / "damaged")
        return self.directory / "damaged" / entry.path.name

    def _move(self, entries: Sequence[JournalEntry], to: Path | None) -> None:
        """Move batches with all that is kept beside them; None: delete them. Without its note a batch counts as not
        trained on, so the notes stay until the batches are gone from the disk."""
        bodies = [entry.path for entry in entries]
        beside = [path for body in bodies for path in body.parent.glob(f"{body.stem}.*") if path != body]
        with _named("delete batches" if to is None else f"move batches to {to}"):
            for paths in (bodies, beside):
                for path in paths:
                    if to is None:
                        path.unlink(missing_ok=True)
                    else:
                        to.mkdir(exist_ok=True)
                        path.replace(to / path.name)
                sync_to_disk(*{path.parent for path in paths}, *([to] if to is not None and paths else []))

    def read(self, entry: JournalEntry) -> bytes:
        """The batch as it was recorded. Raises ``DamagedBatchError`` where the file is not that any more."""
        with _named("read the journalled batch"):
            body = entry.path.read_bytes()
        noted = entry_at(entry.path)
        if noted.size is not None and noted.size != len(body):
            raise DamagedBatchError(f"{entry.path} has {len(body)} bytes, but {noted.size} were written")
        if noted.checksum is not None and noted.checksum != xxhash.xxh3_64_hexdigest(body):
            raise DamagedBatchError(f"{entry.path} is not what was written: its checksum differs")
        return body

    def attach(self, entry: JournalEntry, name: str, content: bytes) -> None:
        """Keep ``content`` beside the batch, as long as that; ``name`` is the file's ending. (Not durable.)"""
        with self._lock:
            self._write(entry.path.with_suffix(f".{name}"), xxhash.xxh3_64_digest(content) + content, durable=False)

    def attachment(self, entry: JournalEntry, name: str) -> bytes | None:
        """The content that ``attach`` kept; None when there is none, or it cannot be read (then the log says why)."""
        path = entry.path.with_suffix(f".{name}")
        try:
            kept = path.read_bytes() if path.exists() else None
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error)
            return None
        if kept is not None and kept[:8] != xxhash.xxh3_64_digest(kept[8:]):
            logger.warning("%s is damaged (or was written by 0.2.0); it is not used", path)
            return None
        return None if kept is None else kept[8:]

    def _select(self, wanted: Callable[[JournalEntry], bool]) -> list[JournalEntry]:
        with self._lock:
            if not self.directory.is_dir():
                return []
            self._prepare()
            return [entry for entry in self._scan() if wanted(entry)]

    def _prepare(self) -> None:
        """Once: create the directory, remove what a killed process left half written, find the last number."""
        if self._clean:
            return
        with _named("create the batch journal"):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_to_disk(self.directory.parent, self.directory.parent.parent)  # the names of it and of the run's
        for torn in sorted([*self.directory.glob(".batch_*.tmp"), *self.directory.glob("batch_*.tmp")]):
            logger.warning("%s is torn (the process died while writing it); removed", torn)
            _remove(torn)
        for beside in sorted(self.directory.glob("batch_*")):
            batch = beside.with_name(f"{beside.name.split('.', 1)[0]}.json")
            if not batch.exists():
                note = _load_meta(batch)
                if note.get("acked"):
                    text = "%s is gone, the step of its note is %s: a process died while it dropped it, or it was lost"
                    logger.warning(text, batch, note.get("step"))
                _remove(beside)
        self._last = max((entry.sequence for entry in self._scan() + self._scan(self._kept)), default=0)
        self._clean = True

    def _scan(self, directory: Path | None = None) -> list[JournalEntry]:
        paths = (directory or self.directory).glob("batch_*.json")
        found = [entry_at(path) for path in paths if _BATCH.fullmatch(path.name)]
        return sorted(found, key=lambda entry: entry.sequence)

    def _write_meta(self, entry: JournalEntry) -> None:
        note: dict[str, Any] = {"sequence": entry.sequence, "bytes": entry.size, "checksum": entry.checksum}
        note |= {"step": entry.step, "meta": dict(entry.meta), "lease_id": entry.lease_id, "acked": entry.acked}
        content = json.dumps({**note, "note_checksum": _checksum(note)}).encode()
        for suffix in _NOTES:  # the copy is there for damage, not for power cuts
            self._write(entry.path.with_suffix(suffix), content, durable=suffix == _NOTES[0])

    def _write(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        advice = f" ({len(content)} bytes); free some space, or choose another run_dir"
        with _named("write the journalled batch", advice):
            write_atomic(path, content, durable=durable)


def entry_at(path: Path) -> JournalEntry:
    """The batch at ``path`` as it is on disk now."""
    note, sequence = _load_meta(path), int(path.stem.removeprefix("batch_"))
    lease_id, acked = note.get("lease_id"), note.get("acked") is True
    made_of = (note.get("bytes"), note.get("checksum"))
    return JournalEntry(sequence, path, note.get("meta") or {}, note.get("step"), lease_id, acked, *made_of)


@contextlib.contextmanager
def _named(what: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {what} {error.filename}: {error.strerror}{advice}") from error


def _remove(path: Path) -> None:
    with _named("delete"):
        path.unlink(missing_ok=True)


def _load_meta(path: Path) -> dict[str, Any]:
    """The note beside a batch, or its copy; empty where there is none or both are damaged."""
    found = [path.with_suffix(suffix) for suffix in _NOTES if path.with_suffix(suffix).exists()]
    for note_path in found:
        try:
            note = json.loads(note_path.read_bytes())
            checksum = note.pop("note_checksum", None)
            # 0.2.0 wrote neither checksum.
            if ("checksum" in note or checksum) and checksum != _checksum(note):
                raise ValueError("its checksum differs")
            return dict(note)
        except (OSError, ValueError, AttributeError) as error:
            others = "its copy is used" if len(found) == 2 else "the batch counts as not trained on"
            logger.warning("%s is damaged (%s); %s", note_path, error, others)
            found = found[1:]
    return {}


def _checksum(note: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(note).encode())
