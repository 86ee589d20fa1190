"""Requests inside the engine: what they are checked against, their sequences, and the future their caller waits on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from atropos_verl.engine.sampling import stream_key
from atropos_verl.errors import GenerationRequestError
from atropos_verl.types import FinishReason, Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

OnDelta = Callable[[GenerationDelta], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What a request is checked against."""

    max_context_len: int
    """Prompt plus completion, tokens."""
    vocab_size: int
    eos_token_ids: frozenset[int]

    def new_tokens(self, request: GenerationRequest) -> int:
        """New tokens of one completion, at most."""
        room = self.max_context_len - len(request.prompt_token_ids)
        return room if request.max_tokens is None else min(request.max_tokens, room)

    def stop_token_ids(self, request: GenerationRequest) -> frozenset[int]:
        """Tokens that end a completion."""
        return frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self.eos_token_ids)


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine started, and what it holds now."""

    running: int = 0
    waiting: int = 0
    """Sequences in a KV slot, and without one."""
    requests: int = 0
    """Accepted; of them ``finished`` with all completions, ``aborted`` by the caller, ``failed`` with an error."""
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    """Tokens prefilled, those after an eviction included; a prompt shared by n completions counts once."""
    reused_tokens: int = 0
    """Tokens of contexts that were not prefilled because their keys and values were stored."""
    generated_tokens: int = 0
    evictions: int = 0
    """Sequences that lost their KV (to new weights, a failure, another request) and were prefilled again."""
    rebuilds: int = 0
    """Failures after which the engine began anew."""
    kv_bytes: int = 0
    weight_bytes: int = 0


class StopStrings:
    """Finds stop strings in the text of generated tokens. ``pieces``: texts of single tokens, kept by the caller.

    A stop string of m UTF-8 bytes is spelled by at most m tokens; a few more are decoded, since decoding may start in
    the middle of a character. Most tokens are not decoded in context: one can only complete a stop string whose last
    character it holds (or may hold: broken UTF-8, and whitespace, which some tokenizers strip from a token alone)."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], pieces: dict[int, str]) -> None:
        self._tokenizer, self._stops, self._pieces = tokenizer, stops, pieces
        self._last_characters = {stop[-1] for stop in stops} | {"\ufffd"}
        self._always = any(stop[-1].isspace() or stop[-1] == "\ufffd" for stop in stops)
        self.window = max(len(stop.encode()) for stop in stops) + 8

    def completed_by(self, tokens: list[int]) -> bool:
        """True when the text of ``tokens`` holds a stop string, given that without the last token it did not."""
        if (last := tokens[-1]) not in self._pieces:
            self._pieces[last] = self._decode([last])
        if not self._always and self._last_characters.isdisjoint(self._pieces[last]):
            return False
        text = self._decode(tokens[-self.window :])
        return any(stop in text for stop in self._stops)

    def _decode(self, tokens: list[int]) -> str:
        # Special tokens stay in: "<|im_end|>" may itself be a stop string.
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One completion on its way. In a slot, its KV cache holds ``context_len - 1`` positions: all but the last."""

    ticket: Ticket
    index: int
    key: int
    """Random stream of this completion."""
    turn: int = 0
    ordinal: int = 0
    """Places in the queue: by turn, then by arrival."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """The policy that sampled each token."""
    finish_reason: FinishReason | None = None
    matcher: Any = None
    """llguidance's state after ``tokens``; None without a constraint."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)

    @property
    def place(self) -> int:
        """Sequences that the same client request asks for before this one."""
        return self.ticket.request.place + self.index

    def __lt__(self, other: RunningSequence) -> bool:
        return (self.turn, self.ordinal) < (other.turn, other.ordinal)

    @property
    def context_len(self) -> int:
        return len(self.ticket.request.prompt_token_ids) + len(self.tokens)

    def context(self) -> tuple[int, ...]:
        """Prompt and generated tokens: what a prefill has to compute."""
        prompt = self.ticket.request.prompt_token_ids
        return (*prompt, *self.tokens) if self.tokens else prompt

    def push(self, token: int, logprob: float, policy_version: int, best: dict[int, float]) -> bool:
        """Append one sampled token. True when it was the last one. Nothing is changed when it raises.

        ``best``: logprobs of the best tokens there, best first; at least as many as the request asks for."""
        ticket = self.ticket
        stops = token in ticket.stop_token_ids
        if ticket.stops is not None and not stops:
            stops = ticket.stops.completed_by([*self.tokens[-ticket.stops.window :], token])
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(policy_version)
        if top := dict(islice(best.items(), ticket.request.top_logprobs)):
            self.top_logprobs.append(top)
        if self.matcher is not None and not self.matcher.consume_token(token):
            logger.warning("a constraint became too complex: %s", self.matcher.get_error())
            self.finish_reason = "abort"
        elif stops or (self.matcher is not None and self.matcher.is_stopped() and ticket.request.ignore_eos):
            self.finish_reason = "stop"
        elif len(self.tokens) >= ticket.max_new_tokens:
            self.finish_reason = "length"
        if ticket.on_delta is not None:
            delta = GenerationDelta(
                index=self.index,
                token_ids=(token,),
                logprobs=(logprob,),
                finish_reason=self.finish_reason,
                policy_version=policy_version,
                top_logprobs=(top,) if top else (),
            )
            ticket.on_delta(delta)
        return self.finish_reason is not None


class Ticket:
    """One request inside the engine: its n sequences, and the future its caller waits on, which is resolved once.

    Completion ``i`` draws from stream ``(seed, i)``. ``on_delta`` is called in the engine's thread and must not block.
    """

    def __init__(
        self,
        request: GenerationRequest,
        limits: EngineLimits,
        stops: StopStrings | None = None,
        seed: int = 0,
        on_delta: OnDelta | None = None,
        matcher: Any = None,
    ) -> None:
        # Contexts are looked up by value, so they must be tuples whatever the caller used.
        self.request = request = dataclasses.replace(request, prompt_token_ids=tuple(request.prompt_token_ids))
        self.stops, self.on_delta = stops, on_delta
        self.future: Future[list[Generation]] = Future()
        self.future.set_running_or_notify_cancel()  # so a cancelled asyncio task cannot cancel it
        self.prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
        self.max_new_tokens = limits.new_tokens(request)
        self.stop_token_ids = limits.stop_token_ids(request)
        self.sequences = [
            RunningSequence(self, index, stream_key(seed, index), matcher=matcher and matcher.deep_copy())
            for index in range(request.n)
        ]

    def resolve_if_done(self) -> bool:
        """Hand the completions over when all have ended. True when this call did."""
        if any(sequence.finish_reason is None for sequence in self.sequences):
            return False
        generations = [
            Generation(
                token_ids=tuple(sequence.tokens),
                logprobs=tuple(sequence.logprobs),
                finish_reason=sequence.finish_reason or "abort",
                policy_version_runs=tuple((version, len(list(run))) for version, run in groupby(sequence.versions)),
                prompt_logprobs=self.prompt_logprobs,
                top_logprobs=tuple(sequence.top_logprobs),
            )
            for sequence in self.sequences
        ]
        with contextlib.suppress(InvalidStateError):  # another thread was first
            self.future.set_result(generations)
            return True
        return False

    def abort(self) -> bool:
        """End every unfinished sequence with "abort" and hand over what there is. True when this call ended it."""
        for sequence in self.sequences:
            if sequence.finish_reason is None and self.on_delta is not None:
                self.on_delta(GenerationDelta(index=sequence.index, token_ids=(), logprobs=(), finish_reason="abort"))
            sequence.finish_reason = sequence.finish_reason or "abort"
        return self.resolve_if_done()

    def fail(self, error: BaseException) -> bool:
        """End the request with an error. True when this call ended it."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
            return True
        return False


def eos_token_ids(*holders: Any) -> frozenset[int]:
    """End-of-sequence ids that configurations and tokenizers name, together."""
    named = (getattr(holder, "eos_token_id", None) for holder in holders)
    several = (value if isinstance(value, (list, tuple)) else [value] for value in named)
    return frozenset(int(token) for values in several for token in values if token is not None)


def validate(request: GenerationRequest, limits: EngineLimits) -> None:
    """Raise ``GenerationRequestError`` naming the parameter, its value and the limit."""
    prompt, room = request.prompt_token_ids, limits.max_context_len
    if len(prompt) >= room:
        text = f"the prompt has {len(prompt)} tokens; the context holds {room} tokens, prompt and completion together"
        raise GenerationRequestError(f"{text}: shorten it or raise inference.max_context_len", "prompt_token_ids")
    check_tokens("prompt_token_ids", prompt, limits.vocab_size)
    strings = not isinstance(request.stop, str) and all(isinstance(s, str) and s for s in request.stop)
    alternatives = 0 if request.prompt_logprobs is None else request.prompt_logprobs
    rules = [
        ("n", request.n >= 1, "at least 1"),
        ("max_tokens", request.max_tokens is None or request.max_tokens >= 1, "at least 1"),
        ("temperature", 0.0 <= request.temperature < math.inf, "0 (greedy) or more"),
        ("top_p", 0.0 < request.top_p <= 1.0, "in (0, 1]"),
        ("top_k", request.top_k >= -1, "-1 or 0 (off), or more"),
        ("min_p", 0.0 <= request.min_p <= 1.0, "in [0, 1]"),
        ("stop", strings, "a tuple of strings, without empty strings"),
        ("prompt_logprobs", 0 <= alternatives <= limits.vocab_size, f"in [0, {limits.vocab_size}]"),
        ("top_logprobs", 0 <= request.top_logprobs <= limits.vocab_size, f"in [0, {limits.vocab_size}]"),
    ]
    for name, holds, wanted in rules:
        if not holds:
            raise GenerationRequestError(f"{name} must be {wanted}, not {getattr(request, name)!r}", name)


def check_tokens(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise ``GenerationRequestError`` when there are none, or for one outside the vocabulary."""
    if not token_ids:
        raise GenerationRequestError(f"{name} is empty: give at least one token", name)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index, token = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
        raise GenerationRequestError(f"{name}[{index}] is {token}, outside the vocabulary [0, {vocab_size})", name)
