"""One turn of a conversation, as every dialect is translated into it: OpenAI's chat form, normalised.

::

    body ── openai | responses | anthropic ──▶ ChatTurn ── render ──▶ prompt ids ── engine ──▶ tokens
    answer ◀── openai | responses | anthropic ── Message ◀── parsing ──────────────────────────┘
"""

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from atropos_verl.gateway.fields import Fields, Sampling
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part → its field that holds the text."""


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool by the policy."""

    id: str
    name: str
    arguments: str
    """JSON text as the policy wrote it, or as the client sent it; what a policy writes need not be JSON."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message. ``role`` is one of the chat template's (``system``, ``user``, ``assistant``, ``tool``, …)."""

    role: str
    content: str | tuple[str, ...] = ""
    """Several texts only where the template knows contents of several parts; otherwise they were joined by lines."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    extra: dict[str, Any] = {}
    """Other fields of the message, for templates that know them (``name``, …)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """A request for the next message of a conversation."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """As the chat API has them: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""
    tool_choice: str = "auto"
    """``auto`` | ``none`` | ``required``, or ``function NAME``."""
    parallel_tool_calls: bool = True
    separates_reasoning: bool = False
    """The answer has what the policy thought in ``reasoning_content``; otherwise it stays in the content."""
    sampling: Sampling
    stream: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template, beside messages and tools; ``add_generation_prompt`` is one."""
    template: str | None = None
    """A client's own chat template; None: the model's."""
    add_special_tokens: bool = False

    @property
    def parses_calls(self) -> bool:
        """Calls in the answer are taken out of its text."""
        return bool(self.tools) and self.tool_choice != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The prompt of a turn."""

    prompt_ids: tuple[int, ...]
    extends: bool = False
    """It continues recorded tokens, which were sampled and not rendered again."""
    reason: str | None = None
    """The reason for which it does not, where a recorded chain was given."""


class Conversation(Protocol):
    """Where a turn's prompt and completions come from: the engine alone, or a session that records them."""

    def render(self, turn: ChatTurn) -> Rendered:
        """The prompt. Raises ``ApiError`` 400 naming the field. It is called in a worker thread."""

    async def complete(self, turn: ChatTurn, request: GenerationRequest) -> list[Generation]:
        """``request.n`` completions, recorded before this returns."""

    def stream(self, turn: ChatTurn, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """The same, token by token; a completion is recorded before its last delta."""


def read_messages(fields: Fields, *, takes_parts: bool, knows_developer: bool) -> tuple[Message, ...]:
    """The ``messages`` of a request of the chat API. Raises ``ApiError`` 400 naming the message.

    As vLLM does: text parts are lines of one text where the template ``takes_parts`` not; what is null is absent; the
    content is not. Further, a ``developer`` is the ``system`` of templates that do not know the newer name, and a
    tool's answer has the name of the call it answers.
    """
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", "expected a non-empty list of messages")
    result, names = [], dict[str, str]()
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise fields.error("messages", f"item {index} must be an object with a string 'role'")
        known = {name: value for name, value in message.items() if value is not None}
        role, content = known.pop("role"), known.pop("content", "")
        calls = tuple(_calls(fields, index, known.pop("tool_calls", [])))
        names |= {call.id: call.name for call in calls}
        answered = known.pop("tool_call_id", None)
        if answered is not None and not isinstance(answered, str):
            raise fields.error("messages", f"item {index}: 'tool_call_id' must be a string")
        if role == "tool" and (name := names.get(str(answered))):
            known.setdefault("name", name)
        if role == "developer" and not knows_developer:
            role = "system"
        thought = known.pop("reasoning_content", known.pop("reasoning", None))
        if thought is not None and not isinstance(thought, str):
            raise fields.error("messages", f"item {index}: 'reasoning_content' must be a string")
        if isinstance(content, list):
            content = join_parts(list(_texts(fields, index, content)), takes_parts=takes_parts)
        elif not isinstance(content, str):
            raise fields.error("messages", f"item {index}: 'content' must be a string or a list of text parts")
        result.append(
            Message(
                role=role,
                content=content,
                tool_calls=calls,
                tool_call_id=answered,
                reasoning_content=thought,
                extra=known,
            )
        )
    return tuple(result)


def join_parts(texts: list[str], *, takes_parts: bool) -> str | tuple[str, ...]:
    """The content that consists of ``texts``."""
    return tuple(texts) if takes_parts and len(texts) > 1 else "\n".join(texts)


def _calls(fields: Fields, index: int, calls: Any) -> Iterator[ToolCall]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise fields.error("messages", f"item {index}: 'tool_calls' must be a list of objects")
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            text = f"item {index}: each of 'tool_calls' needs a 'function' with a 'name'; other kinds are not served"
            raise fields.error("messages", text)
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, str):
            try:
                arguments = msgspec.json.encode(arguments).decode()
            except RecursionError:
                raise fields.error("messages", f"item {index}: the arguments of a call have too many levels") from None
        yield ToolCall(id=str(call.get("id") or ""), name=function["name"], arguments=arguments)


def _texts(fields: Fields, index: int, parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            message = f"item {index}: only parts of type 'text' are supported"
            raise fields.error("messages", message, "unsupported_field")
        yield text


def template_form(message: Message) -> dict[str, Any]:
    """The message as chat templates expect it, which is not quite what it is on the wire.

    As vLLM does: arguments of calls, JSON text on the wire, are objects. What is absent is not there at all.
    """
    form: dict[str, Any] = {"role": message.role, **message.extra}
    content = message.content
    form["content"] = content if isinstance(content, str) else [{"type": "text", "text": text} for text in content]
    if message.reasoning_content is not None:
        form["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        form["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        form["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": parsed_arguments(c.arguments)}}
            for c in message.tool_calls
        ]
    return form


def parsed_arguments(arguments: str) -> Any:
    """The object that ``arguments`` are the JSON text of; the text itself where they are none."""
    try:
        parsed = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict | list) else arguments
