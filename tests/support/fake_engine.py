"""A hand-written ``GenerationEngine`` whose every token, logprob and version can be worked out by hand."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from atropos_verl.types import FinishReason, Generation, GenerationDelta, GenerationRequest

Reply = Callable[[GenerationRequest, int], Sequence[int]]
"""(request, completion index) → the tokens the engine would write if nothing cut it; then it stops."""

_POLL = 0.001


def counting_reply(request: GenerationRequest, index: int) -> list[int]:
    """Endless: token k of completion ``index`` is ``(last prompt token + 1 + index + k) % 200``."""
    return [(request.prompt_token_ids[-1] + 1 + index + k) % 200 for k in range(request.max_tokens or 0)]


def text_reply(tokenizer: Any, *texts: str) -> Reply:
    """Completion i is ``texts[i % len(texts)]``, tokenized (special tokens in the text become their ids)."""
    replies = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return lambda request, index: replies[index % len(replies)]


def logprob_of(index: int, position: int) -> float:
    """Logprob of token ``position`` of completion ``index``: distinct everywhere, exact in binary."""
    return -(position + 1) / 8 - index / 1024


class FakeEngine:
    """Writes ``reply``, one token per turn of the event loop.

    ``pause()`` holds every request between two tokens until ``resume()``. ``started``, ``finished`` and ``cancelled``
    are the request ids in order; ``active`` those that hold a slot now. ``fail_with`` is raised by the next requests,
    after ``fail_after`` tokens. With ``abort_all`` every completion ends as "abort" after one token.
    """

    def __init__(self, reply: Reply = counting_reply, *, max_context_len: int = 512, token_delay: float = 0.0) -> None:
        self.reset(reply, max_context_len=max_context_len, token_delay=token_delay)

    def reset(self, reply: Reply = counting_reply, *, max_context_len: int = 512, token_delay: float = 0.0) -> None:
        """As new: lets many tests share one server."""
        self.reply = reply
        self.max_context_len = max_context_len
        self.token_delay = token_delay
        self.policy_version = 0
        self.eos_token_ids = frozenset({258})
        self.requests: list[GenerationRequest] = []
        self.started: list[str] = []
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.active: set[str] = set()
        self.fail_with: Exception | None = None
        self.fail_after = 0
        self.abort_all = False
        self.logprob: Callable[[int, int], float] = logprob_of
        self._paused = False

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        parts: list[list[GenerationDelta]] = [[] for _ in range(request.n)]
        async with aclosing(self.astream(request)) as stream:
            async for delta in stream:
                parts[delta.index].append(delta)
        versions = [[delta.policy_version or 0 for delta in deltas] for deltas in parts]
        return [
            Generation(
                token_ids=tuple(t for d in deltas for t in d.token_ids),
                logprobs=tuple(v for d in deltas for v in d.logprobs),
                finish_reason=deltas[-1].finish_reason or "abort",
                policy_version_runs=tuple((version, len(list(run))) for version, run in itertools.groupby(seen)),
                prompt_logprobs=self._prompt_logprobs(request),
            )
            for deltas, seen in zip(parts, versions, strict=True)
        ]

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self.requests.append(request)
        self.started.append(request.request_id)
        self.active.add(request.request_id)
        done = False
        try:
            scripts = [self._script(request, index) for index in range(request.n)]
            for position in range(max(len(tokens) for tokens, _ in scripts)):
                await self._turn(position)
                for index, (tokens, finish) in enumerate(scripts):
                    if position < len(tokens):
                        last = position == len(tokens) - 1
                        yield GenerationDelta(
                            index=index,
                            token_ids=(tokens[position],),
                            logprobs=(self.logprob(index, position),),
                            finish_reason=finish if last else None,
                            policy_version=self.policy_version,
                        )
            done = True
        finally:
            self.active.discard(request.request_id)
            (self.finished if done else self.cancelled).append(request.request_id)

    async def _turn(self, position: int) -> None:
        await asyncio.sleep(self.token_delay)
        while self._paused:  # noqa: ASYNC110 - pause() is called from other threads
            await asyncio.sleep(_POLL)
        if self.fail_with is not None and position >= self.fail_after:
            raise self.fail_with

    def _script(self, request: GenerationRequest, index: int) -> tuple[list[int], FinishReason]:
        tokens = list(self.reply(request, index))
        if self.abort_all:
            return tokens[:1], "abort"
        limit = request.max_tokens
        cut = limit is not None and (len(tokens) > limit or self.reply is counting_reply)
        return (tokens[:limit], "length") if cut else (tokens, "stop")

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[dict[int, float] | None, ...] | None:
        """Position p: the token itself at ``-p``, and k alternatives: ids 1000.. at ``-p - 0.5``, ``-p + 0.5``, ..."""
        if request.prompt_logprobs is None:
            return None
        entries: list[dict[int, float] | None] = [None]
        for p, token_id in list(enumerate(request.prompt_token_ids))[1:]:
            others = {1000 + i: -p + 0.5 * (-1) ** (i + 1) for i in range(request.prompt_logprobs)}
            entries.append({**others, token_id: float(-p)})
        return tuple(entries)
