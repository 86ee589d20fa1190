"""What the policy wrote → content, reasoning and tool calls; and the grammar of a completion that must be a call.

Formats: tags (``<think>…</think>``, ``<tool_call>{"name", "arguments"}</tool_call>``: Hermes, Qwen and most of their
heirs, and every model whose template knows no tools), read as they are written; and those that the library
``renderers`` knows (GLM, Kimi, gpt-oss, …), read when the completion has ended.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from atropos_verl.gateway.chat import ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError
from atropos_verl.gateway.text import StreamText, TextCodec, cut_at_stop
from atropos_verl.types import Constraint, FinishReason, GenerationRequest

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_MARKS = {_THINK, _END_THINK, _CALL, _END_CALL}
_PROMPT_TAIL = 16
"""Tokens at the end of a prompt in which it may open the reasoning."""
_PIECE = 4096
"""Characters of an answer that are read at a time."""
_JSON_MARK = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of constrained JSON: as Python writes it. With free whitespace a weak policy writes whitespace for ever."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: some text of its content or reasoning, or a whole call."""

    kind: Literal["content", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class ReplyReader:
    """The message that one completion holds, piece by piece as its tokens arrive."""

    def __init__(self, codec: TextCodec, turn: ChatTurn, request: GenerationRequest, index: int = 0) -> None:
        sampling, reads = turn.sampling, turn.parses_calls or turn.separates_reasoning
        if reads and not _MARKS.isdisjoint(getattr(codec.tokenizer, "all_special_tokens", ())):
            sampling = replace(sampling, skip_special_tokens=False)  # the text would lack the tags
        self._text = StreamText(codec, sampling)
        self._turn = turn
        self._ids: list[int] = []
        # Of the answer's id and the place in it: an answer that is sent again has the same ids.
        self._call_id = f"call_{re.split('[-_]', request.request_id, maxsplit=1)[-1]}-{index}"
        self._renderer = codec.renderer if reads else None
        self._prompt_ids = request.prompt_token_ids
        self._tags: _Tags | None = None
        if self._renderer is None and reads:
            self._tags = _Tags(calls=turn.parses_calls, opened=opens_reasoning(codec, request.prompt_token_ids))
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self.calls: list[ToolCall] = []
        """Those that were read so far."""

    @property
    def message(self) -> Message:
        """What was read so far."""
        content, thought = ("".join(texts) for texts in self._texts.values())
        return Message("assistant", content, tuple(self.calls), reasoning_content=thought or None)

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> list[Piece]:
        """The pieces that ``token_ids`` complete; with a finish reason, all that was held back too."""
        text = self._text.push(token_ids, finish_reason)
        pieces: Iterable[Piece] = [Piece("content", text)]
        if self._renderer is not None:
            self._ids += token_ids
            pieces = self._read_by_renderer() if finish_reason is not None else []
        elif self._tags is not None:
            pieces = self._tags.push(text, ended=finish_reason is not None)
        return [piece for piece in map(self._keep, pieces) if piece.text or piece.call is not None]

    def _keep(self, piece: Piece) -> Piece:
        """What is handed out of it."""
        if piece.call is None:
            self._texts[piece.kind].append(piece.text)
            return piece
        if self.calls and not self._turn.parallel_tool_calls:
            return Piece("content")
        self.calls.append(msgspec.structs.replace(piece.call, id=f"{self._call_id}-{len(self.calls)}"))
        return Piece("call", call=self.calls[-1])

    def _read_by_renderer(self) -> Iterator[Piece]:
        assert self._renderer is not None
        tools = list(self._turn.tools) or None
        parsed = self._renderer.parse_response(self._ids, tools=tools, prompt_ids=list(self._prompt_ids))
        content, _ = cut_at_stop(parsed.content, self._turn.sampling.template.stop, include_stop=False)
        yield Piece("reasoning", parsed.reasoning_content or "")
        calls: list[Piece] = []
        for call in parsed.tool_calls:
            if self._turn.parses_calls and call.status == "ok" and call.name:
                arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments or {})
                calls.append(Piece("call", call=ToolCall(id="", name=call.name, arguments=arguments)))
            else:  # what cannot be read is what the policy said
                content += call.raw
        yield from (Piece("content", content), *calls)


class _Tags:
    """Splits text at the tags, in time linear in its length. Whitespace between its parts belongs to none of them."""

    def __init__(self, *, calls: bool, opened: bool) -> None:
        self._calls = calls
        self._held = ""
        self._state: Literal["begin", "reasoning", "content", "call"] = "reasoning" if opened else "begin"
        self._strips = opened
        """Whitespace comes next that belongs to nothing."""
        self._depth = self._read = 0
        """Open braces and brackets of the call that is being written, and where in it reading goes on."""
        self._in_string = False
        self._end: int | None = None
        """Of its JSON."""

    def push(self, text: str, *, ended: bool) -> Iterator[Piece]:
        for start in range(0, len(text) or 1, _PIECE):  # what is held is copied at each step
            yield from self._push(text[start : start + _PIECE], ended=ended and start + _PIECE >= len(text))

    def _push(self, text: str, *, ended: bool) -> Iterator[Piece]:
        self._held += text
        while self._held:
            if self._strips:
                self._held = self._held.lstrip()
                self._strips = not self._held
            before = self._held, self._state
            step = {"begin": self._in_begin, "call": self._in_call}.get(self._state, self._in_text)
            yield from step(ended)
            if (self._held, self._state) == before:
                return

    def _in_begin(self, ended: bool) -> Iterator[Piece]:
        text = self._held.lstrip()
        if text.startswith(_THINK):
            self._held, self._state, self._strips = text.removeprefix(_THINK), "reasoning", True
        elif ended or not _THINK.startswith(text):
            self._state = "content"
        yield from ()

    def _in_text(self, ended: bool) -> Iterator[Piece]:
        """Up to its end tag; without one, all but what may be the tag's beginning, and whitespace in front of it."""
        text, thinks = self._held, self._state == "reasoning"
        tag = _END_THINK if thinks else _CALL if self._calls else ""
        end = text.find(tag) if tag else -1
        if ends := end >= 0:
            self._held, self._state, self._strips = text[end:].removeprefix(_END_THINK), "content", True
            if not thinks:
                self._state, self._strips = "call", False
                self._depth, self._read, self._in_string, self._end = 0, len(_CALL), False, None
        else:
            end = len(text)
            if tag and not ended:
                part = next((k for k in range(min(len(tag) - 1, end), 0, -1) if text.endswith(tag[:k])), 0)
                end = len(text[: end - part].rstrip())
            self._held = text[end:]
        yield Piece("reasoning" if thinks else "content", text[:end].rstrip() if ends or thinks else text[:end])

    def _in_call(self, ended: bool) -> Iterator[Piece]:
        # A closing tag may stand in a string of the arguments: the call ends where its JSON ends.
        self._find_json_end()
        end = len(self._held) if ended and self._end is None else self._end
        if end is None:
            return
        rest = self._held[end:].lstrip()
        if not ended and len(rest) < len(_END_CALL) and _END_CALL.startswith(rest):
            return
        call = None
        if rest.startswith(_END_CALL) or (ended and not rest):  # at the end: that was the stop string
            call = _written_call(self._held[len(_CALL) : end])
        if call is not None:
            yield Piece("call", call=call)
            self._held, self._state, self._strips = rest.removeprefix(_END_CALL), "content", True
        else:  # what cannot be read is what the policy said
            yield Piece("content", _CALL)
            self._held, self._state = self._held[len(_CALL) :], "content"

    def _find_json_end(self) -> None:
        """``_end``, also where it is clear that there is no JSON object."""
        if self._end is None and self._depth == 0:
            begin = len(self._held) - len(self._held[self._read :].lstrip())
            self._read = begin
            if self._held[begin : begin + 1] not in ("", "{"):
                self._end = begin
        while self._end is None and (mark := _JSON_MARK.search(self._held, self._read)) is not None:
            self._read = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and mark[0] in "{[}]":
                self._depth += 1 if mark[0] in "{[" else -1
                self._end = self._read if self._depth == 0 else None
        if self._depth:  # what a backslash at the end escapes is still to come
            self._read = max(self._read, len(self._held) - self._held.endswith("\\"))


def _written_call(text: str) -> ToolCall | None:
    """The call that is written in ``text``, its arguments letter by letter; None: it is none."""
    try:
        written = msgspec.json.decode(text, type=_Written)
        arguments = bytes(written.arguments).decode()
        if arguments.startswith('"'):
            arguments = msgspec.json.decode(arguments, type=str)
    except (ValueError, RecursionError):
        return None
    return ToolCall(id="", name=written.name, arguments=arguments) if written.name else None


# -- grammars --------------------------------------------------------------------------------------------------------


def opens_reasoning(codec: TextCodec, prompt_ids: Sequence[int]) -> bool:
    """The prompt ends inside of the policy's reasoning."""
    tail = codec.decode(prompt_ids[-_PROMPT_TAIL:], skip_special_tokens=False)
    return tail.rstrip().endswith(_THINK)


def constraint_of(codec: TextCodec, turn: ChatTurn, prompt_ids: Sequence[int]) -> Constraint | None:
    """The grammar that ``turn`` asks for. Raises ``ApiError`` 400 where the model's format of calls has none."""
    calls_only = turn.tool_choice not in ("auto", "none")
    if turn.response_schema is None and not calls_only:
        return None
    bodies, rules, param = [], list[str](), "response_format"
    if turn.response_schema is not None and not calls_only:
        bodies.append("value")
        rules.append(f"value: %json {_json(turn.response_schema)}")
    if turn.parses_calls:
        if codec.renderer is not None:
            text = "calls in the format of this model cannot be enforced; leave it out, or send 'auto'"
            raise ApiError(400, f"tool_choice: {text}", param="tool_choice", code="unsupported_field")
        param = "tools" if calls_only else param
        bodies.append('call ("\\n" call)*' if turn.parallel_tool_calls else "call")
        rules += _call_rules(codec, turn)
    schema = turn.response_schema if bodies == ["value"] else None
    start = " | ".join(bodies)
    thought, rule = "thought", r"thought[lazy]: /(?s:.*)<\/think>/"
    if _tag(codec, _END_THINK) == _END_THINK:
        thought, rule = f"thought {_END_THINK}", "thought: /(?s:.*)/"
    if opens_reasoning(codec, prompt_ids):
        start, schema = f"{thought} /\\s*/ ({start})", None
    elif _THINK in codec.template.source:
        start, schema = f"({_tag(codec, _THINK)} {thought} /\\s*/)? ({start})", None
    if start.count("thought"):
        rules.append(rule)
    grammar = "\n".join([f"start: {start}", *rules])
    return Constraint(grammar=grammar, json_schema=None if schema is None else json.dumps(schema), param=param)


def _call_rules(codec: TextCodec, turn: ChatTurn) -> Iterator[str]:
    functions = [tool["function"] for tool in turn.tools]
    chosen = turn.tool_choice.removeprefix("function ")
    if chosen != turn.tool_choice:
        functions = [function for function in functions if function["name"] == chosen]
    names = [f"call_{number}" for number in range(len(functions))]
    yield f'call: {_tag(codec, _CALL)} "\\n" ({" | ".join(names)}) "\\n" {_tag(codec, _END_CALL)}'
    for rule, function in zip(names, functions, strict=True):
        head = json.dumps(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
        yield f'{rule}: {head} arguments_{rule} "}}"'
        yield f"arguments_{rule}: %json {_json(function.get('parameters') or {'type': 'object'})}"


def _json(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON_STYLE})


def _tag(codec: TextCodec, tag: str) -> str:
    """``tag`` in a grammar: a token of its own where the vocabulary has one."""
    return tag if tag in codec.tokenizer.get_added_vocab() else json.dumps(tag)
