"""The model's chat template. It is a program: it runs in a worker thread, and is stopped when it takes too long."""

import ctypes
import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn, Message, read_list, read_messages, template_form
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
        self,
        fields: Fields,
        name: str = "messages",
        items: Iterable[tuple[int, Any]] | None = None,
        before: Iterable[Message] = (),
    ) -> tuple[Message, ...]:
        """See ``read_messages``, in the form that the model's template knows; ``items`` None: the field's own."""
        items = enumerate(read_list(fields, name)) if items is None else items
        return read_messages(fields, name, items, takes_parts=self.takes_parts, role_of=self.role, before=before)

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
    result = [] if messages[0].role == "system" else [Message(role="system", content=preamble)]
    before = ""
    for message in messages:
        content = message.text
        if message.role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if before == "tool":
                content = f"{result.pop().content}\n{content}"
            result.append(Message(role="user", content=content))
        elif not result:
            result.append(msgspec.structs.replace(message, content=f"{content}\n\n{preamble}" if content else preamble))
        else:
            result.append(message)
        before = message.role
    return result


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
