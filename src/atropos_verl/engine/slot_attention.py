"""Attention of one new token per row over cached keys, without repeating them for every query head.

transformers repeats keys and values once per query head of a group (``repeat_kv``) whenever a mask is given, which
copies the whole cache per layer and token. With one query per row the heads of a group can stand in the query
dimension instead: ``[n, kv_heads * g, 1, d]`` is ``[n, kv_heads, g, d]``, and all of them look at the same keys through
the same mask. Same numbers (up to rounding), a fifth to a twentieth of the time on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SLOT_ATTENTION", "register_slot_attention", "slot_attention"]

SLOT_ATTENTION = "atropos_slots"


def register_slot_attention() -> str:
    """Make ``slot_attention`` known to transformers, with sdpa's masks; returns its name. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
    return SLOT_ATTENTION


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A transformers attention function: query [n, heads, q, d], key and value [n, kv_heads, L, d].

    Returns [n, q, heads, d]. Several queries per row, and masks that differ between heads, go to transformers' sdpa.
    """
    rows, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    shared_mask = attention_mask is None or (attention_mask.ndim == 4 and attention_mask.shape[1] == 1)
    if queries != 1 or not shared_mask:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, query.shape[3])
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(rows, 1, heads, value.shape[3]), None
