"""``trace.sqlite`` of a run directory: what became of every group that came in, and of every request to the policy.

Both backends say what happened (``TraceWriter``); one thread writes it, all that waits in one transaction, while the
run goes on. ``report/trace_reader.py`` reads it. A group has the id ``batch << 16 | index in the batch``, a sequence
``group << 16 | position``, so a batch that is taken again after a resume has the ids it had. States of both:
docs/view.md.
"""

import functools
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_verl.training.staleness import Applied, with_repaired_tokens
from atropos_verl.types import (
    NOT_TRAINED,
    UNKNOWN_VERSION,
    FloatArray,
    IntArray,
    SampleReport,
    ScoredGroup,
    SequenceMatch,
    TrainingSample,
)

logger = logging.getLogger(__name__)

NAME = "trace.sqlite"
BITS = 16
State = Literal["under_way", "trained", "stale", "quarantined", "filtered", "overlong", "given_up", "expired", "failed"]
Place = tuple[int, int]
"""Of a group: number of its batch in the journal, index in the batch."""
OfSequences = Mapping[tuple[int, int, int], FloatArray]
"""(batch, index, position in the group) → a value of each token [T]."""
F = TypeVar("F", bound=Callable[..., Any])
VERSION = 3
_LONGEST_REASON = 500
_MOST_WAITING = 1 << 15
"""Sequences and requests that wait for a slow disk; what comes beyond is not noted."""
_GATHER_SECONDS = 2.0
_SCHEMA = """
CREATE TABLE groups (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT, reason TEXT,
    size INTEGER, reward REAL, hash TEXT, weight INTEGER DEFAULT 1);
CREATE TABLE sequences (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT,
    reason TEXT, reward REAL, prompt_tokens INTEGER, tokens INTEGER, trained_tokens INTEGER, first_version INTEGER,
    last_version INTEGER, weight INTEGER DEFAULT 1);
CREATE TABLE data (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE requests (id INTEGER PRIMARY KEY, tokens INTEGER, version INTEGER, begun REAL, seconds REAL,
    prompt INTEGER, prompt_tokens INTEGER, session TEXT, reason TEXT, sequence INTEGER, weight INTEGER DEFAULT 1);
CREATE TABLE sessions (id TEXT PRIMARY KEY, state TEXT, reason TEXT);
CREATE TABLE thinned (environment INTEGER, state TEXT, groups INTEGER, sequences INTEGER);
"""
"""The id of a request is its number in the ledger, of one without an answer a negative number."""
_GROUP_ROW = "INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)"
TRAINED, POSTED, UNMATCHED = 1, 2, 4
_TRAINED_MARKS = (TRAINED, TRAINED | POSTED, TRAINED | POSTED | UNMATCHED)


class GroupData(msgspec.Struct, array_like=True):
    """The tokens of a group, sequence after sequence: T ids, of which N are trained, or would have been. What follows
    from these, text above all, is the reader's to make: few of many thousand groups are ever looked at."""

    sizes: list[int]
    """Tokens of each sequence."""
    ids: bytes
    """int32 [T]"""
    marks: bytes
    """uint8 [T]: ``TRAINED``; where that is not all that the environment posted as trained, ``POSTED`` is it, and
    ``UNMATCHED`` what nobody is known to have generated of it."""
    advantages: list[tuple[float, int]]
    """(value, length) of each stretch of the N, NaN: not known; empty: none is. ``versions`` alike."""
    versions: list[tuple[int, int]]
    logprobs: bytes
    """float32 [N] of the policy that sampled, NaN: not known; empty: none is."""
    trainer_logprobs: bytes
    """float32 [N] of the trainer before the update, alike."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A group whose samples are made, and that no step has trained on yet. Where it has no sequence, an empty one."""

    arrived: float
    posted: ScoredGroup
    ids: Sequence[IntArray]
    """Those of the samples; of what has none, as the ledger completed them."""
    matches: Sequence[SequenceMatch | None]
    samples: Sequence[TrainingSample | None]

    def pack(
        self, advantages: Sequence[FloatArray | None], trainer_logprobs: Sequence[FloatArray | None]
    ) -> tuple[list[tuple[int | None, ...]], bytes]:
        """The columns of each sequence from ``prompt_tokens`` to ``last_version``, and the ``GroupData``, with values
        [T] of each sequence that the step knows."""
        sizes = [len(ids) for ids in self.ids]
        marks = np.concatenate([self._marks(i, size) for i, size in enumerate(sizes)])
        trained = marks & TRAINED > 0

        def of_trained(rows: Sequence[FloatArray | IntArray | None], unknown: float) -> NDArray[Any]:
            """[N]; [0] where all rows are None."""
            if all(row is None for row in rows):
                return np.zeros(0)
            filled = [
                np.full(size, unknown) if row is None else row[:size] for row, size in zip(rows, sizes, strict=True)
            ]
            return np.concatenate(filled)[trained]

        versions = of_trained([None if match is None else match.versions for match in self.matches], UNKNOWN_VERSION)
        logprobs = of_trained([None if s is None else s.rollout_logprobs for s in self.samples], math.nan)
        data = GroupData(
            sizes=sizes,
            ids=np.concatenate(self.ids).astype("<i4").tobytes(),
            marks=marks.tobytes(),
            advantages=_stretches(of_trained(advantages, math.nan)),
            versions=_stretches(versions),
            logprobs=logprobs.astype("<f4").tobytes(),
            trainer_logprobs=of_trained(trainer_logprobs, math.nan).astype("<f4").tobytes(),
        )
        columns: list[tuple[int | None, ...]] = []
        written, first, stop = versions.tolist(), 0, 0
        for sample, size in zip(self.samples, sizes, strict=True):
            own, stop = data.marks[stop : stop + size], stop + size
            count = sum(own.count(mark) for mark in _TRAINED_MARKS)
            known = set(written[first : first + count]) - {UNKNOWN_VERSION}
            stated = None if sample is None else _stored(sample.policy_version)
            bounds = (min(known, default=stated), max(known, default=stated))
            columns.append((size - len(own.lstrip(b"\0")), size, 0 if sample is None else count, *bounds))
            first += count
        return columns, msgspec.msgpack.encode(data)

    def _marks(self, i: int, size: int) -> NDArray[np.uint8]:
        """[T] of sequence ``i``."""
        sample, match, masks = self.samples[i], self.matches[i], self.posted.masks
        if sample is not None and (match is None or not match.unmatched_tokens):
            return sample.loss_mask.view(np.uint8)  # which is all that was posted
        posted = np.zeros(size, np.bool_)
        if match is not None and match.repaired is not None:
            posted |= match.repaired.loss_mask[:size]
        elif i < len(masks) and len(masks[i]) >= size:  # those of a refused group need not fit
            posted |= masks[i][:size] != NOT_TRAINED
        posted[:1] = False  # nothing predicts the first token
        lost = posted & ~match.found[:size] if match is not None else np.zeros(size, np.bool_)
        trained = posted if sample is None else sample.loss_mask
        return trained * np.uint8(TRAINED) | posted * np.uint8(POSTED) | lost * np.uint8(UNMATCHED)


def _stretches(values: NDArray[Any]) -> list[tuple[Any, int]]:
    """Value and length of each stretch of equal ones (NaN is equal to NaN) in [N] of 64 bits each."""
    bits = values.view(np.int64)
    starts = [0, *((bits[1:] != bits[:-1]).nonzero()[0] + 1).tolist()] if len(bits) else []
    lengths = (stop - start for start, stop in pairwise([*starts, len(bits)]))
    return list(zip(values[starts].tolist(), lengths, strict=True))


def _noted(weight: Callable[..., int] = lambda *_: 0) -> Callable[[F], F]:
    """The call returns at once, and the writing thread makes it, in the order of the calls. ``weight`` of what it holds
    in memory, by its arguments; 0: it is small, and never left out."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def note(self: "TraceWriter", *about: Any, **named: Any) -> None:
            self._put(functools.partial(method, self, *about, **named), weight(*about))

        return cast(F, note)

    return decorate


class TraceWriter:
    """Writes the trace of one run. Every method returns at once, from any thread; the writing thread is a daemon. A
    disk that refuses ends the trace, with a line in the log, and not the run. ``most_bytes``: beyond it half of the
    groups of the older half go, with their requests; what is left of these counts twice (``weight``)."""

    def __init__(self, run_dir: Path, most_bytes: int) -> None:
        self.path = run_dir / NAME
        self.seconds = 0.0
        """Processor time of the writing thread."""
        self._most_bytes = most_bytes
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()
        self._jobs: list[tuple[float, Callable[[], None]]] = []
        self._waiting = 0
        self._now = 0.0
        self._thread: threading.Thread | None = None
        self._newest = 0
        self._is_over = False
        self._is_closing = threading.Event()

    def begin(self, step: int | None) -> int:
        """What earlier processes wrote is kept up to ``step``; what was trained on later is under way again. None: a
        run begins, and nothing is kept. What is noted before this is called is written once it is. Returns the number
        of the newest batch that is kept, 0 without one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="atropos-verl-trace", daemon=True)
            try:
                self._db = _open(self.path, step)
                self._newest = (self._db.execute("SELECT max(id) FROM groups").fetchone()[0] or 0) >> BITS
                self._thread.start()
            except (sqlite3.Error, OSError):
                self._end_trace()
        return self._newest

    def close(self) -> None:
        """Writes what waits. Idempotent."""
        self._is_closing.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(30.0)
        self._is_over = True

    @_noted(lambda _, groups: sum(map(len, groups)))
    def arrived(self, batch: int, groups: Sequence[ScoredGroup]) -> None:
        """A batch was fetched; ``batch`` is its number in the journal."""
        numbered = enumerate(groups[: 1 << BITS], batch << BITS)
        rows = [_group_row(id_, group, self._now, "under_way", None, None) for id_, group in numbered]
        # A batch that is taken again may be trained on in part, and a checkpoint holds that.
        self._db.executemany(f"INSERT OR IGNORE {_GROUP_ROW}", rows)

    @_noted(lambda places, posted, *_: sum(map(len, posted)))
    def collected(
        self,
        places: Sequence[Place],
        posted: Sequence[ScoredGroup],
        matches: Sequence[Sequence[SequenceMatch | None]],
        applied: Applied,
        report: SampleReport,
    ) -> None:
        """Samples were made of groups. Those that were left out end here."""
        refused = {bad.group.group_id: bad.reason for bad in report.quarantined}
        filtered = {group.group_id for group in report.filtered}
        completed = dict(zip(applied.kept, applied.groups, strict=True))
        by_place: dict[tuple[str, int], list[TrainingSample]] = {}
        for sample in reversed(report.samples):  # a group that was sent twice has one hash: the first comes last
            by_place.setdefault((sample.group_id, sample.sequence_index), []).append(sample)
        for index, (place, group, found) in enumerate(zip(places, posted, matches, strict=True)):
            id_, name = place[0] << BITS | place[1], group.group_id
            whole = completed[index] if index in completed else with_repaired_tokens(group, found)
            ends: tuple[State, str] | None = None
            if index not in completed:
                ends = "stale", "older than off_policy.max_staleness"
            elif name in refused:
                ends = "quarantined", refused[name]
            elif name in filtered:
                ends = "filtered", "left out by data.filter_path"
            numbers = range(max(len(group), 1))
            samples = [of.pop() if ends is None and (of := by_place.get((name, i))) else None for i in numbers]
            ids = [
                sample.token_ids if sample is not None else np.clip(row, -1 << 31, (1 << 31) - 1)
                for sample, row in zip(samples, whole.token_ids or [np.zeros(0, np.int64)], strict=True)
            ]
            self._held[id_] = _Held(self._now, group, ids, list(found) or [None], samples)
            if ends is not None:
                self._end([id_], None, *ends, {}, {})

    @_noted()
    def ended(
        self,
        places: Sequence[Place],
        step: int,
        state: State = "trained",
        *,
        reason: str | None = None,
        advantages: OfSequences | None = None,
        trainer_logprobs: OfSequences | None = None,
    ) -> None:
        """A step trained on groups. ``advantages``, ``trainer_logprobs``: where they are not those of the samples."""
        ids = [batch << BITS | index for batch, index in places]
        for id_ in (id_ for id_ in ids if id_ not in self._held):
            # It was refused; the step is the one whose batch it came in.
            self._db.execute("UPDATE groups SET step = ? WHERE id = ? AND state != 'under_way'", (step, id_))
            own = "UPDATE sequences SET step = ? WHERE id >= ? AND id < ? AND state != 'under_way'"
            self._db.execute(own, (step, id_ << BITS, id_ + 1 << BITS))
        held = [id_ for id_ in ids if id_ in self._held]
        self._end(held, step, state, reason, advantages or {}, trainer_logprobs or {})

    @_noted(lambda *_: 1)
    def request(
        self,
        records: Sequence[tuple[int, int, int]],
        prompt: int,
        prompt_tokens: int,
        begun: float,
        seconds: float,
        session: str | None = None,
        reason: str | None = None,
    ) -> None:
        """The policy answered a request, or did not (``reason``). ``records``: (number in the ledger, tokens, policy
        version) of each completion; ``prompt``: hash of its ids; ``begun``: seconds since the epoch."""
        about = (begun, seconds, prompt, prompt_tokens, session)
        rows: list[tuple[Any, ...]] = [(*record, *about, None) for record in records]
        if reason is not None:
            lowest = self._db.execute("SELECT min(id, 0) FROM requests ORDER BY id LIMIT 1").fetchone() or (0,)
            rows.append((lowest[0] - 1, None, None, *about, reason[:_LONGEST_REASON]))
        insert = "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, 1)"
        self._db.executemany(insert, rows)

    @_noted()
    def session(self, session: str, state: str, reason: str | None) -> None:
        """A session has ended: finished, aborted or expired."""
        self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (session, state, reason))

    def _put(self, job: Callable[[], None], weight: int) -> None:
        with self._lock:
            if self._is_over or (weight and self._waiting > _MOST_WAITING):
                return
            self._waiting += weight
            if weight and self._waiting > _MOST_WAITING:
                logger.warning("%s lacks a part of what happens now: the disk is too slow for it", self.path)
            self._jobs.append((time.time(), job))

    def _run(self) -> None:
        try:
            size = self._db.execute("PRAGMA page_size").fetchone()[0]
            is_over = False
            while not is_over:
                is_over = self._is_closing.wait(_GATHER_SECONDS)  # a transaction costs more than what is in it
                with self._lock:
                    jobs, self._jobs, self._waiting = self._jobs, [], 0
                with self._db:
                    for self._now, job in jobs:
                        self._do(job)
                    self._thin_out(size)
                self.seconds = time.thread_time()
            self._db.close()
        except Exception:  # noqa: BLE001 - the run must not end of it
            self._end_trace()

    def _end_trace(self) -> None:
        logger.exception("%s is written no further; training goes on", self.path)
        self._is_over, self._jobs = True, []

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except sqlite3.DatabaseError:
            raise
        except Exception:  # what came from outside holds a value that SQLite does not
            logger.exception("%s lacks a part of what happened", self.path)

    def _end(
        self,
        ids: Sequence[int],
        step: int | None,
        state: State,
        reason: str | None,
        advantages: OfSequences,
        trainer_logprobs: OfSequences,
    ) -> None:
        """Groups that are held end."""
        reason = None if reason is None else reason.encode("utf-8", "backslashreplace").decode()[:_LONGEST_REASON]
        ending = [(id_, self._held.pop(id_)) for id_ in ids]
        taken = [
            (id_ << BITS | i, order)
            for id_, held in ending
            for i, match in enumerate(held.matches)
            for order in (() if match is None else match.records)
        ]
        groups, sequences, packed = [], [], []
        for id_, held in ending:
            scores, environment, states = _scores(held.posted), _stored(held.posted.env_id), set()
            places = [(id_ >> BITS, id_ & (1 << BITS) - 1, i) for i in range(len(held.samples))]
            own_advantages = [
                None if sample is None else advantages.get(place, sample.advantages)
                for place, sample in zip(places, held.samples, strict=True)
            ]
            columns, data = held.pack(own_advantages, [trainer_logprobs.get(place) for place in places])
            for i, (sample, values) in enumerate(zip(held.samples, columns, strict=True)):
                own, why = state, reason
                if state == "trained" and sample is None:
                    own, why = "overlong", f"{values[1]} tokens, more than data.max_token_len"
                elif state == "trained" and not values[2]:
                    why = "it has no token to train on"
                states.add(own)
                sequences.append((id_ << BITS | i, held.arrived, step, environment, own, why, scores[i], *values))
            packed.append((id_, data))
            own_state = "overlong" if states == {"overlong"} else state
            groups.append(_group_row(id_, held.posted, held.arrived, own_state, reason, step))
        run = self._db.executemany
        run(f"INSERT OR REPLACE {_GROUP_ROW}", groups)
        run(f"INSERT OR REPLACE INTO sequences VALUES ({', '.join('?' * 12)}, 1)", sequences)
        run("INSERT OR REPLACE INTO data VALUES (?, ?)", packed)
        run("UPDATE requests SET sequence = ? WHERE id = ?", taken)

    def _thin_out(self, page_size: int) -> None:
        execute = self._db.execute
        pages, free = (execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        if (pages - free) * page_size <= self._most_bytes:
            return
        half = "SELECT id, arrived FROM groups ORDER BY id LIMIT 1 OFFSET (SELECT count(*) / 2 FROM groups)"
        if (found := execute(half).fetchone()) is None:
            return
        middle = found[0]
        began = execute("SELECT min(arrived) FROM groups WHERE id >= ?", (middle,)).fetchone()[0]
        # Every second one in the order of arrival, so that no environment, step or length is preferred.
        execute(
            "CREATE TEMP TABLE gone AS SELECT id, environment, state, size FROM "
            "(SELECT *, row_number() OVER (ORDER BY id) AS place FROM groups WHERE id < ?) WHERE place % 2",
            (middle,),
        )
        for statement, *values in (
            ("INSERT INTO thinned SELECT environment, state, count(*), sum(size) FROM gone GROUP BY 1, 2",),
            ("DELETE FROM data WHERE id IN (SELECT id FROM gone)",),
            (f"DELETE FROM requests WHERE sequence >> {BITS} IN (SELECT id FROM gone)",),
            (f"DELETE FROM sequences WHERE id >> {BITS} IN (SELECT id FROM gone)",),
            ("DELETE FROM groups WHERE id IN (SELECT id FROM gone)",),
            ("DELETE FROM requests WHERE sequence IS NULL AND begun < ? AND id % 2", began),
            ("UPDATE requests SET weight = 2 * weight WHERE begun < ?", began),
            ("UPDATE groups SET weight = 2 * weight WHERE id < ?", middle),
            (f"UPDATE sequences SET weight = 2 * weight WHERE id < ? << {BITS}", middle),
            ("DROP TABLE gone",),
        ):
            execute(statement, values)


def _group_row(
    id_: int, group: ScoredGroup, arrived: float, state: str, reason: str | None, step: int | None
) -> tuple[Any, ...]:
    scores = [score for score in _scores(group) if score is not None]
    mean = sum(scores) / len(scores) if scores else None
    return (id_, arrived, step, _stored(group.env_id), state, reason, len(group), mean, group.group_id)


def _stored(value: int | None) -> int | None:
    """SQLite has 64 bits; what came from outside may have more."""
    return value if value is not None and abs(value) < 1 << 63 else None


def _scores(group: ScoredGroup) -> list[float | None]:
    scores = [score if math.isfinite(score) else None for score in group.scores[: len(group)].tolist()]
    return scores + [None] * (max(len(group), 1) - len(scores))


def _open(path: Path, step: int | None) -> sqlite3.Connection:
    """Raises ``sqlite3.Error`` and ``OSError``. A file that is no such database begins anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if step is None:
        _remove(path)
    try:
        return _connect(path, step)
    except sqlite3.OperationalError:  # it is locked, the disk is full: what it holds is not lost
        raise
    except sqlite3.DatabaseError as error:
        logger.warning("%s cannot be read (%s): it begins anew", path, error)
        _remove(path)
        return _connect(path, step)


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _connect(path: Path, step: int | None) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it is of version {version}, this program writes {VERSION}")
        if version == 0:
            db.executescript(f"{_SCHEMA} PRAGMA user_version = {VERSION};")
        with db:
            for table in ("groups", "sequences"):
                db.execute(f"UPDATE {table} SET state = 'under_way', step = NULL WHERE step > ?", (step or 0,))
        return db
    except BaseException:
        db.close()
        raise
