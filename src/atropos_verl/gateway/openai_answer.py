"""A parsed call of the OpenAI endpoints, and the JSON shapes of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from atropos_verl.gateway.sampling import Sampling
from atropos_verl.gateway.service import GatewayService, finite_logprobs, policy_fields
from atropos_verl.types import Generation, GenerationRequest

__all__ = ["OpenAICall", "chat_logprobs", "completion_logprobs", "usage", "whole_answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAICall:
    """A parsed request of either endpoint."""

    chat: bool
    requests: tuple[GenerationRequest, ...]
    """One per prompt."""
    sampling: Sampling
    logprobs: bool
    return_token_ids: bool
    tokens_as_ids: bool
    """Show tokens as ``token_id:123`` in logprobs (for tokens that are no valid UTF-8)."""
    stream: bool
    include_usage: bool
    envelope: dict[str, Any]
    """id, object, created, model of the answer."""

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)


async def whole_answer(service: GatewayService, call: OpenAICall) -> bytes:
    """Generate, and encode the whole answer: choices in prompt order, ``n`` per prompt."""
    results = await service.generate(call.requests)
    choices: list[dict[str, Any]] = []
    for request, generations in zip(call.requests, results, strict=True):
        for generation in generations:
            choices.append(_choice(service, call, len(choices), request, generation))
    everything = [generation for generations in results for generation in generations]
    answer = {
        **call.envelope,
        "choices": choices,
        "usage": usage(call.prompt_tokens, sum(len(g.token_ids) for g in everything)),
        **policy_fields(everything),
    }
    if call.chat and call.return_token_ids:
        answer["prompt_token_ids"] = call.requests[0].prompt_token_ids
    return msgspec.json.encode(answer)


def _choice(
    service: GatewayService, call: OpenAICall, index: int, request: GenerationRequest, generation: Generation
) -> dict[str, Any]:
    text, matched = service.codec.completion_text(generation.token_ids, generation.finish_reason, call.sampling)
    stop_token = service.codec.stop_token(generation.token_ids, generation.finish_reason, call.sampling)
    choice: dict[str, Any] = {"index": index}
    if call.chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    choice["logprobs"] = None
    if call.logprobs:
        build = chat_logprobs if call.chat else completion_logprobs
        choice["logprobs"] = build(service, call, generation.token_ids, generation.logprobs)
    choice["finish_reason"] = generation.finish_reason
    # vLLM: the stop string or the stop token id the client asked for; null at the end-of-sequence token
    choice["stop_reason"] = stop_token if stop_token in call.sampling.stop_token_ids else matched
    if call.return_token_ids:
        choice["token_ids"] = generation.token_ids
        if not call.chat:
            choice["prompt_token_ids"] = request.prompt_token_ids
    return choice


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _names(service: GatewayService, call: OpenAICall, token_ids: Sequence[int]) -> list[str]:
    if call.tokens_as_ids:
        return [f"token_id:{token_id}" for token_id in token_ids]
    return service.codec.token_texts(token_ids)


def chat_logprobs(
    service: GatewayService, call: OpenAICall, token_ids: Sequence[int], logprobs: Sequence[float]
) -> dict[str, Any]:
    """The chat API's shape: one entry per token, ``top_logprobs`` empty (none was asked for)."""
    names = _names(service, call, token_ids)
    return {
        "content": [
            {"token": name, "logprob": logprob, "bytes": list(name.encode()), "top_logprobs": []}
            for name, logprob in zip(names, finite_logprobs(logprobs), strict=True)
        ]
    }


def completion_logprobs(
    service: GatewayService,
    call: OpenAICall,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    first_offset: int = 0,
) -> dict[str, Any]:
    """The completions API's shape: parallel lists; ``text_offset`` counts characters from ``first_offset``."""
    names = _names(service, call, token_ids)
    values = finite_logprobs(logprobs)
    offsets, position = [], first_offset
    for name in names:
        offsets.append(position)
        position += len(name)
    return {
        "text_offset": offsets,
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": [{name: value} for name, value in zip(names, values, strict=True)],
    }
