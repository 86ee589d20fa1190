"""Text ⇄ tokens: prompts, completions that are still being written, what the policy wrote → content, reasoning and tool
calls, and the grammar of a completion that must be a call.

Formats: tags (``<think>…</think>``, ``<tool_call>{"name", "arguments"}</tool_call>``: Hermes, Qwen and most of their
heirs, and every model whose template knows no tools), read as they are written; and those that the library
``renderers`` knows (GLM, Kimi, gpt-oss, …), read when the completion has ended."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec

from atropos_verl.gateway.chat import ChatTemplate, ChatTurn, Message, ToolCall
from atropos_verl.gateway.fields import ApiError, Fields, Sampling, TokenIds
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import Constraint, FinishReason, GenerationRequest

logger = logging.getLogger(__name__)

_Prompts = msgspec.Meta(min_length=1, max_length=1024)
_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 64
"""A UTF-8 character has at most 4 bytes: a longer undecodable run is not an unfinished character, it is noise."""
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


def cut_at_stop(text: str, stop: Sequence[str], *, include_stop: bool) -> tuple[str, str | None]:
    """Cut ``text`` at the earliest stop string; returns the text and the stop string found (None: none)."""
    found = [(position, s) for s in stop if (position := text.find(s)) >= 0]
    if not found:
        return text, None
    position, matched = min(found, key=lambda item: item[0])
    return text[: position + len(matched) if include_stop else position], matched


class TextCodec:
    """A Hugging Face tokenizer as the gateway uses it. ``eos_token_ids``: at these the engine ends a completion."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self._eos_ids = eos_token_ids
        self.tokens = TokenTexts(tokenizer)
        self.template = ChatTemplate(tokenizer)

    @cached_property
    def renderer(self) -> Any:
        """The library's renderer of the model; None: it does not know it, or its calls are JSON in ``<tool_call>``."""
        if self.template.writes_calls_in_tags:
            return None
        from renderers.base import MODEL_RENDERER_MAP, create_renderer
        from renderers.configs import config_from_name

        parts = str(getattr(self.tokenizer, "name_or_path", "")).rstrip("/").split("/")
        # A path names the model as well: .../Qwen3.5-4B, and the cache's .../models--Qwen--Qwen3.5-4B/snapshots/0a1b2c.
        names = {parts[-1], *(part.split("--")[-1] for part in parts if part.startswith("models--"))}
        kinds = {kind for known, kind in MODEL_RENDERER_MAP.items() if known.split("/")[-1] in names}
        if len(kinds) == 1:
            return create_renderer(self.tokenizer, config_from_name(kinds.pop()))
        text = "the format of this model's tool calls is not known (%s); <tool_call>{JSON}</tool_call> is looked for"
        logger.warning(text, "/".join(parts))
        return None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def render(self, turn: ChatTurn) -> tuple[int, ...]:
        """The prompt of a turn, by the chat template. Raises ``ApiError`` 400 naming the field."""
        return self.encode(self.template.prompt(turn), add_special_tokens=turn.add_special_tokens)

    def prompts(self, fields: Fields, name: str, kind: Any = str | TokenIds) -> tuple[list[tuple[int, ...]], bool]:
        """Token ids of every prompt under ``name``: texts, token ids or both; and whether a list of them was sent."""
        value, special = fields.raw(name), fields.read("add_special_tokens", True)
        listed = isinstance(value, list) and (not value or type(value[0]) is not int)
        prompts = fields.convert(name, value if listed else [value], Annotated[list[kind], _Prompts])
        texts = (one if isinstance(one, tuple) else self.encode(one, add_special_tokens=special) for one in prompts)
        return list(texts), listed

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def has_end(self, token_ids: Sequence[int], finish_reason: FinishReason | None, asked: GenerationRequest) -> bool:
        """The last token ended the completion, and is no part of its text."""
        ends = {*asked.stop_token_ids, *(() if asked.ignore_eos else self._eos_ids)}
        return finish_reason == "stop" and bool(token_ids) and token_ids[-1] in ends

    def completion_text(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None, sampling: Sampling
    ) -> tuple[str, str | int | None]:
        """Text of a finished completion as vLLM shows it, and the stop string or token id that ended it.

        Without the stop token, without special tokens (unless asked for), cut before the stop string."""
        asked, stopped = sampling.template, finish_reason == "stop"
        ended = self.has_end(token_ids, finish_reason, asked)
        visible = token_ids[:-1] if ended and not sampling.include_stop else token_ids
        text = self.decode(visible, skip_special_tokens=sampling.skip_special_tokens)
        text, matched = cut_at_stop(text, asked.stop if stopped else (), include_stop=sampling.include_stop)
        return text, token_ids[-1] if ended else matched


class StreamText:
    """Text of one completion, handed out as its tokens arrive.

    The pieces joined are exactly ``completion_text`` of all tokens. Held back until more is known: an unfinished
    character, and a tail that may turn out to be the beginning of a stop string."""

    def __init__(self, codec: TextCodec, sampling: Sampling) -> None:
        self._codec, self._sampling = codec, sampling
        self.ids: list[int] = []
        self.matched: str | int | None = None
        """What ended it, as ``completion_text`` says."""
        self._window = 0  # index of the first token whose text may still be decoded anew
        self._context = 0  # tokens before the window that are decoded with it, since some tokenizers look back
        self._stable = ""  # text that later tokens cannot change
        self._sent = 0  # characters handed out

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        """New text after ``token_ids``; with a finish reason, all that was held back too."""
        self.ids.extend(token_ids)
        if finish_reason is not None:
            text, self.matched = self._codec.completion_text(self.ids, finish_reason, self._sampling)
            limit = len(text)
        else:
            self._advance()
            text, limit = self._stable, self._limit()
        piece, self._sent = text[self._sent : limit], max(self._sent, limit)
        return piece

    def _advance(self) -> None:
        skip = self._sampling.skip_special_tokens
        before = self._codec.decode(self.ids[self._context : self._window], skip_special_tokens=skip)
        text = self._codec.decode(self.ids[self._context :], skip_special_tokens=skip)
        if text.endswith(_REPLACEMENT) and len(self.ids) - self._window < _MAX_PENDING_TOKENS:
            return
        self._stable += text[len(before) :]
        self._context, self._window = self._window, len(self.ids)

    def _limit(self) -> int:
        """The number of characters of the stable text that may be shown."""
        tail = self._stable[self._sent :]  # no stop string begins in what was shown: it would have been held back
        shown, matched = cut_at_stop(tail, self._sampling.template.stop, include_stop=False)
        end = len(shown)
        if matched is None:
            end = min((end - _begun(tail, stop) for stop in self._sampling.template.stop), default=end)
        return self._sent + end


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)


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
        self.text = StreamText(codec, sampling)
        self._turn, self._request = turn, request
        # Of the answer's id and the place in it: an answer that is sent again has the same ids.
        self._call_id = f"call_{re.split('[-_]', request.request_id, maxsplit=1)[-1]}-{index}"
        self._renderer = codec.renderer if reads else None
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
        text = self.text.push(token_ids, finish_reason)
        pieces: Iterable[Piece] = [Piece("content", text)]
        if self._renderer is not None:
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
        prompt_ids, tools = list(self._request.prompt_token_ids), list(self._turn.tools) or None
        parsed = self._renderer.parse_response(self.text.ids, tools=tools, prompt_ids=prompt_ids)
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
        self._call_tag = _CALL if calls else ""
        self._held, self._ended, self._pieces = "", False, list[Piece]()
        self._reading = self._read(opened=opened)
        """Each step waits for more text."""

    def push(self, text: str, *, ended: bool) -> list[Piece]:
        for start in range(0, len(text) or 1, _PIECE):  # what is held is copied at each step
            self._held += text[start : start + _PIECE]
            self._ended = ended and start + _PIECE >= len(text)
            next(self._reading, None)
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self, *, opened: bool) -> Iterator[None]:
        if not opened:
            while not self._ended and len(text := self._held.lstrip()) < len(_THINK) and _THINK.startswith(text):
                yield
        if opened or self._held.lstrip().startswith(_THINK):
            self._held = self._held if opened else self._held.lstrip().removeprefix(_THINK)
            yield from self._strip()
            yield from self._text("reasoning", _END_THINK)
            self._held = self._held.removeprefix(_END_THINK)
            yield from self._strip()
        while self._held or not self._ended:
            yield from self._text("content", self._call_tag)
            if self._held:
                yield from self._call()

    def _strip(self) -> Iterator[None]:
        while not (text := self._held.lstrip()) and not self._ended:
            yield
        self._held = text

    def _text(self, kind: Literal["content", "reasoning"], tag: str) -> Iterator[None]:
        """Up to ``tag``; until it comes, all but what may be its beginning, and whitespace in front of it."""
        while (end := self._held.find(tag) if tag else -1) < 0 and not self._ended:
            end = len(self._held)
            if tag:
                end = len(self._held[: end - _begun(self._held, tag)].rstrip())
            self._pieces.append(Piece(kind, self._held[:end]))
            self._held = self._held[end:]
            yield
        text = self._held if end < 0 else self._held[:end]
        self._pieces.append(Piece(kind, text.rstrip() if end >= 0 or kind == "reasoning" else text))
        self._held = self._held[len(text) :]

    def _call(self) -> Iterator[None]:
        """A closing tag may stand in a string of the arguments: the call ends where its JSON ends."""
        at, depth, in_string, end = len(_CALL), 0, False, None
        while not (text := self._held[at:].lstrip()) and not self._ended:
            yield
        at = len(self._held) - len(text)
        if not text.startswith("{"):
            end = at
        while end is None:
            for mark in _JSON_MARK.finditer(self._held, at):
                at = mark.end()
                if mark[0] == '"':
                    in_string = not in_string
                elif not in_string and mark[0] in "{[}]":
                    depth += 1 if mark[0] in "{[" else -1
                    if depth == 0:
                        end = at
                        break
            else:
                if self._ended:
                    end = len(self._held)
                else:  # what a backslash at the end escapes is still to come
                    at = max(at, len(self._held) - self._held.endswith("\\"))
                    yield
        while len(rest := self._held[end:].lstrip()) < len(_END_CALL) and _END_CALL.startswith(rest):
            if self._ended:
                break
            yield
        call = None
        if rest.startswith(_END_CALL) or (self._ended and not rest):  # at the end: that was the stop string
            call = _written_call(self._held[len(_CALL) : end])
        if call is None:  # what cannot be read is what the policy said
            self._pieces.append(Piece("content", _CALL))
            self._held = self._held[len(_CALL) :]
        else:
            self._pieces.append(Piece("call", call=call))
            self._held = rest.removeprefix(_END_CALL)
            yield from self._strip()


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
