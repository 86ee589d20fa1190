"""Our ``InferenceEngine`` over verl's replicas of any kind, so that the gateway can stand before them.

::

    environment ──HTTP──▶ gateway ──▶ LLMServerEngine ──▶ AttemptClient ──Ray──▶ replica (transformers, vLLM, SGLang)
                             │                ▲                                     │
                        RequestGate           └── aborted: go on from its tokens ◀──┘

A replica returns a request early when it is aborted for a weight update. The answer is then continued from the tokens
it has, with their logprobs, at whichever replica is free: the environment sees one answer that took longer. It says
which policies (trainer steps) made its first and its last token.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch

from atropos_verl.backends.ray.sampling_params import to_sampling_params
from atropos_verl.engine.requests import EngineLimits, StopStrings, validate
from atropos_verl.errors import EngineError, GenerationRequestError
from atropos_verl.types import UNKNOWN_VERSION, FinishReason, Generation, GenerationDelta, GenerationRequest

__all__ = ["LLMServerEngine"]

logger = logging.getLogger(__name__)

_ABORTED = ("aborted", "abort")
_TURNED_AWAY_WAIT = (0.02, 1.0)
"""Seconds before asking again after a replica returned nothing: the first wait, and the longest."""


class _Client(Protocol):
    """``AttemptClient``, or anything like it."""

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any: ...


class LLMServerEngine:
    """``InferenceEngine`` over a client of verl's replicas. Safe to call from several threads and loops.

    Args:
        client: one attempt per call (``AttemptClient``).
        tokenizer: finds stop strings that an abort cut in two.
        max_context_len: prompt plus completion in tokens, at most what the replicas hold.
        vocab_size: ids outside are refused here.
        eos_token_ids: tells "stop" from "length" where a replica does not say.
    """

    def __init__(
        self,
        client: _Client,
        tokenizer: Any,
        *,
        max_context_len: int,
        vocab_size: int,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._limits = EngineLimits(
            max_context_len=max_context_len, vocab_size=vocab_size, eos_token_ids=frozenset(eos_token_ids)
        )
        self._pieces: dict[int, str] = {}
        self._policy_version = -1
        self.continued = 0
        """Answers that went on after an abort, in all."""

    @property
    def policy_version(self) -> int:
        """Newest trainer step seen in an answer or told by ``set_policy_version``; -1 before."""
        return self._policy_version

    def set_policy_version(self, version: int) -> None:
        """The trainer's word after a weight update."""
        self._policy_version = version

    @property
    def max_context_len(self) -> int:
        return self._limits.max_context_len

    # -- generation --------------------------------------------------------------------------------------------------

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """See ``InferenceEngine``. Aborts are invisible: no ``Generation`` ends with "abort"."""
        validate(request, self._limits)
        try:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the others and frees their slots
                own = group.create_task(self._own_prompt_logprobs(request))
                tasks = [group.create_task(self._complete(request, index, None)) for index in range(request.n)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result().result(own.result()) for task in tasks]

    async def _own_prompt_logprobs(self, request: GenerationRequest) -> tuple[float, ...]:
        """[P-1] logprobs of the prompt's own tokens 1.. where alternatives are asked for, else nothing.

        verl's protocol returns the k best only; a prompt token that is none of them has to be asked for by itself.
        """
        if not request.prompt_logprobs:
            return ()
        alone = GenerationRequest(
            prompt_token_ids=request.prompt_token_ids,
            max_tokens=1,
            temperature=request.temperature,
            prompt_logprobs=0,
            request_id=f"{request.request_id or uuid.uuid4().hex}-prompt",
        )
        rows = (await self._complete(alone, 0, None)).result().prompt_logprobs
        assert rows is not None
        return tuple(next(iter(row.values())) for row in rows if row is not None)

    def astream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """See ``InferenceEngine``. verl's replicas answer whole: a delta is what one attempt made."""
        validate(request, self._limits)
        return self._stream(request)

    async def _stream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        queue: asyncio.Queue[GenerationDelta | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._complete(request, index, queue)) for index in range(request.n)]
        ended = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
        ended.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended the request
        finally:
            ended.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Generation]]:
        """See ``InferenceEngine``. Not to be called inside an event loop."""

        async def everything() -> list[list[Generation]]:
            return await asyncio.gather(*(self.agenerate(request) for request in requests))

        return asyncio.run(everything())

    async def _complete(
        self, request: GenerationRequest, index: int, deltas: asyncio.Queue[GenerationDelta | None] | None
    ) -> _Answer:
        """One completion, over as many attempts as it takes."""
        answer = _Answer(request, self._limits, self._tokenizer, self._pieces)
        # A name of its own for each: the load balancer spreads names, and keeps a name at its replica.
        name = f"{request.request_id or uuid.uuid4().hex}-{index}"
        wait, longest = _TURNED_AWAY_WAIT
        while answer.finish_reason is None:
            done = len(answer.tokens)
            params = to_sampling_params(request, answer.budget - done, index=index, generated=done)
            output = await self._client.generate(
                name, prompt_ids=[*request.prompt_token_ids, *answer.tokens], sampling_params=params
            )
            answer.take(output)
            self._policy_version = max([self._policy_version, *(v for v in answer.versions[-1:] if v is not None)])
            if answer.finish_reason is None:
                self.continued += bool(answer.tokens)
                if len(answer.tokens) == done:
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, longest)
            if deltas is not None:
                for delta in answer.deltas(index, done):
                    deltas.put_nowait(delta)
        return answer

    # -- logprobs ----------------------------------------------------------------------------------------------------

    def compute_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """See ``InferenceEngine``. The replicas score at temperature 1 only, and need room for one more token."""
        if temperature not in (0.0, 1.0):
            raise GenerationRequestError(f"replicas score at temperature 1, not {temperature!r}", "temperature")
        request = GenerationRequest(prompt_token_ids=tuple(token_ids), max_tokens=1, prompt_logprobs=0)
        [[generation]] = self.generate([request])
        assert generation.prompt_logprobs is not None
        pairs = zip(token_ids, generation.prompt_logprobs, strict=True)
        return [entry[token] for token, entry in pairs if entry is not None]

    # -- what verl's trainer does itself -----------------------------------------------------------------------------

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int | None = None
    ) -> int:
        """Refused: verl's trainer sends weights from its workers to its replicas (``CheckpointEngineManager``)."""
        raise EngineError("verl's trainer updates its replicas' weights; nothing can be sent through their front")

    def resume_memory_occupation(self) -> None:
        """Refused, like ``update_weights_from_tensor``."""
        raise EngineError("verl's trainer wakes its replicas (CheckpointEngineManager.update_weights)")

    def release_memory_occupation(self) -> None:
        """Refused, like ``update_weights_from_tensor``."""
        raise EngineError("verl's trainer puts its replicas to sleep (CheckpointEngineManager.sleep_replicas)")

    def close(self) -> None:
        """Nothing to end: the replicas are verl's."""


@dataclass(slots=True)
class _Answer:
    """A completion that grows attempt by attempt."""

    request: GenerationRequest
    limits: EngineLimits
    tokenizer: Any
    pieces: dict[int, str]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    """Which policy sampled each token; None where the replica only knows the first and the last."""
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None

    @property
    def budget(self) -> int:
        """New tokens at most, over all attempts."""
        room = self.limits.max_context_len - len(self.request.prompt_token_ids)
        return room if self.request.max_tokens is None else min(self.request.max_tokens, room)

    def take(self, output: Any) -> None:
        """Add what one attempt returned. Raises ``EngineError`` when tokens came without their logprobs."""
        logprobs = [] if output.log_probs is None else list(output.log_probs)
        if len(logprobs) != len(output.token_ids):
            raise EngineError(f"the replica sent {len(output.token_ids)} tokens with {len(logprobs)} logprobs")
        joint = len(self.tokens)
        self.tokens += [int(token) for token in output.token_ids]
        self.logprobs += [float(value) for value in logprobs]
        extra = output.extra_fields
        self.versions += _versions(len(output.token_ids), extra)
        if self.prompt_logprobs is None and self.request.prompt_logprobs is not None and "prompt_ids" in extra:
            self.prompt_logprobs = _prompt_logprobs(extra)
        if joint and self._stop_across(joint):
            self.finish_reason = "stop"
        elif output.stop_reason not in _ABORTED:
            self.finish_reason = self._reason(extra.get("finish_reason"))
        elif len(self.tokens) >= self.budget:
            self.finish_reason = "length"

    def _stop_across(self, joint: int) -> bool:
        """True when a stop string began before the abort and ends after it: the replica saw only its second part."""
        if not self.request.stop:
            return False
        stops = StopStrings(self.tokenizer, self.request.stop, self.pieces)
        longest = max(len(stop.encode()) for stop in self.request.stop)
        for end in range(joint + 1, min(len(self.tokens), joint + longest) + 1):
            if stops.completed_by(self.tokens[:end]):
                del self.tokens[end:], self.logprobs[end:], self.versions[end:]
                return True
        return False

    def _reason(self, said: str | None) -> FinishReason:
        """The replica's word, or what its tokens tell: verl's vLLM server says "completed" to both."""
        if said in ("stop", "length"):
            return "stop" if said == "stop" else "length"
        if len(self.tokens) < self.budget or not self.tokens:
            return "stop"
        ends = set(self.request.stop_token_ids) | (set() if self.request.ignore_eos else self.limits.eos_token_ids)
        if self.tokens[-1] in ends:
            return "stop"
        if self.request.stop and StopStrings(self.tokenizer, self.request.stop, self.pieces).completed_by(self.tokens):
            return "stop"
        return "length"

    def deltas(self, index: int, since: int) -> Iterator[GenerationDelta]:
        """What is new after ``since`` tokens: one delta per policy, the last with the finish reason."""
        start = since
        for version, run in groupby(self.versions[since:]):
            end = start + len(list(run))
            yield GenerationDelta(
                index=index,
                token_ids=tuple(self.tokens[start:end]),
                logprobs=tuple(self.logprobs[start:end]),
                finish_reason=self.finish_reason if end == len(self.tokens) else None,
                policy_version=version,
            )
            start = end
        if start == since and self.finish_reason is not None:
            yield GenerationDelta(index=index, token_ids=(), logprobs=(), finish_reason=self.finish_reason)

    def result(self, own: Sequence[float] = ()) -> Generation:
        """The whole. ``own`` [P-1]: logprobs of the prompt's own tokens, put beside their alternatives."""
        assert self.finish_reason is not None
        if self.request.prompt_logprobs is not None and self.prompt_logprobs is None:
            raise EngineError("the replica returned no prompt_logprobs; this kind of replica does not have them")
        if own and self.prompt_logprobs is not None:
            rows = zip(self.request.prompt_token_ids[1:], own, self.prompt_logprobs[1:], strict=True)
            self.prompt_logprobs = (None, *({token: value} | (row or {}) for token, value, row in rows))
        first, last = (self.versions[0], self.versions[-1]) if self.versions else (None, None)
        known = [version is not None for version in self.versions]
        runs = tuple((int(version or 0), len(list(run))) for version, run in groupby(self.versions))
        return Generation(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            policy_version_first=UNKNOWN_VERSION if first is None else first,
            policy_version_last=UNKNOWN_VERSION if last is None else last,
            policy_version_runs=runs if all(known) else (),
            prompt_logprobs=self.prompt_logprobs,
        )


def _versions(tokens: int, extra: dict[str, Any]) -> list[int | None]:
    """Which policy sampled each of an attempt's ``tokens``, as far as the replica says (-1: before any update)."""
    if runs := extra.get("policy_version_runs"):
        return [version for version, count in runs for _ in range(count)]
    first, last = (
        -1 if steps is None else int(steps) for steps in (extra["min_global_steps"], extra["max_global_steps"])
    )
    if tokens < 2:
        return [last] * tokens
    return [first, *([first if first == last else None] * (tokens - 2)), last]


def _prompt_logprobs(extra: dict[str, Any]) -> tuple[dict[int, float] | None, ...]:
    """[P] ``{token: logprob}`` from verl's layout: row t is about token t+1, and the last row is padding."""
    rows = zip(extra["prompt_ids"][:-1], extra["prompt_logprobs"][:-1], strict=True)
    return (None, *(dict(zip(ids, values, strict=True)) for ids, values in rows))
