"""``Ledger`` knows which policy version generated which token, and with what logprob, for all this gateway generated.

It records every completion under the token ids it came after; a scored sequence is looked up by its own token ids, turn
by turn. A look-up hashes all prefixes of the sequence at once, finds the records by hash, and then compares the ids
themselves: a hash alone never decides. What is not found stays unknown. The least recently used records go first.

``run_dir/ledger/ledger.sqlite`` (a ``RecordStore``) holds the same for the process that resumes the run. Half a ledger
is worse than none: of two alike completions it might know only the wrong one. So a store that has lost rows (it and its
copy are damaged), or that cannot be written any more, is given up as a whole."""

from __future__ import annotations

import contextlib
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_verl.errors import StorageDamagedError, StorageError, StorageInUseError
from atropos_verl.storage import RecordStore
from atropos_verl.types import Generation

logger = logging.getLogger(__name__)

Runs = tuple[tuple[int, int], ...]  # (policy version, tokens it wrote), in order
IDS = np.dtype("<i4")
LOGPROBS = np.dtype("<f4")
OVERHEAD_BYTES = 700
"""Python objects of one record beside its arrays, measured with tracemalloc (about 650 bytes)."""
_TOKEN_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POSITION_FACTOR = np.uint64(0xD1B54A32D192ED03)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_MOST_COMPARED = 4096
"""Completions of one prompt that are compared one by one, newest first, where the exact index finds none."""
_MOST_ALIKE = 256
"""Records with the same ids, prompt and completion: a policy that has settled writes them by the thousand."""


@dataclass(slots=True, eq=False)
class Prompt:
    """The ids that completions came after; shared by all completions of the same prompt."""

    key: int
    ids: bytes
    spans: OrderedDict[int, SpanRecord]

    @property
    def length(self) -> int:
        return len(self.ids) // IDS.itemsize


@dataclass(slots=True, eq=False)
class SpanRecord:
    """One completion: what the engine wrote after a prompt in one go."""

    order: int  # counts the records of this ledger, in the order in which they ended
    request: int  # completions of one request share it: the order of the first
    prompt: Prompt
    ids: bytes  # int32
    logprobs: NDArray[np.float32]
    runs: Runs
    temperature: float
    end_key: int
    uses: int = 0  # looked-up sequences that are known to hold it
    consumed: int = 0  # trained ones
    branch: tuple[int, int] | None = None
    """(restart, policy version): that restart went on at a version before some of ``runs``; the weights that these
    name were lost, and other ones have their numbers now."""

    @property
    def start(self) -> int:
        """Its first token's position in a sequence that holds it."""
        return self.prompt.length

    @property
    def stop(self) -> int:
        return self.prompt.length + len(self.ids) // IDS.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.ids) + self.logprobs.nbytes + OVERHEAD_BYTES

    @property
    def policies(self) -> tuple[Runs, tuple[int, int] | None]:
        """Equal for records that the same weights wrote, token by token."""
        return self.runs, self.branch

    def inside(self, piece: Piece) -> slice:
        """The tokens of ``piece`` among its own."""
        return slice(piece.first, piece.first + piece.stop - piece.start)

    def written_by(self, piece: Piece) -> NDArray[np.int64]:
        """Policy version of each token of ``piece``, as the process that wrote it counted."""
        return np.repeat([v for v, _ in self.runs], [n for _, n in self.runs]).astype(np.int64)[self.inside(piece)]

    def versions(self, piece: Piece) -> NDArray[np.int64]:
        """Policy version of each token. Lost weights count as those of the checkpoint that a later process went on
        with: their staleness grows with every step since, and no newer weights are mistaken for them."""
        written = self.written_by(piece)
        return written if self.branch is None else np.minimum(written, self.branch[1])


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens ``[start, stop)`` of a looked-up sequence, and the records that hold them, from their token ``first``. No
    candidate: it is unknown which weights wrote them."""

    start: int
    stop: int
    candidates: tuple[SpanRecord, ...] = ()
    first: int = 0


@dataclass(slots=True, kw_only=True)
class LedgerStats:
    """The contents of a ledger now, and its counters since it was made."""

    spans: int = 0
    prompts: int = 0
    bytes: int = 0
    recorded_spans: int = 0
    recorded_tokens: int = 0
    evicted_spans: int = 0
    restored_spans: int = 0  # of processes before this one


class _Rows(msgspec.Struct):
    """The tables of a store. The first entry of each row is its key."""

    prompts: list[tuple[int, bytes]] = []  # hash, token ids
    spans: list[tuple[int, int, int, bytes, bytes, Runs, float, int]] = []
    """Order, request, hash of the prompt, ids, logprobs, runs, temperature, hash of the end, as in ``SpanRecord``."""
    uses: list[tuple[int, int]] = []  # order, trained sequences that hold it
    state: list[tuple[int, int, Runs]] = []
    """0, the newest order, and (policy version, newest order before it) of each process that resumed the run."""


_TABLES = _Rows.__struct_fields__


class Lengths:
    """The lengths that prompts have had: only there it is worth to look for one."""

    def __init__(self) -> None:
        self._seen = np.zeros(1024, dtype=np.bool_)

    def add(self, length: int) -> None:
        if length >= len(self._seen):
            self._seen = np.pad(self._seen, (0, length + 1))
        self._seen[length] = True

    def within(self, start: int, stop: int) -> list[int]:
        """Those in ``[start, stop)``, ascending."""
        return [start + length for length in np.flatnonzero(self._seen[start:stop]).tolist()]


class Ledger:
    """Completions by the ids they came after. Safe to call from any thread. ``max_bytes`` are of ids, logprobs and
    objects."""

    def __init__(self, max_bytes: int = 256 << 20, max_spans: int = 1_000_000) -> None:
        self.max_bytes = max_bytes
        self.max_spans = max_spans
        self.lock = threading.RLock()
        self._prompts: dict[int, Prompt] = {}
        self._lengths = Lengths()
        self._by_end: dict[int, dict[int, SpanRecord]] = {}
        self._spans: OrderedDict[int, SpanRecord] = OrderedDict()
        self._counts = LedgerStats()
        self._orders = 0
        self._resumes: Runs = ()
        """(policy version, newest order before it) of each process that resumed the run."""
        self._store: RecordStore | None = None
        self._store_failed = False
        self._changes: list[tuple[str, int, tuple[Any, ...] | None]] = []
        """Table, key and row (None: deleted), since the last write."""

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, order: int) -> bool:
        return order in self._spans

    def stats(self) -> LedgerStats:
        with self.lock:
            return replace(self._counts, spans=len(self._spans), prompts=len(self._prompts))

    def record(
        self, prompt_token_ids: Sequence[int], generations: Iterable[Generation], temperature: float = 1.0
    ) -> tuple[Future[None] | None, list[tuple[int, int, int]]]:
        """Record the completions of one request. Call it before the client can see them. The logprobs are of the
        distribution at ``temperature``; 0 (greedy) counts as 1, as engines report it. Returns a future that is done,
        and never raises, when the death of this process cannot lose the records any more (None: nothing is kept over a
        restart); and of each record its number, its tokens, and the policy version that began it."""
        prompt = np.asarray(prompt_token_ids, dtype=IDS)
        made = [(np.asarray(g.token_ids, dtype=IDS), _logprobs(g), _runs(g)) for g in generations if g.token_ids]
        if not made:
            return None, []
        key = int(prefix_hashes(prompt)[-1])
        temperature = temperature if temperature > 0 else 1.0
        with self.lock:
            node, request = self._node(key, prompt.tobytes()), self._orders + 1
            for ids, logprobs, runs in made:
                self._orders += 1
                end_key = (key + int(prefix_hashes(ids, offset=len(prompt))[-1])) % (1 << 64)
                content, values = ids.tobytes(), (runs, temperature, end_key)
                row = (self._orders, request, key, content, logprobs.tobytes(), *values)
                self._changes.append(("spans", self._orders, row))
                self._add(SpanRecord(self._orders, request, node, content, logprobs, *values))
                self._counts.recorded_spans += 1
                self._counts.recorded_tokens += len(ids)
            self._shrink()
            return self._write(), [(request + i, len(ids), runs[0][0]) for i, (ids, _, runs) in enumerate(made)]

    def _write(self) -> Future[None] | None:
        """Store the changes, all or none. The future is done when that is so, and never raises. None: nothing is kept,
        or an earlier write has failed."""
        rows, self._changes = self._changes, []
        store = self._store
        if store is None or self._store_failed:
            return None
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a client that goes away while it waits does not cancel it

        def written(future: Future[None]) -> None:
            """Called by the store's thread."""
            error = future.exception()
            # The files of a store that is closed may be another process's by now.
            if error is not None and not self._store_failed and not store.is_closed:
                self._store_failed = True
                text = "%s: %s. After a restart the policy versions of tokens generated up to then are unknown"
                logger.warning(text, store.path.parent, error)
                with contextlib.suppress(OSError):
                    _remove(store.path.parent)  # the open connection goes on with files that have no name
            done.set_result(None)

        encode = msgspec.msgpack.encode
        rows.append(("state", 0, (0, self._orders, self._resumes)))
        # Hashes of 64 bits become the signed integers that SQLite has.
        changes = [(table, key - (key >> 63 << 64), None if row is None else encode(row)) for table, key, row in rows]
        store.write(changes).add_done_callback(written)
        return done

    def _node(self, key: int, ids: bytes) -> Prompt:
        node = self._prompts.get(key)
        if node is not None and node.ids != ids:  # two prompts, one 64-bit hash: the newer stays
            for record in list(node.spans.values()):
                self._forget(record)
            node = None
        if node is None:
            node = self._prompts[key] = Prompt(key, ids, OrderedDict())
            self._changes.append(("prompts", key, (key, ids)))
            self._lengths.add(node.length)
            self._counts.bytes += len(ids) + OVERHEAD_BYTES
        return node

    def _add(self, record: SpanRecord) -> None:
        self._spans[record.order] = record
        record.prompt.spans[record.order] = record
        self._counts.bytes += record.nbytes
        alike = self._by_end.setdefault(record.end_key, {})
        alike[record.order] = record
        if len(alike) > _MOST_ALIKE:
            self._forget(next(iter(alike.values())))

    def _shrink(self) -> None:
        while self._spans and (self._counts.bytes > self.max_bytes or len(self._spans) > self.max_spans):
            self._forget(next(iter(self._spans.values())))

    def _forget(self, record: SpanRecord) -> None:
        del self._spans[record.order]
        self._changes += ("spans", record.order, None), ("uses", record.order, None)
        node = record.prompt
        del node.spans[record.order]
        self._counts.bytes -= record.nbytes
        if not node.spans:
            del self._prompts[node.key]
            self._changes.append(("prompts", node.key, None))
            self._counts.bytes -= len(node.ids) + OVERHEAD_BYTES
        alike = self._by_end[record.end_key]
        del alike[record.order]
        if not alike:
            del self._by_end[record.end_key]
        self._counts.evicted_spans += 1

    def persist(self, directory: Path, resumed_at: int | None = None) -> int:
        """Keep what is recorded from here on in ``directory`` as well, for the process that resumes this run.
        ``resumed_at``: this process resumes a run at this policy version, and what is there is taken in. None: it
        begins one, and what is there is removed. Returns the completions taken in: none of a damaged file, which the
        log names."""
        with self.lock:
            if self._orders or self._store is not None:
                raise ValueError("persist comes before the first record")
            self._store, found = _open_store(directory, keep=resumed_at is not None)
            _, orders, resumes = found.state[0] if found.state else (0, 0, ())
            oldest = min((span[0] for span in found.spans), default=orders)
            resumes = tuple(resume for resume in resumes if resume[1] >= oldest)
            self._resumes = resumes if resumed_at is None else (*resumes, (resumed_at, orders))
            prompts = dict(found.prompts)
            for order, request, key, ids, content, runs, temperature, end_key in found.spans:
                node, logprobs = self._node(key, prompts[key]), np.frombuffer(content, dtype=LOGPROBS)
                self._add(SpanRecord(order, request, node, ids, logprobs, runs, temperature, end_key))
                self._shrink()
            for order, count in found.uses:
                if order in self._spans:
                    self._spans[order].uses = self._spans[order].consumed = count
            self._orders = orders
            _note_branches(self._spans.values(), self._resumes)
            self._counts.restored_spans, self._counts.evicted_spans = len(self._spans), 0
            # The rest is as it was read, also a prompt that was forgotten and came again.
            forgotten = (change for change in self._changes if change[2] is None)
            self._changes = [change for change in forgotten if change[0] != "prompts" or change[1] not in self._prompts]
            self._write()
            return len(self._spans)

    def consumed(self, orders: Iterable[int]) -> None:
        """Note that a batch with the records of these numbers was trained on: they are not looked up again."""
        with self.lock:
            records = [self._spans[order] for order in orders if order in self._spans]
            for record in records:
                record.consumed += 1
                self._changes.append(("uses", record.order, (record.order, record.consumed)))
            if records:
                self._write()

    def close(self) -> None:
        """Finish the writes that wait, and let go of the directory. Idempotent."""
        with self.lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def find(self, token_ids: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> list[list[Piece]]:
        """For each trained span ``[start, stop)`` of a sequence the pieces it consists of, in order and without gaps. A
        span of one completion is one piece. Two completions one after the other (a generation that was continued) are
        two; a completion whose head or tail the environment left untrained or cut off is found as well. Tokens that no
        record holds, because the text was edited or tokenised anew, are pieces without candidates: where a completion's
        ids turn into others, nothing of it is taken."""
        ids = np.asarray(token_ids, dtype=IDS)
        hashes = prefix_hashes(ids)
        sequence = ids.tobytes()
        with self.lock:
            return [list(self._pieces(sequence, hashes, start, stop)) for start, stop in spans]

    def continues(self, token_ids: Sequence[int]) -> bool:
        """True when a prompt begins with a prompt and the completion that followed it: the next turn of an episode."""
        ids = np.asarray(token_ids, dtype=IDS)
        sequence = ids.tobytes()
        keys = prefix_hashes(ids).tolist()
        with self.lock:
            return any(
                record.stop == stop and _holds(record, sequence, stop)
                for stop in range(len(ids), 0, -1)
                for record in self._by_end.get(keys[stop], {}).values()
            )

    def used(self, orders: Iterable[int]) -> set[int]:
        """Note that a sequence is known to hold each record of these numbers. Returns those that the ledger holds."""
        with self.lock:
            known = [order for order in orders if order in self._spans]
            for order in known:
                self._spans[order].uses += 1
                self._spans.move_to_end(order)
            return set(known)

    def newest(self, count: int) -> list[SpanRecord]:
        """The ``count`` most recent records, newest first."""
        with self.lock:
            return list(islice(reversed(self._spans.values()), count))

    def newer_than(self, order: int, count: int) -> list[SpanRecord]:
        """The ``count`` oldest of the records that came after the one of this number."""
        with self.lock:
            known = (self._spans[number] for number in range(order + 1, self._orders + 1) if number in self._spans)
            return list(islice(known, count))

    def _pieces(self, sequence: bytes, hashes: NDArray[np.uint64], start: int, stop: int) -> Iterator[Piece]:
        position = start
        while position < stop:
            alike = self._by_end.get(int(hashes[stop]), {}).values()
            exact = (record for record in alike if (record.start, record.stop) == (position, stop))
            records, end = [record for record in exact if _holds(record, sequence, stop)], stop
            if not records:
                records, end = self._after_prompt(sequence, hashes, position, stop)
            if not records:
                records, end = self._begun_before(sequence, hashes, position, stop)
            if not records:  # up to where the next completion may begin
                places = self._lengths.within(position + 1, stop)
                end = next((place for place in places if int(hashes[place]) in self._prompts), stop)
            yield Piece(position, end, tuple(records), position - records[0].start if records else 0)
            position = end

    def _after_prompt(
        self, sequence: bytes, hashes: NDArray[np.uint64], start: int, stop: int
    ) -> tuple[list[SpanRecord], int]:
        """Completions that begin at ``start``, and where the longest of them ends in this span."""
        node = self._prompts.get(int(hashes[start]))
        if node is None or not sequence.startswith(node.ids) or node.length != start:
            return [], start
        found: list[SpanRecord] = []
        longest = start
        for record in islice(reversed(node.spans.values()), _MOST_COMPARED):
            end = min(record.stop, stop)
            if end >= longest and _holds(record, sequence, end):
                found = [record] if end > longest else [*found, record]
                longest = end
        return found, longest

    def _begun_before(
        self, sequence: bytes, hashes: NDArray[np.uint64], start: int, stop: int
    ) -> tuple[list[SpanRecord], int]:
        """Completions of an earlier prompt that reach over ``start``: the environment left their head untrained."""
        for position in reversed(self._lengths.within(0, start)):
            if int(hashes[position]) in self._prompts:
                records, end = self._after_prompt(sequence, hashes, position, stop)
                if end > start:
                    return records, end
        return [], start


def _open_store(directory: Path, *, keep: bool) -> tuple[RecordStore | None, _Rows]:
    """The store of a run, or None with a warning when the directory cannot be used; and what earlier processes left
    there: nothing where any of it is damaged (a warning names the file), or without ``keep`` (it is removed)."""

    def opened() -> RecordStore:
        return RecordStore(directory / "ledger.sqlite", dict.fromkeys(_TABLES, int), owner="ledger")

    try:
        try:
            store = opened()
            if keep:
                return store, _read(store)
            store.close()
        except StorageInUseError:
            raise
        except StorageDamagedError as error:
            if keep:
                text = "The ledger begins empty: policy versions of tokens generated before this start are unknown"
                logger.warning("%s. %s", error, text)
        _remove(directory)
        return opened(), _Rows()
    except (StorageError, OSError) as error:
        logger.warning("the ledger will not survive a restart of this run: %s", error)
        return None, _Rows()


def _read(store: RecordStore) -> _Rows:
    """Closes the store, and raises ``StorageDamagedError``, when a row is damaged or missing."""
    try:
        tables = {name: [msgspec.msgpack.decode(value) for _, value in store.read(name)] for name in _TABLES}
        found = msgspec.convert(tables, _Rows)
        prompts = dict(found.prompts)
        if store.lost_rows or any(span[2] not in prompts for span in found.spans):
            raise StorageDamagedError(f"{store.path} and its copy are damaged: rows are missing")
        return found
    except (msgspec.MsgspecError, StorageDamagedError) as error:
        store.close()
        if isinstance(error, StorageDamagedError):
            raise
        raise StorageDamagedError(f"{store.path} holds a row that is not one of a ledger ({error})") from error


def _remove(directory: Path) -> None:
    for file in directory.glob("ledger*.sqlite*"):
        file.unlink(missing_ok=True)


def trained_spans(loss_mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """``[start, stop)`` of each run of True."""
    marks, spans, stop = loss_mask.tobytes() + b"\0", list[tuple[int, int]](), 0
    while (start := marks.find(1, stop)) >= 0:
        stop = marks.find(0, start)
        spans.append((start, stop))
    return spans


def prefix_hashes(token_ids: NDArray[np.int32], offset: int = 0) -> NDArray[np.uint64]:
    """64-bit hashes of all prefixes: entry p is that of the first p tokens, ``[T + 1]``. The sum, modulo 2^64, of a
    well mixed value of each (token, position) pair (splitmix64's finaliser, Steele et al. 2014), so that all prefixes
    come from one cumulative sum, and that of a prompt plus that of what follows it (``offset`` = length of the prompt)
    is that of both."""
    mixed = np.arange(offset, offset + len(token_ids) + 1, dtype=np.uint64) * _POSITION_FACTOR
    mixed[1:] += token_ids.astype(np.uint64) * _TOKEN_FACTOR
    mixed ^= mixed >> _S30
    mixed *= _MIX_1
    mixed ^= mixed >> _S27
    mixed *= _MIX_2
    mixed ^= mixed >> _S31
    mixed[0] = 0
    return np.add.accumulate(mixed, out=mixed)


def _note_branches(records: Iterable[SpanRecord], resumes: Runs) -> None:
    """Mark the records that name weights which a restart lost."""
    lasts = [last for _, last in resumes]
    for record in records:
        outlived = bisect_left(lasts, record.order)
        newest = max(version for version, _ in record.runs)
        lost_by = [number for number in range(outlived, len(resumes)) if newest > resumes[number][0]]
        if lost_by:
            record.branch = (lost_by[0], min(version for version, _ in resumes[outlived:]))


def _runs(generation: Generation) -> Runs:
    runs, count = generation.policy_version_runs, len(generation.token_ids)
    if sum(n for _, n in runs) != count:
        raise ValueError(f"policy_version_runs {runs} do not add up to {count} tokens")
    return runs


def _logprobs(generation: Generation) -> NDArray[np.float32]:
    """float32; NaN where the engine reports none."""
    if len(generation.logprobs) != len(generation.token_ids):
        return np.full(len(generation.token_ids), np.nan, dtype=LOGPROBS)
    return np.asarray(generation.logprobs, dtype=LOGPROBS)


def _holds(record: SpanRecord, sequence: bytes, stop: int) -> bool:
    """True when ``sequence`` is prompt and completion of ``record``, as far as position ``stop``, at most its own."""
    start = len(record.prompt.ids)
    written = record.ids[: stop * IDS.itemsize - start]
    return sequence.startswith(written, start) and sequence.startswith(record.prompt.ids)
