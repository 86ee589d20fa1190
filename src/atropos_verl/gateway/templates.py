"""Chat templates: rendering that is bounded in time, memory and output.

A template is a program. The model's own is trusted as far as the model is: it runs in a worker thread, and is stopped
when it takes too long. One that a client sends (``gateway.allow_client_templates``) runs in a process of its own, whose
time and memory the kernel bounds: ``python -m atropos_verl.gateway.templates``, JSON in and out.
"""

import ctypes
import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import msgspec

from atropos_verl.gateway.chat import ChatTurn, Message, read_list, read_messages, template_form
from atropos_verl.gateway.fields import ApiError, Fields

_SECONDS = 10.0
"""Time that one prompt may take to render, the start of a client template's process included."""
_MAX_CHARACTERS = 16 << 20
_MEMORY_BYTES = 1 << 30
"""Address space of the process of a client's template."""
_SHOWN = 300
_NEEDED = re.compile(r"PATH|HOME|HF_HOME|LANG|LC_\w+|LD_LIBRARY_PATH|PYTHON\w*|TMPDIR|VIRTUAL_ENV|OMP_NUM_THREADS")
"""Environment variables of the process of a client's template: of all others none is known to hold no secret."""


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, and those of clients where they are allowed."""

    def __init__(self, tokenizer: Any, *, allows_clients: bool) -> None:
        self._tokenizer = tokenizer
        self._allows_clients = allows_clients

    def turn(self, fields: Fields, messages: tuple[Message, ...], **parts: Any) -> ChatTurn:
        """The turn of ``messages`` with what ``fields`` say to the template. Raises ``ApiError`` 400."""
        variables = fields.get("chat_template_kwargs", dict[str, Any]())
        for name in variables:
            if name == "add_generation_prompt" or name == "tools":
                raise fields.error("chat_template_kwargs", f"send {name} as a field of the request, not in here")
            if name in _reserved_names() or not name:
                raise fields.error("chat_template_kwargs", f"{name} cannot be set by a client")
        return ChatTurn(
            messages=messages,
            variables={**variables, "add_generation_prompt": fields.get("add_generation_prompt", True)},
            template=self._client_template(fields),
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
        own = self._client_template(fields) is None
        items = enumerate(read_list(fields, name)) if items is None else items
        forms: dict[str, Any] = {"takes_parts": own and self.takes_parts, "role_of": self.role}
        return read_messages(fields, name, items, **forms, before=before)

    def prompt(self, turn: ChatTurn) -> str:
        """The prompt text of a turn. Raises ``ApiError`` 400."""
        template, said = turn.template, list(turn.messages)
        source = self.source if template is None else template
        if "tool_calls" not in source:
            said = [_with_calls_as_text(message) for message in said]
        if turn.parses_calls and "tools" not in source:
            said = _with_preamble(said, turn)
        messages = [template_form(message) for message in said]
        options = {**turn.variables, **({"tools": list(turn.tools)} if turn.tools else {})}
        try:
            if template is None:
                with _stopped_after(_SECONDS):
                    text = self._render(messages, **options)
            else:
                special = getattr(self._tokenizer, "special_tokens_map", {})
                text = _render_apart(template, messages, {**special, **options})
        except (Exception, _TooSlow) as error:  # whatever a template, a program, raises
            is_named = template is None and not isinstance(error, _TooSlow)
            reason = (f"{type(error).__name__}: {error}" if is_named else str(error))[:_SHOWN]
            name = "messages" if template is None else "chat_template"
            raise ApiError(400, f"{name}: the chat template failed: {reason}", param=name) from error
        if len(text) > _MAX_CHARACTERS:
            message = f"messages: the prompt has more than {_MAX_CHARACTERS} characters; send less"
            raise ApiError(400, message, param="messages")
        return text

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _client_template(self, fields: Fields) -> str | None:
        """The template in the request; None: the model's own."""
        if "chat_template" not in fields or fields.raw("chat_template") == self._tokenizer.chat_template:
            return None
        if not self._allows_clients:
            message = "templates are programs, and this server runs the model's own only; leave it out (or set"
            raise fields.error("chat_template", f"{message} gateway.allow_client_templates)", "unsupported_field")
        return fields.get("chat_template", "")

    @cached_property
    def takes_parts(self) -> bool:
        """The model's template knows contents that are lists of parts."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            with _stopped_after(_SECONDS):
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
        content = message.content if isinstance(message.content, str) else "\n".join(message.content)
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
    names = [msgspec.json.encode(call.name).decode() for call in message.tool_calls]
    calls = [
        f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>'
        for name, call in zip(names, message.tool_calls, strict=True)
    ]
    content = message.content if isinstance(message.content, str) else "\n".join(message.content)
    return msgspec.structs.replace(message, content="\n".join([content, *calls] if content else calls), tool_calls=())


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


def _render_apart(template: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Render a template that is not trusted. Raises ``RuntimeError`` or ``TimeoutError`` with what went wrong."""
    command = [sys.executable, "-m", __name__]
    request = msgspec.json.encode({"template": template, "messages": messages, "options": options})
    env = {name: value for name, value in os.environ.items() if _NEEDED.fullmatch(name)}
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=_SECONDS, env=env, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it takes longer than {_SECONDS:g} s") from None
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(done.stderr.decode(errors="replace").strip()[-_SHOWN:] or "it takes too much memory")
    return str(msgspec.json.decode(done.stdout))


def _render_from_stdin() -> None:
    import resource

    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    request = msgspec.json.decode(sys.stdin.buffer.read())
    try:
        messages, template = [request["messages"]], request["template"]
        [text], _ = render_jinja_template(messages, chat_template=template, **request["options"])
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        sys.exit(f"{type(error).__name__}: {error}"[:_SHOWN])
    sys.stdout.buffer.write(msgspec.json.encode(text[: _MAX_CHARACTERS + 1]))


if __name__ == "__main__":
    _render_from_stdin()
