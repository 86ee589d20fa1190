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
_SPACES = [character.encode() for character in map(chr, range(0x3001)) if character.isspace()]


class TokenTexts(dict[int, tuple[str, bytes]]):
    """Token id → its text alone, special tokens shown (a part of a character is U+FFFD), and its bytes."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._byte_of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
        """Of the letters by which byte-level vocabularies (GPT-2's and its heirs) name bytes."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {id_: token.content for id_, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self._is_special = np.zeros(max(special, default=0) + 2, dtype=np.bool_)
        self._is_special[list(special)] = True
        edges = sorted({*_SPACES, *(text.encode() for text in special.values() if text)}, key=len, reverse=True)
        self._heads, self._tails = (
            {edge[at]: [one for one in edges if one[at] == edge[at]] for edge in edges} for at in (0, -1)
        )
        """White space and special tokens by their first and by their last byte, the longest first."""
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

    @cached_property
    def _table(self) -> tuple[NDArray[np.uint8], IntArray, IntArray]:
        """The bytes of all tokens, where those of each begin, and how many it has. The last one, for ids outside, has
        none."""
        pieces = [*(self[token_id][1] for token_id in range(len(self._tokenizer))), b""]
        lengths = np.array([len(piece) for piece in pieces])
        return np.frombuffer(b"".join(pieces), np.uint8), lengths.cumsum() - lengths, lengths

    def read(self, token_ids: NDArray[np.int32]) -> tuple[bytes | None, IntArray]:
        """The text in UTF-8, special tokens shown, and the byte at which each token begins, ``[T + 1]``. None: it holds
        a part of a character, so that these tokens are not those of a text."""
        everything, begins, lengths = self._table
        ids, starts = token_ids.astype(np.intp), np.zeros(len(token_ids) + 1, dtype=np.int64)
        counts = lengths.take(ids, mode="clip")
        np.add.accumulate(counts, out=starts[1:])
        places = (begins.take(ids, mode="clip") - starts[:-1]).repeat(counts)
        places += np.arange(len(places))
        found = everything.take(places).tobytes()
        try:
            found.decode()
        except UnicodeDecodeError:
            return None, starts
        return found, starts

    def text(self, token_ids: NDArray[np.int32]) -> bytes:
        """The same; parts of characters become U+FFFD as this tokenizer's decoder does it."""
        found = self.read(token_ids)[0]
        return self.decode(token_ids.tolist()).encode() if found is None else found

    def core(self, text: bytes, start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """``[start, stop)`` of a text without the white space and the special tokens at both ends."""
        stop = len(text) if stop is None else stop
        while start < stop and (edges := self._heads.get(text[start])):
            if not (length := next((len(edge) for edge in edges if text.startswith(edge, start, stop)), 0)):
                break
            start += length
        while start < stop and (edges := self._tails.get(text[stop - 1])):
            if not (length := next((len(edge) for edge in edges if text.endswith(edge, start, stop)), 0)):
                break
            stop -= length
        return start, stop

    def cores(self, token_ids: NDArray[np.int32], text: bytes) -> list[bytes]:
        """The texts of a completion, whose whole one is ``text``, that an environment may post: without the white space
        and the special tokens at both ends, and those between shown or left out."""
        is_special = self._is_special.take(token_ids, mode="clip")
        is_mixed = b"\1" in is_special.tobytes().strip(b"\1")
        texts = [*([self.text(token_ids[~is_special])] if is_mixed else []), text]
        forms = [form if form.isascii() else self._normalize(form.decode()).encode() for form in texts]
        return list(dict.fromkeys(form[slice(*self.core(form))] for form in forms))
