"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: the Messages API of Anthropic."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn, ToolCall, joined, parsed_arguments, read_list
from atropos_verl.gateway.fields import Fields, parse_sampling, sent_event
from atropos_verl.gateway.service import Answer, EventAnswer, GatewayService
from atropos_verl.types import FinishReason

_HARMLESS = ("stream", "cache_control", "inference_geo", "speed", "diagnostics", "betas", "context_management")
_SIGNATURE = "unsigned"
"""Of thinking blocks: clients demand one, and send it back."""
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}


def messages(service: GatewayService, fields: Fields) -> Answer:
    """One answer. Raises ``ApiError`` 400."""
    call = _Call(service, fields)
    return call.stream if fields.read("stream", False) else call.whole


def count_tokens(service: GatewayService, fields: Fields) -> Answer:
    """The number of tokens of the prompt that ``messages`` would make. Raises ``ApiError`` 400."""
    fields.ignore("max_tokens", "stream", "stop_sequences")
    count = len(service.codec.render(_read_turn(service, fields)))

    async def answer() -> bytes:
        return msgspec.json.encode({"input_tokens": count})

    return answer


def _read_turn(service: GatewayService, fields: Fields) -> ChatTurn:
    sampling = parse_sampling(fields, ("max_tokens",))
    stop, _ = fields.stops("stop_sequences")
    sampling = replace(sampling, template=replace(sampling.template, stop=(*sampling.template.stop, *stop)))
    fields.refuse("container", "mcp_servers", n=1)
    fields.ignore(*_HARMLESS)
    thinking, output = fields.child("thinking"), fields.child("output_config")
    thinking.ignore("budget_tokens", "display")
    output.ignore("effort")
    # OpenAI's words for the same choices.
    choice = fields.read("tool_choice", dict[str, Any]())
    kind = choice.get("type", "auto")
    named = {"name": choice.get("name")} if kind == "tool" else choice
    as_openai = Fields({"tool_choice": _CHOICES.get(kind, named) if isinstance(kind, str) else named})
    template, system = service.codec.template, fields.raw("system")
    said = template.messages(fields, "system", [(0, {"role": "system", "content": system})] if system else [])
    turn = template.turn(
        fields,
        said + template.messages(fields, "messages", _items(fields)),
        _function,
        (output, "format"),
        choice=as_openai,
        parallel_tool_calls=not choice.get("disable_parallel_tool_use"),
        separates_reasoning=thinking.read("type", "disabled") != "disabled" or None,
        sampling=sampling,
    )
    service.report_unread("/v1/messages", fields, thinking, output)
    return turn


def _function(tool: dict[str, Any]) -> Any:
    if tool.get("type", "custom") != "custom":
        return None
    function = {name: tool[name] for name in ("name", "description") if tool.get(name) is not None}
    return {**function, "parameters": tool.get("input_schema") or {"type": "object"}}


def _items(fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """The messages in the form of the chat API, each with its place in ``messages``."""
    for index, message in enumerate(read_list(fields, "messages")):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise fields.error("messages", f"item {index}: the role must be 'user', 'assistant' or 'system'")
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(block, dict) for block in blocks):
            raise fields.error("messages", f"item {index}: 'content' must be a text or a list of blocks")
        own = ("thinking", "tool_use") if role == "assistant" else ("tool_result",)
        named = {kind: [block for block in blocks if block.get("type") == kind] for kind in own}
        said: dict[str, Any] = {"role": role, "content": [block for block in blocks if block.get("type") not in own]}
        for block in named.get("tool_result", ()):
            yield index, {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content")}
        if role == "assistant":
            said["content"] = joined(said["content"])
            if named["thinking"]:
                said["reasoning_content"] = "".join(str(block.get("thinking", "")) for block in named["thinking"])
            said["tool_calls"] = [
                {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input")}}
                for block in named["tool_use"]
            ]
        if said["content"] or role == "assistant" or not named["tool_result"]:
            yield index, said


class _Call(EventAnswer):
    def __init__(self, service: GatewayService, fields: Fields) -> None:
        if "max_tokens" not in fields:
            raise fields.error("max_tokens", "missing; the API demands it")
        super().__init__(service, _read_turn(service, fields), "msg_", "messages")
        self._blocks: list[dict[str, Any]] = []
        self._ends: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def body(self) -> dict[str, Any]:
        usage = {"input_tokens": len(self.request.prompt_token_ids), "output_tokens": len(self.reader.text.ids)}
        form: dict[str, Any] = {"id": self.id, "type": "message", "role": "assistant", "model": self.service.model_name}
        form["policy_version"] = self.service.engine.policy_version
        return {**form, "content": self._blocks, **self._ends, "usage": usage}

    def begin(self) -> Iterator[bytes]:
        yield _event("message_start", message=self.body())

    def call(self, call: ToolCall) -> Iterator[bytes]:
        arguments = call.arguments
        if not isinstance(parsed_arguments(arguments), dict):  # the API has objects only
            arguments = msgspec.json.encode({"arguments": arguments}).decode()
        yield self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        self._blocks[-1]["input"] = msgspec.Raw(arguments.encode())
        yield self._delta(type="input_json_delta", partial_json=arguments)
        yield _event("content_block_stop", index=len(self._blocks) - 1)

    def open(self, kind: str) -> Iterator[bytes]:
        thought = {"type": "thinking", "thinking": "", "signature": ""}
        yield self._begin(thought if kind == "reasoning" else {"type": "text", "text": ""})

    def more(self, text: str) -> Iterator[bytes]:
        name = self._blocks[-1]["type"]
        self._blocks[-1][name] += text
        yield self._delta(type=f"{name}_delta", **{name: text})

    def _begin(self, block: dict[str, Any]) -> bytes:
        self._blocks.append(block)
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def close(self, kind: str) -> Iterator[bytes]:
        if kind == "reasoning":
            self._blocks[-1]["signature"] = _SIGNATURE
            yield self._delta(type="signature_delta", signature=_SIGNATURE)
        yield _event("content_block_stop", index=len(self._blocks) - 1)

    def end(self, finish_reason: FinishReason) -> Iterator[bytes]:
        reason, matched = "max_tokens" if finish_reason == "length" else "end_turn", self.reader.text.matched
        stop = matched if isinstance(matched, str) else None
        reason = "tool_use" if self.reader.calls else "stop_sequence" if stop is not None else reason
        self._ends = {"stop_reason": reason, "stop_sequence": stop}
        yield _event("message_delta", delta=self._ends, usage=self.body()["usage"])
        yield _event("message_stop")


def _event(kind: str, **data: Any) -> bytes:
    return sent_event({"type": kind, **data}, kind)
