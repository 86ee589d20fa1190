"""``POST /v1/chat/completions`` and ``POST /v1/completions``, with the extensions of vLLM that Atropos clients use.

Extensions: ``top_k``, ``min_p``, ``stop_token_ids``, ``ignore_eos``, ``skip_special_tokens``, ``return_token_ids``,
``return_tokens_as_token_ids``, ``add_generation_prompt``, ``chat_template_kwargs``. Extra fields of the answer:
``policy_version``, ``policy_versions``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from atropos_verl.gateway.fields import Fields
from atropos_verl.gateway.sampling import Sampling, parse_sampling
from atropos_verl.gateway.service import GatewayService, finite_logprobs, policy_fields
from atropos_verl.gateway.text import StreamText
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

__all__ = ["chat_completions", "completions"]

_DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions when absent: the documented default of that API, in vLLM too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
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


async def chat_completions(service: GatewayService, fields: Fields) -> bytes | AsyncGenerator[bytes, None]:
    """One conversation, ``n`` answers. Raises ``ApiError`` 400."""
    sampling = parse_sampling(fields, max_tokens_names=("max_completion_tokens", "max_tokens"), max_tokens_default=None)
    logprobs = fields.boolean("logprobs", False)
    _refuse_alternatives(fields, "top_logprobs", maximum=0)
    prompt = _chat_prompt(service, fields)
    call = _finish_parsing(service, fields, sampling, chat=True, logprobs=logprobs, prompts=[prompt], param="messages")
    return _stream_answer(service, call) if call.stream else await _whole_answer(service, call)


async def completions(service: GatewayService, fields: Fields) -> bytes | AsyncGenerator[bytes, None]:
    """One or several prompts (texts or token ids), ``n`` completions of each, in prompt order. 400 on a bad body."""
    sampling = parse_sampling(fields, max_tokens_names=("max_tokens",), max_tokens_default=_DEFAULT_COMPLETION_TOKENS)
    logprobs = "logprobs" in fields
    if _refuse_alternatives(fields, "logprobs", maximum=1):
        text = "/v1/completions: logprobs=1 returns the sampled token's logprob only, no alternative"
        service.warn_once("completions logprobs=1", text)
    prompts = _completion_prompts(service, fields)
    call = _finish_parsing(service, fields, sampling, chat=False, logprobs=logprobs, prompts=prompts, param="prompt")
    return _stream_answer(service, call) if call.stream else await _whole_answer(service, call)


def _finish_parsing(
    service: GatewayService,
    fields: Fields,
    sampling: Sampling,
    *,
    chat: bool,
    logprobs: bool,
    prompts: Sequence[tuple[int, ...]],
    param: str,
) -> _Call:
    service.check_model(fields)
    request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    fields.ignore("request_id")
    stream = fields.boolean("stream", False)
    options = fields.child("stream_options")
    if stream and len(prompts) != 1:
        raise fields.error("stream", f"one prompt at a time can be streamed, not {len(prompts)}", "unsupported_field")
    call = _Call(
        chat=chat,
        requests=tuple(
            sampling.to_request(
                prompt,
                max_context_len=service.engine.max_context_len,
                param=param,
                request_id=f"{request_id}-{index}",
            )
            for index, prompt in enumerate(prompts)
        ),
        sampling=sampling,
        logprobs=logprobs,
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
        stream=stream,
        include_usage=options.boolean("include_usage", False),
        envelope={
            "id": request_id,
            "object": ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        },
    )
    options.ignore("continuous_usage_stats", "include_obfuscation")
    service.report_unread("/v1/chat/completions" if chat else "/v1/completions", fields, options)
    return call


def _refuse_alternatives(fields: Fields, name: str, *, maximum: int) -> int:
    """The engine reports the sampled token's logprob only; asking for alternatives is refused by name."""
    count = fields.integer(name, 0, minimum=0)
    if count > maximum:
        message = f"this server returns the sampled token's logprob, no alternatives ({count}); send {maximum} at most"
        raise fields.error(name, message, "unsupported_field")
    return count


def _chat_prompt(service: GatewayService, fields: Fields) -> tuple[int, ...]:
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", "expected a non-empty list of messages")
    fields.require_neutral({"functions": ([],), "function_call": ("none",), "tool_choice": ("none", "auto")})
    fields.require_neutral({"modalities": (["text"],), "audio": (), "continue_final_message": (False,)})
    options = dict(fields.mapping("chat_template_kwargs"))
    tools = fields.raw("tools")
    if tools:
        options["tools"] = tools
    if "chat_template" in fields:
        options["chat_template"] = fields.string("chat_template")
    options["add_generation_prompt"] = fields.boolean("add_generation_prompt", True)
    for reserved in ("tokenize", "return_dict", "return_tensors", "continue_final_message", "conversation"):
        if reserved in options:
            raise fields.error("chat_template_kwargs", f"{reserved} cannot be set by a client")
    text = service.codec.render_chat([_message(fields, i, m) for i, m in enumerate(messages)], **options)
    return service.codec.encode(text, add_special_tokens=fields.boolean("add_special_tokens", False))


def _message(fields: Fields, index: int, message: Any) -> dict[str, Any]:
    """One message with plain text as content: templates of text models know no list of parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise fields.error("messages", f"item {index} must be an object with a string 'role'")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise fields.error(
                "messages", f"item {index}: only parts of type 'text' are supported", "unsupported_field"
            )
        content = "".join(str(text) for text in texts)
    if content is not None and not isinstance(content, str):
        raise fields.error("messages", f"item {index}: 'content' must be a string or a list of text parts")
    return {**message, "content": content or ""}


def _completion_prompts(service: GatewayService, fields: Fields) -> list[tuple[int, ...]]:
    """Every form of ``prompt``: str, list of str, token ids, list of token ids."""
    prompt = fields.raw("prompt")
    add_special = fields.boolean("add_special_tokens", True)
    if prompt is None or prompt == []:
        raise fields.error("prompt", "missing; send a text, a list of texts, token ids, or a list of token ids")
    if isinstance(prompt, list) and type(prompt[0]) is int:
        prompt = [prompt]
    items = prompt if isinstance(prompt, list) else [prompt]
    return [
        service.codec.encode(item, add_special_tokens=add_special)
        if isinstance(item, str)
        else fields.check_token_ids("prompt", item)
        for item in items
    ]


# The whole answer ---------------------------------------------------------------------------------------------------


async def _whole_answer(service: GatewayService, call: _Call) -> bytes:
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
        "usage": _usage(call.prompt_tokens, sum(len(g.token_ids) for g in everything)),
        **policy_fields(everything),
    }
    if call.chat and call.return_token_ids:
        answer["prompt_token_ids"] = call.requests[0].prompt_token_ids
    return msgspec.json.encode(answer)


def _choice(
    service: GatewayService, call: _Call, index: int, request: GenerationRequest, generation: Generation
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
        build = _chat_logprobs if call.chat else _completion_logprobs
        choice["logprobs"] = build(service, call, generation.token_ids, generation.logprobs)
    choice["finish_reason"] = generation.finish_reason
    # vLLM: the stop string or the stop token id the client asked for; null at the end-of-sequence token
    choice["stop_reason"] = stop_token if stop_token in call.sampling.template.stop_token_ids else matched
    if call.return_token_ids:
        choice["token_ids"] = generation.token_ids
        if not call.chat:
            choice["prompt_token_ids"] = request.prompt_token_ids
    return choice


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _names(service: GatewayService, call: _Call, token_ids: Sequence[int]) -> list[str]:
    if call.tokens_as_ids:
        return [f"token_id:{token_id}" for token_id in token_ids]
    return service.codec.token_texts(token_ids)


def _chat_logprobs(
    service: GatewayService, call: _Call, token_ids: Sequence[int], logprobs: Sequence[float]
) -> dict[str, Any]:
    """The chat API's shape: one entry per token, ``top_logprobs`` empty (none was asked for)."""
    names = _names(service, call, token_ids)
    return {
        "content": [
            {"token": name, "logprob": logprob, "bytes": list(name.encode()), "top_logprobs": []}
            for name, logprob in zip(names, finite_logprobs(logprobs), strict=True)
        ]
    }


def _completion_logprobs(
    service: GatewayService,
    call: _Call,
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


# Server-sent events: one ``data: {...}`` line per piece, then ``data: [DONE]`` ------------------------------------


@dataclass(slots=True)
class _StreamedChoice:
    """A completion that is being written."""

    text: StreamText
    offset: int = 0
    """Characters of the tokens sent so far, for ``text_offset``."""
    started: bool = False


async def _stream_answer(service: GatewayService, call: _Call) -> AsyncGenerator[bytes, None]:
    """The events of a call with one prompt. Closing the generator frees the slots."""
    request = call.requests[0]
    choices = [_StreamedChoice(StreamText(service.codec, call.sampling)) for _ in range(request.n)]
    completion_tokens = 0
    async with aclosing(service.stream(request)) as deltas:
        async for delta in deltas:
            completion_tokens += len(delta.token_ids)
            for chunk in _chunks(service, call, choices[delta.index], delta):
                yield _event(chunk)
    if call.include_usage:
        yield _event({**call.envelope, "choices": [], "usage": _usage(call.prompt_tokens, completion_tokens)})
    yield b"data: [DONE]\n\n"


def _chunks(
    service: GatewayService, call: _Call, choice: _StreamedChoice, delta: GenerationDelta
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
        piece["logprobs"] = _chat_logprobs(service, call, delta.token_ids, delta.logprobs)
    elif call.logprobs:
        lists = _completion_logprobs(service, call, delta.token_ids, delta.logprobs, choice.offset)
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
