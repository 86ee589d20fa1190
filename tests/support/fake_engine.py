"""A hand-written ``GenerationEngine`` whose every token, logprob and version can be worked out by hand."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from atropos_verl.gateway.service import joined
from atropos_verl.types import FinishReason, Generation, GenerationDelta, GenerationRequest

Reply = Callable[[GenerationRequest, int], Sequence[int]]
"""(request, completion index) → the tokens the engine would write if nothing cut it; then it stops."""


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

    eos_token_ids = frozenset({258})

    def __init__(self, reply: Reply = counting_reply, **settings: Any) -> None:
        self.reset(reply, **settings)

    def reset(self, reply: Reply = counting_reply, *, max_context_len: int = 512, token_delay: float = 0.0) -> None:
        """As new: lets many tests share one server."""
        self.reply, self.max_context_len, self.token_delay = reply, max_context_len, token_delay
        self.policy_version = 0
        self.requests: list[GenerationRequest] = []
        self.started, self.finished, self.cancelled = list[str](), list[str](), list[str]()
        self.active: set[str] = set()
        self.fail_with: Exception | None = None
        self.fail_after = 0
        self.abort_all = False
        self.logprob = logprob_of
        self.resume()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        parts: list[list[GenerationDelta]] = [[] for _ in range(request.n)]
        async with aclosing(self.astream(request)) as stream:
            async for delta in stream:
                parts[delta.index].append(delta)
        logprobs = self._prompt_logprobs(request)
        return [replace(generation, prompt_logprobs=logprobs) for generation in joined(parts)]

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self.requests.append(request)
        self.started.append(request.request_id)
        self.active.add(request.request_id)
        over = self.cancelled
        try:
            scripts = [self._script(request, index) for index in range(request.n)]
            for position in range(max(len(tokens) for tokens, _ in scripts)):
                await self._turn(position)
                for index, (tokens, finish) in enumerate(scripts):
                    if position < len(tokens):
                        yield GenerationDelta(
                            index=index,
                            token_ids=(tokens[position],),
                            logprobs=(self.logprob(index, position),),
                            finish_reason=finish if position == len(tokens) - 1 else None,
                            policy_version=self.policy_version,
                        )
            over = self.finished
        finally:
            self.active.discard(request.request_id)
            over.append(request.request_id)

    async def _turn(self, position: int) -> None:
        await asyncio.sleep(self.token_delay)
        while self._paused:  # noqa: ASYNC110 - pause() is called from other threads
            await asyncio.sleep(0.001)
        if self.fail_with is not None and position >= self.fail_after:
            raise self.fail_with

    def _script(self, request: GenerationRequest, index: int) -> tuple[Sequence[int], FinishReason]:
        tokens, limit = self.reply(request, index), request.max_tokens
        if self.abort_all:
            return tokens[:1], "abort"
        cut = limit is not None and (len(tokens) > limit or self.reply is counting_reply)
        return (tokens[:limit], "length") if cut else (tokens, "stop")

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[dict[int, float] | None, ...] | None:
        """Position p: the token itself at ``-p``, and k alternatives: ids 1000.. at ``-p - 0.5``, ``-p + 0.5``, ..."""
        if request.prompt_logprobs is None:
            return None
        others = [(1000 + i, 0.5 * (-1) ** (i + 1)) for i in range(request.prompt_logprobs)]
        tokens = enumerate(request.prompt_token_ids[1:], start=1)
        return None, *({**{other: -p + more for other, more in others}, token: float(-p)} for p, token in tokens)
