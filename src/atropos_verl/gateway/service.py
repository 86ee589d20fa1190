"""The part all endpoints share: the engine behind its gate, the tokenizer, the counters."""

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import msgspec
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from atropos_verl.engine.protocol import GenerationEngine, RequestGate
from atropos_verl.errors import EngineError
from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError, Fields, Sampling
from atropos_verl.gateway.text import ReplyReader, TextCodec, constraint_of
from atropos_verl.http_thread import SameLines, printable
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.types import (
    MIN_LOGPROB,
    NO_LOGPROB,
    UNKNOWN_VERSION,
    FinishReason,
    Generation,
    GenerationDelta,
    GenerationRequest,
)

logger = logging.getLogger(__name__)

Answer = Callable[[], Awaitable[bytes] | AsyncGenerator[bytes, None]]
"""A request that was read, to be generated: the whole answer, or its pieces as they come."""

_MAX_SEQUENCES = 4096
_MAX_TOKENS = 1 << 25
"""Tokens of one request, the prompts' and those it may generate: 256 completions in a context of 131,072."""
_MAX_KEPT_BYTES = 64 << 20
"""Of conversations that may be continued by ``previous_response_id``, those of the oldest answers go first."""
_MAX_REMEMBERED_WARNINGS = 256
_PREFIX = "atropos_verl_gateway"


@dataclass(eq=False)
class GatewayService(Collector):
    """One engine as the endpoints see it, and what was counted since the start (in the gateway's event loop only)."""

    engine: GenerationEngine
    codec: TextCodec
    model_name: str
    gate: RequestGate
    ledger: Ledger | None
    throttle: StalenessThrottle | None
    max_new_tokens: int | None = None
    """Of one completion, whatever a request asks for; None: the rest of the context."""
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(endpoint, HTTP status) → requests answered; 499 = the client went away."""
    counts: Counter[str] = field(default_factory=Counter)
    """``in_flight`` requests, ``unread_bytes`` of these, ``prompt_tokens`` and ``generated_tokens`` of answers,
    ``kept_bytes`` of conversations."""
    on_request: Callable[..., None] | None = None
    """Told of every request that ended, as ``training.trace.TraceWriter.request`` is."""
    session_id: str | None = None
    """Of the session whose requests these are."""
    _conversations: dict[str, tuple[int, tuple[Message, ...]]] = field(default_factory=dict)
    """Id of an answer → about how many bytes the conversation has that ended with it, and its messages."""
    _warned: set[str] = field(default_factory=set)
    _refusals: SameLines = field(default_factory=SameLines)
    more_figures: Callable[[], Iterable[tuple[str, str, float]]] = tuple
    """Name, text and value of figures that others count."""

    def collect(self) -> Iterator[Metric]:
        text = "Requests answered, by endpoint and HTTP status (499: client went away)."
        requests = CounterMetricFamily(f"{_PREFIX}_requests", text, labels=["endpoint", "status"])
        for (endpoint, status), count in sorted(self.answered.items()):
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        version = self.engine.policy_version
        figures: list[tuple[str, str, float]] = [
            ("requests_in_flight", "Generation requests being served or waiting.", self.counts["in_flight"]),
            ("prompt_tokens_total", "Prompt tokens of served requests.", self.counts["prompt_tokens"]),
            ("generated_tokens_total", "Tokens generated for clients.", self.counts["generated_tokens"]),
            ("policy_version", "Version of the weights the engine holds; -1 before the first.", version),
            ("paused", "1 while new requests wait for a weight sync.", not self.gate.is_open),
            ("paused_seconds_total", "Seconds spent paused for weight syncs.", self.gate.paused_seconds),
        ]
        if (stats := getattr(self.engine, "stats", None)) is not None:  # replicas count for themselves
            held = stats()
            figures += [
                ("prefilled_tokens_total", "Tokens whose keys and values the engine computed.", held.prompt_tokens),
                ("reused_tokens_total", "Tokens whose keys and values it had from before.", held.reused_tokens),
                ("sampled_tokens_total", "Tokens it sampled, also for answers that go on.", held.generated_tokens),
            ]
        if self.ledger is not None:
            for name, value in asdict(self.ledger.stats()).items():
                total = "_total" if name.startswith(("recorded", "evicted")) else ""
                figures.append((f"ledger_{name}{total}", f"Of the ledger: {name} (spans are completions).", value))
        for name, text, value in (*figures, *self.more_figures()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"{_PREFIX}_{name}", text, value=value)

    def warn(self, key: str, message: str, *args: object, again: bool = False) -> None:
        """Log ``message`` at WARNING the first time ``key`` occurs, without what a terminal obeys; ``again``: once in
        10 s, so that the newest refusal in the log says why requests fail now."""
        key = key if key in self._warned or len(self._warned) < _MAX_REMEMBERED_WARNINGS else "others"
        if self._refusals.is_new(key) if again else key not in self._warned:
            logger.warning("%s", printable(message % args))
        self._warned.add(key)

    def report_unread(self, endpoint: str, fields: Fields, *parts: Fields) -> None:
        """Log each unknown field once: it is tolerated, as vLLM does, but never in silence. So is another model's name
        (environments often send a tokenizer path)."""
        name = fields.read("model", self.model_name)[:200]
        if name != self.model_name[:200]:
            text = "a client asks for model %r; this gateway serves %r only and answers with that"
            self.warn(f"model {name}", text, name, self.model_name)
        for name in (name[:100] for part in (fields, *parts) for name in part.unread()):
            if "template" in name:
                raise ApiError(400, f"{name}: no template is taken in this field", param=name)
            self.warn(f"field {name}", "%s: the request field %r is unknown here and is ignored", endpoint, name)

    def requests(
        self,
        sampling: Sampling,
        prompts: Sequence[tuple[int, ...]],
        *,
        param: str,
        name: str,
        prompt_logprobs: int | None = None,
    ) -> list[GenerationRequest]:
        """The engine's requests, called ``name``-0, …; ``max_tokens`` is cut to the run's bound and the context's rest.

        Raises ``ApiError`` 400 naming ``param`` when a prompt is empty, or leaves no room for one new token."""
        template, context = sampling.template, self.engine.max_context_len
        if (sequences := len(prompts) * template.n) > _MAX_SEQUENCES:
            text = f"n: {len(prompts)} prompts, {template.n} completions each: {_MAX_SEQUENCES} at most in one request"
            raise ApiError(400, text, param="n")
        made, tokens = [], 0
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ApiError(400, f"{param}: the prompt has no token; send at least one", param=param)
            room = context - len(prompt)
            if room < 1:
                text = f"This model's maximum context length is {context} tokens, but the prompt has {len(prompt)} "
                text += f"tokens and at least 1 must be left for the completion. Shorten the prompt ({param})."
                raise ApiError(400, text, param=param, code="context_length_exceeded")
            bound, asked = min(room, self.max_new_tokens or room), template.max_tokens or room
            if self.max_new_tokens is not None and asked > self.max_new_tokens:
                text = "requests ask for up to %d new tokens; max_response_length=%d is what they get"
                self.warn("max_response_length", text, asked, self.max_new_tokens)
            new: dict[str, Any] = {"prompt_token_ids": prompt, "max_tokens": min(asked, bound), "asked": sequences}
            new |= {"prompt_logprobs": prompt_logprobs, "request_id": f"{name}-{index}", "place": index * template.n}
            made.append(replace(template, **new))
            tokens += len(prompt) * (1 + (prompt_logprobs or 0)) + template.n * min(asked, bound)
        if tokens > _MAX_TOKENS:
            text = f"max_tokens: {sequences} completions and their prompts may have {tokens} tokens; {_MAX_TOKENS} at "
            text += "most in one request; lower it, n, or the number of prompts"
            raise ApiError(400, text, param="max_tokens")
        return made

    def new_id(self, prefix: str) -> str:
        """A new id of something in the answer."""
        return f"{prefix}{uuid.uuid4().hex}"

    def render(self, turn: ChatTurn) -> tuple[int, ...]:
        """The prompt of a turn, in a worker thread. Raises ``ApiError`` 400 naming the field."""
        return self.codec.render(turn)

    def request(self, turn: ChatTurn, name: str, param: str = "messages") -> GenerationRequest:
        """The engine's request for a turn, in a worker thread. Raises ``ApiError`` 400 naming the field."""
        if turn.parses_calls or turn.separates_reasoning:
            _ = self.codec.renderer  # its first import takes a second, and should not take it from the event loop
        prompt_ids = self.render(turn)
        constraint = constraint_of(self.codec, turn, prompt_ids)
        [request] = self.requests(turn.sampling, [prompt_ids], param=param, name=name)
        return replace(request, constraint=constraint)

    def reader(self, turn: ChatTurn, request: GenerationRequest, generation: Generation, index: int) -> ReplyReader:
        """It has read completion ``index`` of the request for a turn."""
        reader = ReplyReader(self.codec, turn, request, index)
        reader.push(generation.token_ids, generation.finish_reason)
        return reader

    def messages_of(self, answer_id: str) -> Sequence[Message] | None:
        """The conversation that ended with the answer of this id; None: not kept."""
        kept = self._conversations.get(answer_id)
        return None if kept is None else kept[1]

    def remember(self, answer_id: str, messages: tuple[Message, ...]) -> None:
        """Keep a conversation for a while, which a client may continue by the id of its last answer."""
        parts = ([said.content, said.reasoning_content, said.tool_calls] for said in messages)
        size = sum(500 + len(msgspec.json.encode(part)) for part in parts)
        self._conversations[answer_id] = size, messages
        self.counts["kept_bytes"] += size
        while self.counts["kept_bytes"] > _MAX_KEPT_BYTES:
            self.counts["kept_bytes"] -= self._conversations.pop(next(iter(self._conversations)))[0]

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Generation]]:
        """``requests[i].n`` completions of each request. Cancelling frees every slot they hold.

        Raises ``GenerationRequestError``, ``EngineStoppedError``, ``EngineError``; ``ApiError`` 503 when a completion
        was aborted (half a completion must not be taken for a whole one)."""
        begun = time.time()
        async with self._admitted(requests):
            try:
                async with asyncio.TaskGroup() as group:  # the first failure cancels the others and frees their slots
                    tasks = [group.create_task(self.engine.agenerate(request)) for request in requests]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors
        results = [task.result() for task in tasks]
        for request, generations in zip(requests, results, strict=True):
            if len(generations) != request.n:
                raise EngineError(f"{request.request_id}: {len(generations)} completions instead of n = {request.n}")
            for generation in generations:
                self.counts["generated_tokens"] += len(generation.token_ids)
                _refuse_aborted(generation.finish_reason)
            self.counts["prompt_tokens"] += len(request.prompt_token_ids)
        await self._record(zip(requests, results, strict=True), begun)
        return results

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """``generate`` for one request, token by token. Closing the generator frees its slots."""
        begun = time.time()
        async with self._admitted([request]) as untold:
            seen: list[list[GenerationDelta]] = [[] for _ in range(request.n)]
            running = request.n
            try:
                # A client that goes away may do so between two deltas: only closing tells the engine then.
                async with aclosing(self.engine.astream(request)) as deltas:
                    async for delta in deltas:
                        self.counts["generated_tokens"] += len(delta.token_ids)
                        _refuse_aborted(delta.finish_reason)
                        seen[delta.index].append(delta)
                        running -= delta.finish_reason is not None
                        if not running:
                            untold.clear()
                            await self._record([(request, joined(seen))], begun)
                        yield delta
            finally:
                # A reader who left may use what it got.
                if running and (made := joined(seen)):
                    untold.clear()
                    self._into_ledger(request, made, begun)
        self.counts["prompt_tokens"] += len(request.prompt_token_ids)

    def _into_ledger(self, request: GenerationRequest, made: list[Generation], begun: float) -> Future[None] | None:
        """A constrained completion has no logprobs in it, so no importance weight: its own are of the masked
        distribution, which the trainer cannot build."""
        if self.ledger is None:
            return None
        if request.constraint is not None:
            made = [replace(generation, logprobs=(NO_LOGPROB,) * len(generation.token_ids)) for generation in made]
        future, records = self.ledger.record(request.prompt_token_ids, made, request.temperature)
        if records:
            self._tell_end(request, begun, records, None)
        return future

    def _tell_end(
        self, request: GenerationRequest, begun: float, records: Sequence[tuple[int, int, int]], reason: str | None
    ) -> None:
        if self.on_request is not None and self.ledger is not None:
            prompt = hash(request.prompt_token_ids)  # of integers: the same in every process
            about = (prompt, len(request.prompt_token_ids), begun, time.time() - begun)
            self.on_request(records, *about, self.session_id, reason)

    async def _record(self, answers: Iterable[tuple[GenerationRequest, list[Generation]]], begun: float) -> None:
        """Record completions before the client sees them, so that no death of this process makes them unknown."""
        for future in [self._into_ledger(request, made, begun) for request, made in answers]:
            if future is not None:
                await asyncio.wrap_future(future)

    @asynccontextmanager
    async def _admitted(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[GenerationRequest]]:
        """Gives the list of those whose failure is told; what a record tells of, its caller takes out."""
        throttled = nullcontext() if self.throttle is None else self.throttle.admitted(requests)
        begun, untold = time.time(), list(requests)
        try:
            async with throttled, self.gate.request():
                yield untold
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError | GeneratorExit)
            reason = "the client went away" if left else f"{type(error).__name__}: {error}"
            for request in untold:
                self._tell_end(request, begun, (), reason)
            raise


class EventAnswer:
    """The answer to a turn as a sequence of events, which also build the whole answer."""

    def __init__(self, service: GatewayService, turn: ChatTurn, prefix: str, param: str) -> None:
        self.service, self.turn, self.id = service, turn, service.new_id(prefix)
        self.request = service.request(turn, self.id, param)
        self.reader = ReplyReader(service.codec, turn, self.request)
        self.open_kind: str | None = None
        """The kind of piece that the last part of the answer takes more of."""

    # Each dialect has the events before the first part, those of a call, of a part of content or reasoning that begins,
    # goes on (these put it into the answer, too) and ends, and the last ones; and the whole answer.
    begin: Callable[[], Iterator[bytes]]
    call: Callable[[ToolCall], Iterator[bytes]]
    open: Callable[[str], Iterator[bytes]]
    more: Callable[[str], Iterator[bytes]]
    close: Callable[[str], Iterator[bytes]]
    end: Callable[[FinishReason], Iterator[bytes]]
    body: Callable[[], dict[str, Any]]

    async def whole(self) -> bytes:
        [[generation]] = await self.service.generate([self.request])
        for _ in self._events(generation.token_ids, generation.finish_reason):
            pass
        return msgspec.json.encode({**self.body(), **policy_fields([generation])})

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Closing the generator frees the slots."""
        for event in self.begin():
            yield event
        async with aclosing(self.service.stream(self.request)) as deltas:
            async for delta in deltas:
                for event in self._events(delta.token_ids, delta.finish_reason):
                    yield event

    def _events(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> Iterator[bytes]:
        for piece in self.reader.push(token_ids, finish_reason):
            if piece.kind != self.open_kind:
                yield from self._close()
            if piece.call is not None:
                yield from self.call(piece.call)
                continue
            if self.open_kind is None:
                self.open_kind = piece.kind
                yield from self.open(piece.kind)
            yield from self.more(piece.text)
        if finish_reason is not None:
            yield from self._close()
            yield from self.end(finish_reason)

    def _close(self) -> Iterator[bytes]:
        kind, self.open_kind = self.open_kind, None
        yield from self.close(kind) if kind is not None else ()


def joined(seen: Sequence[Sequence[GenerationDelta]]) -> list[Generation]:
    """What a stream wrote of each completion. A version that a delta does not name is ``UNKNOWN_VERSION``."""
    joined: list[Generation] = []
    for deltas in seen:
        versions = [
            UNKNOWN_VERSION if d.policy_version is None else d.policy_version for d in deltas for _ in d.token_ids
        ]
        generation = Generation(
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=tuple(value for delta in deltas for value in delta.logprobs),
            finish_reason=deltas[-1].finish_reason or "abort" if deltas else "abort",
            policy_version_runs=tuple((version, len([*run])) for version, run in groupby(versions)),
        )
        joined += [generation] if versions else []
    return joined


def _refuse_aborted(finish_reason: str | None) -> None:
    if finish_reason == "abort":
        raise ApiError(503, "the generation was aborted on the server; send the request again", code="aborted")


def finite_logprobs(values: Iterable[float]) -> list[float]:
    """As JSON can hold them: -inf becomes -9999.0, as in vLLM. Raises ``EngineError`` for NaN."""
    result = [max(value, MIN_LOGPROB) for value in values]  # NaN stays NaN
    if any(map(math.isnan, result)):
        raise EngineError("the logprob of a generated token is NaN; are the weights finite?")
    return result


def policy_fields(generations: Sequence[Generation]) -> dict[str, Any]:
    """``policy_version``: the oldest weights any of the tokens was sampled from (what staleness is measured by);
    ``policy_versions``: per completion, those of its first and last token."""
    spans = [list(g.policy_versions) for g in generations]
    return {"policy_version": min(min(span) for span in spans), "policy_versions": spans}
