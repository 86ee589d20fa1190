"""A batch of scored sequences → policy version and logprob of every trained token, from a ``Ledger``.

Where several records hold the same ids, evidence chooses: time, logprobs bit for bit, records no sequence holds yet,
one request for a whole group. What the records that are left do not agree on stays unknown: nothing is guessed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_verl.provenance.ledger import IDS, Ledger, Piece, SpanRecord, trained_spans
from atropos_verl.provenance.repair import Repair, Repairer
from atropos_verl.types import MIN_LOGPROB, UNKNOWN_VERSION, FloatArray, IntArray, SequenceMatch

_MOST_COMPARED = 512  # newest records that a sequence is compared with, to say where it differs


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceQuery:
    """One scored sequence, as far as the ledger is concerned."""

    token_ids: IntArray  # [T]
    loss_mask: NDArray[np.bool_]  # [T]; True = trained
    logprobs: FloatArray | None = None  # [T] that the environment sent; NaN = no value
    group: int = 0  # sequences of one group share it
    is_text: bool = False
    """Its ids are only a form of its text; False: the environment sent values of just these tokens."""
    has_advantages: bool = False  # token by token: they follow the text


def look_up(ledger: Ledger, queries: Sequence[SequenceQuery], repairer: Repairer | None = None) -> list[SequenceMatch]:
    """Match the sequences of one batch, and note their records as used. One entry per query. With ``repairer``,
    sequences that ``is_text`` get the ids that were sampled, where that is certain."""
    queries, repairs = list(queries), list[Repair]()
    for i, query in enumerate(queries):
        spans = trained_spans(query.loss_mask)
        repair = Repair(pieces=ledger.find(query.token_ids, spans))
        if repairer is not None and query.is_text and not all(p.candidates for pieces in repair.pieces for p in pieces):
            ids, mask, origin = query.token_ids, query.loss_mask, query.has_advantages
            repair = repairer.repair(ids, mask, spans, repair.pieces, wants_origin=origin)
        if repair.tokens is not None:
            queries[i] = replace(query, token_ids=repair.tokens.token_ids, loss_mask=repair.tokens.loss_mask)
        repairs.append(repair)
    chooser = _Chooser(queries, [repair.pieces for repair in repairs])
    matches: dict[int, SequenceMatch] = {}
    # Those with logprobs first: what they take is certain, and leaves less to the others.
    for index in sorted(range(len(queries)), key=lambda i: queries[i].logprobs is None):
        matches[index] = _match(queries[index], repairs[index], *chooser.choose(index))
    ledger.used(order for match in matches.values() for order in match.records)
    return [matches[index] for index in range(len(queries))]


_Picks = dict[int, list[SpanRecord]]  # start of a piece → the records that it may be, oldest first


class _Chooser:
    """Chooses the records of each piece of a batch."""

    def __init__(self, queries: Sequence[SequenceQuery], found: Sequence[list[list[Piece]]]) -> None:
        self._queries = queries
        self._pieces = [[piece for span in spans for piece in span if piece.candidates] for spans in found]
        self._uses: Counter[int] = Counter()

    def choose(self, index: int) -> tuple[_Picks, list[int]]:
        """The records that each piece of a sequence may be, and the numbers of those that it is known to hold."""
        query, picks, certain = self._queries[index], _Picks(), list[int]()
        before: int | None = None
        for piece in reversed(self._pieces[index]):
            equal = list(piece.candidates) if len(piece.candidates) == 1 else self._best(query, piece, before)
            picks[piece.start] = equal
            if all(record.policies == equal[0].policies for record in equal):
                certain.append(equal[0].order)
                self._uses[equal[0].order] += 1
            before = max(record.order for record in equal)
        return picks, certain

    def _best(self, query: SequenceQuery, piece: Piece, before: int | None) -> list[SpanRecord]:
        """The records for which all evidence is equally good, oldest first."""
        sent = None if query.logprobs is None else query.logprobs[piece.start : piece.stop].astype(np.float32)
        whole = self._whole[query.group, piece.candidates[0].prompt.key]

        def evidence(record: SpanRecord) -> tuple[bool, bool, int, bool]:
            own = record.logprobs[record.inside(piece)]
            return (
                before is not None and record.order >= before,
                sent is not None and not np.array_equal(sent, np.maximum(own, np.float32(MIN_LOGPROB))),
                record.uses + self._uses[record.order],
                record.request not in whole,
            )

        ranked = [(evidence(record), record) for record in piece.candidates]
        best = min(key for key, _ in ranked)
        return sorted((record for key, record in ranked if key == best), key=lambda record: record.order)

    @cached_property
    def _whole(self) -> dict[tuple[int, int], set[int]]:
        """(group, prompt) → requests that wrote every piece (of two or more) that follows this prompt in the group."""
        wanted: defaultdict[tuple[int, int], Counter[tuple[int, int, int]]] = defaultdict(Counter)
        offered: dict[tuple[int, int, int], Counter[int]] = {}
        for query, pieces in zip(self._queries, self._pieces, strict=True):
            for piece in pieces:
                first = piece.candidates[0]
                content = (first.prompt.key, piece.stop, first.end_key)
                wanted[query.group, first.prompt.key][content] += 1
                offered.setdefault(content, Counter(record.request for record in piece.candidates))
        return {
            key: {
                request
                for request in offered[next(iter(contents))]
                if contents.total() > 1 and all(offered[c][request] >= n for c, n in contents.items())
            }
            for key, contents in wanted.items()
        }


def _match(query: SequenceQuery, repair: Repair, picks: _Picks, certain: list[int]) -> SequenceMatch:
    versions = np.full(len(query.token_ids), UNKNOWN_VERSION, dtype=np.int64)
    logprobs = np.full(len(query.token_ids), np.nan)
    known = np.zeros(len(query.token_ids), dtype=np.bool_)
    temperatures: set[float] = set()
    ambiguous: set[int] = set()
    lost: Counter[int] = Counter()  # tokens of each span that no record holds
    for number, piece in [(number, piece) for number, span in enumerate(repair.pieces) for piece in span]:
        if piece.start not in picks:
            lost[number] += piece.stop - piece.start
            continue
        first, *others = picks[piece.start]
        part = slice(piece.start, piece.stop)
        known[part] = True
        versions[part], logprobs[part] = first.versions(piece), first.logprobs[first.inside(piece)]
        for other in others:
            other_weights = (first.written_by(piece) != other.written_by(piece)) | (first.branch != other.branch)
            # Of the same weights two logprobs differ by rounding at most (by what else was in the engine's batch).
            unequal = logprobs[part] != other.logprobs[other.inside(piece)]
            logprobs[part][other_weights & unequal] = np.nan
            versions[part][versions[part] != other.versions(piece)] = UNKNOWN_VERSION
            if other.policies != first.policies:
                ambiguous.add(number)
        temperatures.update(record.temperature for record in picks[piece.start])
    return SequenceMatch(
        found=known,
        versions=versions,
        logprobs=logprobs,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
        spans=len(repair.pieces),
        unmatched_spans=len(lost),
        unmatched_tokens=lost.total(),
        ambiguous_spans=len(ambiguous),
        records=tuple(certain),
        repaired=repair.tokens,
        repaired_spans=repair.repaired_spans,
        ambiguous_texts=repair.ambiguous_spans,
    )


def first_difference(
    ledger: Ledger, token_ids: IntArray, read: Callable[[NDArray[np.int32]], Sequence[Any]]
) -> tuple[int, Sequence[Any], Sequence[Any]]:
    """Where ``token_ids`` turn away from the newest record that agrees longest with them, and what both hold. ``read``:
    token ids → what is compared, the ids or their text. 0: nothing agrees."""
    posted = read(np.asarray(token_ids, dtype=IDS))
    longest, similar = 0, posted[:0]
    for record in ledger.newest(_MOST_COMPARED):
        written = read(np.frombuffer(record.prompt.ids + record.ids, dtype=IDS))
        common = sum(takewhile(bool, map(eq, posted, written)))
        if longest < common < len(posted):  # one that holds all of it, as a part of a prompt, says nothing
            longest, similar = common, written
    return longest, posted, similar
