"""The tree of what was sampled in a session: turns that continue each other, and the rows they are trained in.

A ``Turn`` is one completion with the prompt tokens that its parent's sequence lacks."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.gateway.chat import ChatTurn, Message, parsed_arguments
from atropos_verl.gateway.fields import ApiError
from atropos_verl.gateway.text import TextCodec
from atropos_verl.types import (
    MIN_LOGPROB,
    NO_LOGPROB,
    NOT_TRAINED,
    UNKNOWN_VERSION,
    FinishReason,
    Generation,
    GenerationRequest,
)

_IDS, _LOGPROBS = np.dtype("<i4"), np.dtype("<f4")
_CONTEXT = 8
"""Tokens before a piece that are decoded with it: some tokenizers look back."""
_MOST_ALIKE = 16
"""Recorded answers with equal messages that are looked at, newest first."""


class StoredTurn(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One completion and what came before it, as it is on disk."""

    parent: int | None
    """Number of the turn whose tokens it continues, in the session."""
    request: str
    """Completions of one request share it; all ids in its answer begin with it."""
    digest: bytes
    """Of the request: path and body."""
    idempotency_key: str | None
    prompt: bytes
    """[P] token ids, int32: after the parent's last one."""
    sampled: bytes
    """[S] token ids, int32."""
    logprobs: bytes
    """[S] float32."""
    runs: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    has_end: bool
    """The last sampled token ended the completion, and is no part of its text."""
    constrained: bool
    """Sampled under constraints: the logprobs are not those of the policy alone."""
    key: int
    """Hash of all messages up to the answer; 0: its prompt was no list of messages."""
    messages: int
    characters: int
    """Of the text of prompt and answer."""
    text_hash: int
    reason: str | None
    """Why the request does not continue the newest answer among its messages."""
    said: tuple[Message, ...]
    """The messages that the parent lacks, and the answer."""

    def generation(self) -> Generation:
        return Generation(
            token_ids=tuple(np.frombuffer(self.sampled, _IDS).tolist()),
            logprobs=tuple(np.frombuffer(self.logprobs, _LOGPROBS).astype(float).tolist()),
            finish_reason=self.finish_reason,
            policy_version_runs=self.runs,
        )


class Turn(NamedTuple):
    """A row of a ``Tree``: what is kept in memory of a turn while its session is open."""

    number: int
    parent: int
    """-1: none."""
    lineage: int
    children: int
    begin: int
    """Of its own tokens, those that its parent lacks, among those of the tree."""
    own: int
    sampled: int
    """Tokens at the end of its own."""
    length: int
    """Tokens of the sequence that ends with it."""
    key: int
    messages: int
    characters: int
    text_hash: int
    has_end: bool
    request: bytes
    name: int
    """Hash of the idempotency key of the request, or else of its digest."""
    digest: int
    """Hash of the digest."""
    received: int
    """1: its answer went out whole; 0: the connection broke before; -1: not known (yet)."""


_SAME = ("key", "messages", "characters", "text_hash", "has_end")
_FORMATS = ("i4", "i4", "i4", "i4", "i8", "i4", "i4", "i4", "i8", "i4", "i4", "i8", "?", "S24", "i8", "i8", "i1")
_COLUMNS = np.dtype([*zip(Turn._fields, _FORMATS, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt and its place in the tree."""

    ids: tuple[int, ...]
    parent: Turn | None = None
    reason: str | None = None
    text: str = ""
    turn: ChatTurn | None = None
    key: int = 0
    """Hash of all its messages."""


@dataclass(eq=False)
class Tree:
    """The turns of one session. Read by worker threads while the event loop adds to it."""

    lineages: int = 0
    row_tokens: int = 0
    """Of all sequences that nothing continues."""
    count: int = 0
    _rows: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, _COLUMNS))
    _ids: "array[int]" = field(default_factory=lambda: array("i"))

    @property
    def turns(self) -> NDArray[np.void]:
        """Columns named as the fields of ``Turn``."""
        return self._rows[: self.count]

    @property
    def tokens(self) -> int:
        """Prompt tokens, counted once where turns share them, and sampled ones."""
        return len(self._ids)

    def turn(self, number: int) -> Turn:
        return Turn(*self.turns[number].item())

    def path(self, number: int) -> list[Turn]:
        """The turns from the first of the sequence to this one."""
        path = [self.turn(number)]
        while path[-1].parent >= 0:
            path.append(self.turn(path[-1].parent))
        return path[::-1]

    def own_ids(self, turn: Turn) -> "array[int]":
        return self._ids[turn.begin : turn.begin + turn.own]

    def ids(self, number: int) -> tuple[int, ...]:
        """Token ids of the sequence that ends with the turn."""
        return tuple(chain.from_iterable(map(self.own_ids, self.path(number))))

    def add(self, stored: StoredTurn, received: int = -1) -> None:
        """Raises ``IndexError`` where its parent is not there."""
        parent = None if stored.parent is None else self.turn(stored.parent)
        own, begins = stored.prompt + stored.sampled, parent is None or parent.children > 0
        if self.count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros(4 + self.count // 8, _COLUMNS)])
        turn = Turn(
            number=self.count,
            parent=-1 if parent is None else parent.number,
            lineage=self.lineages if parent is None or begins else parent.lineage,
            children=0,
            begin=len(self._ids),
            own=len(own) // _IDS.itemsize,
            sampled=len(stored.sampled) // _IDS.itemsize,
            length=len(own) // _IDS.itemsize + (0 if parent is None else parent.length),
            request=stored.request.encode(),
            name=hash_of(stored.idempotency_key or stored.digest),
            digest=hash_of(stored.digest),
            received=received,
            **{name: getattr(stored, name) for name in _SAME},
        )
        self._rows[self.count] = turn
        self._ids.frombytes(own)
        self.count += 1
        self.lineages += begins
        self.row_tokens += turn.length
        if parent is not None:
            self.row_tokens -= 0 if parent.children else parent.length
            self._rows["children"][parent.number] += 1

    def render(self, codec: TextCodec, turn: ChatTurn) -> Prompt:
        """The prompt of a turn: recorded tokens and more, where that is proven to be what the template renders."""
        text = codec.template.prompt(turn)
        keys = [0, *message_keys(turn.messages)]
        alike, reason = self._longest(turn.messages, keys)
        found = next((one for one in alike if _begins(text, one)), None)
        if alike and found is None:
            # An answer that was cut, trimmed or whose calls are written in another way is still the one that was given:
            # the template is asked for the conversation with the words that were sampled.
            path = self.path(alike[0].number)
            try:
                other = codec.template.prompt(self._as_sampled(codec, turn, path))
            except ApiError:
                other = ""
            if _begins(other, alike[0]):
                text, found = other, alike[0]
            else:
                reason = "the chat template renders recorded answers in another way than they were sampled"
                found = next((one for one in reversed(path[:-1]) if _begins(text, one)), None)
        if found is not None:
            before, rest = self.ids(found.number), text[found.characters :]
            more = codec.encode(rest, add_special_tokens=False)
            if _text_after(codec, before, more) == rest:
                return Prompt(ids=before + more, parent=found, reason=reason, text=text, turn=turn, key=keys[-1])
            reason = "the tokenizer does not give back the text of the new messages"
        ids = codec.encode(text, add_special_tokens=turn.add_special_tokens)
        return Prompt(ids=ids, reason=reason, text=text, turn=turn, key=keys[-1])

    def place(self, ids: tuple[int, ...]) -> Prompt:
        """A prompt of token ids: it continues the longest recorded sequence that it begins with."""
        own, ends = np.asarray(ids, _IDS).tobytes(), {-1: 0}
        known: list[Turn] = []
        for turn in map(Turn._make, self.turns.tolist()):  # after its parent
            start = ends.get(turn.parent)
            if start is not None and own.startswith(self.own_ids(turn).tobytes(), start):
                ends[turn.number] = turn.length * _IDS.itemsize
                known.append(turn)
        known.sort(key=lambda turn: (turn.length, -turn.children, turn.number))
        return Prompt(ids=ids, parent=known[-1] if known else None)

    def _longest(self, messages: Sequence[Message], keys: Sequence[int]) -> tuple[list[Turn], str | None]:
        """The turns whose messages are the longest beginning of ``messages``, those that nothing continues first; and
        why it is not all answers among them."""
        reason = None
        for last in (i for i in reversed(range(len(messages))) if messages[i].role == "assistant"):
            if len(alike := np.flatnonzero(self.turns["key"] == keys[last + 1])):
                newest_first = [self.turn(number) for number in alike[-_MOST_ALIKE:][::-1]]
                return sorted(newest_first, key=lambda turn: turn.children > 0), reason
            reason = f"messages[{last}] is no answer that was given after these messages"
        return [], reason

    def _as_sampled(self, codec: TextCodec, turn: ChatTurn, path: Sequence[Turn]) -> ChatTurn:
        """``turn`` with the text of each recorded answer as it was sampled."""
        messages = list(turn.messages)
        for one in path:
            if one.key:
                ids = self.own_ids(one)[one.own - one.sampled :].tolist()
                text = codec.decode(ids[:-1] if one.has_end else ids, skip_special_tokens=False)
                messages[one.messages - 1] = Message(role="assistant", content=text)
        return replace(turn, messages=tuple(messages))


def new_turn(
    codec: TextCodec,
    prompt: Prompt,
    asked: GenerationRequest,
    generation: Generation,
    answer: Message | None,
    **fields: Any,
) -> StoredTurn:
    """The turn of a completion of ``prompt``. ``answer`` is what the agent was given; None: no message."""
    parent = prompt.parent
    number, known, before = (None, 0, 0) if parent is None else (parent.number, parent.length, parent.messages)
    messages = () if answer is None or prompt.turn is None else (*prompt.turn.messages, answer)
    text = prompt.text + _text_after(codec, prompt.ids, generation.token_ids)
    return StoredTurn(
        parent=number,
        prompt=np.asarray(prompt.ids[known:], _IDS).tobytes(),
        sampled=np.asarray(generation.token_ids, _IDS).tobytes(),
        logprobs=np.asarray(generation.logprobs, _LOGPROBS).tobytes(),
        runs=generation.policy_version_runs,
        finish_reason=generation.finish_reason,
        has_end=codec.has_end(generation.token_ids, generation.finish_reason, asked),
        constrained=asked.constraint is not None,
        key=next(message_keys(messages[-1:], prompt.key), 0),
        messages=len(messages),
        characters=len(text),
        text_hash=hash_of(text),
        reason=prompt.reason,
        said=messages[before:],
        **fields,
    )


def message_keys(messages: Sequence[Message], key: int = 0) -> Iterator[int]:
    """For each message a hash of it and all before it; ``key``: of those before the first.

    Equal answers: the same text but for white space around it, the same reasoning, calls of the same tools in the same
    order with arguments that are equal as JSON. Ids of calls do not count: where a template shows them, its text does.
    """
    for message in messages:
        parts: list[Any] = [key, message.role, message.content]
        if message.role == "assistant":
            calls = [(call.name, parsed_arguments(call.arguments)) for call in message.tool_calls]
            parts = [key, message.role, message.content.strip(), (message.reasoning_content or "").strip(), calls]
        key = hash_of(msgspec.json.encode(parts, order="deterministic")) or 1
        yield key


def kept_turns(parents: Sequence[int], received: Sequence[int]) -> list[int]:
    """Numbers of the turns that are trained: those whose answer was received, as far as is known, or continued."""
    kept = {number for number, was_received in enumerate(received) if was_received}
    for number in reversed(range(len(parents))):  # a turn comes after its parent
        if number in kept:
            kept.add(parents[number])
    return sorted(kept - {-1})


def training_rows(turns: Sequence[StoredTurn], received: Sequence[int]) -> list[dict[str, Any]]:
    """The sequences of a session, as ``GET /sessions/ID/rollout`` answers them: one for each of the ``kept_turns`` that
    nothing continues. A sampled token is trained in the first that holds it. ``received``: as ``Turn`` has it."""
    parents = [-1 if turn.parent is None else turn.parent for turn in turns]
    kept = kept_turns(parents, received)
    continued, trained, rows = {parents[number] for number in kept}, set[int](), []
    for leaf in (number for number in kept if number not in continued):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        columns = ("token_ids", "masks", "logprobs", "versions", "finish_reasons", "turns", "spans")
        row: dict[str, list[Any]] = {name: [] for name in columns}
        for number in reversed(path):
            turn, start = turns[number], len(row["token_ids"])
            ids = np.frombuffer(turn.prompt + turn.sampled, _IDS).tolist()
            row["token_ids"] += ids
            count = len(ids) if number in trained else len(turn.prompt) // _IDS.itemsize
            row["masks"] += [NOT_TRAINED] * count
            row["logprobs"] += [NO_LOGPROB] * count
            row["versions"] += [UNKNOWN_VERSION] * count
            if sampled := ids[count:]:
                row["spans"].append([start + count, start + len(ids)])
                row["turns"].append(bisect_left(kept, number))
                row["finish_reasons"].append(turn.finish_reason)
                logprobs = np.frombuffer(turn.logprobs, _LOGPROBS).astype(float).tolist()
                # A token that was the only one allowed has no gradient where it was sampled.
                is_forced = [turn.constrained and value >= 0.0 for value in logprobs]
                pairs = zip(sampled, is_forced, strict=True)
                row["masks"] += [NOT_TRAINED if forced else token for token, forced in pairs]
                row["logprobs"] += [NO_LOGPROB if turn.constrained else max(v, MIN_LOGPROB) for v in logprobs]
                row["versions"] += [version for version, run in turn.runs for _ in range(run)]
        rows.append(row)
        trained.update(path)
    return rows


def _begins(text: str, turn: Turn) -> bool:
    """``text`` begins with the text of the turn's sequence."""
    return len(text) >= turn.characters and hash_of(text[: turn.characters]) == turn.text_hash


def _text_after(codec: TextCodec, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` where they stand after ``before``."""
    head = list(before[-_CONTEXT:])
    start, whole = (codec.decode(some, skip_special_tokens=False) for some in (head, [*head, *ids]))
    return whole[len(start) :] if whole.startswith(start) else codec.decode(ids, skip_special_tokens=False)


def hash_of(value: bytes | str) -> int:
    """64 bits, the first 0."""
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return xxhash.xxh3_64_intdigest(data) >> 1
