"""Server-sent events for ``stream: true``: one ``data: {...}`` line per piece, then ``data: [DONE]``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from atropos_verl.gateway.openai_answer import OpenAICall, chat_logprobs, completion_logprobs, usage
from atropos_verl.gateway.service import GatewayService
from atropos_verl.gateway.text import StreamText
from atropos_verl.types import GenerationDelta

__all__ = ["stream_answer"]


@dataclass(slots=True)
class _Choice:
    """A completion that is being written."""

    text: StreamText
    offset: int = 0
    """Characters of the tokens sent so far, for ``text_offset``."""
    started: bool = False


async def stream_answer(service: GatewayService, call: OpenAICall) -> AsyncGenerator[bytes, None]:
    """The events of a call with one prompt. Closing the generator frees the slots."""
    request = call.requests[0]
    choices = [_Choice(StreamText(service.codec, call.sampling)) for _ in range(request.n)]
    completion_tokens = 0
    async with aclosing(service.stream(request)) as deltas:
        async for delta in deltas:
            completion_tokens += len(delta.token_ids)
            for chunk in _chunks(service, call, choices[delta.index], delta):
                yield _event(chunk)
    if call.include_usage:
        yield _event({**call.envelope, "choices": [], "usage": usage(call.prompt_tokens, completion_tokens)})
    yield b"data: [DONE]\n\n"


def _chunks(
    service: GatewayService, call: OpenAICall, choice: _Choice, delta: GenerationDelta
) -> Iterator[dict[str, Any]]:
    """The chunks for one delta: the chat API announces the role before the first text."""
    first, choice.started = not choice.started, True
    extra: dict[str, Any] = {"usage": None} if call.include_usage else {}
    if first and call.chat:
        role = {"index": delta.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        head: dict[str, Any] = {**call.envelope, **extra, "choices": [{**role, "finish_reason": None}]}
        if call.return_token_ids:
            head["prompt_token_ids"] = call.requests[0].prompt_token_ids
        yield head
    text = choice.text.push(delta.token_ids, delta.finish_reason)
    if not delta.token_ids and not text and delta.finish_reason is None:
        return
    piece: dict[str, Any] = {"index": delta.index}
    if call.chat:
        piece["delta"] = {"content": text}
    else:
        piece["text"] = text
    piece["logprobs"] = None
    if call.logprobs and call.chat:
        piece["logprobs"] = chat_logprobs(service, call, delta.token_ids, delta.logprobs)
    elif call.logprobs:
        lists = completion_logprobs(service, call, delta.token_ids, delta.logprobs, choice.offset)
        choice.offset += sum(len(token) for token in lists["tokens"])
        piece["logprobs"] = lists
    piece["finish_reason"] = delta.finish_reason
    if call.return_token_ids:
        piece["token_ids"] = delta.token_ids
        if first and not call.chat:
            piece["prompt_token_ids"] = call.requests[0].prompt_token_ids
    yield {**call.envelope, **extra, "choices": [piece], "policy_version": service.engine.policy_version}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
