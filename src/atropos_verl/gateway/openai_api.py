"""``POST /v1/chat/completions`` and ``POST /v1/completions``, with the extensions of vLLM that Atropos clients use.

Extensions: ``top_k``, ``min_p``, ``stop_token_ids``, ``ignore_eos``, ``skip_special_tokens``, ``return_token_ids``,
``return_tokens_as_token_ids``, ``add_generation_prompt``, ``chat_template_kwargs``. Extra fields of the answer:
``policy_version``, ``policy_versions``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from atropos_verl.gateway.fields import Fields
from atropos_verl.gateway.openai_answer import OpenAICall, whole_answer
from atropos_verl.gateway.openai_stream import stream_answer
from atropos_verl.gateway.sampling import Sampling, parse_sampling
from atropos_verl.gateway.service import GatewayService

__all__ = ["chat_completions", "completions"]

_DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions when absent: the documented default of that API, in vLLM too."""


async def chat_completions(service: GatewayService, fields: Fields) -> bytes | AsyncGenerator[bytes, None]:
    """One conversation, ``n`` answers. Raises ``ApiError`` 400."""
    sampling = parse_sampling(fields, max_tokens_names=("max_completion_tokens", "max_tokens"), max_tokens_default=None)
    logprobs = fields.boolean("logprobs", False)
    _refuse_alternatives(fields, "top_logprobs", maximum=0)
    prompt = _chat_prompt(service, fields)
    call = _finish_parsing(service, fields, sampling, chat=True, logprobs=logprobs, prompts=[prompt], param="messages")
    return stream_answer(service, call) if call.stream else await whole_answer(service, call)


async def completions(service: GatewayService, fields: Fields) -> bytes | AsyncGenerator[bytes, None]:
    """One or several prompts (texts or token ids), ``n`` completions of each, in prompt order. 400 on a bad body."""
    sampling = parse_sampling(fields, max_tokens_names=("max_tokens",), max_tokens_default=_DEFAULT_COMPLETION_TOKENS)
    logprobs = "logprobs" in fields
    if _refuse_alternatives(fields, "logprobs", maximum=1):
        text = "/v1/completions: logprobs=1 returns the sampled token's logprob only, no alternative"
        service.warn_once("completions logprobs=1", text)
    prompts = _completion_prompts(service, fields)
    call = _finish_parsing(service, fields, sampling, chat=False, logprobs=logprobs, prompts=prompts, param="prompt")
    return stream_answer(service, call) if call.stream else await whole_answer(service, call)


def _finish_parsing(
    service: GatewayService,
    fields: Fields,
    sampling: Sampling,
    *,
    chat: bool,
    logprobs: bool,
    prompts: Sequence[tuple[int, ...]],
    param: str,
) -> OpenAICall:
    service.check_model(fields)
    request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    fields.ignore("request_id")
    stream = fields.boolean("stream", False)
    options = fields.child("stream_options")
    if stream and len(prompts) != 1:
        raise fields.error("stream", f"one prompt at a time can be streamed, not {len(prompts)}", "unsupported_field")
    call = OpenAICall(
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
