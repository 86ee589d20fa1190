"""One turn of a conversation, as every dialect is translated into it: OpenAI's chat form, normalised."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from atropos_verl.gateway.fields import Fields, Sampling

_TEXT_PARTS = {"refusal": "refusal", **dict.fromkeys(("text", "input_text", "output_text"), "text")}
_TEXT_PARTS |= dict.fromkeys(("reasoning_text", "summary_text"), "text")
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

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(self.content)


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
    response_schema: dict[str, Any] | None = None
    """JSON schema of the content; it is enforced."""
    sampling: Sampling
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template, beside messages and tools; ``add_generation_prompt`` is one."""
    add_special_tokens: bool = False

    @property
    def parses_calls(self) -> bool:
        """Calls in the answer are taken out of its text."""
        return bool(self.tools) and self.tool_choice != "none"


def read_list(fields: Fields, name: str) -> list[Any]:
    """The items of a field that must have some. Raises ``ApiError`` 400."""
    items = fields.raw(name)
    if not isinstance(items, list) or not items:
        raise fields.error(name, "expected a non-empty list")
    return items


def read_tools(fields: Fields, function_of: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], ...]:
    """The ``tools`` in the chat API's form; ``function_of`` finds the function in an item. Raises ``ApiError`` 400."""
    tools = fields.raw("tools") or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise fields.error("tools", "expected a list of objects")
    functions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        function = function_of(tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            kind = str(tool.get("type", "function"))[:40]
            text = f"item {index} ({kind}) must be a function with a 'name'; no other kind of tool is served"
            raise fields.error("tools", text, "unsupported_field")
        if name in functions:
            raise fields.error("tools", f"item {index}: there are two tools of the name {name!r}")
        if not isinstance(function.get("parameters") or {}, dict):
            raise fields.error("tools", f"item {index}: 'parameters' must be a JSON schema, an object")
        functions[name] = function
    return tuple({"type": "function", "function": function} for function in functions.values())


def read_tool_choice(
    fields: Fields, tools: tuple[dict[str, Any], ...], function_of: Callable[[dict[str, Any]], Any]
) -> str:
    """``tool_choice`` as ``ChatTurn`` has it; ``function_of`` finds what has a name in an object. ``ApiError`` 400."""
    choice = fields.raw("tool_choice")
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    function = function_of(choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(name, str):
        text = "expected 'none', 'auto', 'required', or an object that names a function"
        raise fields.error("tool_choice", text, "unsupported_field")
    known = [tool["function"]["name"] for tool in tools]
    if name is not None and name not in known:
        raise fields.error("tool_choice", f"there is no tool {name[:100]!r} among the tools {known[:20]}")
    if not known:
        raise fields.error("tool_choice", "a call is required, but there are no tools")
    return "required" if name is None else f"function {name}"


def read_format(fields: Fields, name: str) -> dict[str, Any] | None:
    """The JSON schema of the content that the field ``name`` asks for; None: any text. Raises ``ApiError`` 400."""
    value = fields.get(name, dict[str, Any]())
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    holder = value.get("json_schema", value)
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if kind != "json_schema":
        text = f"the type {str(kind)[:40]!r} is not supported; send text, json_object or json_schema"
        raise fields.error(name, text, "unsupported_field")
    if not isinstance(schema, dict):
        raise fields.error(name, "json_schema needs a 'schema', an object")
    return schema


def read_calls(fields: Fields, name: str, index: int, calls: Any) -> Iterator[ToolCall]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise fields.error(name, f"item {index}: 'tool_calls' must be a list of objects")
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            text = f"item {index}: a call needs a 'function' with a 'name'; other kinds of calls are not served"
            raise fields.error(name, text)
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, str):
            try:
                arguments = msgspec.json.encode(arguments).decode()
            except RecursionError:
                raise fields.error(name, f"item {index}: the arguments of a call have too many levels") from None
        yield ToolCall(id=str(call.get("id") or ""), name=function["name"], arguments=arguments)


def read_texts(fields: Fields, name: str, index: int, parts: Iterable[Any]) -> Iterator[str]:
    """The texts of the content ``parts`` of item ``index`` of the field ``name``. Raises ``ApiError`` 400."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            found = f" ({kind[:40]})" if isinstance(kind, str) else ""
            message = f"item {index}: only parts of type 'text' are supported; images, files and sound are not{found}"
            raise fields.error(name, message, "unsupported_field")
        yield text


def joined(parts: Any) -> Any:
    """The text of an answer whose text is in several parts; anything else as it is."""
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "".join(part["text"] for part in parts)
    return parts


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
