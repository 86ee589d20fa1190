"""``Repairer``: posted text that was tokenised again gets back the token ids that were sampled.

An environment that sees text tokenises it itself, and may get other ids for it than were sampled. So completions are
looked up by their text too: the text before a trained span must be that of a prompt, and the text of the span that of
what was written after it, or of a chain of completions that continue each other. White space and special tokens at the
ends of a completion do not count, since chat templates add and strip them. Anything else must agree to the character.

A prompt is found by the hash of its text, its completion by that of its own; then the texts are compared. What is found
with different ids is not repaired: which of them the environment was given is not known. Texts are UTF-8, and places in
them bytes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.provenance.ledger import IDS, Ledger, Lengths, Piece, Prompt, SpanRecord
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import IntArray, RepairedTokens

_CATCH_UP = 256
"""Records that are looked through in one go, between which the gateway may record others."""
_CACHED = 512  # texts of prompts and completions
_MOST_CHAINS = 64  # ways to read one span as a chain of completions; beyond, it counts as ambiguous


@dataclass(slots=True)
class _Written:
    """A prompt, and the numbers of its completions by the hash of their text."""

    prompt: Prompt
    newest: int = 0
    completions: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class _Link:
    """A completion of a chain: ``[start, stop)`` of the posted text without its edges, and its records."""

    prompt_end: int
    start: int
    stop: int
    records: tuple[SpanRecord, ...]

    @property
    def ids(self) -> tuple[bytes, bytes]:
        return self.records[0].prompt.ids, self.records[0].ids


_Chain = tuple[_Link, ...]


@dataclass(slots=True)
class Repair:
    """A sequence with the ids that were sampled."""

    tokens: RepairedTokens | None = None  # None: nothing was repaired
    pieces: list[list[Piece]] = field(default_factory=list)  # for each trained span, as ``Ledger.find``
    repaired_spans: int = 0
    ambiguous_spans: int = 0  # their text was found with different ids


@dataclass(frozen=True, slots=True)
class _Posted:
    """A posted sequence."""

    ids: NDArray[np.int32]
    text: bytes
    starts: IntArray
    mask: NDArray[np.bool_]


def _token_at(starts: IntArray, place: int) -> int:
    """The token in which the character at ``place`` begins."""
    return int(starts[:-1].searchsorted(place, "right")) - 1


class Repairer:
    """The completions of a ledger by their text. Threads of the trainer call it one at a time."""

    def __init__(self, ledger: Ledger, texts: TokenTexts) -> None:
        self._ledger = ledger
        self.texts = texts
        self._newest = 0
        self._written: dict[int, dict[int, _Written]] = {}  # hash of a text → prompts by key
        self._lengths = Lengths()  # of prompts
        self._text: Callable[[bytes], bytes] = lru_cache(_CACHED)(lambda ids: texts.text(np.frombuffer(ids, IDS)))
        self._cores: Callable[[bytes], list[bytes]] = lru_cache(_CACHED)(
            lambda ids: texts.cores(np.frombuffer(ids, IDS), self._text(ids))
        )

    def repair(
        self,
        token_ids: IntArray,
        loss_mask: NDArray[np.bool_],
        spans: list[tuple[int, int]],
        found: list[list[Piece]],
        *,
        wants_origin: bool = False,
    ) -> Repair:
        """Repair the spans of a sequence that ``Ledger.find`` did not find as they are, in ``found``. The tokens before
        one become those after which it was sampled, where that is possible beside the spans before it."""
        ids, result = token_ids.astype(IDS), Repair(pieces=found)
        lost = [self._is_lost(ids, pieces) for pieces in found]
        if not any(lost):
            return result
        text, starts = self.texts.read(ids)
        if text is None:
            return result
        self._catch_up()
        posted = _Posted(ids, text, starts, loss_mask)
        made = _Assembly(self.texts, self._text, posted, wants_origin=wants_origin)
        pieces: list[list[Piece]] = []
        for (start, stop), own, is_lost in zip(spans, found, lost, strict=True):
            chains = self._chains(posted, made.cursor, start, stop) if is_lost else []
            result.ambiguous_spans += len(chains) > 1
            if len(chains) == 1:
                pieces.append(made.add(chains[0], start, stop))
                result.repaired_spans += 1
            else:
                pieces.append(made.keep(own, start, stop))
            if made.has_failed:
                return Repair(pieces=found, ambiguous_spans=result.ambiguous_spans)
        if result.repaired_spans:
            result.tokens, result.pieces = made.finish(), pieces
        return result

    def _is_lost(self, ids: NDArray[np.int32], pieces: list[Piece]) -> bool:
        """False also where only what a template adds behind a completion is unknown."""
        lost = [piece for piece in pieces if not piece.candidates]
        if not lost or len(pieces) == 1 or lost[0] is not pieces[-1]:
            return bool(lost)
        start, stop = self.texts.core(self.texts.text(ids[lost[0].start : lost[0].stop]))
        return start < stop

    def _chains(self, posted: _Posted, begin: int, start: int, stop: int) -> list[_Chain]:
        """The ways to read the trained tokens ``[start, stop)`` as completions; those of equal ids are one. The first
        may begin before the span, from place ``begin`` on: one token may hold the end of a prompt and the beginning of
        a completion, and heads may be left untrained."""
        text, first, end = posted.text, int(posted.starts[start]), int(posted.starts[stop])
        ends = [end]
        if stop < len(posted.ids) and int(posted.ids[stop]) not in self.texts.special_ids:
            ends += range(end + 1, int(posted.starts[stop + 1]) + 1)  # likewise at the end
        prompts = self._prompts(text, self._lengths.within(begin, end + 1))
        reached: dict[int, list[_Chain]] = {}
        for place in reversed(prompts):
            chains: list[_Chain] = [(link,) for link in self._links(text, place, prompts[place], ends)]
            for after in [p for p in prompts if p > max(place, first) and reached[p]]:
                for link in self._links(text, place, prompts[place], [after], whole=True):
                    chains += [(link, *chain) for chain in reached[after]]
            reached[place] = chains[:_MOST_CHAINS]
        # What stands in the span before the first of a chain was not written there, unless it is an edge.
        whole = [chains for p, chains in reached.items() if p <= first or p <= self.texts.core(text, first, p)[0]]
        every = {tuple(link.ids for link in chain): chain for chains in whole for chain in chains}
        rests = {key[n:] for key in every for n in range(1, len(key))}
        return [chain for key, chain in every.items() if key not in rests]

    def _prompts(self, text: bytes, places: Iterable[int]) -> dict[int, list[_Written]]:
        """The places up to which ``text`` is that of prompts, ascending, and these."""
        found: dict[int, list[_Written]] = {}
        hashed, before = xxhash.xxh3_64(), 0
        for place in places:
            hashed.update(text[before:place])
            before = place
            alike = self._written.get(hashed.intdigest(), {}).values()
            same = [one for one in alike if one.prompt.spans and text[:place] == self._text(one.prompt.ids)]
            if same:
                found[place] = same
                for one in same:
                    self._index(one)
        return found

    def _links(
        self, text: bytes, place: int, prompts: Iterable[_Written], ends: list[int], *, whole: bool = False
    ) -> list[_Link]:
        """Completions of the text between ``place`` and one of ``ends``; those of equal ids are one. ``whole``: of
        exactly this text, its ends included, as it is where a completion was continued."""
        links: dict[tuple[bytes, bytes], _Link] = {}
        for start, stop in dict.fromkeys(self.texts.core(text, place, end) for end in ends):
            core = text[start:stop]
            for one in prompts:
                same: defaultdict[bytes, list[SpanRecord]] = defaultdict(list)
                for order in one.completions.get(xxhash.xxh3_64_intdigest(core), ()):
                    record = one.prompt.spans.get(order)
                    if record is None or core not in self._cores(record.ids):
                        continue
                    if not whole or self._text(record.ids) == text[place : ends[0]]:
                        same[record.ids].append(record)
                for ids, alike in same.items():
                    links[one.prompt.ids, ids] = _Link(place, start, stop, tuple(alike))
        return list(links.values())

    def _catch_up(self) -> None:
        """Take in the prompts that were recorded since the last time. Texts are made without the ledger's lock: the
        gateway goes on."""
        while records := self._ledger.newer_than(self._newest, _CATCH_UP):
            self._newest = records[-1].order
            for prompt in dict.fromkeys(record.prompt for record in records):
                text = self._text(prompt.ids)
                same = self._written.setdefault(xxhash.xxh3_64_intdigest(text), {})
                if prompt.key not in same or same[prompt.key].prompt is not prompt:
                    same[prompt.key] = _Written(prompt)
                    self._lengths.add(len(text))
            if len(self._written) > 2 * self._ledger.stats().prompts:  # most were forgotten
                alive = {
                    key: {k: one for k, one in same.items() if one.prompt.spans} for key, same in self._written.items()
                }
                self._written = {key: same for key, same in alive.items() if same}

    def _index(self, one: _Written) -> None:
        """Take in what was written after a prompt since the last time."""
        with self._ledger.lock:
            spans = one.prompt.spans
            records = list(spans.values()) if next(reversed(spans), 0) > one.newest else []
        if records and sum(map(len, one.completions.values())) > 4 * len(records):  # most were forgotten
            one.newest, one.completions = 0, defaultdict(list)
        for record in records:
            if record.order > one.newest:
                for core in self._cores(record.ids):
                    one.completions[xxhash.xxh3_64_intdigest(core)].append(record.order)
                one.newest = record.order


class _Assembly:
    """A sequence that is put together from posted and from sampled tokens."""

    def __init__(
        self, texts: TokenTexts, text: Callable[[bytes], bytes], posted: _Posted, *, wants_origin: bool
    ) -> None:
        self._texts, self._text = texts, text
        self._posted = posted
        self._ids = b""
        self._trained: list[tuple[int, int]] = []
        self._places: list[IntArray] | None = [] if wants_origin else None
        """Place in the posted text at which each token begins."""
        self.cursor = 0  # the posted text that it stands for so far ends here
        self.has_failed = False  # part of a token had to be tokenised, and gave another text

    @property
    def _length(self) -> int:
        return len(self._ids) // IDS.itemsize

    def add(self, chain: _Chain, start: int, stop: int) -> list[Piece]:
        """A chain in the place of the trained tokens ``[start, stop)``."""
        written = chain[0].records[0].prompt.ids
        if written.startswith(self._ids):
            self._append(np.frombuffer(written[len(self._ids) :], IDS))
        else:
            prompt = np.frombuffer(written, IDS)
            self._append_from(prompt, self._texts.text(prompt), self._texts.read(prompt)[1])
        pieces = [self._completion(link, start, stop) for link in chain]
        return [piece for piece in pieces if piece.start < piece.stop]

    def _completion(self, link: _Link, start: int, stop: int) -> Piece:
        posted, written = self._posted, link.records[0].ids
        ids, text = np.frombuffer(written, IDS), self._text(written)
        first, last = self._texts.core(text)
        head, tail, places = 0, len(ids), None
        is_headless = link.prompt_end < posted.starts[start - 1]  # the environment left its head untrained
        if is_headless or self._places is not None:
            places = np.clip(self._texts.read(ids)[1] + link.start - first, link.prompt_end, link.stop)
            if is_headless:
                head = int(places[1:].searchsorted(posted.starts[start], "right"))
            places = np.clip(places, posted.starts[start], posted.starts[stop] - 1)  # trained as the span is
        self.cursor = link.stop
        if int(ids[-1]) in self._texts.special_ids:
            rest, end = posted.text[link.stop :], self._texts[int(ids[-1])][1]
            after = link.stop + len(rest) - len(rest.decode().lstrip().encode())
            if posted.text.startswith(end, after):
                self.cursor = after + len(end)
                tail -= not posted.mask[_token_at(posted.starts, after)]
        elif posted.text.startswith(text[last:], link.stop):
            self.cursor += len(text) - last
        begin = self._length
        self._append(ids, places)
        self._trained.append((begin + head, begin + tail))
        return Piece(begin + head, begin + tail, link.records, head)

    def keep(self, pieces: list[Piece], start: int, stop: int) -> list[Piece]:
        """The posted tokens up to ``stop``; ``pieces`` of the trained ones ``[start, stop)`` at their new places."""
        posted = self._posted
        self.has_failed |= self.cursor > posted.starts[start]
        self._append_from(posted.ids[:stop], posted.text, posted.starts[: stop + 1])
        self.cursor = int(posted.starts[stop])
        shift = self._length - stop
        self._trained.append((start + shift, stop + shift))
        return [Piece(p.start + shift, p.stop + shift, p.candidates, p.first) for p in pieces]

    def finish(self) -> RepairedTokens:
        posted = self._posted
        if self.cursor < posted.starts[-1]:
            self._append_from(posted.ids, posted.text, posted.starts)
        origin = None
        if self._places is not None:
            places = np.maximum.accumulate(np.concatenate(self._places))
            origin = posted.starts[:-1].searchsorted(places, "right") - 1
        mask = np.zeros(self._length, dtype=np.bool_)
        for start, stop in self._trained:
            mask[start:stop] = True
        token_ids = np.frombuffer(self._ids, IDS).astype(np.int64)
        return RepairedTokens(token_ids=token_ids, loss_mask=mask, origin=origin, posted=len(posted.ids))

    def _append(self, ids: NDArray[np.int32], places: IntArray | None = None) -> None:
        """``places``: [T] or more; None: all at ``cursor``."""
        self._ids += ids.tobytes()
        if self._places is not None:
            self._places.append(np.full(len(ids), self.cursor) if places is None else places[: len(ids)])

    def _append_from(self, ids: NDArray[np.int32], text: bytes, starts: IntArray) -> None:
        """The tokens of a text from ``cursor`` on; of one that begins before it, the rest is tokenised anew."""
        at = _token_at(starts, self.cursor) if self.cursor else 0
        if starts[at] < self.cursor:
            at += 1
            while at < len(ids) and text[starts[at]] & 0xC0 == 0x80:  # inside of a character
                at += 1
            rest = text[self.cursor : starts[at]]
            made = np.array(self._texts.encode(rest.decode(errors="replace")) if rest else [], dtype=IDS)
            self.has_failed |= self._texts.text(made) != rest
            self._append(made)
        self._append(ids[at:], starts[at:-1])
