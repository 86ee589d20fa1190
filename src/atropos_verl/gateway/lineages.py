"""The tree of what was sampled in a session: turns that continue each other, and the rows they are trained in.

A ``Turn`` is one completion with the prompt tokens that its parent's sequence lacks.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import xxhash

from atropos_verl.gateway.chat import ChatTurn, Message, parsed_arguments
from atropos_verl.gateway.fields import ApiError
from atropos_verl.gateway.text import TextCodec
from atropos_verl.types import MIN_LOGPROB, NO_LOGPROB, NOT_TRAINED, UNKNOWN_VERSION, FinishReason, Generation

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
    """Their number."""
    characters: int
    """Of the text of prompt and answer."""
    text_hash: int
    reason: str | None
    """The reason for which the request does not continue the newest answer among its messages."""
    said: tuple[Message, ...]
    """The messages that the parent lacks, and the answer."""

    def generation(self) -> Generation:
        return Generation(
            token_ids=tuple(np.frombuffer(self.sampled, _IDS).tolist()),
            logprobs=tuple(np.frombuffer(self.logprobs, _LOGPROBS).astype(float).tolist()),
            finish_reason=self.finish_reason,
            policy_version_runs=self.runs,
        )


@dataclass(slots=True, eq=False)
class Turn:
    """What is kept in memory of a turn while its session is open."""

    number: int
    parent: "Turn | None"
    stored: StoredTurn
    """Without logprobs and messages."""
    length: int
    """Tokens of the sequence that ends with it."""
    ids_hash: int
    lineage: int
    children: int = 0

    def path(self) -> list["Turn"]:
        """The turns from the first of the sequence to this one."""
        path, turn = [self], self.parent
        while turn is not None:
            path.append(turn)
            turn = turn.parent
        return path[::-1]

    def ids(self) -> tuple[int, ...]:
        """Token ids of the sequence that ends with it."""
        return tuple(np.frombuffer(_bytes_of(self), _IDS).tolist())

    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of its whole prompt."""
        return self.ids()[: self.length - len(self.stored.sampled) // _IDS.itemsize]

    def begins(self, text: str) -> bool:
        """``text`` begins with the text of its sequence."""
        characters = self.stored.characters
        return len(text) >= characters and _hash(text[:characters]) == self.stored.text_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt and its place in the tree."""

    ids: tuple[int, ...]
    parent: Turn | None = None
    reason: str | None = None
    text: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(eq=False)
class Tree:
    """The turns of one session. Read by worker threads while the event loop adds to it."""

    turns: list[Turn] = field(default_factory=list)
    lineages: int = 0
    tokens: int = 0
    """Prompt tokens, counted once where turns share them, and sampled ones."""
    row_tokens: int = 0
    """Of all sequences that nothing continues."""
    _by_messages: dict[int, list[Turn]] = field(default_factory=dict)

    def add(self, stored: StoredTurn) -> Turn:
        """Raises ``IndexError`` where its parent is not there."""
        parent = None if stored.parent is None else self.turns[stored.parent]
        own = stored.prompt + stored.sampled
        turn = Turn(
            number=len(self.turns),
            parent=parent,
            stored=msgspec.structs.replace(stored, logprobs=b"", said=()),
            length=(0 if parent is None else parent.length) + len(own) // _IDS.itemsize,
            ids_hash=0,
            lineage=self.lineages if parent is None or parent.children else parent.lineage,
        )
        turn.ids_hash = _hash(_bytes_of(turn))
        self.lineages += turn.lineage == self.lineages
        self.row_tokens += turn.length
        if parent is not None:
            self.row_tokens -= 0 if parent.children else parent.length
            parent.children += 1
        self.tokens += len(own) // _IDS.itemsize
        self.turns.append(turn)
        if stored.key:
            self._by_messages.setdefault(stored.key, []).append(turn)
        return turn

    def render(self, codec: TextCodec, turn: ChatTurn) -> Prompt:
        """The prompt of a turn: recorded tokens and more, where that is proven to be what the template renders."""
        text = codec.template.prompt(turn)
        alike, reason = self._longest(turn.messages)
        found = next((one for one in alike if one.begins(text)), None)
        if alike and found is None:
            # An answer that was cut, trimmed or whose calls are written in another way is still the one that was given:
            # the template is asked for the conversation with the words that were sampled.
            sampled = _as_sampled(codec, turn, alike[0])
            try:
                other = codec.template.prompt(sampled)
            except ApiError:
                other = ""
            if alike[0].begins(other):
                text, found = other, alike[0]
            else:
                reason = "the chat template renders recorded answers in another way than they were sampled"
                found = next((one for one in reversed(alike[0].path()[:-1]) if one.begins(text)), None)
        if found is not None:
            before, rest = found.ids(), text[found.stored.characters :]
            more = codec.encode(rest, add_special_tokens=False)
            if _text_after(codec, before, more) == rest:
                return Prompt(ids=before + more, parent=found, reason=reason, text=text, messages=turn.messages)
            reason = "the tokenizer does not give back the text of the new messages"
        ids = codec.encode(text, add_special_tokens=turn.add_special_tokens)
        return Prompt(ids=ids, reason=reason, text=text, messages=turn.messages)

    def place(self, ids: tuple[int, ...]) -> Prompt:
        """A prompt of token ids: it continues the longest recorded sequence that it begins with."""
        own, hashes = np.asarray(ids, _IDS).tobytes(), dict[int, int]()
        for turn in sorted(self.turns, key=lambda turn: (-turn.length, turn.children, -turn.number)):
            if turn.length <= len(ids):
                size = turn.length
                if size not in hashes:
                    hashes[size] = _hash(own[: size * _IDS.itemsize])
                if hashes[size] == turn.ids_hash:
                    return Prompt(ids=ids, parent=turn)
        return Prompt(ids=ids)

    def _longest(self, messages: Sequence[Message]) -> tuple[list[Turn], str | None]:
        """The turns whose messages are the longest beginning of ``messages``, those that nothing continues first; and
        why it is not all answers among them."""
        alike: list[Turn] = []
        count = 0
        for end, key in enumerate(message_keys(messages), 1):
            if messages[end - 1].role == "assistant" and (known := self._by_messages.get(key)):
                alike, count = known, end
        later = next((i for i in range(count, len(messages)) if messages[i].role == "assistant"), None)
        reason = None if later is None else f"messages[{later}] is no answer that was given after these messages"
        newest_first = alike[-_MOST_ALIKE:][::-1]
        return sorted(newest_first, key=lambda turn: turn.children > 0), reason


def new_turn(
    codec: TextCodec,
    prompt: Prompt,
    generation: Generation,
    *,
    answer: Message | None,
    has_end: bool,
    **fields: Any,
) -> StoredTurn:
    """The turn of a completion of ``prompt``. ``answer`` is what the agent was given; None: no message."""
    parent = prompt.parent
    known = 0 if parent is None else parent.length
    said = () if answer is None else (*prompt.messages[0 if parent is None else parent.stored.messages :], answer)
    messages = () if answer is None else (*prompt.messages, answer)
    text = prompt.text + _text_after(codec, prompt.ids, generation.token_ids)
    return StoredTurn(
        parent=None if parent is None else parent.number,
        prompt=np.asarray(prompt.ids[known:], _IDS).tobytes(),
        sampled=np.asarray(generation.token_ids, _IDS).tobytes(),
        logprobs=np.asarray(generation.logprobs, _LOGPROBS).tobytes(),
        runs=generation.policy_version_runs,
        finish_reason=generation.finish_reason,
        has_end=has_end,
        key=list(message_keys(messages))[-1] if messages else 0,
        messages=len(messages),
        characters=len(text),
        text_hash=_hash(text),
        reason=prompt.reason,
        said=said,
        **fields,
    )


def message_keys(messages: Sequence[Message]) -> Iterator[int]:
    """For each message a hash of it and all before it.

    Equal answers: the same text but for white space around it, the same reasoning, calls of the same tools in the same
    order with arguments that are equal as JSON. Ids of calls do not count: where a template shows them, its text does.
    """
    key = 0
    for message in messages:
        content = message.content if isinstance(message.content, str) else "\n".join(message.content)
        parts: list[Any] = [key, message.role, content]
        if message.role == "assistant":
            calls = [(call.name, parsed_arguments(call.arguments)) for call in message.tool_calls]
            parts = [key, message.role, content.strip(), (message.reasoning_content or "").strip(), calls]
        key = _hash(msgspec.json.encode(parts, order="deterministic")) or 1
        yield key


def _as_sampled(codec: TextCodec, turn: ChatTurn, recorded: Turn) -> ChatTurn:
    """``turn`` with the text of each recorded answer as it was sampled."""
    messages = list(turn.messages)
    for one in recorded.path():
        if one.stored.key:
            ids = np.frombuffer(one.stored.sampled, _IDS).tolist()
            text = codec.decode(ids[:-1] if one.stored.has_end else ids, skip_special_tokens=False)
            messages[one.stored.messages - 1] = Message(role="assistant", content=text)
    return replace(turn, messages=tuple(messages))


def kept_turns(turns: Sequence[StoredTurn], unreceived: Collection[str]) -> list[int]:
    """Numbers of the turns that are trained: those whose answer was received, as far as is known, or continued."""
    kept = {number for number, turn in enumerate(turns) if turn.request not in unreceived}
    for number in range(len(turns) - 1, -1, -1):  # a turn comes after its parent
        parent = turns[number].parent
        if number in kept and parent is not None:
            kept.add(parent)
    return sorted(kept)


def training_rows(turns: Sequence[StoredTurn], unreceived: Collection[str]) -> list[dict[str, Any]]:
    """The sequences of a session, as ``GET /sessions/ID/rollout`` answers them.

    One for each of the ``kept_turns`` that nothing continues. A sampled token is trained in the first of the sequences
    that hold it.
    """
    parents = [turn.parent for turn in turns]
    kept = kept_turns(turns, unreceived)
    order = {number: index for index, number in enumerate(kept)}
    continued = {parents[number] for number in kept}
    trained: set[int] = set()
    rows = []
    for leaf in (number for number in kept if number not in continued):
        path: list[int] = []
        number: int | None = leaf
        while number is not None:
            path.append(number)
            number = parents[number]
        rows.append(_row(turns, path[::-1], trained, order))
        trained.update(path)
    return rows


def _row(
    turns: Sequence[StoredTurn], path: list[int], trained: Collection[int], order: dict[int, int]
) -> dict[str, Any]:
    row: dict[str, list[Any]] = {
        name: [] for name in ("token_ids", "masks", "logprobs", "versions", "finish_reasons", "turns", "spans")
    }

    def add(*columns: Sequence[float]) -> None:
        for values, column in zip(row.values(), columns, strict=False):
            values += column

    for number in path:
        turn = turns[number]
        prompt, sampled = (np.frombuffer(ids, _IDS).tolist() for ids in (turn.prompt, turn.sampled))
        if number in trained or not sampled:
            prompt, sampled = prompt + sampled, []
        count = len(prompt)
        add(prompt, [NOT_TRAINED] * count, [NO_LOGPROB] * count, [UNKNOWN_VERSION] * count)
        if sampled:
            row["spans"].append([len(row["token_ids"]), len(row["token_ids"]) + len(sampled)])
            row["turns"].append(order[number])
            row["finish_reasons"].append(turn.finish_reason)
            generation = turn.generation()
            logprobs = [NO_LOGPROB if turn.constrained else max(v, MIN_LOGPROB) for v in generation.logprobs]
            versions = [version for version, run in turn.runs for _ in range(run)]
            masks = sampled
            if turn.constrained:  # a token that was the only one allowed has no gradient where it was sampled
                pairs = zip(sampled, generation.logprobs, strict=True)
                masks = [token if value < 0.0 else NOT_TRAINED for token, value in pairs]
            add(sampled, masks, logprobs, versions)
    return row


def _bytes_of(turn: Turn) -> bytes:
    return b"".join(one.stored.prompt + one.stored.sampled for one in turn.path())


def _text_after(codec: TextCodec, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` where they stand after ``before``."""
    head = list(before[-_CONTEXT:])
    start, whole = (codec.decode(some, skip_special_tokens=False) for some in (head, [*head, *ids]))
    return whole[len(start) :] if whole.startswith(start) else codec.decode(ids, skip_special_tokens=False)


def _hash(value: bytes | str) -> int:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return xxhash.xxh3_64_intdigest(data) >> 1
