"""A batch of scored sequences → policy version and logprob of every trained token, from a ``Ledger``.

Where several records hold the same ids, evidence chooses: time, logprobs bit for bit, records no sequence holds yet,
one request for a whole group. What the records that are left do not agree on stays unknown: nothing is guessed.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atropos_verl.provenance.ledger import IDS, Ledger, Piece, SpanRecord, trained_spans
from atropos_verl.provenance.repair import Repair, Repairer
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import MIN_LOGPROB, UNKNOWN_VERSION, Difference, FloatArray, IntArray, SequenceMatch

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
    is_text: bool = False
    """Its ids are only a form of its text; False: the environment sent values of just these tokens."""
    has_advantages: bool = False
    """Token by token: they follow the text."""


def look_up(ledger: Ledger, queries: Sequence[SequenceQuery], repairer: Repairer | None = None) -> list[SequenceMatch]:
    """Match the sequences of one batch, and note their records as used. One entry per query.

    With ``repairer``, sequences that ``is_text`` get the ids that were sampled, where that is certain.
    """
    queries, found, repairs = list(queries), list[list[list[Piece]]](), list[Repair]()
    for i, query in enumerate(queries):
        spans = trained_spans(query.loss_mask)
        repair = Repair(pieces=ledger.find(query.token_ids, spans))
        if repairer is not None and query.is_text and not all(p.candidates for pieces in repair.pieces for p in pieces):
            ids, mask, origin = query.token_ids, query.loss_mask, query.has_advantages
            repair = repairer.repair(ids, mask, spans, repair.pieces, wants_origin=origin)
        if repair.tokens is not None:
            queries[i] = replace(query, token_ids=repair.tokens.token_ids, loss_mask=repair.tokens.loss_mask)
        repairs.append(repair)
        found.append(repair.pieces)
    chooser = _Chooser(queries, found)
    picks: dict[int, _Picks] = {}
    # Those with logprobs first: what they take is certain, and leaves less to the others.
    for index in sorted(range(len(queries)), key=lambda i: queries[i].logprobs is None):
        picks[index] = chooser.choose(index)
    ledger.used(record for records in chooser.certain for record in records)
    return [
        replace(
            _match(query, repair.pieces, picks[index], chooser.certain[index]),
            repaired=repair.tokens,
            repaired_spans=repair.repaired_spans,
            ambiguous_texts=repair.ambiguous_spans,
        )
        for index, (query, repair) in enumerate(zip(queries, repairs, strict=True))
    ]


_Picks = dict[int, list[SpanRecord]]
"""Start of a piece → the records that it may be, oldest first."""


class _Chooser:
    """Chooses the records of each piece of a batch."""

    def __init__(self, queries: Sequence[SequenceQuery], found: list[list[list[Piece]]]) -> None:
        self._queries = queries
        self._pieces = [[piece for span in spans for piece in span if piece.candidates] for spans in found]
        self._uses: Counter[int] = Counter()
        self._whole = self._whole_requests()
        self.certain: list[list[SpanRecord]] = [[] for _ in queries]
        """For each sequence, the records that it is known to hold."""

    def choose(self, index: int) -> _Picks:
        """The records that each piece of a sequence may be."""
        query, picks = self._queries[index], _Picks()
        before: int | None = None
        for piece in reversed(self._pieces[index]):
            equal = list(piece.candidates) if len(piece.candidates) == 1 else self._best(query, piece, before)
            picks[piece.start] = equal
            if all(record.policies == equal[0].policies for record in equal):
                self.certain[index].append(equal[0])
                self._uses[equal[0].order] += 1
            before = max(record.order for record in equal)
        return picks

    def _best(self, query: SequenceQuery, piece: Piece, before: int | None) -> list[SpanRecord]:
        """The records for which all evidence is equally good, oldest first."""
        sent = None if query.logprobs is None else query.logprobs[piece.start : piece.stop].astype(np.float32)
        whole = self._whole[query.group, piece.candidates[0].prompt.key]

        def as_sent(record: SpanRecord) -> NDArray[np.float32]:
            """The logprobs as the gateway sent them to the environment."""
            return np.maximum(record.logprobs[record.inside(piece)], np.float32(MIN_LOGPROB))

        def evidence(record: SpanRecord) -> tuple[bool, bool, int, bool]:
            return (
                before is not None and record.order >= before,
                sent is not None and not np.array_equal(sent, as_sent(record)),
                record.uses + self._uses[record.order],
                record.request not in whole,
            )

        ranked = [(evidence(record), record) for record in piece.candidates]
        best = min(key for key, _ in ranked)
        return sorted((record for key, record in ranked if key == best), key=lambda record: record.order)

    def _whole_requests(self) -> dict[tuple[int, int], set[int]]:
        """(group, prompt) → requests that wrote every piece (of two or more) that follows this prompt in the group."""
        wanted: defaultdict[tuple[int, int], Counter[tuple[int, int]]] = defaultdict(Counter)
        offered: dict[tuple[int, int], dict[tuple[int, int], Counter[int]]] = {}
        for query, pieces in zip(self._queries, self._pieces, strict=True):
            for piece in pieces:
                first = piece.candidates[0]
                key = (query.group, first.prompt.key)
                content = (piece.stop, first.end_key)
                wanted[key][content] += 1
                offered.setdefault(key, {}).setdefault(content, Counter(r.request for r in piece.candidates))
        whole: dict[tuple[int, int], set[int]] = {key: set() for key in wanted}
        for key, contents in wanted.items():
            for request in next(iter(offered[key].values())):
                if contents.total() > 1 and all(offered[key][c][request] >= n for c, n in contents.items()):
                    whole[key].add(request)
        return whole


def _match(
    query: SequenceQuery,
    spans: list[list[Piece]],
    picks: _Picks,
    certain: list[SpanRecord],
) -> SequenceMatch:
    versions = np.full(len(query.token_ids), UNKNOWN_VERSION, dtype=np.int64)
    logprobs = np.full(len(query.token_ids), np.nan)
    known = np.zeros(len(query.token_ids), dtype=np.bool_)
    temperatures: set[float] = set()
    lost_tokens = 0
    ambiguous: set[int] = set()
    for number, piece in [(number, piece) for number, span in enumerate(spans) for piece in span]:
        records = picks.get(piece.start, [])
        if not records:
            lost_tokens += piece.stop - piece.start
            continue
        part = slice(piece.start, piece.stop)
        known[part] = True
        first = records[0]
        versions[part], logprobs[part] = first.versions(piece), first.logprobs[first.inside(piece)]
        for other in records[1:]:
            other_weights = first.written_by(piece) != other.written_by(piece)
            if first.branch != other.branch:
                other_weights[:] = True
            # Of the same weights two logprobs differ by rounding at most (by what else was in the engine's batch).
            unequal = logprobs[part] != other.logprobs[other.inside(piece)]
            logprobs[part][other_weights & unequal] = np.nan
            versions[part][versions[part] != other.versions(piece)] = UNKNOWN_VERSION
        if any(other.policies != first.policies for other in records[1:]):
            ambiguous.add(number)
        temperatures.update(record.temperature for record in records)
    return SequenceMatch(
        found=known,
        versions=versions,
        logprobs=logprobs,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
        spans=len(spans),
        unmatched_spans=sum(any(piece.start not in picks for piece in span) for span in spans),
        unmatched_tokens=lost_tokens,
        ambiguous_spans=len(ambiguous),
        records=tuple(record.order for record in certain),
    )


def explain(ledger: Ledger, token_ids: IntArray, start: int, stop: int, texts: TokenTexts | None = None) -> Difference:
    """Where the unmatched tokens ``[start, stop)`` turn away from the newest record that agrees longest with them.

    With ``texts`` what counts is their text: the place is that of the tokens that hold the first other character.
    """
    posted, at = _units(np.asarray(token_ids, dtype=IDS), texts)
    best, similar = -1, None
    for record in ledger.newest(_MOST_EXPLAINED):
        written, places = _units(np.frombuffer(record.prompt.ids + record.ids, dtype=IDS), texts)
        count = min(len(written), len(posted))
        unequal = np.flatnonzero(written[:count] != posted[:count])
        common = int(unequal[0]) if unequal.size else count
        # A record that the sequence holds as a whole ends before the lost piece: it explains nothing but its end.
        if common > best and common <= at[stop]:
            best, similar = common, (record, places)
    if similar is None or best <= 0:
        return Difference(
            position=start, written=None, posted=int(token_ids[start]), in_prompt=True, nothing_similar=True
        )
    record, places = similar

    def token(ids: IntArray, starts: IntArray) -> tuple[int, int | None]:
        """That holds the first difference."""
        if best >= starts[-1]:
            return len(ids), None
        index = int(np.searchsorted(starts[:-1], best, side="right")) - 1
        return index, int(ids[index])

    position, found = token(token_ids, at)
    _, written_there = token(np.frombuffer(record.prompt.ids + record.ids, dtype=IDS), places)
    return Difference(
        position=position, written=written_there, posted=found, in_prompt=best < places[record.prompt.length]
    )


def _units(ids: NDArray[np.int32], texts: TokenTexts | None) -> tuple[NDArray[np.int32], IntArray]:
    """The ids themselves, or the characters of their text; and for each token the number of those before it."""
    if texts is None:
        return ids, np.arange(len(ids) + 1)
    return np.frombuffer(texts.text(ids).encode("utf-32-le", "surrogatepass"), dtype=IDS), texts.starts(ids)
