"""Constrained decoding: which tokens a grammar allows next, by the library llguidance, and the bytes of tokens.

Shapes: ``B`` rows, ``V`` vocabulary.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch

from atropos_verl.errors import GenerationRequestError
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import GenerationRequest


class Grammars:
    """Makes matchers for the grammars of requests. Safe to call from several threads; the first call takes seconds."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def matcher(self, request: GenerationRequest) -> Any:
        """An ``LLMatcher`` at the beginning of ``request.constraint``. Raises ``GenerationRequestError`` naming the
        client's field for a grammar that cannot be enforced."""
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        constraint = request.constraint
        assert constraint is not None
        if not self._eos_ids:
            raise GenerationRequestError("the model names no end-of-sequence token, which a constraint needs to end")
        with self._lock:
            if self._vocabulary is None:
                vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
                self._vocabulary = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=sorted(self._eos_ids))
        matcher = LLMatcher(self._vocabulary, constraint.grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0][:300]
            raise GenerationRequestError(f"{constraint.param}: it cannot be enforced: {reason}", constraint.param)
        return matcher


class _Vocabulary:
    """A tokenizer as llguidance takes it, by the bytes of its tokens: of some decoders it would guess them wrong."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        texts = TokenTexts(tokenizer)
        tokens = [texts[token_id][1] for token_id in range(min(len(tokenizer), vocab_size))]
        self.tokens = [*tokens, *[b""] * (vocab_size - len(tokens))]
        self.eos_token_id = min(eos_token_ids)
        special = {*eos_token_ids, *tokenizer.get_added_vocab().values()}
        self.special_token_ids = sorted(special & set(range(vocab_size)))

    def __call__(self, text: bytes) -> list[int]:
        return list(self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False))


def masked(logits: torch.Tensor, matchers: Sequence[Any]) -> torch.Tensor:
    """``logits`` [B, V] with minus infinity where the row's matcher does not allow the token; None allows all."""
    if all(matcher is None for matcher in matchers):
        return logits
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            allowed[row] = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) != 0
    return logits.masked_fill(~allowed.to(logits.device), float("-inf"))
