"""``trace.sqlite`` of a run directory: what became of every group that came in, and of every request to the policy.

Both backends say what happened (``TraceWriter``); one thread writes it, all that waits in one transaction, while the
run goes on. ``report/trace_reader.py`` reads it. A group has the id ``batch << 16 | index in the batch``, a sequence
``group << 16 | position``, so a batch that is taken again after a resume has the ids it had. States of both:
docs/view.md.
"""

import functools
import logging
import math
import queue
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
VERSION = 2
_LONGEST_REASON = 500
_MOST_WAITING = 8192
"""Sequences and requests that wait for a slow disk; what comes beyond is not noted."""
_GATHER_SECONDS = 0.5
_SCHEMA = """
CREATE TABLE groups (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT, reason TEXT,
    size INTEGER, reward REAL, hash TEXT, weight INTEGER DEFAULT 1);
CREATE TABLE sequences (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT,
    reason TEXT, reward REAL, prompt_tokens INTEGER, tokens INTEGER, trained_tokens INTEGER, first_version INTEGER,
    last_version INTEGER, latency REAL, session TEXT, weight INTEGER DEFAULT 1);
CREATE TABLE data (id INTEGER PRIMARY KEY, data BLOB);
CREATE VIRTUAL TABLE texts USING fts5(text, detail=none, columnsize=0);
CREATE TABLE requests (id INTEGER PRIMARY KEY, record INTEGER UNIQUE, begun REAL, seconds REAL, prompt INTEGER,
    prompt_tokens INTEGER, tokens INTEGER, version INTEGER, session TEXT, sequence INTEGER, reason TEXT,
    weight INTEGER DEFAULT 1);
CREATE TABLE sessions (id TEXT PRIMARY KEY, state TEXT, reason TEXT);
CREATE TABLE thinned (environment INTEGER, state TEXT, groups INTEGER, sequences INTEGER);
"""


class SequenceData(msgspec.Struct, array_like=True):
    """The tokens of one sequence, packed: T ids. The arrays are about the last N of them: the first of these is the
    first one that is trained, or would have been."""

    ids: bytes
    """uint32 [T]"""
    trained: bytes
    """bool [N]"""
    unmatched: bytes
    """bool [N]: nobody is known to have generated it; empty: none."""
    advantages: bytes
    """float32 [N], or [1] where those of all trained tokens are equal; empty: not known."""
    logprobs: bytes
    """float32 [N], NaN: not known; of the policy that sampled; empty: not known."""
    trainer_logprobs: bytes
    """float32 [N]: the trainer's, before the update; empty: not known."""
    versions: list[tuple[int, int]]
    """(policy version, tokens it wrote) of the N, in order; empty: not known."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A group whose samples are made, and that no step has trained on yet."""

    arrived: float
    posted: ScoredGroup
    """As it came."""
    whole: ScoredGroup
    """As the ledger completed it, where it got that far."""
    matches: Sequence[SequenceMatch | None]
    samples: Sequence[TrainingSample | None]

    def pack(
        self, i: int, advantages: FloatArray | None, trainer_logprobs: FloatArray | None
    ) -> tuple[tuple[Any, ...], bytes]:
        """The columns of sequence ``i`` from ``prompt_tokens`` to ``last_version``, and its ``SequenceData``.
        ``advantages`` and ``trainer_logprobs`` [T] are the step's; without, those of the sample, or not known."""
        sample, match, group = self.samples[i], self.matches[i], self.whole
        ids = np.clip(group.token_ids[i], 0, (1 << 32) - 1) if sample is None else sample.token_ids
        size = len(ids)
        marks = group.masks[i][:size] != NOT_TRAINED if i < len(group.masks) else np.zeros(0, dtype=np.bool_)
        if len(marks) < size:
            marks = np.zeros(size, dtype=np.bool_)
        trained = marks if sample is None else sample.loss_mask
        if match is not None:
            marks = self.posted.masks[i][:size] != NOT_TRAINED if match.repaired is None else match.repaired.loss_mask
        shown = trained | marks
        shown[:1] = False  # nothing predicts the first token
        start = int(shown.argmax()) if size else 0
        start = start if size and shown[start] else size
        trained, lost = trained[start:], b""
        if match is not None and (missing := shown[start:] > match.found[start:size]).any():
            lost = missing.tobytes()
        count = 0 if sample is None else int(np.count_nonzero(trained))
        if advantages is None and sample is not None:
            advantages = sample.advantages
        versions = None if group.token_versions is None else group.token_versions[i]
        runs = [] if versions is None or start == size else _runs(versions[start:size])
        known = [version for version, _ in runs if version != UNKNOWN_VERSION]
        stated = None if sample is None else _stored(sample.policy_version)
        data = SequenceData(
            ids=ids.astype("<u4").tobytes(),
            trained=trained.tobytes(),
            unmatched=lost,
            advantages=b"" if advantages is None or not trained.any() else _one_or_all(advantages[start:size], trained),
            logprobs=_packed(None if sample is None else sample.rollout_logprobs, start),
            trainer_logprobs=_packed(trainer_logprobs, start),
            versions=runs,
        )
        columns = (start, size, count, min(known, default=stated), max(known, default=stated))
        return columns, msgspec.msgpack.encode(data)


def _packed(values: FloatArray | None, start: int) -> bytes:
    return b"" if values is None else values[start:].astype("<f4").tobytes()


def _one_or_all(values: FloatArray, trained: NDArray[np.bool_]) -> bytes:
    own = values[trained]
    return (own[:1] if (own == own[0]).all() else values).astype("<f4").tobytes()


def _runs(values: IntArray) -> list[tuple[int, int]]:
    """Value and length of each stretch of equal ones in [N], N at least 1."""
    if (values == values[0]).all():
        return [(int(values[0]), len(values))]
    edges = [0, *((values[1:] != values[:-1]).nonzero()[0] + 1).tolist(), len(values)]
    return [(int(values[a]), b - a) for a, b in pairwise(edges)]


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
    """Writes the trace of one run. Every method returns at once, from any thread; the writing thread is a daemon.

    A disk that refuses ends the trace, with a line in the log, and not the run. ``most_bytes``: beyond it half of the
    groups of the older half go, with their requests; what is left of these counts twice (``weight``).
    """

    def __init__(self, run_dir: Path, most_bytes: int) -> None:
        self.path = run_dir / NAME
        self.decode: Any = None
        """Token ids → text, special tokens shown; None: no text is kept."""
        self.seconds = 0.0
        """Processor time of the writing thread."""
        self._most_bytes = most_bytes
        self._held: dict[int, _Held] = {}
        self._jobs: queue.SimpleQueue[tuple[float, int, Callable[[], None] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
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
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put((0.0, 0, None))
            self._is_closing.set()
            self._thread.join(30.0)
        self._is_over = True

    # -- what happened -----------------------------------------------------------------------------------------------

    @_noted(lambda _, groups: sum(map(len, groups)))
    def arrived(self, batch: int, groups: Sequence[ScoredGroup]) -> None:
        """A batch was fetched; ``batch`` is its number in the journal."""
        ended = "SELECT id FROM groups WHERE id >= ? AND id < ? AND step IS NOT NULL"
        # A batch that is taken again may be trained on in part, and a checkpoint holds that.
        known = {id_ for (id_,) in self._db.execute(ended, (batch << BITS, batch + 1 << BITS))}
        new = [(id_, group) for id_, group in enumerate(groups[: 1 << BITS], batch << BITS) if id_ not in known]
        self._put_groups([(id_, group, self._now, "under_way", None, None) for id_, group in new])
        rows = []
        for id_, group in new:
            about, scores = (self._now, _stored(group.env_id)), _scores(group)
            sizes = [len(ids) for ids in group.token_ids]
            rows += [(id_ << BITS | i, *about, scores[i], size) for i, size in enumerate(sizes)]
            rows += [] if sizes else [(id_ << BITS, *about, None, 0)]
        self._db.executemany(
            "INSERT OR REPLACE INTO sequences (id, arrived, environment, state, reward, tokens) "
            "VALUES (?, ?, ?, 'under_way', ?, ?)",
            rows,
        )

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
            samples = [
                of.pop() if ends is None and (of := by_place.get((name, i))) else None for i in range(len(group))
            ]
            self._held[id_] = _Held(self._now, group, whole, found, samples)
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
        """The policy answered a request, or did not (``reason``).

        Args:
            records: (number in the ledger, tokens, policy version) of each completion.
            prompt: hash of its ids.
            begun: seconds since the epoch; it took ``seconds``.
        """
        about = (begun, seconds, prompt, prompt_tokens, session)
        rows: list[tuple[Any, ...]] = [(*record, *about, None) for record in records]
        rows += [(None, None, None, *about, reason[:_LONGEST_REASON])] if reason is not None else []
        self._db.executemany(
            "INSERT OR REPLACE INTO requests "
            "(record, tokens, version, begun, seconds, prompt, prompt_tokens, session, reason) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    @_noted()
    def session(self, session: str, state: str, reason: str | None) -> None:
        """A session has ended: finished, aborted or expired."""
        self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (session, state, reason))

    # -- the writing thread ------------------------------------------------------------------------------------------

    def _put(self, job: Callable[[], None], weight: int) -> None:
        with self._lock:
            if self._is_over or (weight and self._waiting > _MOST_WAITING):
                return
            self._waiting += weight
            if weight and self._waiting > _MOST_WAITING:
                logger.warning("%s lacks a part of what happens now: the disk is too slow for it", self.path)
        self._jobs.put((time.time(), weight, job))

    def _run(self) -> None:
        try:
            size = self._db.execute("PRAGMA page_size").fetchone()[0]
            is_over = False
            while not is_over:
                jobs = [self._jobs.get()]
                self._is_closing.wait(_GATHER_SECONDS)  # a transaction costs more than what one request adds to it
                while not self._jobs.empty():
                    jobs.append(self._jobs.get())
                with self._db:
                    for self._now, _, job in jobs:
                        if job is None:
                            is_over = True
                        else:
                            self._do(job)
                    self._thin_out(size)
                with self._lock:
                    self._waiting -= sum(weight for _, weight, _ in jobs)
                self.seconds = time.thread_time()
            self._db.close()
        except Exception:  # noqa: BLE001 - the run must not end of it
            self._end_trace()

    def _end_trace(self) -> None:
        logger.exception("%s is written no further; training goes on", self.path)
        self._is_over, self._jobs = True, queue.SimpleQueue()

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except sqlite3.DatabaseError:
            raise
        except Exception:  # what came from outside holds a value that SQLite does not
            logger.exception("%s lacks a part of what happened", self.path)

    def _put_groups(self, rows: Sequence[tuple[int, ScoredGroup, float, str, str | None, int | None]]) -> None:
        values = []
        for id_, group, arrived, state, reason, step in rows:
            scores = [score for score in _scores(group) if score is not None]
            mean = sum(scores) / len(scores) if scores else None
            about = (_stored(group.env_id), state, reason, len(group), mean, group.group_id)
            values.append((id_, arrived, step, *about))
        self._db.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)", values)

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
        ending = {id_: self._held.pop(id_) for id_ in ids}
        taken = [
            (id_ << BITS | i, order)
            for id_, held in ending.items()
            for i, match in enumerate(held.matches)
            for order in (() if match is None else match.records)
        ]
        answers = self._db.execute(
            "SELECT record, begun, begun + seconds, session FROM requests "
            "WHERE record IN (SELECT value FROM json_each(?)) AND seconds IS NOT NULL",
            (msgspec.json.encode([order for _, order in taken]).decode(),),
        )
        known = {record: about for record, *about in answers}
        requests: dict[int, list[Any]] = {}
        for key, order in taken:
            requests.setdefault(key, []).extend([known[order]] if order in known else [])
        groups, sequences, packed, texts = [], [], [], []
        for id_, held in ending.items():
            scores, environment, states = _scores(held.posted), _stored(held.posted.env_id), set()
            for i, sample in enumerate(held.samples):
                key, place = id_ << BITS | i, (id_ >> BITS, id_ & (1 << BITS) - 1, i)
                values, data = held.pack(i, advantages.get(place), trainer_logprobs.get(place))
                own, why = state, reason
                if state == "trained" and sample is None:
                    own, why = "overlong", f"{values[1]} tokens, more than data.max_token_len"
                elif state == "trained" and not values[2]:
                    why = "it has no token to train on"
                states.add(own)
                latency = session = None
                if of := requests.get(key):
                    latency = max(end for _, end, _ in of) - min(begun for begun, _, _ in of)
                    session = next((name for _, _, name in of if name is not None), None)
                about = (held.arrived, step, environment, own, why, scores[i])
                sequences.append((key, *about, *values, latency, session))
                packed.append((key, data))
                if self.decode is not None:
                    ids_ = held.whole.token_ids[i] if sample is None else sample.token_ids
                    texts.append((key, self.decode(np.maximum(ids_, 0).tolist())))
            own_state = "overlong" if states == {"overlong"} else state
            groups.append((id_, held.posted, held.arrived, own_state, reason, step))
        self._put_groups(groups)
        run = self._db.executemany
        run(f"INSERT OR REPLACE INTO sequences VALUES ({', '.join('?' * 14)}, 1)", sequences)
        run("INSERT OR REPLACE INTO data VALUES (?, ?)", packed)
        run("INSERT OR REPLACE INTO texts (rowid, text) VALUES (?, ?)", texts)
        run("UPDATE requests SET sequence = ? WHERE record = ?", taken)

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
        of_sequence = f"IN (SELECT s.id FROM gone JOIN sequences AS s ON s.id >> {BITS} = gone.id)"
        for statement, *values in (
            ("INSERT INTO thinned SELECT environment, state, count(*), sum(size) FROM gone GROUP BY 1, 2",),
            (f"DELETE FROM texts WHERE rowid {of_sequence}",),
            (f"DELETE FROM data WHERE id {of_sequence}",),
            (f"DELETE FROM requests WHERE sequence {of_sequence}",),
            (f"DELETE FROM sequences WHERE id >> {BITS} IN (SELECT id FROM gone)",),
            ("DELETE FROM groups WHERE id IN (SELECT id FROM gone)",),
            ("DELETE FROM requests WHERE sequence IS NULL AND begun < ? AND id % 2", began),
            ("UPDATE requests SET weight = 2 * weight WHERE begun < ?", began),
            ("UPDATE groups SET weight = 2 * weight WHERE id < ?", middle),
            (f"UPDATE sequences SET weight = 2 * weight WHERE id < ? << {BITS}", middle),
            ("DROP TABLE gone",),
        ):
            execute(statement, values)


def _stored(value: int | None) -> int | None:
    """SQLite has 64 bits; what came from outside may have more."""
    return value if value is not None and abs(value) < 1 << 63 else None


def _scores(group: ScoredGroup) -> list[float | None]:
    scores = [score if math.isfinite(score) else None for score in group.scores[: len(group)].tolist()]
    return scores + [None] * (len(group) - len(scores))


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
