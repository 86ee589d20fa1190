"""Sequences end to end in one row, without padding, on torch's own attention (``sdpa``).

verl trains without padding through flash attention's variable-length kernels, which are CUDA's. Everything in a
transformer but attention works on one token at a time, so a row of joined sequences only needs an attention that does
not look across their borders: here one call of ``sdpa`` per sequence. No token of padding is computed anywhere, and the
square of attention is that of each sequence, not of the row.

transformers hands the borders through as ``cu_seq_lens_q``, the name its flash attention uses.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

__all__ = ["ATTENTION", "can_pack", "install_packed_attention", "packs_exactly"]

logger = logging.getLogger(__name__)

ATTENTION = "atropos_packed_sdpa"
_PROBE_LENGTHS = [5, 3]
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the largest logit. A model that looks across a border is off by the size of its logits."""


def can_pack(config: Any) -> bool:
    """Whether a model of this transformers config attends to everything before a token, through ``sdpa``."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config._attn_implementation == "sdpa" and layers == {"full_attention"} and not slides


def install_packed_attention(model: Any) -> bool:
    """Let ``model`` (before it is sharded) take packed rows beside padded ones. False: it cannot, and is unchanged."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not hasattr(model, "set_attn_implementation") or not can_pack(model.config):
        return False
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    model.set_attn_implementation(ATTENTION)
    return bool(model.config._attn_implementation == ATTENTION)


def packs_exactly(model: Any, device: torch.device, vocabulary: int) -> bool:
    """Whether ``model`` gives the same logits for two sequences in one row as for each alone.

    False for one that carries a state along the row (recurrent layers), or that does not pass the borders on.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(1, sum(_PROBE_LENGTHS) + 1, device=device)[None] % vocabulary
    positions = torch.cat([torch.arange(n, device=device) for n in _PROBE_LENGTHS])[None]
    borders = torch.tensor([0, *torch.tensor(_PROBE_LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    try:
        with torch.no_grad():
            joined = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=borders, use_cache=False).logits[0]
            parts = torch.split(ids, _PROBE_LENGTHS, dim=1)
            alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in parts])
    finally:
        model.train(was_training)
    largest = float(alone.float().abs().max())
    difference = float((joined.float() - alone.float()).abs().max())
    return difference <= _PROBE_TOLERANCE.get(joined.dtype, 1e-3) * max(largest, 1e-3)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function; query [B, heads, T, D], key and value [B, kv heads, T, D] → [B, T, heads, D].

    ``cu_seq_lens_q`` [S + 1]: borders of the S sequences of a packed row (B = 1). Without it: transformers' ``sdpa``.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if cu_seq_lens_q is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return plain
    groups = query.shape[1] // key.shape[1]
    # Repeated once for the whole row: sdpa's own way to share heads has no fast kernel on a CPU.
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=q.shape[2] > 1
        )
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for rows that are packed or hold one sequence each; they need no [T, T] mask. Else that of ``sdpa``."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask
