"""Chat templates: messages as templates expect them, and rendering that is bounded in time, memory and output.

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

from atropos_verl.gateway.fields import ApiError, Fields

_SECONDS = 10.0
"""Time that one prompt may take to render, the start of a client template's process included."""
_MAX_CHARACTERS = 16 << 20
_MEMORY_BYTES = 1 << 30
"""Address space of the process of a client's template."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part → its field that holds the text."""
_SHOWN = 300
_NEEDED = re.compile(r"PATH|HOME|HF_HOME|LANG|LC_\w+|LD_LIBRARY_PATH|PYTHON\w*|TMPDIR|VIRTUAL_ENV|OMP_NUM_THREADS")
"""Environment variables of the process of a client's template: of all others none is known to hold no secret."""


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, and those of clients where they are allowed."""

    def __init__(self, tokenizer: Any, *, allows_clients: bool) -> None:
        self._tokenizer = tokenizer
        self._allows_clients = allows_clients

    def prompt(self, fields: Fields) -> str:
        """The prompt text of a chat request. Raises ``ApiError`` 400 naming the field."""
        options = self._options(fields)
        template = self._client_template(fields)
        try:
            if template is None:
                with _stopped_after(_SECONDS):
                    text = self._render(self._messages(fields, takes_parts=self._takes_parts), **options)
            else:
                special = getattr(self._tokenizer, "special_tokens_map", {})
                text = _render_apart(template, self._messages(fields), {**special, **options})
        except ApiError:
            raise
        except (Exception, _TooSlow) as error:  # whatever a template, a program, raises
            is_named = template is None and not isinstance(error, _TooSlow)
            reason = (f"{type(error).__name__}: {error}" if is_named else str(error))[:_SHOWN]
            name = "messages" if template is None else "chat_template"
            raise ApiError(400, f"{name}: the chat template failed: {reason}", param=name) from error
        if len(text) > _MAX_CHARACTERS:
            raise fields.error("messages", f"the prompt has more than {_MAX_CHARACTERS} characters; send less")
        return text

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _options(self, fields: Fields) -> dict[str, Any]:
        """Variables of the template beside the messages."""
        variables = fields.get("chat_template_kwargs", dict[str, Any]())
        for name in variables:
            if name == "add_generation_prompt" or name == "tools":
                raise fields.error("chat_template_kwargs", f"send {name} as a field of the request, not in here")
            if name in _reserved_names() or not name:
                raise fields.error("chat_template_kwargs", f"{name} cannot be set by a client")
        tools = fields.raw("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise fields.error("tools", "expected a list of objects")
        options = {**variables, "add_generation_prompt": fields.get("add_generation_prompt", True)}
        return {**options, "tools": tools} if tools else options

    def _client_template(self, fields: Fields) -> str | None:
        """The template in the request; None: the model's own."""
        if "chat_template" not in fields or fields.raw("chat_template") == self._tokenizer.chat_template:
            return None
        if not self._allows_clients:
            message = "templates are programs, and this server runs the model's own only; leave it out (or set"
            raise fields.error("chat_template", f"{message} gateway.allow_client_templates)", "unsupported_field")
        return fields.get("chat_template", "")

    @cached_property
    def _takes_parts(self) -> bool:
        """The model's template knows contents that are lists of parts."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            text = self._render(probe)
        except Exception:  # noqa: BLE001 - a template is a program; this one knows texts only
            return False
        return "probe" in text and not any(shown in text for shown in ("'probe'", '"probe"'))

    @cached_property
    def _knows_developer(self) -> bool:
        return "developer" in str(self._tokenizer.chat_template)

    def _messages(self, fields: Fields, *, takes_parts: bool = False) -> list[dict[str, Any]]:
        """The messages as templates expect them, which is not quite what they are on the wire.

        As vLLM does: arguments of calls, JSON text on the wire, are objects; text parts are lines of one text where the
        template knows no parts; what is null is absent; the content is not. Further, a ``developer`` is the ``system``
        of templates that do not know the newer name, and a tool's answer has the name of the call it answers.
        """
        messages = fields.raw("messages")
        if not isinstance(messages, list) or not messages:
            raise fields.error("messages", "expected a non-empty list of messages")
        result, names = [], dict[Any, Any]()
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise fields.error("messages", f"item {index} must be an object with a string 'role'")
            known = {name: value for name, value in message.items() if value is not None}
            calls = known.get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise fields.error("messages", f"item {index}: 'tool_calls' must be a list of objects")
            known.pop("tool_calls", None)
            if calls:
                known["tool_calls"] = calls = [_with_arguments(call, "function") for call in calls]
            known = _with_arguments(known, "function_call")
            names |= {str(c.get("id")): c["function"].get("name") for c in calls if isinstance(c.get("function"), dict)}
            if known["role"] == "tool" and (name := names.get(str(known.get("tool_call_id")))):
                known.setdefault("name", name)
            if known["role"] == "developer" and not self._knows_developer:
                known["role"] = "system"
            content = known.get("content", "")
            if isinstance(content, list):
                texts = list(_texts(fields, index, content))
                content = [{"type": "text", "text": text} for text in texts] if takes_parts else "\n".join(texts)
            elif not isinstance(content, str):
                raise fields.error("messages", f"item {index}: 'content' must be a string or a list of text parts")
            result.append({**known, "content": content})
        return result


def _with_arguments(holder: Any, name: str) -> Any:
    """``holder`` whose function ``name`` has its arguments as an object, where they are one as JSON text."""
    function = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(function, dict):
        return holder
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            parsed = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):  # what a policy wrote need not be JSON
            parsed = None
        arguments = parsed if isinstance(parsed, dict | list) else arguments
    return {**holder, name: {**function, "arguments": arguments}}


def _texts(fields: Fields, index: int, parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            message = f"item {index}: only parts of type 'text' are supported"
            raise fields.error("messages", message, "unsupported_field")
        yield text


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
