"""``POST /v1/chat/completions`` and ``POST /v1/completions``, with the extensions of vLLM that Atropos clients use."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate
from typing import Annotated, Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall, read_list
from atropos_verl.gateway.fields import Fields, parse_sampling, sent_event
from atropos_verl.gateway.service import Answer, GatewayService, finite_logprobs, policy_fields
from atropos_verl.gateway.text import Piece, ReplyReader
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

_Alternatives = Annotated[int, msgspec.Meta(ge=0, le=20)]
"""As OpenAI's API allows."""
_DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of /v1/completions when absent: the documented default of that API, in vLLM too."""


def completions(service: GatewayService, fields: Fields, *, chat: bool) -> Answer:
    """``n`` answers to one conversation (chat), or to each of several prompts. Raises ``ApiError`` 400."""
    call = _Call(service, fields, chat=chat)
    return call.stream if call.streamed else call.whole


class _Call:
    """A request of either endpoint, and its answer. The constructor reads the fields."""

    def __init__(self, service: GatewayService, fields: Fields, *, chat: bool) -> None:
        self.service, self.chat = service, chat
        request_id = service.new_id("chatcmpl-" if chat else "cmpl-")
        if chat:
            self.turn = _read_turn(service, fields)
            self.logprobs = fields.read("logprobs", False)
            alternatives = fields.read("top_logprobs", 0, _Alternatives)
            if alternatives and not self.logprobs:
                raise fields.error("top_logprobs", "send logprobs = true with it")
        else:
            sampling = parse_sampling(fields, ("max_tokens",), _DEFAULT_COMPLETION_TOKENS)
            self.turn = ChatTurn(messages=(), sampling=sampling)
            self.logprobs = "logprobs" in fields
            fields.ignore("parallel_tool_calls")
            alternatives = fields.read("logprobs", 0, _Alternatives)
            alternatives -= alternatives == 1  # what clients send that want the sampled token's
            prompts, _ = service.codec.prompts(fields, "prompt")
        self.streamed = fields.read("stream", False)
        self.return_token_ids = fields.read("return_token_ids", False)
        self.tokens_as_ids = fields.read("return_tokens_as_token_ids", False)
        """Show tokens as ``token_id:123`` in logprobs (for tokens that are no valid UTF-8)."""
        options = fields.child("stream_options")
        self.include_usage = options.read("include_usage", False)
        options.ignore("include_obfuscation")
        fields.ignore("request_id")
        fields.refuse(prompt_logprobs=None)
        if chat:
            self.requests = [service.request(self.turn, request_id)]
        else:
            self.requests = service.requests(self.turn.sampling, prompts, param="prompt", name=request_id)
        if self.streamed and len(self.requests) != 1:
            message = f"one prompt at a time can be streamed, not {len(self.requests)}"
            raise fields.error("stream", message, "unsupported_field")
        self.requests = [replace(request, top_logprobs=alternatives) for request in self.requests]
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
            **(self._prompt_ids(self.requests[0]) if self.chat else {}),
        }
        return msgspec.json.encode(answer)

    def _prompt_ids(self, request: GenerationRequest) -> dict[str, Any]:
        return {"prompt_token_ids": request.prompt_token_ids} if self.return_token_ids else {}

    def _choice(self, index: int, request: GenerationRequest, generation: Generation) -> dict[str, Any]:
        token_ids = generation.token_ids
        reader = self.service.reader(self.turn, request, generation, index)
        message, matched = reader.message, reader.text.matched
        is_asked_for = isinstance(matched, str) or matched in self.turn.sampling.template.stop_token_ids
        text = {"text": message.content, **self._prompt_ids(request)}
        return {
            "index": index,
            **({"message": _message_form(message)} if self.chat else text),
            "logprobs": self._logprobs(token_ids, generation.logprobs, generation.top_logprobs),
            "finish_reason": "tool_calls" if message.tool_calls else generation.finish_reason,
            # vLLM: the stop string or the stop token id the client asked for; null at the end-of-sequence token
            "stop_reason": matched if is_asked_for else None,
            **({"token_ids": token_ids} if self.return_token_ids else {}),
        }

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _logprobs(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        alternatives: Sequence[dict[int, float]],
        first_offset: int = 0,
    ) -> dict[str, Any] | None:
        """None: not asked for. Chat: an entry per token. Completions: parallel lists, ``text_offset`` in characters."""
        if not self.logprobs:
            return None
        best = [dict(zip(row, finite_logprobs(row.values()), strict=True)) for row in alternatives]
        pairs = list(zip(token_ids, finite_logprobs(logprobs), strict=True))
        if self.chat:
            tops = [[self._entry(*pair) for pair in row.items()] for row in best] or [[] for _ in pairs]
            return {
                "content": [{**self._entry(*pair), "top_logprobs": top} for pair, top in zip(pairs, tops, strict=True)]
            }
        names = [self._name(token_id) for token_id in token_ids]
        ends = list(accumulate(map(len, names), initial=first_offset))
        # As vLLM, the sampled token is among them even where it is none of the best.
        rows = [{**row, token: value} for row, (token, value) in zip(best or [{} for _ in pairs], pairs, strict=True)]
        return {
            "text_offset": ends[:-1],
            "tokens": names,
            "token_logprobs": [value for _, value in pairs],
            "top_logprobs": [{self._name(token): value for token, value in row.items()} for row in rows],
        }

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokens_as_ids else self.service.codec.tokens[token_id][0]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        _, sent = self.service.codec.tokens[token_id]
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(sent)}

    # -- server-sent events: one ``data: {...}`` line per piece, then ``data: [DONE]`` -------------------------------

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of a call with one prompt. Closing the generator frees the slots."""
        [request] = self.requests
        readers = [ReplyReader(self.service.codec, self.turn, request, index) for index in range(request.n)]
        offsets: dict[int, int] = {}
        async with aclosing(self.service.stream(request)) as deltas:
            async for delta in deltas:
                for chunk in self._chunks(readers[delta.index], offsets, delta):
                    yield sent_event(chunk)
        if self.include_usage:
            usage = self._usage(sum(len(reader.text.ids) for reader in readers))
            yield sent_event({**self.envelope, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _chunks(self, reader: ReplyReader, offsets: dict[int, int], delta: GenerationDelta) -> Iterator[dict[str, Any]]:
        """The chunks for one delta. ``offsets``: characters of the tokens sent so far of each choice that has begun."""
        first, offset = delta.index not in offsets, offsets.setdefault(delta.index, 0)
        envelope = {**self.envelope, **({"usage": None} if self.include_usage else {})}
        if first and self.chat:
            role = {"index": delta.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield {**envelope, "choices": [{**role, "finish_reason": None}], **self._prompt_ids(self.requests[0])}
        read, finish_reason = reader.push(delta.token_ids, delta.finish_reason), delta.finish_reason
        if not delta.token_ids and not read and finish_reason is None:
            return
        logprobs = self._logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs, offset)
        if logprobs is not None and not self.chat:
            offsets[delta.index] += sum(map(len, logprobs["tokens"]))
        said = _delta_form(read, reader.calls)
        piece: dict[str, Any] = {
            "index": delta.index,
            **({"delta": said} if self.chat else {"text": said["content"]}),
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if finish_reason and reader.calls else finish_reason,
            **({"token_ids": delta.token_ids} if self.return_token_ids else {}),
            **(self._prompt_ids(self.requests[0]) if first and not self.chat else {}),
        }
        yield {**envelope, "choices": [piece], "policy_version": self.service.engine.policy_version}


def _message_form(message: Message) -> dict[str, Any]:
    form: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning_content is not None:
        form["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        form |= {"content": message.content or None, "tool_calls": [_call_form(call) for call in message.tool_calls]}
    return form


def _call_form(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta_form(pieces: list[Piece], calls: Sequence[ToolCall]) -> dict[str, Any]:
    """``calls``: of the completion so far, these included."""
    said: dict[str, Any] = {"content": "".join(piece.text for piece in pieces if piece.kind == "content")}
    if thought := "".join(piece.text for piece in pieces if piece.kind == "reasoning"):
        said["reasoning_content"] = thought
    if new := [piece.call for piece in pieces if piece.call is not None]:
        first = len(calls) - len(new)
        said["tool_calls"] = [{"index": first + k, **_call_form(call)} for k, call in enumerate(new)]
    return said


def _function(holder: dict[str, Any]) -> Any:
    return holder.get("function") if holder.get("type", "function") == "function" else None


def _read_turn(service: GatewayService, fields: Fields) -> ChatTurn:
    sampling = parse_sampling(fields, ("max_completion_tokens", "max_tokens"), served="response_format")
    fields.refuse("functions", "audio", "continue_final_message", function_call="none", modalities=["text"])
    template = service.codec.template
    return template.turn(
        fields,
        template.messages(fields, "messages", enumerate(read_list(fields, "messages"))),
        _function,
        (fields, "response_format"),
        parallel_tool_calls=fields.read("parallel_tool_calls", True),
        separates_reasoning=fields.read("separate_reasoning", None, bool),
        sampling=sampling,
    )
