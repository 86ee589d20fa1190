"""``trace.sqlite`` of a run directory: what became of every group that came in, and of every request to the policy.

Both backends say what happened (``TraceWriter``); one thread writes it, all that waits in one transaction, while the
run goes on. ``report/trace_reader.py`` reads it. A group has the id ``batch << 16 | index in the batch``, a sequence
``group << 16 | position``, so a batch that is taken again after a resume has the ids it had. States of both:
docs/view.md.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

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
_VERSION = 1
_LONGEST_REASON = 500
_MOST_GROUPS = 1 << BITS
_SCHEMA = """
CREATE TABLE groups (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT, reason TEXT,
    size INTEGER, reward REAL, hash TEXT, weight INTEGER DEFAULT 1);
CREATE TABLE sequences (id INTEGER PRIMARY KEY, arrived REAL, step INTEGER, environment INTEGER, state TEXT,
    reason TEXT, reward REAL, prompt_tokens INTEGER, tokens INTEGER, trained_tokens INTEGER, first_version INTEGER,
    last_version INTEGER, latency REAL, session TEXT, weight INTEGER DEFAULT 1);
CREATE TABLE data (id INTEGER PRIMARY KEY, data BLOB);
CREATE VIRTUAL TABLE texts USING fts5(text);
CREATE TABLE requests (id INTEGER PRIMARY KEY, record INTEGER UNIQUE, begun REAL, seconds REAL, prompt INTEGER,
    prompt_tokens INTEGER, tokens INTEGER, version INTEGER, session TEXT, sequence INTEGER, reason TEXT,
    weight INTEGER DEFAULT 1);
CREATE TABLE sessions (id TEXT PRIMARY KEY, state TEXT, reason TEXT);
CREATE TABLE thinned (environment INTEGER, state TEXT, groups INTEGER, sequences INTEGER);
"""


class SequenceData(msgspec.Struct, array_like=True):
    """The tokens of one sequence, packed: T ids, of which N are ``shown`` (trained, or would have been)."""

    ids: bytes
    """uint32 [T]"""
    shown: list[tuple[int, int]]
    """Spans ``[start, stop)`` of the N tokens that the arrays below are about, in order."""
    trained: bytes
    """bool [N]"""
    unmatched: bytes
    """bool [N]: nobody is known to have generated it; empty: none."""
    advantages: bytes
    """float32 [N], or [1] where all are equal; empty: not known."""
    logprobs: bytes
    """float32 [N], NaN: not known; of the policy that sampled; empty: not known."""
    trainer_logprobs: bytes
    """float32 [N]: the trainer's, before the update; empty: not known."""
    versions: list[tuple[int, int]]
    """(policy version, tokens it wrote) of the N, in order; empty: not known."""


@dataclass(slots=True)
class _Row:
    """A sequence on its way to the file."""

    sample: TrainingSample | None
    group: ScoredGroup
    """As the ledger completed it, where it got that far."""
    match: SequenceMatch | None
    posted: ScoredGroup
    """As it came."""
    position: int
    values: dict[str, Any] = field(default_factory=dict)

    def pack(self, advantages: FloatArray | None, trainer_logprobs: FloatArray | None) -> SequenceData:
        """Fills ``values`` and packs the tokens. ``advantages`` and ``trainer_logprobs``: [T], the step's own."""
        sample, match, i = self.sample, self.match, self.position
        ids = self.group.token_ids[i] if sample is None else sample.token_ids
        size = len(ids)
        marks = np.zeros(size, dtype=np.bool_)
        if i < len(self.group.masks) and len(mask := self.group.masks[i]) >= size:
            marks = mask[:size] != NOT_TRAINED
        marks[:1] = False
        trained = marks if sample is None else sample.loss_mask
        shown, found = trained | marks, None
        if match is not None:
            posted = self.posted.masks[i] != NOT_TRAINED if match.repaired is None else match.repaired.loss_mask
            shown, found = shown | posted[:size], match.found[:size]
            shown[:1] = False
        versions = None if self.group.token_versions is None else self.group.token_versions[i]
        versions = None if versions is None else versions[:size][shown]
        known = np.zeros(0) if versions is None else versions[versions != UNKNOWN_VERSION]
        stated = None if sample is None else sample.policy_version
        first, last = (int(known.min()), int(known.max())) if known.size else (stated, stated)
        self.values |= {
            "prompt_tokens": int(shown.argmax()) if shown.any() else size,
            "tokens": size,
            "trained_tokens": int(trained.sum()) if sample is not None else 0,
            "first_version": first,
            "last_version": last,
        }
        if advantages is None and sample is not None:
            advantages = sample.advantages
        logprobs = None if sample is None else sample.rollout_logprobs
        lost = np.zeros(0, dtype=np.bool_) if found is None else ~found[shown]
        return SequenceData(
            ids=np.clip(ids, 0, (1 << 32) - 1).astype("<u4").tobytes(),
            shown=_spans(shown),
            trained=trained[shown].tobytes(),
            unmatched=lost.tobytes() if lost.any() else b"",
            advantages=_packed(advantages, shown, trained, may_be_one=True),
            logprobs=_packed(logprobs, shown, trained),
            trainer_logprobs=_packed(trainer_logprobs, shown, trained),
            versions=[] if versions is None else _runs(versions),
        )


def _packed(
    values: FloatArray | None, shown: NDArray[np.bool_], trained: NDArray[np.bool_], *, may_be_one: bool = False
) -> bytes:
    if values is None or not trained.any():
        return b""
    chosen = np.where(trained, values[: len(shown)], np.nan)[shown].astype("<f4")
    own = chosen[~np.isnan(chosen)]
    is_one = may_be_one and own.size and (own == own[0]).all()
    return (own[:1] if is_one else chosen).tobytes()


def _spans(marks: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(marks, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _runs(values: IntArray) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(int(values[a]), b - a) for a, b in pairwise(edges) if b > a]


@dataclass(slots=True)
class _Held:
    """A group whose samples are made, and that no step has trained on yet."""

    posted: ScoredGroup
    arrived: float
    rows: list[_Row]


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
        self._jobs: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="atropos-verl-trace", daemon=True)
        self._begun = False

    def begin(self, step: int | None) -> None:
        """What earlier processes wrote is kept up to ``step``; what was trained on later is under way again. None: a
        run begins, and nothing is kept. What is noted before this is called is written once it is."""
        if not self._begun:
            self._begun = True
            self._open_at = step
            self._thread.start()

    def close(self) -> None:
        """Writes what waits. Idempotent."""
        if self._begun and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(30.0)

    # -- what happened -----------------------------------------------------------------------------------------------

    def arrived(self, batch: int, groups: Sequence[ScoredGroup]) -> None:
        """A batch was fetched; ``batch`` is its number in the journal."""
        self._jobs.put((self._write_arrived, batch, groups, time.time()))

    def collected(
        self,
        places: Sequence[tuple[int, int]],
        posted: Sequence[ScoredGroup],
        matches: Sequence[Sequence[SequenceMatch | None]],
        applied: Applied,
        report: SampleReport,
    ) -> None:
        """Samples were made of groups, each of a place (batch, index in it). Those that were left out end here."""
        self._jobs.put((self._write_collected, places, posted, matches, applied, report, time.time()))

    def ended(
        self,
        places: Iterable[tuple[int, int]],
        step: int,
        state: State = "trained",
        *,
        reason: str | None = None,
        advantages: Mapping[tuple[int, int, int], FloatArray] | None = None,
        trainer_logprobs: Mapping[tuple[int, int, int], FloatArray] | None = None,
    ) -> None:
        """A step trained on groups. ``advantages`` and ``trainer_logprobs`` [T] by (batch, index, position), where they
        are not those of the samples."""
        self._jobs.put((self._write_ended, list(places), step, state, reason, advantages or {}, trainer_logprobs or {}))

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
        about = (begun, seconds, prompt, prompt_tokens)
        rows: list[tuple[Any, ...]] = [
            (record, *about, tokens, version, session, None) for record, tokens, version in records
        ]
        rows += [(None, *about, None, None, session, reason[:_LONGEST_REASON])] if reason is not None else []
        self._jobs.put((self._write_requests, rows))

    def session(self, session: str, state: str, reason: str | None) -> None:
        """A session has ended: finished, aborted or expired."""
        self._jobs.put((self._write_session, session, state, reason))

    # -- the writing thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._db = _open(self.path, self._open_at)
            size = self._db.execute("PRAGMA page_size").fetchone()[0]
            is_over = False
            while not is_over:
                jobs = [self._jobs.get()]
                while not self._jobs.empty():
                    jobs.append(self._jobs.get())
                with self._db:
                    for job in jobs:
                        if job is None:
                            is_over = True
                        else:
                            self._do(*job)
                    self._thin_out(size)
                self.seconds = time.thread_time()
            self._db.close()
        except Exception:  # the run must not end of it
            logger.exception("%s is written no further; training goes on", self.path)
            self._jobs = _Nowhere()

    def _do(self, write: Callable[..., None], *about: Any) -> None:
        try:
            write(*about)
        except sqlite3.DatabaseError:
            raise
        except Exception:  # what came from outside holds a value that SQLite does not
            logger.exception("%s lacks a part of what happened", self.path)

    def _write_arrived(self, batch: int, groups: Sequence[ScoredGroup], now: float) -> None:
        ended = "SELECT id FROM groups WHERE id >= ? AND id < ? AND step IS NOT NULL"
        # A batch that is taken again may be trained on in part, and a checkpoint holds that.
        known = {id_ for (id_,) in self._db.execute(ended, (batch << BITS, batch + 1 << BITS))}
        for index, group in enumerate(groups[:_MOST_GROUPS]):
            id_ = batch << BITS | index
            if id_ in known:
                continue
            self._put_group(id_, group, now, "under_way", None, None)
            scores = _scores(group)
            rows = [(id_ << BITS | i, now, group.env_id, scores[i], len(ids)) for i, ids in enumerate(group.token_ids)]
            self._db.executemany(
                "INSERT OR REPLACE INTO sequences (id, arrived, environment, state, reward, tokens) "
                "VALUES (?, ?, ?, 'under_way', ?, ?)",
                rows or [(id_ << BITS, now, group.env_id, None, 0)],
            )

    def _put_group(
        self, id_: int, group: ScoredGroup, now: float, state: str, reason: str | None, step: int | None
    ) -> None:
        scores = [score for score in _scores(group) if score is not None]
        mean = sum(scores) / len(scores) if scores else None
        values = (id_, now, step, group.env_id, state, reason, len(group), mean, group.group_id)
        self._db.execute(
            "INSERT OR REPLACE INTO groups (id, arrived, step, environment, state, reason, size, reward, hash) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )

    def _write_collected(
        self,
        places: Sequence[tuple[int, int]],
        posted: Sequence[ScoredGroup],
        matches: Sequence[Sequence[SequenceMatch | None]],
        applied: Applied,
        report: SampleReport,
        now: float,
    ) -> None:
        refused = {bad.group.group_id: bad.reason for bad in report.quarantined}
        filtered = {group.group_id for group in report.filtered}
        completed = dict(zip(applied.kept, applied.groups, strict=True))
        by_place: dict[tuple[str, int], list[TrainingSample]] = {}
        for sample in reversed(report.samples):  # a group that was sent twice has one hash: the first comes last
            by_place.setdefault((sample.group_id, sample.sequence_index), []).append(sample)
        for index, (place, group, found) in enumerate(zip(places, posted, matches, strict=True)):
            id_ = place[0] << BITS | place[1]
            whole = completed[index] if index in completed else with_repaired_tokens(group, found)
            ends = group.group_id in refused or group.group_id in filtered or index not in completed
            rows = []
            for i in range(len(group)):
                of = [] if ends else by_place.get((group.group_id, i), [])
                rows.append(_Row(of.pop() if of else None, whole, found[i], group, i))
            self._held[id_] = _Held(group, now, rows)
            if index not in completed:
                self._end(id_, None, "stale", "older than off_policy.max_staleness", {}, {})
            elif group.group_id in refused:
                self._end(id_, None, "quarantined", refused[group.group_id], {}, {})
            elif group.group_id in filtered:
                self._end(id_, None, "filtered", "left out by data.filter_path", {}, {})

    def _write_ended(
        self,
        places: Sequence[tuple[int, int]],
        step: int,
        state: State,
        reason: str | None,
        advantages: Mapping[tuple[int, int, int], FloatArray],
        trainer_logprobs: Mapping[tuple[int, int, int], FloatArray],
    ) -> None:
        for batch, index in places:
            id_ = batch << BITS | index
            own: list[dict[int, FloatArray]] = [
                {i: values for i in range(len(held.rows)) if (values := given.get((batch, index, i))) is not None}
                if (held := self._held.get(id_)) is not None
                else {}
                for given in (advantages, trainer_logprobs)
            ]
            if id_ in self._held:
                self._end(id_, step, state, reason, *own)
            else:  # it was refused; the step is the one whose batch it came in
                self._db.execute("UPDATE groups SET step = ? WHERE id = ?", (step, id_))
                own_ids = (step, id_ << BITS, id_ + 1 << BITS)
                self._db.execute("UPDATE sequences SET step = ? WHERE id >= ? AND id < ?", own_ids)

    def _end(
        self,
        id_: int,
        step: int | None,
        state: State,
        reason: str | None,
        advantages: Mapping[int, FloatArray],
        trainer_logprobs: Mapping[int, FloatArray],
    ) -> None:
        held = self._held.pop(id_)
        reason = None if reason is None else reason.encode("utf-8", "backslashreplace").decode()[:_LONGEST_REASON]
        records = [() if row.match is None else row.match.records for row in held.rows]
        known = self._requests_of([order for orders in records for order in orders])
        sequences, packed, texts, taken = [], [], [], []
        scores = _scores(held.posted)
        states = []
        for i, (row, orders) in enumerate(zip(held.rows, records, strict=True)):
            data = row.pack(advantages.get(i), trainer_logprobs.get(i))
            own, why = state, reason
            if state == "trained" and row.sample is None:
                own, why = "overlong", f"{row.values['tokens']} tokens, more than data.max_token_len"
            elif state == "trained" and not row.values["trained_tokens"]:
                why = "it has no token to train on"
            states.append(own)
            requests = [known[order] for order in orders if order in known]
            latency = max(b + s for b, s, _ in requests) - min(b for b, _, _ in requests) if requests else None
            session = next((session for _, _, session in requests if session is not None), None)
            key, values = id_ << BITS | i, row.values
            sequences.append(
                (key, held.arrived, step, held.posted.env_id, own, why, scores[i], *values.values(), latency, session)
            )
            packed.append((key, msgspec.msgpack.encode(data)))
            if self.decode is not None:
                texts.append((key, self.decode(np.frombuffer(data.ids, "<u4").tolist())))
            taken += [(key, order) for order in orders]
        own_state = "overlong" if states and set(states) == {"overlong"} else state
        self._put_group(id_, held.posted, held.arrived, own_state, reason, step)
        run = self._db.executemany
        run(f"INSERT OR REPLACE INTO sequences VALUES ({', '.join('?' * 14)}, 1)", sequences)
        run("INSERT OR REPLACE INTO data VALUES (?, ?)", packed)
        run("INSERT OR REPLACE INTO texts (rowid, text) VALUES (?, ?)", texts)
        run("UPDATE requests SET sequence = ? WHERE record = ?", taken)

    def _requests_of(self, records: Sequence[int]) -> dict[int, tuple[float, float, str | None]]:
        rows = self._db.execute(
            "SELECT record, begun, seconds, session FROM requests "
            "WHERE record IN (SELECT value FROM json_each(?)) AND seconds IS NOT NULL",
            (msgspec.json.encode(records).decode(),),
        )
        return {record: (begun, seconds, session) for record, begun, seconds, session in rows}

    def _write_requests(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO requests "
            "(record, begun, seconds, prompt, prompt_tokens, tokens, version, session, reason) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def _write_session(self, session: str, state: str, reason: str | None) -> None:
        self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (session, state, reason))

    def _thin_out(self, page_size: int) -> None:
        execute = self._db.execute
        used = [execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")]
        if (used[0] - used[1]) * page_size <= self._most_bytes:
            return
        middle = execute(
            "SELECT id FROM groups ORDER BY id LIMIT 1 OFFSET (SELECT count(*) / 2 FROM groups)"
        ).fetchone()
        if middle is None:
            return
        began = execute("SELECT min(arrived) FROM groups WHERE id >= ?", middle).fetchone()[0]
        # Every second one in the order of arrival, so that no environment, step or length is preferred.
        execute(
            "CREATE TEMP TABLE gone AS SELECT id, environment, state, size FROM "
            "(SELECT *, row_number() OVER (ORDER BY id) AS place FROM groups WHERE id < ?) WHERE place % 2",
            middle,
        )
        execute(
            "INSERT INTO thinned SELECT environment, state, count(*), sum(size) FROM gone GROUP BY environment, state"
        )
        of_sequence = f"IN (SELECT s.id FROM gone JOIN sequences AS s ON s.id >> {BITS} = gone.id)"
        execute(f"DELETE FROM texts WHERE rowid {of_sequence}")
        execute(f"DELETE FROM data WHERE id {of_sequence}")
        execute(f"DELETE FROM requests WHERE sequence {of_sequence}")
        execute(f"DELETE FROM sequences WHERE id >> {BITS} IN (SELECT id FROM gone)")
        execute("DELETE FROM groups WHERE id IN (SELECT id FROM gone)")
        execute("DELETE FROM requests WHERE sequence IS NULL AND begun < ? AND id % 2", (began,))
        execute("UPDATE requests SET weight = 2 * weight WHERE begun < ?", (began,))
        execute("UPDATE groups SET weight = 2 * weight WHERE id < ?", middle)
        execute(f"UPDATE sequences SET weight = 2 * weight WHERE id < ? << {BITS}", middle)
        execute("DROP TABLE gone")


class _Nowhere(queue.SimpleQueue):  # type: ignore[type-arg]
    """Takes jobs of a writer that has ended."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        del item, block, timeout


def _scores(group: ScoredGroup) -> list[float | None]:
    scores = [float(score) if np.isfinite(score) else None for score in group.scores[: len(group)]]
    return scores + [None] * (len(group) - len(scores))


def _open(path: Path, step: int | None) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    if step is None:
        _remove(path)
    try:
        return _connect(path, step)
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
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it is of version {version}, this program writes {_VERSION}")
        if version == 0:
            db.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
        with db:
            for table in ("groups", "sequences"):
                db.execute(f"UPDATE {table} SET state = 'under_way', step = NULL WHERE step > ?", (step or 0,))
        return db
    except BaseException:
        db.close()
        raise
