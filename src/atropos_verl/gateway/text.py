"""Text ⇄ tokens for the gateway: prompts, completions, and completions that are still being written."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from atropos_verl.gateway.chat import ChatTurn
from atropos_verl.gateway.fields import ApiError, Fields, Sampling
from atropos_verl.gateway.templates import ChatTemplate
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import FinishReason, GenerationRequest

logger = logging.getLogger(__name__)

_MAX_PROMPTS = 1024
_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 64
"""A UTF-8 character has at most 4 bytes: a longer undecodable run is not an unfinished character, it is noise."""


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

    def prompts(
        self, fields: Fields, name: str, *, texts: bool = True, ids: bool = True
    ) -> tuple[list[tuple[int, ...]], bool]:
        """Token ids of every prompt under ``name``: texts, token ids or both; and whether a list of them was sent."""
        value, special = fields.raw(name), fields.get("add_special_tokens", True)
        if value is None or value == []:
            raise fields.error(name, "expected one prompt or a non-empty list of prompts")
        listed = isinstance(value, list) and type(value[0]) is not int
        if listed and len(value) > _MAX_PROMPTS:
            raise fields.error(name, f"{len(value)} prompts; send {_MAX_PROMPTS} at most in one request")
        found = []
        for index, item in enumerate(value if listed else [value]):
            if fields.abandoned.is_set():
                raise ApiError(499, "the client left")
            if not ids and not isinstance(item, str):
                raise fields.error(name, f"item {index} must be a string")
            is_text = texts and isinstance(item, str)
            tokens = self.encode(item, add_special_tokens=special) if is_text else fields.check_token_ids(name, item)
            found.append(tokens)
        return found, listed

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

        Without the stop token, without special tokens (unless asked for), cut before the stop string.
        """
        asked, stopped = sampling.template, finish_reason == "stop"
        ended = self.has_end(token_ids, finish_reason, asked)
        visible = token_ids[:-1] if ended and not sampling.include_stop else token_ids
        text = self.decode(visible, skip_special_tokens=sampling.skip_special_tokens)
        text, matched = cut_at_stop(text, asked.stop if stopped else (), include_stop=sampling.include_stop)
        return text, token_ids[-1] if ended else matched


class StreamText:
    """Text of one completion, handed out as its tokens arrive.

    The pieces joined are exactly ``completion_text`` of all tokens. Held back until more is known: an unfinished
    character, and a tail that may turn out to be the beginning of a stop string.
    """

    def __init__(self, codec: TextCodec, sampling: Sampling) -> None:
        self._codec, self._sampling = codec, sampling
        self._ids: list[int] = []
        self._window = 0  # index of the first token whose text may still be decoded anew
        self._context = 0  # tokens before the window that are decoded with it, since some tokenizers look back
        self._stable = ""  # text that later tokens cannot change
        self._sent = 0  # characters handed out

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        """New text after ``token_ids``; with a finish reason, all that was held back too."""
        self._ids.extend(token_ids)
        if finish_reason is not None:
            text, _ = self._codec.completion_text(self._ids, finish_reason, self._sampling)
            piece = text[self._sent :]
            self._sent = max(self._sent, len(text))
            return piece
        self._advance()
        limit = self._limit()
        piece = self._stable[self._sent : limit]
        self._sent = max(self._sent, limit)
        return piece

    def _advance(self) -> None:
        skip = self._sampling.skip_special_tokens
        before = self._codec.decode(self._ids[self._context : self._window], skip_special_tokens=skip)
        text = self._codec.decode(self._ids[self._context :], skip_special_tokens=skip)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._window < _MAX_PENDING_TOKENS:
            return
        self._stable += text[len(before) :]
        self._context, self._window = self._window, len(self._ids)

    def _limit(self) -> int:
        """The number of characters of the stable text that may be shown."""
        tail = self._stable[self._sent :]  # no stop string begins in what was shown: it would have been held back
        shown, matched = cut_at_stop(tail, self._sampling.template.stop, include_stop=False)
        end = len(shown)
        if matched is None:
            for stop in self._sampling.template.stop:
                lengths = range(min(len(stop) - 1, len(tail)), 0, -1)
                end = min(end, next((len(tail) - k for k in lengths if tail.endswith(stop[:k])), end))
        return self._sent + end
