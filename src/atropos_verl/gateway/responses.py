"""``POST /v1/responses``: OpenAI's Responses API, with and without ``previous_response_id``."""

import time
from collections.abc import Iterator
from typing import Any

from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall, joined, read_list
from atropos_verl.gateway.fields import Fields, parse_sampling, sent_event
from atropos_verl.gateway.service import Answer, EventAnswer, GatewayService
from atropos_verl.types import FinishReason

_ROLES = ("user", "assistant", "system", "developer")
_HARMLESS = ("stream", "store", "include", "reasoning", "truncation", "prompt_cache_retention", "max_tool_calls")
_ECHOED = ("instructions", "max_output_tokens", "metadata", "previous_response_id", "temperature", "text", "top_p")


def responses(service: GatewayService, fields: Fields) -> Answer:
    """One answer. Raises ``ApiError`` 400."""
    call = _Call(service, fields)
    return call.stream if fields.read("stream", False) else call.whole


def _read_turn(service: GatewayService, fields: Fields) -> ChatTurn:
    sampling = parse_sampling(fields, ("max_output_tokens",))
    fields.refuse("conversation", "prompt", "top_logprobs", "moderation", n=1)
    fields.ignore("stream_options", *_HARMLESS)
    template = service.codec.template
    form = fields.child("text")
    form.ignore("verbosity")
    said: list[Message] = []
    if previous := fields.read("previous_response_id", ""):
        if (kept := service.messages_of(previous)) is None:
            text = f"{previous[:100]!r} is not known (any more); send the whole conversation in 'input'"
            raise fields.error("previous_response_id", text, "previous_response_not_found")
        said = [message for message in kept if not message.extra.get("instructions")]
    if "instructions" in fields:  # of this request only: the next one sends its own
        instructions = Message(role="system", content=fields.read("instructions", ""), extra={"instructions": True})
        said = [instructions, *said]
    turn = template.turn(
        fields,
        (*said, *template.messages(fields, "input", _items(fields), said)),
        _function,
        (form, "format"),
        parallel_tool_calls=fields.read("parallel_tool_calls", True),
        separates_reasoning=True,
        sampling=sampling,
    )
    service.report_unread("/v1/responses", fields, form)
    return turn


def _function(holder: dict[str, Any]) -> Any:
    if holder.get("type", "function") != "function":
        return None
    return {name: value for name, value in holder.items() if name not in ("type", "strict") and value is not None}


def _items(fields: Fields) -> list[tuple[int, dict[str, Any]]]:
    """The ``input`` in the form of the chat API, each message with its place. What one answer held is one message; its
    items have ids: an assistant's message without one is a message of its own."""
    if isinstance(given := fields.raw("input"), str):
        return [(0, {"role": "user", "content": given})]
    said: list[tuple[int, dict[str, Any]]] = []
    for index, item in enumerate(read_list(fields, "input")):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message" and item.get("role") in _ROLES:
            message = {"role": item["role"], "content": item.get("content")}
        elif kind == "reasoning":
            thought = joined(item.get("content") or item.get("summary") or [])
            message = {"role": "assistant", "reasoning_content": thought}
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            message = {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
        elif kind == "function_call_output":
            message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        else:
            role = item.get("role") if isinstance(item, dict) else None
            text = f"item {index}: type {str(kind)[:40]!r}, role {str(role)[:40]!r} is not supported"
            raise fields.error("input", text, "unsupported_field")
        if message["role"] == "assistant":
            message["content"] = joined(message.get("content") or [])
            last = said[-1][1] if said else message
            if last["role"] == "assistant" and (kind != "message" or "id" in item or not last["content"]):
                for name in ("content", "reasoning_content", "tool_calls") if said else ():
                    before, part = last.get(name), message.get(name)
                    # Parts that are no text are refused below.
                    last[name] = before + part if before and part and type(before) is type(part) else part or before
                said[-1:] = [(index, last)]
                continue
        said.append((index, message))
    return said


class _Call(EventAnswer):
    def __init__(self, service: GatewayService, fields: Fields) -> None:
        super().__init__(service, _read_turn(service, fields), "resp_", "input")
        self.envelope: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": service.model_name,
            **{name: fields.raw(name) for name in _ECHOED},
            "tools": fields.raw("tools") or [],
            "tool_choice": fields.raw("tool_choice") or "auto",
            "parallel_tool_calls": self.turn.parallel_tool_calls,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        self._stores = fields.read("store", True)
        self._items: list[dict[str, Any]] = []
        self._sent = 0

    def body(self) -> dict[str, Any]:
        return self.envelope

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self.envelope)
        yield self._event("response.in_progress", response=self.envelope)

    def _event(self, kind: str, **data: Any) -> bytes:
        self._sent += 1
        return sent_event({"type": kind, "sequence_number": self._sent - 1, **data}, kind)

    def call(self, call: ToolCall) -> Iterator[bytes]:
        yield self._begin("fc", "function_call", call_id=call.id, name=call.name, arguments="")
        item, kind = self._items[-1], "response.function_call_arguments"
        item |= {"arguments": call.arguments, "status": "completed"}
        place = {"output_index": len(self._items) - 1, "item_id": item["id"]}
        yield self._event(f"{kind}.delta", **place, delta=call.arguments)
        yield self._event(f"{kind}.done", **place, name=call.name, arguments=call.arguments)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def open(self, kind: str) -> Iterator[bytes]:
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text"}
            yield self._begin("rs", "reasoning", summary=[], content=[])
        else:
            part = {"type": "output_text", "annotations": [], "logprobs": []}
            yield self._begin("msg", "message", role="assistant", content=[])
        self._items[-1]["content"] = [{**part, "text": ""}]
        yield self._part_event("response.content_part.added", part=self._items[-1]["content"][0])

    def more(self, text: str) -> Iterator[bytes]:
        [part] = self._items[-1]["content"]
        part["text"] += text
        more: dict[str, Any] = {"logprobs": []} if "logprobs" in part else {}
        yield self._part_event(f"response.{part['type']}.delta", delta=text, **more)

    def _begin(self, prefix: str, kind: str, **data: Any) -> bytes:
        name = f"{prefix}_{self.id.removeprefix('resp_')}_{len(self._items)}"
        self._items.append({"id": name, "type": kind, "status": "in_progress", **data})
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])

    def _part_event(self, kind: str, **data: Any) -> bytes:
        place = {"output_index": len(self._items) - 1, "item_id": self._items[-1]["id"], "content_index": 0}
        return self._event(kind, **place, **data)

    def close(self, kind: str) -> Iterator[bytes]:
        item = self._items[-1]
        item["status"], part = "completed", item["content"][0]
        more: dict[str, Any] = {"logprobs": []} if "logprobs" in part else {}
        yield self._part_event(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def end(self, finish_reason: FinishReason) -> Iterator[bytes]:
        if not self._items:
            yield from (*self.open("content"), *self.more(""), *self.close("content"))
        if self._stores:
            self.service.remember(self.id, (*self.turn.messages, self.reader.message))
        prompt, tokens = len(self.request.prompt_token_ids), len(self.reader.text.ids)
        cut = finish_reason == "length"
        self.envelope |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + tokens,
            },
            "policy_version": self.service.engine.policy_version,
        }
        yield self._event(f"response.{self.envelope['status']}", response=self.envelope)
