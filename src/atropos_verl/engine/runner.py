"""Forward passes of the embedded engine: prefill, decode, and the logprobs of given tokens. Knows no requests.

Shapes: ``U`` distinct prompts, ``P`` longest of them, ``n`` running sequences, ``V`` vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from atropos_verl.engine.kv_cache import SLOT_ATTENTION, SlotCache, slot_attention
from atropos_verl.engine.requests import check_tokens
from atropos_verl.engine.weights import WeightStore
from atropos_verl.errors import EngineError

WORTH_SEVERAL_THREADS = 40_000_000
"""Multiply-adds per layer of a decode step below which one thread is faster (``benchmarks/bench_engine_threads.py``):
to wake threads and wait for them costs about 0.45 ms per layer, and a second one has to save more than that."""
_LOGITS_BYTES = 256 * 2**20  # of float32 logits held at once


def context_len(config: Any, wanted: int | None) -> int:
    """Prompt plus completion in tokens, at most: ``wanted``, and what the model can. Raises ``EngineError`` when that
    is no room, and for an architecture whose cache the slots cannot hold."""
    text = config.get_text_config(decoder=True)
    bounds = [size for size in (wanted, getattr(text, "max_position_embeddings", None)) if size is not None]
    if not bounds:
        raise EngineError(f"{config.model_type} names no max_position_embeddings: give max_context_len")
    if (context := int(min(bounds))) < 2:
        raise EngineError(f"max_context_len is {context}: it must hold a prompt token and a new one")
    kinds = set(getattr(text, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others or getattr(config, "is_encoder_decoder", False):
        what = f"layers of type {others}" if others else "encoder-decoder models"
        raise EngineError(f"{config.model_type}: {what} are not supported by the embedded engine")
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or (not kinds and getattr(text, "use_sliding_window", True))
    if window is not None and slides and context > window:
        what = f"{config.model_type} attends within a sliding window of {window} tokens; the engine is exact up to that"
        raise EngineError(f"{what}: set inference.max_context_len <= {window} (it is {context})")
    return context


class ModelRunner:
    """A causal language model with its weights and a slot cache. Not thread-safe."""

    def __init__(self, model: Any, *, max_context_len: int) -> None:
        self.model = model
        self.max_context_len = max_context_len
        self.cache = SlotCache()
        self.weights = WeightStore(model)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.device = torch.device(model.device)
        # Attention must take a 4-D mask, which is how rows of different lengths share one forward. "eager" does, and
        # was chosen by the user, or by an architecture that needs it.
        if model.config._attn_implementation != "eager":
            AttentionInterface.register(SLOT_ATTENTION, slot_attention)
            AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
            slots = getattr(model, "_supports_attention_backend", False)
            model.set_attn_implementation(SLOT_ATTENTION if slots else "sdpa")
        model.eval()

    @property
    def max_prefill_logits(self) -> int:
        """Rows times distinct lengths of one prefill whose logits stay within their memory bound."""
        return max(1, _LOGITS_BYTES // (4 * self.vocab_size))

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], base: int, rows: int, found: Sequence[Sequence[int]] = ()
    ) -> torch.Tensor:
        """Compute ``prompts`` into slots ``base .. base+U-1`` (``rows`` slots are about to be used in all).

        ``found``: [U] blocks of the cache's store with a prefix of each prompt; only what comes after is computed.
        Returns [U, V] float32 logits of the token after each prompt."""
        lengths = [len(prompt) for prompt in prompts]
        self.cache.reserve(base + rows, max(lengths) + 1, self.max_context_len)
        starts = self.cache.load(base, found or [()] * len(prompts))
        new = [torch.tensor(prompt[start:]) for prompt, start in zip(prompts, starts, strict=True)]
        counts = [len(part) for part in new]
        ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        # Only the last position of each prompt needs logits: `last` are the distinct ones, `pick` the one of each row.
        last, pick = torch.tensor(counts).sub_(1).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        positions, mask = torch.arange(max(counts)).expand(len(prompts), -1), None
        if any(starts):
            # Padding stands at positions of other tokens, which the model certainly has; nobody reads what comes of it.
            positions = (positions + torch.tensor(starts)[:, None]).clamp_(max=max(lengths) - 1)
            self.cache.begin_extend(base, starts, lengths)
            mask = self._mask(positions.to(self.device), max(lengths))
        else:  # No mask: padding stands on the right, where causal attention never looks.
            self.cache.begin_prefill(base, len(prompts), max(counts))
        logits = self._forward(ids, positions, mask, last)
        return logits[torch.arange(len(prompts), device=logits.device), pick.to(logits.device)].float()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """[n, V] logits of what follows ``tokens`` [n], which stand at positions ``lengths`` [n] of slots 0 .. n-1."""
        width = max(lengths) + 1
        self.cache.reserve(len(tokens), width, self.max_context_len)
        positions = torch.tensor(lengths).unsqueeze(-1).to(self.device)
        self.cache.begin_decode(positions[:, 0], width)
        mask = self._mask(positions, width) if min(lengths) + 1 < width else None
        return self._forward(torch.tensor(tokens).unsqueeze(-1), positions, mask, 1)[:, -1]

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens 1 .. T-1 of one sequence at temperature 1."""
        rows = self.prompt_logprobs(token_ids, 0, 1.0)
        return [row[token] for row, token in zip(rows, token_ids, strict=True) if row is not None]

    @torch.inference_mode()
    def prompt_logprobs(
        self, token_ids: Sequence[int], best: int, temperature: float
    ) -> tuple[dict[int, float] | None, ...]:
        """[P] per position {token: logprob} of the ``best`` alternatives and the token itself; position 0 None."""
        check_tokens("token_ids", token_ids, self.vocab_size)
        chunk = max(16, self.max_prefill_logits)
        cache = DynamicCache(config=self.model.config) if len(token_ids) > chunk else None
        result: list[dict[int, float] | None] = [None]
        for start in range(0, len(token_ids), chunk):
            ids = torch.tensor(token_ids[start : start + chunk], device=self.device).unsqueeze(0)
            positions = torch.arange(start, start + ids.shape[1], device=self.device).unsqueeze(0)
            out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
            targets = torch.tensor(token_ids[start + 1 : start + 1 + chunk], device=self.device, dtype=torch.int64)
            logp = torch.log_softmax(out.logits[0, : len(targets)].float() / temperature, dim=-1)
            own = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
            values, top = (part.tolist() for part in logp.topk(best, dim=-1))
            for token, value, ids, row in zip(targets.tolist(), own, top, values, strict=True):
                result.append({token: value} | dict(zip(ids, row, strict=True)))
        return tuple(result)

    def _mask(self, positions: torch.Tensor, width: int) -> torch.Tensor:
        """[n, 1, q, width], to be added: query ``positions`` [n, q] see keys up to their own position."""
        beyond = torch.arange(width, device=self.device) > positions.unsqueeze(-1)
        mask = torch.zeros(beyond.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(beyond, float("-inf")).unsqueeze(1)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, keep: int | torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            position_ids=positions.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep.to(self.device) if isinstance(keep, torch.Tensor) else keep,
        ).logits
        return logits


def multiply_adds_per_layer(config: Any, rows: int) -> int:
    """Multiply-adds of the matrix products of a decode step of ``rows`` sequences, over the number of layers; of a
    mixture of experts, those of one token."""
    text = config.get_text_config(decoder=True)
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    inner = int(getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    weights = layers * (attention + 3 * hidden * inner * experts) + hidden * int(text.vocab_size)
    return rows * weights // layers


def engine_threads(config: Any, rows: int, default: int | None) -> int | None:
    """1 where a full batch of ``rows`` sequences is too little work for several threads, else ``default``."""
    return 1 if multiply_adds_per_layer(config, rows) < WORTH_SEVERAL_THREADS else default
