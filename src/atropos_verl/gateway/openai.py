"""``POST /v1/chat/completions`` and ``POST /v1/completions``, with the extensions of vLLM that Atropos clients use.

Extensions: ``top_k``, ``min_p``, ``stop_token_ids``, ``ignore_eos``, ``skip_special_tokens``, ``return_token_ids``,
``return_tokens_as_token_ids``, ``add_generation_prompt``, ``chat_template_kwargs``. Extra fields of the answer:
``policy_version``, ``policy_versions``.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn
from atropos_verl.gateway.fields import Fields, Sampling, parse_sampling
from atropos_verl.gateway.service import Answer, GatewayService, finite_logprobs, policy_fields
from atropos_verl.gateway.text import StreamText, render
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

_DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions when absent: the documented default of that API, in vLLM too."""


def completions(service: GatewayService, fields: Fields, *, chat: bool) -> Answer:
    """``n`` answers to one conversation (chat), or to each of several prompts. Raises ``ApiError`` 400."""
    call = _Call(service, fields, chat=chat)
    return call.stream if call.streamed else call.whole


class _Call:
    """A request of either endpoint, and its answer. The constructor reads the fields."""

    def __init__(self, service: GatewayService, fields: Fields, *, chat: bool) -> None:
        self.service = service
        self.chat = chat
        if chat:
            names: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
            self.sampling = parse_sampling(fields, max_tokens_names=names, max_tokens_default=None)
            self.logprobs = fields.get("logprobs", False)
            _refuse_alternatives(fields, "top_logprobs", maximum=0)
            turn = _read_turn(service, fields, self.sampling)
            prompts = [render(service.codec, turn).prompt_ids]
            if "tools" in fields and fields.raw("tool_choice") != "none":
                text = (
                    "tools are in the prompt, but calls in an answer are not parsed: they stay text of message.content"
                )
                service.warn_once("tools", "/v1/chat/completions: %s", text)
        else:
            names, default = ("max_tokens",), _DEFAULT_COMPLETION_TOKENS
            self.sampling = parse_sampling(fields, max_tokens_names=names, max_tokens_default=default)
            self.logprobs = "logprobs" in fields
            if _refuse_alternatives(fields, "logprobs", maximum=1):
                text = "/v1/completions: logprobs=1 returns the sampled token's logprob only, no alternative"
                service.warn_once("completions logprobs=1", text)
            prompts, _ = service.codec.prompts(fields, "prompt")
        self.streamed = fields.get("stream", False)
        self.return_token_ids = fields.get("return_token_ids", False)
        self.tokens_as_ids = fields.get("return_tokens_as_token_ids", False)
        """Show tokens as ``token_id:123`` in logprobs (for tokens that are no valid UTF-8)."""
        options = fields.child("stream_options")
        self.include_usage = options.get("include_usage", False)
        options.ignore("include_obfuscation")
        fields.ignore("request_id")
        fields.require_neutral({"prompt_logprobs": ()})
        service.check_model(fields)
        if self.streamed and len(prompts) != 1:
            message = f"one prompt at a time can be streamed, not {len(prompts)}"
            raise fields.error("stream", message, "unsupported_field")
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        param = "messages" if chat else "prompt"
        self.requests = service.requests(self.sampling, prompts, param=param, name=request_id)
        kind = "chat.completion.chunk" if self.streamed else "chat.completion"
        self.envelope = {
            "id": request_id,
            "object": kind if chat else "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        service.report_unread("/v1/chat/completions" if chat else "/v1/completions", fields, options)

    # -- the whole answer --------------------------------------------------------------------------------------------

    async def whole(self) -> bytes:
        """Generate, and encode the whole answer: choices in prompt order, ``n`` per prompt."""
        results = await self.service.generate(self.requests)
        pairs = [(r, g) for r, generations in zip(self.requests, results, strict=True) for g in generations]
        everything = [generation for _, generation in pairs]
        answer = {
            **self.envelope,
            "choices": [self._choice(index, *pair) for index, pair in enumerate(pairs)],
            "usage": self._usage(sum(len(g.token_ids) for g in everything)),
            **policy_fields(everything),
        }
        if self.chat and self.return_token_ids:
            answer["prompt_token_ids"] = self.requests[0].prompt_token_ids
        return msgspec.json.encode(answer)

    def _choice(self, index: int, request: GenerationRequest, generation: Generation) -> dict[str, Any]:
        codec, sampling = self.service.codec, self.sampling
        text, matched = codec.completion_text(generation.token_ids, generation.finish_reason, sampling)
        is_asked_for = isinstance(matched, str) or matched in sampling.template.stop_token_ids
        choice: dict[str, Any] = {
            "index": index,
            **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}),
            "logprobs": self._logprobs(generation.token_ids, generation.logprobs),
            "finish_reason": generation.finish_reason,
            # vLLM: the stop string or the stop token id the client asked for; null at the end-of-sequence token
            "stop_reason": matched if is_asked_for else None,
        }
        if self.return_token_ids:
            choice["token_ids"] = generation.token_ids
            if not self.chat:
                choice["prompt_token_ids"] = request.prompt_token_ids
        return choice

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[float], first_offset: int = 0
    ) -> dict[str, Any] | None:
        """None: not asked for. Chat: an entry per token. Completions: parallel lists, ``text_offset`` in characters."""
        if not self.logprobs:
            return None
        tokens = self.service.codec.tokens(token_ids)
        names = [f"token_id:{t}" for t in token_ids] if self.tokens_as_ids else [text for text, _ in tokens]
        values = finite_logprobs(logprobs)
        pairs = list(zip(names, values, strict=True))
        if self.chat:
            entries = [{"token": name, "logprob": value, "top_logprobs": []} for name, value in pairs]
            return {"content": [{**e, "bytes": list(sent)} for e, (_, sent) in zip(entries, tokens, strict=True)]}
        ends = list(accumulate(map(len, names), initial=first_offset))
        return {
            "text_offset": ends[:-1],
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": [{name: value} for name, value in pairs],
        }

    # -- server-sent events: one ``data: {...}`` line per piece, then ``data: [DONE]`` -------------------------------

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a call with one prompt. Closing the generator frees the slots."""
        [request] = self.requests
        texts = [StreamText(self.service.codec, self.sampling) for _ in range(request.n)]
        offsets: dict[int, int] = {}
        completion_tokens = 0
        async with aclosing(self.service.stream(request)) as deltas:
            async for delta in deltas:
                completion_tokens += len(delta.token_ids)
                for chunk in self._chunks(texts[delta.index], offsets, delta):
                    yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        if self.include_usage:
            last = {**self.envelope, "choices": [], "usage": self._usage(completion_tokens)}
            yield b"data: " + msgspec.json.encode(last) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _chunks(self, stream: StreamText, offsets: dict[int, int], delta: GenerationDelta) -> Iterator[dict[str, Any]]:
        """The chunks for one delta: the chat API announces the role before the first text.

        ``offsets``: characters of the tokens sent so far of each choice that has begun, for ``text_offset``.
        """
        first, offset = delta.index not in offsets, offsets.setdefault(delta.index, 0)
        envelope = {**self.envelope, **({"usage": None} if self.include_usage else {})}
        if first and self.chat:
            role = {"index": delta.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            head: dict[str, Any] = {**envelope, "choices": [{**role, "finish_reason": None}]}
            if self.return_token_ids:
                head["prompt_token_ids"] = self.requests[0].prompt_token_ids
            yield head
        text = stream.push(delta.token_ids, delta.finish_reason)
        if not delta.token_ids and not text and delta.finish_reason is None:
            return
        logprobs = self._logprobs(delta.token_ids, delta.logprobs, offset)
        if logprobs is not None and not self.chat:
            offsets[delta.index] += sum(map(len, logprobs["tokens"]))
        piece: dict[str, Any] = {
            "index": delta.index,
            **({"delta": {"content": text}} if self.chat else {"text": text}),
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if self.return_token_ids:
            piece["token_ids"] = delta.token_ids
            if first and not self.chat:
                piece["prompt_token_ids"] = self.requests[0].prompt_token_ids
        yield {**envelope, "choices": [piece], "policy_version": self.service.engine.policy_version}


def _refuse_alternatives(fields: Fields, name: str, *, maximum: int) -> int:
    """The engine reports the sampled token's logprob only; asking for alternatives is refused by name."""
    count = fields.integer(name, 0, minimum=0)
    if count > maximum:
        message = f"this server returns the sampled token's logprob, no alternatives ({count}); send {maximum} at most"
        raise fields.error(name, message, "unsupported_field")
    return count


def _read_turn(service: GatewayService, fields: Fields, sampling: Sampling) -> ChatTurn:
    fields.require_neutral({"functions": ([],), "function_call": ("none",), "tool_choice": ("none", "auto")})
    fields.require_neutral({"modalities": (["text"],), "audio": (), "continue_final_message": (False,)})
    tools = fields.raw("tools") or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise fields.error("tools", "expected a list of objects")
    template = service.codec.template
    return template.turn(fields, template.messages(fields), tools=tuple(tools), sampling=sampling)
