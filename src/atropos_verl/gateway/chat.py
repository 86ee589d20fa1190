"""A conversation, as every dialect is translated into it: OpenAI's chat form, normalised; and its prompt, by the
model's chat template. A template is a program: it runs in a worker thread."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Annotated, Any

import msgspec

from atropos_verl.gateway.fields import ApiError, Fields, Sampling

_TEXT_PARTS = {"refusal": "refusal"}
_TEXT_PARTS |= dict.fromkeys(("text", "input_text", "output_text", "reasoning_text", "summary_text"), "text")
"""Type of a content part → its field that holds the text."""
_MAX_MESSAGES = 10_000
_MAX_CHARACTERS = 16 << 20


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool by the policy."""

    id: str
    name: str
    arguments: str
    """JSON text as the policy wrote it, or as the client sent it; what a policy writes need not be JSON."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message. ``role`` is one of the chat template's (``system``, ``user``, ``assistant``, ``tool``, …)."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    extra: dict[str, Any] = {}
    """Other fields of the message, for templates that know them (``name``, …)."""


class _Function(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    parameters: dict[str, Any] | None = None
    arguments: Any = None


class _WireCall(msgspec.Struct):
    function: _Function
    id: Any = None


class _WireMessage(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None
    tool_calls: list[_WireCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


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


# -- what dialects read. Each raises ``ApiError`` 400 naming the field ------------------------------------------------


def read_list(fields: Fields, name: str) -> list[Any]:
    """The items of a field that must have some."""
    items = fields.raw(name)
    if not isinstance(items, list) or not items:
        raise fields.error(name, "expected a non-empty list")
    return items


def _read_tools(fields: Fields, function_of: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], ...]:
    """The ``tools`` in the chat API's form; ``function_of`` finds the function in an item."""
    functions: dict[str, Any] = {}
    for index, tool in enumerate(fields.read("tools", list[dict[str, Any]](), list[dict[str, Any]])):
        where = f"item {index} ({str(tool.get('type', 'function'))[:40]}) must be a function, no other tool is served: "
        name = fields.convert("tools", function := function_of(tool), _Function, where).name
        if name in functions:
            raise fields.error("tools", f"item {index}: there are two tools of the name {name!r}")
        functions[name] = function
    return tuple({"type": "function", "function": function} for function in functions.values())


def _read_tool_choice(
    fields: Fields, tools: tuple[dict[str, Any], ...], function_of: Callable[[dict[str, Any]], Any]
) -> str:
    """``tool_choice`` as ``ChatTurn`` has it; ``function_of`` finds what has a name in an object."""
    choice = fields.raw("tool_choice")
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    function = function_of(choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(name, str):
        text = "expected 'none', 'auto', 'required', or an object that names a function"
        raise fields.error("tool_choice", text, "unsupported_field")
    known = [tool["function"]["name"] for tool in tools]
    if name not in (None, *known) or not known:
        raise fields.error("tool_choice", f"there is no tool {(name or '')[:100]!r} among the tools {known[:20]}")
    return "required" if name is None else f"function {name}"


def _read_format(fields: Fields, name: str) -> dict[str, Any] | None:
    """The JSON schema of the content that the field ``name`` asks for; None: any text."""
    value = fields.read(name, dict[str, Any]())
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    holder = value.get("json_schema", value)
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        text = f"{str(kind)[:40]!r} is not supported; send text, json_object, or json_schema with a 'schema', an object"
        raise fields.error(name, text, "unsupported_field")
    return schema


def joined(parts: Any) -> Any:
    """The text of an answer whose text is in several parts; anything else as it is."""
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _call(fields: Fields, name: str, index: int, call: "_WireCall") -> ToolCall:
    arguments = call.function.arguments or {}
    if not isinstance(arguments, str):
        try:
            arguments = msgspec.json.encode(arguments).decode()
        except RecursionError:
            raise fields.error(name, f"item {index}: the arguments of a call have too many levels") from None
    return ToolCall(id=str(call.id or ""), name=call.function.name, arguments=arguments)


def _texts(fields: Fields, name: str, index: int, parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            found = f" ({kind[:40]})" if isinstance(kind, str) else ""
            message = f"item {index}: only parts of type 'text' are supported; images, files and sound are not{found}"
            raise fields.error(name, message, "unsupported_field")
        yield text


# -- the chat template ------------------------------------------------------------------------------------------------


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def source(self) -> str:
        """The text of the model's own template."""
        return str(self._tokenizer.chat_template)

    @property
    def writes_calls_in_tags(self) -> bool:
        """Calls are JSON in ``<tool_call>``: as Hermes and Qwen have them, and where the preamble is ours."""
        return "tools" not in self.source or "<args-json-object>" in self.source

    def turn(
        self,
        fields: Fields,
        messages: tuple[Message, ...],
        function_of: Callable[[dict[str, Any]], Any],
        response_format: tuple[Fields, str],
        *,
        choice: Fields | None = None,
        separates_reasoning: bool | None = None,
        **parts: Any,
    ) -> ChatTurn:
        """The turn of ``messages`` with the tools in ``fields``, and what these say to the template. ``ApiError`` 400.

        ``function_of`` finds the function in an item of ``tools`` and in ``tool_choice`` (of ``choice``, if given);
        ``response_format``: where that is; ``separates_reasoning`` None: where there are tools."""
        if fields.raw("chat_template") not in (None, self.source):
            text = "templates are programs, and this server runs the model's own only; leave it out"
            raise fields.error("chat_template", text, "unsupported_field")
        variables = fields.read("chat_template_kwargs", dict[str, Any]())
        for name in variables:
            if name in _reserved_names() or not name:
                raise fields.error("chat_template_kwargs", f"{name} cannot be set in here")
        tools = _read_tools(fields, function_of)
        return ChatTurn(
            messages=messages,
            tools=tools,
            tool_choice=_read_tool_choice(choice or fields, tools, function_of),
            separates_reasoning=bool(tools) if separates_reasoning is None else separates_reasoning,
            response_schema=_read_format(*response_format),
            variables={**variables, "add_generation_prompt": fields.read("add_generation_prompt", True)},
            add_special_tokens=fields.read("add_special_tokens", False),
            **parts,
        )

    def messages(
        self, fields: Fields, name: str, items: Iterable[tuple[int, Any]], before: Iterable[Message] = ()
    ) -> tuple[Message, ...]:
        """Messages in the form of the chat API, each with its place in the field ``name``. Raises ``ApiError`` 400.

        Text parts are lines of one text; what is null is absent; the content is not. A ``developer`` is the ``system``
        of templates that do not know the name, and a tool's answer has the name of the call it answers, here or in
        ``before``."""
        result, names = list[Message](), {call.id: call.name for message in before for call in message.tool_calls}
        for index, message in items:
            said: _WireMessage = fields.convert(name, message, _WireMessage, f"item {index}: ")
            more = {key: value for key, value in message.items() if value is not None and not hasattr(said, key)}
            calls = tuple(_call(fields, name, index, call) for call in said.tool_calls or ())
            names |= {call.id: call.name for call in calls}
            if said.role == "tool" and (tool := names.get(str(said.tool_call_id))):
                more.setdefault("name", tool)
            role = "system" if said.role == "developer" and "developer" not in self.source else said.role
            content = said.content or ""
            text = content if isinstance(content, str) else "\n".join(_texts(fields, name, index, content))
            thought = said.reasoning if said.reasoning_content is None else said.reasoning_content
            result.append(Message(role, text, calls, said.tool_call_id, thought, more))
        if len(result) > _MAX_MESSAGES:  # templates may look through all of them for each
            raise fields.error(name, f"{len(result)} messages; send {_MAX_MESSAGES} at most")
        return tuple(result)

    def prompt(self, turn: ChatTurn) -> str:
        """The prompt text of a turn. Raises ``ApiError`` 400."""
        said = list(turn.messages)
        if "tool_calls" not in self.source:
            said = [_with_calls_as_text(message) for message in said]
        if turn.parses_calls and "tools" not in self.source:
            said = _with_preamble(said, turn)
        options = {**turn.variables, **({"tools": list(turn.tools)} if turn.tools else {})}
        try:
            forms = [_template_form(message) for message in said]
            text = str(self._tokenizer.apply_chat_template(forms, tokenize=False, **options))
        except Exception as error:  # whatever a template, a program, raises
            reason = f"the chat template failed: {type(error).__name__}: {error}"[:300]
            raise ApiError(400, f"messages: {reason}", param="messages") from error
        if len(text) > _MAX_CHARACTERS:
            message = f"messages: the prompt has more than {_MAX_CHARACTERS} characters; send less"
            raise ApiError(400, message, param="messages")
        return text


def _with_preamble(messages: list[Message], turn: ChatTurn) -> list[Message]:
    """The tools as text of the system message, for templates that know none; models know the form from Hermes and Qwen.

    What tools answer is then a user's text in ``<tool_response>``, answers one after the other in one message."""
    tools = "\n".join(msgspec.json.encode(tool["function"]).decode() for tool in turn.tools)
    preamble = f"You may call tools:\n<tools>\n{tools}\n</tools>\nA call of a tool is\n"
    preamble += '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    result: list[Message] = []
    for is_answer, group in groupby(messages, key=lambda message: message.role == "tool"):
        said = [*group]
        texts = [f"<tool_response>\n{message.content}\n</tool_response>" for message in said]
        result += [Message(role="user", content="\n".join(texts))] if is_answer else said
    if result[0].role != "system":
        return [Message(role="system", content=preamble), *result]
    text = f"{result[0].content}\n\n{preamble}" if result[0].content else preamble
    return [msgspec.structs.replace(result[0], content=text), *result[1:]]


def _with_calls_as_text(message: Message) -> Message:
    """The calls of a message as the policy wrote them, for templates that do not know ``tool_calls``."""
    if not message.tool_calls:
        return message
    parts = [message.content] if message.content else []
    for call in message.tool_calls:
        name = msgspec.json.encode(call.name).decode()
        parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>')
    return msgspec.structs.replace(message, content="\n".join(parts), tool_calls=())


def _template_form(message: Message) -> dict[str, Any]:
    """The message as chat templates expect it. As vLLM does: arguments of calls, JSON text on the wire, are objects.
    What is absent is not there at all."""
    form: dict[str, Any] = {"role": message.role, **message.extra, "content": message.content}
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


@cache
def _reserved_names() -> set[str]:
    """Names that are no variables of a template, but parameters on the way to it."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    return {"self", "messages", *(name for function in functions for name in inspect.signature(function).parameters)}
