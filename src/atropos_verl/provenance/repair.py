"""``Repairer``: posted text that was tokenised again gets back the token ids that were sampled.

An environment that sees text tokenises it itself, and may get other ids for it than were sampled. So completions are
looked up by their text too: the text before a trained span must be that of a prompt, and the text of the span that of
what was written after it, or of a chain of completions that continue each other. White space and special tokens at the
ends of a completion do not count, since chat templates add and strip them. Anything else must agree to the character.

A prompt is found by the hash of its text, a completion by that of its own; then the texts are compared. What is found
with different ids is not repaired: which of them the environment was given is not known.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atropos_verl.provenance.ledger import IDS, Ledger, Lengths, Piece, Prompt, SpanRecord, prefix_hashes, trained_spans
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import IntArray, RepairedTokens

_CATCH_UP = 256
"""Records that are indexed in one go, between which the gateway may record others."""
_CACHED = 512
"""Texts of prompts and completions."""
_MOST_CHAINS = 64
"""Ways to read one span as a chain of completions; beyond, it counts as ambiguous."""


@dataclass(frozen=True, slots=True)
class _Link:
    """A completion of a chain: characters ``[start, stop)`` of the posted text without its edges, and its records."""

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


@dataclass(slots=True)
class _Posted:
    """A posted sequence and its text."""

    ids: NDArray[np.int32]
    text: str
    starts: IntArray
    mask: NDArray[np.bool_]
    _keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def key(self, stop: int) -> int:
        """Hash of the first ``stop`` characters."""
        if stop >= len(self._keys):
            self._keys = _text_keys(self.text[: 2 * stop])
        return int(self._keys[stop])


def _token_at(starts: IntArray, character: int) -> int:
    """The token in which a character begins."""
    return int(np.searchsorted(starts[:-1], character, side="right")) - 1


def _text_keys(text: str) -> NDArray[np.uint64]:
    """``prefix_hashes`` of characters."""
    return prefix_hashes(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=IDS))


class Repairer:
    """The completions of a ledger by their text. Threads of the trainer call it one at a time."""

    def __init__(self, ledger: Ledger, texts: TokenTexts) -> None:
        self._ledger = ledger
        self.texts = texts
        self._newest = 0
        self._prompts: defaultdict[int, dict[int, Prompt]] = defaultdict(dict)  # hash of a text → prompts by key
        self._prompt_keys: dict[int, int] = {}
        self._lengths = Lengths()  # characters of prompts
        self._completions: defaultdict[int, dict[int, SpanRecord]] = defaultdict(dict)
        """Hash of the texts of prompt and completion → records by order."""
        self._keys: dict[int, tuple[int, ...]] = {}  # order of a record → its keys in ``_completions``
        self._text: Callable[[bytes], str] = lru_cache(_CACHED)(lambda ids: texts.text(np.frombuffer(ids, dtype=IDS)))
        self._cores: Callable[[bytes], list[str]] = lru_cache(_CACHED)(
            lambda ids: texts.cores(np.frombuffer(ids, dtype=IDS), self._text(ids))
        )
        ledger.on_forget = self._forget

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
        lost = [self._is_lost(token_ids, pieces) for pieces in found]
        result, ids = Repair(pieces=found), token_ids.astype(IDS)
        text = self.texts.text_if_whole(ids) if any(lost) else None
        if text is None:
            return result
        self._catch_up()
        posted = _Posted(ids, text, self.texts.starts(ids), loss_mask)
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

    def _is_lost(self, token_ids: IntArray, pieces: list[Piece]) -> bool:
        """False also where only what a template adds behind a completion is unknown."""
        lost = [piece for piece in pieces if not piece.candidates]
        if not lost or len(pieces) == 1 or lost[0] is not pieces[-1]:
            return bool(lost)
        tail = self.texts.text(token_ids[lost[0].start : lost[0].stop].astype(IDS))
        start, stop = self.texts.core(tail)
        return start < stop

    def _chains(self, posted: _Posted, begin: int, start: int, stop: int) -> list[_Chain]:
        """The ways to read the trained tokens ``[start, stop)`` as completions; those of equal ids are one.

        The first may begin before the span, from character ``begin`` on: one token may hold the end of a prompt and
        the beginning of a completion, and heads may be left untrained.
        """
        first, end = int(posted.starts[start]), int(posted.starts[stop])
        ends = [end]
        if stop < len(posted.ids) and not self.texts.is_special(posted.ids[stop : stop + 1])[0]:
            ends += range(end + 1, int(posted.starts[stop + 1]) + 1)  # likewise at the end
        with self._ledger.lock:
            places = self._lengths.within(begin, end + 1)
            prompts = {p: found for p in places if (found := self._prompts_at(posted, p))}
            reached: dict[int, list[_Chain]] = {}
            for place in reversed(prompts):
                chains: list[_Chain] = [(link,) for link in self._links(posted, place, prompts[place], ends)]
                for after in [p for p in prompts if p > max(place, first) and reached[p]]:
                    for link in self._links(posted, place, prompts[place], [after], whole=True):
                        chains += [(link, *chain) for chain in reached[after]]
                reached[place] = chains[:_MOST_CHAINS]
        # What stands in the span before the first of a chain was not written there, unless it is an edge.
        whole = [chains for p, chains in reached.items() if p <= max(first, self.texts.core(posted.text, first, p)[0])]
        every = {tuple(link.ids for link in chain): chain for chains in whole for chain in chains}
        rests = {key[n:] for key in every for n in range(1, len(key))}
        return [chain for key, chain in every.items() if key not in rests]

    def _prompts_at(self, posted: _Posted, stop: int) -> list[Prompt]:
        """Prompts whose text are the first ``stop`` characters."""
        found = self._prompts.get(posted.key(stop), {}).values()
        return [prompt for prompt in found if posted.text[:stop] == self._text(prompt.ids)]

    def _links(
        self, posted: _Posted, place: int, prompts: Sequence[Prompt], ends: Sequence[int], *, whole: bool = False
    ) -> list[_Link]:
        """Completions of the text between ``place`` and one of ``ends``; those of equal ids are one. ``whole``: of
        exactly this text, its ends included, as it is where a completion was continued."""
        links: dict[tuple[bytes, bytes], _Link] = {}
        for start, stop in dict.fromkeys(self.texts.core(posted.text, place, end) for end in ends):
            core = posted.text[start:stop]
            for prompt in prompts:
                records = self._completions.get(hash((self._prompt_keys[prompt.key], core)), {}).values()
                same: defaultdict[bytes, list[SpanRecord]] = defaultdict(list)
                for record in records:
                    is_whole = not whole or self._text(record.ids) == posted.text[place : ends[0]]
                    if record.prompt is prompt and is_whole and core in self._cores(record.ids):
                        same[record.ids].append(record)
                for ids, alike in same.items():
                    links[prompt.ids, ids] = _Link(place, start, stop, tuple(alike))
        return list(links.values())

    def _catch_up(self) -> None:
        """Index what was recorded since the last time. Texts are made without the lock: the gateway goes on."""
        while records := self._ledger.newer_than(self._newest, _CATCH_UP):
            self._newest = records[-1].order
            for record in records:
                prompt = record.prompt
                text = self._text(prompt.ids) if prompt.key not in self._prompt_keys else ""
                cores = self._cores(record.ids)
                with self._ledger.lock:
                    if record.order not in self._ledger:
                        continue
                    if prompt.key not in self._prompt_keys:
                        key = self._prompt_keys[prompt.key] = int(_text_keys(text)[-1])
                        self._prompts[key][prompt.key] = prompt
                        self._lengths.add(len(text))
                    keys = tuple(hash((self._prompt_keys[prompt.key], core)) for core in cores)
                    self._keys[record.order] = keys
                    for key in keys:
                        self._completions[key][record.order] = record

    def _forget(self, record: SpanRecord) -> None:
        """Called by the ledger, which holds its lock."""
        for key in self._keys.pop(record.order, ()):
            del self._completions[key][record.order]
            if not self._completions[key]:
                del self._completions[key]
        if not record.prompt.spans and (text_key := self._prompt_keys.pop(record.prompt.key, None)) is not None:
            del self._prompts[text_key][record.prompt.key]
            if not self._prompts[text_key]:
                del self._prompts[text_key]


class _Assembly:
    """A sequence that is put together from posted and from sampled tokens."""

    def __init__(self, texts: TokenTexts, text: Callable[[bytes], str], posted: _Posted, *, wants_origin: bool) -> None:
        self._texts = texts
        self._text = text  # of a record's ids
        self._posted = posted
        self._mask = posted.mask.copy()
        """Posted tokens that are trained where they stay: no longer those of a span that was repaired."""
        self._ids = b""
        self._trained: list[NDArray[np.bool_]] = []
        self._places: list[IntArray] | None = [] if wants_origin else None
        """Character of the posted text at which each token begins."""
        self.cursor = 0  # characters of the posted text that it stands for so far
        self.has_failed = False  # part of a token had to be tokenised, and gave another text

    @property
    def _length(self) -> int:
        return len(self._ids) // IDS.itemsize

    def add(self, chain: _Chain, start: int, stop: int) -> list[Piece]:
        """A chain in the place of the trained tokens ``[start, stop)``."""
        written = chain[0].records[0].prompt.ids
        if written.startswith(self._ids):
            prompt = np.frombuffer(written[len(self._ids) :], dtype=IDS)
            self._append(prompt)
        else:
            prompt = np.frombuffer(written, dtype=IDS)
            self._append_from(prompt, self._texts.starts(prompt))
        self._mask[start:stop] = False
        return [piece for link in chain for piece in self._completion(link, start, stop)]

    def _completion(self, link: _Link, start: int, stop: int) -> list[Piece]:
        posted, ids = self._posted, np.frombuffer(link.records[0].ids, dtype=IDS)
        text = self._text(link.records[0].ids)
        first, last = self._texts.core(text)
        places, trained = None, np.ones(len(ids), dtype=np.bool_)
        is_headless = link.prompt_end < posted.starts[start - 1]  # the environment left its head untrained
        if is_headless or self._places is not None:
            places = np.clip(self._texts.starts(ids) + link.start - first, link.prompt_end, link.stop)
            if is_headless:
                trained = places[1:] > posted.starts[start]
            places = np.clip(places, posted.starts[start], posted.starts[stop] - 1)  # trained as the span is
        self.cursor = link.stop
        if self._texts.is_special(ids[-1:])[0]:
            end = self._texts[int(ids[-1])][0]
            after = link.stop + len(posted.text[link.stop :]) - len(posted.text[link.stop :].lstrip())
            if posted.text.startswith(end, after):
                self.cursor = after + len(end)
                trained[-1] &= posted.mask[_token_at(posted.starts, after)]
        elif posted.text.startswith(text[last:], link.stop):
            self.cursor += len(text) - last
        begin = self._length
        self._append(ids, places, trained)
        return [Piece(begin + a, begin + b, link.records, a) for a, b in trained_spans(trained)]

    def keep(self, pieces: list[Piece], start: int, stop: int) -> list[Piece]:
        """The posted tokens up to ``stop``; ``pieces`` of the trained ones ``[start, stop)`` at their new places."""
        self.has_failed |= self.cursor > self._posted.starts[start]
        self._append_from(self._posted.ids[:stop], self._posted.starts[: stop + 1], self._mask)
        self.cursor = int(self._posted.starts[stop])
        shift = self._length - stop
        return [Piece(p.start + shift, p.stop + shift, p.candidates, p.first) for p in pieces]

    def finish(self) -> RepairedTokens:
        ids, starts = self._posted.ids, self._posted.starts
        if self.cursor < starts[-1]:
            self._append_from(ids, starts, self._mask)
        origin = None
        if self._places is not None:
            places = np.maximum.accumulate(np.concatenate(self._places))
            origin = np.searchsorted(starts[:-1], places, side="right") - 1
        token_ids = np.frombuffer(self._ids, dtype=IDS).astype(np.int64)
        mask = np.concatenate(self._trained)
        return RepairedTokens(token_ids=token_ids, loss_mask=mask, origin=origin, posted=len(ids))

    def _append(
        self, ids: NDArray[np.int32], places: IntArray | None = None, trained: NDArray[np.bool_] | None = None
    ) -> None:
        """``places``: [T] or more; None: all at ``cursor``. ``trained`` None: none."""
        self._ids += ids.tobytes()
        self._trained.append(np.zeros(len(ids), dtype=np.bool_) if trained is None else trained)
        if self._places is not None:
            self._places.append(np.full(len(ids), self.cursor) if places is None else places[: len(ids)])

    def _append_from(self, ids: NDArray[np.int32], starts: IntArray, trained: NDArray[np.bool_] | None = None) -> None:
        """The tokens of a text from ``cursor`` on; of one that begins before it, the rest is tokenised anew."""
        at, cursor = 0, self.cursor
        if cursor:
            at = _token_at(starts, cursor)
            if starts[at] < cursor:
                text = self._texts.text(ids)[cursor : starts[at + 1]]
                rest = np.array(self._texts.encode(text) if text else [], dtype=IDS)
                self.has_failed |= self._texts.text(rest) != text
                self._append(rest)
                after = starts[at + 1]
                at = _token_at(starts, after) if after < starts[-1] else len(ids)
        self._append(ids[at:], starts[at:-1], None if trained is None else trained[at : len(ids)])
