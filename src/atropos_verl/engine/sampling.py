"""Sampling of one token per row, each row with its own settings, in a handful of tensor operations.

Shapes: ``B`` rows, ``F`` rows with a filter (top-k, top-p, min-p), ``V`` vocabulary.

A token is drawn by inverting the cumulative distribution at one uniform number per row, ``mix(key + (t + 1) * GAMMA)``
with the finaliser and increment of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014): a seeded request draws the same tokens whatever else is running, after an eviction, and in any batch.

Constrained decoding: llguidance says which tokens a grammar allows next; the others are masked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atropos_verl.errors import GenerationRequestError
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import GREEDY_BELOW, GenerationRequest

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_PARTIAL_SORT_WIDTH = 1024  # candidates looked at before a whole vocabulary is sorted; top-p and top-k need few


def _mix(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = keys + (positions + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)))


def stream_key(seed: int, index: int) -> int:
    """64-bit key of the random stream of completion ``index`` of a request with ``seed``."""
    numbers = np.array([[seed % (1 << 64)], [0], [index]], dtype=np.uint64)
    return int(_mix(_mix(numbers[0], numbers[1]), numbers[2])[0])


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """[B] numbers in [0, 1), multiples of 2**-53: number ``positions[b]`` of stream ``keys[b]``."""
    return np.asarray((_mix(keys, positions) >> np.uint64(11)) * 2.0**-53)


def effective_temperature(temperature: float) -> float:
    """The temperature logprobs are of: 1 for a greedy request."""
    return 1.0 if temperature < GREEDY_BELOW else temperature


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Settings of B rows as tensors. Built when rows join or leave, not per token."""

    keys: NDArray[np.uint64]
    """[B] random stream of each row."""
    temperature: torch.Tensor | None
    """[B, 1] float32, greedy rows at 1; None when all are 1."""
    greedy: torch.Tensor | None
    """[B] bool; None when no row is greedy."""
    all_greedy: bool
    filtered: torch.Tensor | None
    """[F] int64, rows with a filter; None when there are none."""
    top_k: torch.Tensor
    """[F, 1] int64, the vocabulary size where off."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    """Both [F, 1] float64."""
    alternatives: int = 0
    """Best tokens that are reported beside the drawn one."""

    @classmethod
    def build(
        cls, requests: Sequence[GenerationRequest], keys: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> SamplingRows:
        """One row per entry of ``requests``; ``keys[b]`` is its random stream."""
        greedy = [r.temperature < GREEDY_BELOW for r in requests]
        temperatures = [effective_temperature(r.temperature) for r in requests]
        filters = [0 < r.top_k < vocab_size or r.top_p < 1.0 or r.min_p > 0.0 for r in requests]
        filtered = [row for row, filters_row in enumerate(filters) if filters_row and not greedy[row]]
        chosen = [requests[row] for row in filtered]

        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)

        return cls(
            keys=np.array(keys, dtype=np.uint64),
            temperature=None if all(t == 1.0 for t in temperatures) else column(temperatures, torch.float32),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            filtered=torch.tensor(filtered, dtype=torch.int64, device=device) if filtered else None,
            top_k=column([min(r.top_k, vocab_size) if r.top_k > 0 else vocab_size for r in chosen], torch.int64),
            top_p=column([r.top_p for r in chosen], torch.float64),
            min_p=column([r.min_p for r in chosen], torch.float64),
            alternatives=min(max((r.top_logprobs for r in requests), default=0), vocab_size),
        )


def sample(
    logits: torch.Tensor, rows: SamplingRows, positions: NDArray[np.uint64]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Draw one token per row from ``logits`` [B, V]. ``positions`` [B]: numbers of its stream that each row has used.

    Returns tokens [B] int64, their logprobs [B] float32 (``log_softmax(logits / temperature)`` over the full
    vocabulary, before any filter; greedy rows at temperature 1), and logprobs and ids [B, K] of the best
    ``rows.alternatives`` (K)."""
    logits = logits.float()
    if rows.temperature is not None:
        logits = logits / rows.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if rows.all_greedy:
        tokens = logprobs.argmax(dim=-1)
    else:
        draws = torch.from_numpy(uniforms(rows.keys, positions)).to(logits.device).unsqueeze(-1)
        # The cumulative sum is in float64: in float32 the tail of a large vocabulary would be rounded away.
        tokens = _invert(logprobs.exp().cumsum(dim=-1, dtype=torch.float64), draws)
        if rows.filtered is not None:
            tokens[rows.filtered] = _draw_filtered(logprobs[rows.filtered], draws[rows.filtered], rows)
        if rows.greedy is not None:
            tokens = torch.where(rows.greedy, logprobs.argmax(dim=-1), tokens)
    best = logprobs.topk(rows.alternatives, dim=-1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), (best.values, best.indices)


def _invert(cumulative: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """[B] first index whose cumulative weight exceeds ``draws`` [B, 1] times the total; weight 0 is never chosen."""
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, draws * total, right=True)
    # Rounding may lift draws * total to the total itself; the last index with weight is then the answer.
    last = torch.searchsorted(cumulative, total, right=False)
    # The clamp matters for NaN only, which the caller finds in the token's logprob.
    return torch.minimum(chosen, last).clamp_(max=cumulative.shape[-1] - 1).squeeze(-1)


def _draw_filtered(logprobs: torch.Tensor, draws: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """[F] tokens under top-k, then top-p of what is left (the fewest best tokens whose mass reaches it), then min-p
    (times as likely as the best one, at least): the order of transformers' warpers."""
    vocab_size = logprobs.shape[-1]
    is_enough = False
    if vocab_size > 4 * _PARTIAL_SORT_WIDTH:
        values, ids = logprobs.topk(_PARTIAL_SORT_WIDTH, dim=-1)
        probs = values.double().exp()
        by_p = (probs.sum(-1, keepdim=True) >= rows.top_p) & (rows.top_p < 1.0)
        by_p |= probs[:, -1:] < rows.min_p * probs[:, :1]
        is_enough = bool(((rows.top_k <= _PARTIAL_SORT_WIDTH) | ((rows.top_k == vocab_size) & by_p)).all())
    if not is_enough:
        values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
        probs = values.double().exp()
    best = probs[:, :1].clone()
    rank = torch.arange(probs.shape[-1], device=probs.device)
    probs = probs.masked_fill(rank >= rows.top_k, 0.0)
    cumulative = probs.cumsum(dim=-1)
    # Where top-k is off the mass is 1 even when only part of the vocabulary was sorted.
    mass = torch.where(rows.top_k >= vocab_size, 1.0, cumulative[:, -1:])
    before = cumulative - probs
    drop = ((before >= rows.top_p * mass) & (rows.top_p < 1.0)) | (probs < rows.min_p * best)
    drop[:, 0] = False
    chosen = _invert(probs.masked_fill(drop, 0.0).cumsum(dim=-1), draws)
    return ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class Grammars:
    """Makes matchers for the grammars of requests. Safe to call from several threads; the first one takes seconds."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def matcher(self, request: GenerationRequest) -> Any:
        """An ``LLMatcher`` at the beginning of ``request.constraint``; None without one. Raises
        ``GenerationRequestError`` naming the client's field for a grammar that cannot be enforced."""
        if (constraint := request.constraint) is None:
            return None
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

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
        texts, known = TokenTexts(tokenizer), min(len(tokenizer), vocab_size)
        self.tokens = [texts[token_id][1] for token_id in range(known)] + [b""] * (vocab_size - known)
        self.eos_token_id = min(eos_token_ids)
        special = {*eos_token_ids, *tokenizer.get_added_vocab().values()}
        self.special_token_ids = sorted(special & set(range(vocab_size)))
        self._texts = texts

    def __call__(self, text: bytes) -> list[int]:
        return self._texts.encode(text.decode(errors="replace"))


def masked(logits: torch.Tensor, matchers: Sequence[Any]) -> torch.Tensor:
    """``logits`` [B, V] with minus infinity where the row's matcher does not allow the token; None allows all."""
    if all(matcher is None for matcher in matchers):
        return logits
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            allowed[row] = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) != 0
    return logits.masked_fill(~allowed.to(logits.device), float("-inf"))
