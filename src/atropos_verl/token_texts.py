"""``TokenTexts``: the bytes and texts of a tokenizer's tokens, as they stand in a text."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_verl.types import IntArray

_REPLACEMENT = "\ufffd"
_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's name of a token of one byte
_PLAIN, _COMPOSED = "a B\n c", "e\u0301\ufb01\u3000"
"""A normaliser that changes the first does more than to bring characters into one form; most that do that change the
second."""


class TokenTexts(dict[int, tuple[str, bytes]]):
    """Token id → its text alone, special tokens shown (a part of a character is U+FFFD), and its bytes."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._byte_of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
        """Of the letters by which byte-level vocabularies (GPT-2's and its heirs) name bytes."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {id_: token.content for id_, token in added.items() if token.special}
        self.special_texts = tuple(special.values())
        self._special = np.zeros(max(special, default=0) + 2, dtype=np.bool_)
        self._special[list(special)] = True
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        normalize = str if normalizer is None else normalizer.normalize_str
        self._normalize = normalize if normalize(_PLAIN) == _PLAIN and normalize(_COMPOSED) != _COMPOSED else str

    def __missing__(self, token_id: int) -> tuple[str, bytes]:
        self[token_id] = found = self._token(token_id)
        return found

    def _token(self, token_id: int) -> tuple[str, bytes]:
        text, name = self.decode([token_id]), self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str):  # a row of the embedding that is no token
            return text, text.encode()
        if name.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" "):
            text = f" {text}"  # which decoders leave out at the start of a text
        if _REPLACEMENT not in text:
            return text, text.encode()
        if byte := _BYTE_NAME.fullmatch(name):
            return text, bytes([int(byte[1], 16)])
        letters = self._byte_of_letter
        return text, bytes(letters[letter] for letter in name) if letters.keys() >= set(name) else text.encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def is_special(self, token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self._special[np.minimum(token_ids, len(self._special) - 1)]
        return found

    @cached_property
    def _table(self) -> tuple[NDArray[np.uint8], IntArray, IntArray, IntArray]:
        """The bytes of all tokens one after the other; where each begins, and how many they are; its characters, -1 for
        one that has parts of some. The last entry, for ids outside, has none."""
        tokens = [*(self[token_id] for token_id in range(len(self._tokenizer))), ("", b"")]
        lengths = np.array([len(piece) for _, piece in tokens])
        characters = np.array([len(text) if text.encode() == piece else -1 for text, piece in tokens])
        flat = np.frombuffer(b"".join(piece for _, piece in tokens), dtype=np.uint8)
        return flat, np.cumsum(lengths) - lengths, lengths, characters

    def _joined(self, token_ids: NDArray[np.int32]) -> tuple[NDArray[np.uint8], IntArray]:
        """The bytes of a text, and where each token of it ends."""
        flat, starts, lengths, _ = self._table
        ids = np.minimum(token_ids, len(lengths) - 1)
        counts = lengths.take(ids)
        ends = counts.cumsum()
        places = np.repeat(starts.take(ids) - ends + counts, counts)
        places += np.arange(len(places))
        return flat.take(places), ends

    def text_if_whole(self, token_ids: NDArray[np.int32]) -> str | None:
        """Special tokens shown; None: it holds a part of a character, so that these tokens are not those of a text."""
        try:
            return self._joined(token_ids)[0].tobytes().decode()
        except UnicodeDecodeError:
            return None

    def text(self, token_ids: NDArray[np.int32]) -> str:
        """The same; parts of characters become U+FFFD as this tokenizer's decoder does it."""
        found = self.text_if_whole(token_ids)
        return self.decode(token_ids.tolist()) if found is None else found

    def starts(self, token_ids: NDArray[np.int32]) -> IntArray:
        """For each token the number of characters that begin before it, ``[T + 1]``: those of token t are
        ``[starts[t], starts[t + 1])``; a character of several tokens counts for the first of them. About that many
        where there are parts of characters."""
        counts = self._table[3][np.minimum(token_ids, len(self._table[3]) - 1)]
        if counts.min(initial=0) < 0:
            found, ends = self._joined(token_ids)
            begun = np.cumsum(np.concatenate([[0], (found & 0xC0) != 0x80]))
            return np.concatenate([[0], begun[ends]])
        return np.concatenate([[0], np.cumsum(counts)])

    def core(self, text: str, start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """``[start, stop)`` of a text without the white space and the special tokens at both ends."""
        stop = len(text) if stop is None else stop
        while start < stop:
            if text[start].isspace():
                start += 1
            elif text.startswith(self.special_texts, start, stop):
                start += max(len(token) for token in self.special_texts if text.startswith(token, start, stop))
            elif text[stop - 1].isspace():
                stop -= 1
            elif text.endswith(self.special_texts, start, stop):
                stop -= max(len(token) for token in self.special_texts if text.endswith(token, start, stop))
            else:
                break
        return start, max(start, stop)

    def cores(self, token_ids: NDArray[np.int32], text: str) -> list[str]:
        """The texts of a completion that an environment may post: without the white space and the special tokens at
        both ends, and those between shown or left out."""
        special = self.is_special(token_ids)
        plain = np.flatnonzero(~special)
        inner = plain.size and special[plain[0] : plain[-1]].any()
        texts = [*([self.text(token_ids[plain])] if inner else []), text]
        texts = [text if text.isascii() else self._normalize(text) for text in texts]
        return list(dict.fromkeys(text[slice(*self.core(text))] for text in texts))
