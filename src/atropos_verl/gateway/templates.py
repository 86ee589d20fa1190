"""The model's chat template. It is a program: it runs in a worker thread, and is stopped when it takes too long."""

import ctypes
import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn, Message, read_calls, read_texts, template_form
from atropos_verl.gateway.fields import ApiError, Fields

_SECONDS = 10.0
"""Time that one prompt may take to render."""
_MAX_CHARACTERS = 16 << 20


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def turn(self, fields: Fields, messages: tuple[Message, ...], **parts: Any) -> ChatTurn:
        """The turn of ``messages`` with what ``fields`` say to the template. Raises ``ApiError`` 400."""
        if fields.raw("chat_template") not in (None, self.source):
            text = "templates are programs, and this server runs the model's own only; leave it out"
            raise fields.error("chat_template", text, "unsupported_field")
        variables = fields.get("chat_template_kwargs", dict[str, Any]())
        for name in variables:
            if name in _reserved_names() or not name:
                raise fields.error("chat_template_kwargs", f"{name} cannot be set in here")
        return ChatTurn(
            messages=messages,
            variables={**variables, "add_generation_prompt": fields.get("add_generation_prompt", True)},
            add_special_tokens=fields.get("add_special_tokens", False),
            **parts,
        )

    def messages(
        self, fields: Fields, name: str, items: Iterable[tuple[int, Any]], before: Iterable[Message] = ()
    ) -> tuple[Message, ...]:
        """Messages in the form of the chat API, each with its place in the field ``name``. Raises ``ApiError`` 400.

        As vLLM does: text parts are lines of one text where the template takes no parts; what is null is absent; the
        content is not. Further, a tool's answer has the name of the call it answers, here or in ``before``.
        """
        result, names = list[Message](), {call.id: call.name for message in before for call in message.tool_calls}
        for index, message in items:
            given = message.items() if isinstance(message, dict) else ()
            known = {key: value for key, value in given if value is not None}
            role, content, answered = known.pop("role", None), known.pop("content", ""), known.pop("tool_call_id", None)
            thought = known.pop("reasoning_content", known.pop("reasoning", None))
            if not isinstance(role, str):
                raise fields.error(name, f"item {index} must be an object with a string 'role'")
            if not isinstance(answered, str | None) or not isinstance(thought, str | None):
                raise fields.error(name, f"item {index}: 'tool_call_id' and 'reasoning_content' must be strings")
            calls = tuple(read_calls(fields, name, index, known.pop("tool_calls", [])))
            names |= {call.id: call.name for call in calls}
            if role == "tool" and (tool := names.get(str(answered))):
                known.setdefault("name", tool)
            if isinstance(content, list):
                content = tuple(read_texts(fields, name, index, content))
                content = content if self.takes_parts and len(content) > 1 else "\n".join(content)
            elif not isinstance(content, str):
                raise fields.error(name, f"item {index}: 'content' must be a string or a list of text parts")
            result.append(Message(self.role(role), content, calls, answered, thought, known))
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
            text = self._render([template_form(message) for message in said], **options)
        except (Exception, _TooSlow) as error:  # whatever a template, a program, raises
            reason = f"the chat template failed: {type(error).__name__}: {error}"[:300]
            raise ApiError(400, f"messages: {reason}", param="messages") from error
        if len(text) > _MAX_CHARACTERS:
            message = f"messages: the prompt has more than {_MAX_CHARACTERS} characters; send less"
            raise ApiError(400, message, param="messages")
        return text

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        with _stopped_after(_SECONDS):
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @cached_property
    def takes_parts(self) -> bool:
        """The model's template knows contents that are lists of parts."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            text = self._render(probe)
        except (Exception, _TooSlow):  # noqa: BLE001 - a template is a program; this one knows texts only
            return False
        return "probe" in text and not any(shown in text for shown in ("'probe'", '"probe"'))

    @property
    def source(self) -> str:
        """The text of the model's own template."""
        return str(self._tokenizer.chat_template)

    @property
    def writes_calls_in_tags(self) -> bool:
        """Calls are JSON in ``<tool_call>``: as Hermes and Qwen have them, and where the preamble is ours."""
        return "tools" not in self.source or "<args-json-object>" in self.source

    def role(self, role: str) -> str:
        """``role`` as the template names it: a ``developer`` is the ``system`` of those that do not know the name."""
        return "system" if role == "developer" and "developer" not in self.source else role


def _with_preamble(messages: list[Message], turn: ChatTurn) -> list[Message]:
    """The tools as text of the system message, for templates that know none; models know the form from Hermes and Qwen.

    What tools answer is then a user's text in ``<tool_response>``, answers one after the other in one message.
    """
    tools = "\n".join(msgspec.json.encode(tool["function"]).decode() for tool in turn.tools)
    preamble = f"You may call tools:\n<tools>\n{tools}\n</tools>\nA call of a tool is\n"
    preamble += '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    result: list[Message] = []
    for is_answer, group in groupby(messages, key=lambda message: message.role == "tool"):
        said = [*group]
        texts = [f"<tool_response>\n{message.text}\n</tool_response>" for message in said]
        result += [Message(role="user", content="\n".join(texts))] if is_answer else said
    if result[0].role == "system":
        text = f"{result[0].text}\n\n{preamble}" if result[0].text else preamble
        return [msgspec.structs.replace(result[0], content=text), *result[1:]]
    return [Message(role="system", content=preamble), *result]


def _with_calls_as_text(message: Message) -> Message:
    """The calls of a message as the policy wrote them, for templates that do not know ``tool_calls``."""
    if not message.tool_calls:
        return message
    parts = [message.text] if message.text else []
    for call in message.tool_calls:
        name = msgspec.json.encode(call.name).decode()
        parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>')
    return msgspec.structs.replace(message, content="\n".join(parts), tool_calls=())


@cache
def _reserved_names() -> set[str]:
    """Names that are no variables of a template, but parameters on the way to it."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    return {"self", "messages", *(name for function in functions for name in inspect.signature(function).parameters)}


class _TooSlow(BaseException):
    def __str__(self) -> str:
        return f"it takes longer than {_SECONDS:g} s"


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise ``_TooSlow`` in this thread when the block is not done by then."""
    lock, thread, running = threading.Lock(), threading.get_ident(), True

    def stop() -> None:
        with lock:
            if running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            running = False
        timer.cancel()
