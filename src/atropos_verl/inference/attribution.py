"""A batch of scored sequences → policy version and logprob of every trained token, from a ``Ledger``.

Most spans have one record. Where several records hold the same ids (n completions of one prompt that came out alike, or
a prompt that was asked again later), the record is chosen by, in this order:

1. time: a turn was written before the turns after it;
2. the logprobs that the environment sent along, bit for bit: different weights give different logprobs;
3. records that no sequence was matched with before: each sequence takes one;
4. the request that explains most of the group: its members were usually written by one request;
5. the versions found in the rest of the batch, then the oldest record.

Up to point 4 that is evidence; where only point 5 decides between different versions the span is counted as ambiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atropos_verl.inference.ledger import Ledger, Piece, SpanRecord
from atropos_verl.types import UNKNOWN_VERSION, Difference, FloatArray, IntArray, SequenceMatch

__all__ = ["SequenceQuery", "look_up", "trained_spans"]

_MIN_LOGPROB = np.float32(-9999.0)
"""What the gateway sends for -inf."""
_MOST_EXPLAINED = 512
"""Newest records that a sequence is compared with, to say where it differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceQuery:
    """One scored sequence, as far as the ledger is concerned."""

    token_ids: IntArray
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]; True = trained."""
    logprobs: FloatArray | None = None
    """[T] that the environment sent; NaN = no value."""
    group: int = 0
    """Sequences of one group share it."""
    env_id: int | None = None


def trained_spans(loss_mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """``[start, stop)`` of each run of True."""
    edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))


def look_up(ledger: Ledger, queries: Sequence[SequenceQuery]) -> list[SequenceMatch]:
    """Match the sequences of one batch, and note their records as used. One entry per query."""
    spans = [trained_spans(query.loss_mask) for query in queries]
    found = [ledger.find(query.token_ids, where) for query, where in zip(queries, spans, strict=True)]
    chooser = _Chooser(queries, found)
    chosen = [chooser.choose(i) for i in range(len(queries))]
    ledger.used(record for picks in chosen for record, _ in picks.values())
    explained: set[int | None] = set()
    matches = []
    for query, pieces, picks in zip(queries, found, chosen, strict=True):
        lost = next((p for span in pieces for p in span if not p.candidates), None)
        difference = None
        if lost is not None and query.env_id not in explained:
            explained.add(query.env_id)
            difference = _explain(ledger, query.token_ids, lost)
        matches.append(_match(query, pieces, picks, difference))
    return matches


_Picks = dict[int, tuple[SpanRecord, bool]]
"""Start of a piece → its record, and whether the choice was ambiguous."""


class _Chooser:
    """Chooses one record for each piece of a batch."""

    def __init__(self, queries: Sequence[SequenceQuery], found: list[list[list[Piece]]]) -> None:
        self._queries = queries
        self._pieces = [[piece for span in spans for piece in span if piece.candidates] for spans in found]
        self._uses: Counter[int] = Counter()
        self._support = self._supports()
        self._low, self._high = self._settled_versions()

    def choose(self, index: int) -> _Picks:
        query, picks = self._queries[index], _Picks()
        before: int | None = None
        for piece in reversed(self._pieces[index]):
            if len(piece.candidates) == 1:
                record, ambiguous = piece.candidates[0], False
            else:
                record, ambiguous = self._best(query, piece, before)
            picks[piece.start] = (record, ambiguous)
            self._uses[record.order] += 1
            before = record.order
        return picks

    def _best(self, query: SequenceQuery, piece: Piece, before: int | None) -> tuple[SpanRecord, bool]:
        sent = None if query.logprobs is None else query.logprobs[piece.start : piece.stop].astype(np.float32)
        support = self._support[query.group]

        def evidence(record: SpanRecord) -> tuple[bool, bool, int, int]:
            return (
                before is not None and record.order >= before,
                sent is not None and not np.array_equal(sent, _sent_logprobs(record, piece)),
                record.uses + self._uses[record.order],
                -support[record.request],
            )

        ranked = [(evidence(record), record) for record in piece.candidates]
        best = min(key for key, _ in ranked)
        equal = [record for key, record in ranked if key == best]
        record = min(equal, key=lambda r: (not (self._low <= r.runs[0][0] <= self._high), r.order))
        return record, any(other.runs != record.runs for other in equal)

    def _supports(self) -> dict[int, Counter[int]]:
        """Group → request → pieces of the group that this request can explain, each of its records counted once."""
        wanted: dict[int, Counter[tuple[int, int, int]]] = {}
        offered: dict[int, dict[tuple[int, int, int], Counter[int]]] = {}
        for query, pieces in zip(self._queries, self._pieces, strict=True):
            for piece in pieces:
                first = piece.candidates[0]
                content = (piece.start, piece.stop, first.end_key)
                wanted.setdefault(query.group, Counter())[content] += 1
                offers = offered.setdefault(query.group, {})
                if content not in offers:
                    offers[content] = Counter(record.request for record in piece.candidates)
        result: dict[int, Counter[int]] = {query.group: Counter() for query in self._queries}
        for group, offers in offered.items():
            for content, requests in offers.items():
                for request, count in requests.items():
                    result[group][request] += min(count, wanted[group][content])
        return result

    def _settled_versions(self) -> tuple[int, int]:
        """Oldest and newest first version among the pieces that have but one possible version."""
        settled = [
            piece.candidates[0].runs[0][0]
            for pieces in self._pieces
            for piece in pieces
            if all(record.runs == piece.candidates[0].runs for record in piece.candidates[1:])
        ]
        return (min(settled), max(settled)) if settled else (UNKNOWN_VERSION, 1 << 62)


def _sent_logprobs(record: SpanRecord, piece: Piece) -> NDArray[np.float32]:
    """The record's logprobs of the piece's tokens, as the gateway sent them to the environment."""
    offset = piece.start - record.start
    return np.maximum(record.logprobs[offset : offset + piece.stop - piece.start], _MIN_LOGPROB)


def _match(
    query: SequenceQuery, spans: list[list[Piece]], picks: _Picks, difference: Difference | None
) -> SequenceMatch:
    versions = np.full(len(query.token_ids), UNKNOWN_VERSION, dtype=np.int64)
    logprobs = np.full(len(query.token_ids), np.nan)
    known = np.zeros(len(query.token_ids), dtype=np.bool_)
    temperatures: set[float] = set()
    lost_tokens = 0
    for piece in (piece for span in spans for piece in span):
        if piece.start not in picks:
            lost_tokens += piece.stop - piece.start
            continue
        record, _ = picks[piece.start]
        offset = piece.start - record.start
        count = piece.stop - piece.start
        versions[piece.start : piece.stop] = record.versions()[offset : offset + count]
        logprobs[piece.start : piece.stop] = record.logprobs[offset : offset + count]
        known[piece.start : piece.stop] = True
        temperatures.add(record.temperature)
    return SequenceMatch(
        found=known,
        versions=versions,
        logprobs=logprobs,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
        spans=len(spans),
        unmatched_spans=sum(any(piece.start not in picks for piece in span) for span in spans),
        unmatched_tokens=lost_tokens,
        ambiguous_spans=sum(any(picks[p.start][1] for p in span if p.start in picks) for span in spans),
        difference=difference,
    )


def _explain(ledger: Ledger, token_ids: IntArray, piece: Piece) -> Difference:
    """Compare with the newest records; the one that agrees longest is taken for what the environment began with."""
    ids = np.asarray(token_ids, dtype=np.int64)
    best, similar = -1, None
    for record in ledger.newest(_MOST_EXPLAINED):
        written = np.frombuffer(record.prompt.ids + record.ids, dtype="<i4")
        count = min(len(written), len(ids))
        unequal = np.flatnonzero(written[:count] != ids[:count])
        common = int(unequal[0]) if unequal.size else count
        # A record that the sequence holds as a whole ends before the lost piece: it explains nothing but its end.
        if common > best and common <= piece.stop:
            best, similar = common, (written, record.start)
    if similar is None or best <= 0:
        return Difference(
            position=piece.start, written=None, posted=int(ids[piece.start]), in_prompt=True, nothing_similar=True
        )
    written, prompt_length = similar
    return Difference(
        position=best,
        written=int(written[best]) if best < len(written) else None,
        posted=int(ids[best]) if best < len(ids) else None,
        in_prompt=best < prompt_length,
    )
