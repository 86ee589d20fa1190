"""The key/value cache in slots, and attention of one new token per row over it.

Row ``r`` of every buffer belongs to the sequence in slot ``r``. Buffers, one pair per layer: ``[rows, kv_heads,
capacity, head_dim]``. The rows in use are always ``0 .. n-1``, so a decode step reads ``buffer[:n, :, :width]``, a
view; nothing is gathered and nothing is concatenated per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLOT_ATTENTION = "atropos_slots"

_CAPACITY_STEP = 128


class SlotCache(Cache):  # type: ignore[misc]
    """A ``transformers.Cache`` whose rows have lengths of their own.

    Before each forward call ``begin_prefill`` or ``begin_decode``; the model then calls ``update`` once per layer.
    Memory is zeroed when taken: masked positions are read as well (weight 0), and 0 times a stray NaN is NaN.
    Buffers are made by the first ``update`` of a layer (so any head layout will do) and grow as needed.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._buffers: list[torch.Tensor] = []
        """Keys of layer 0, its values, keys of layer 1, …"""
        self._rows = 0
        self._capacity = 0
        self._prefill_base: int | None = None
        self._row_index: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._width = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, rows: int, tokens: int, max_tokens: int) -> None:
        """Make room for ``rows`` rows of ``tokens`` positions; grows geometrically, never beyond ``max_tokens``."""
        if rows > self._rows:
            self._rows = max(rows, min(2 * self._rows, 64 + self._rows))
        if tokens > self._capacity:
            grown = max(tokens, self._capacity + self._capacity // 2)
            rounded = -(-grown // _CAPACITY_STEP) * _CAPACITY_STEP
            self._capacity = max(tokens, min(rounded, max_tokens))
        for number, old in enumerate(self._buffers):
            if old.shape[0] < self._rows or old.shape[2] < self._capacity:
                # One at a time, so that only one is held twice.
                new = self._zeros(old)
                new[: old.shape[0], :, : old.shape[2]] = old
                self._buffers[number] = new

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros((self._rows, like.shape[1], self._capacity, like.shape[3]))

    def clear(self) -> None:
        """Give the memory back. Every slot loses its content."""
        self._buffers.clear()
        self._rows = self._capacity = 0
        self._row_index = self._lengths = None

    def begin_prefill(self, base: int) -> None:
        """The next forward computes whole prompts, right-padded [U, P], for slots ``base .. base+U-1``."""
        self._prefill_base = base

    def begin_decode(self, lengths: torch.Tensor, width: int) -> None:
        """The next forward computes one token for each of the first ``n`` slots.

        Args:
            lengths: [n] int64, positions slot ``r`` holds already: where its new key goes.
            width: the largest of ``lengths`` plus one.
        """
        self._prefill_base = None
        self._lengths = lengths
        self._width = width
        if self._row_index is None or self._row_index.shape[0] != lengths.shape[0]:
            self._row_index = torch.arange(lengths.shape[0], device=lengths.device)

    @torch.inference_mode()
    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of slots ``sources`` to slots ``targets`` (disjoint sets)."""
        for buffer in self._buffers:
            src = torch.tensor(sources, device=buffer.device)
            buffer[torch.tensor(targets, device=buffer.device), :, :length] = buffer[src, :, :length]

    # -- what the model calls ----------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [U or n, kv_heads, P or 1, head_dim]; return those to attend to."""
        while len(self._buffers) <= 2 * layer_idx:
            self._buffers += self._zeros(key_states), self._zeros(value_states)
        keys, values = self._buffers[2 * layer_idx : 2 * layer_idx + 2]
        if self._prefill_base is not None:
            # A prompt attends to itself only. What padding writes lies beyond the row's length: masked, overwritten.
            base, rows, width = self._prefill_base, key_states.shape[0], key_states.shape[2]
            keys[base : base + rows, :, :width] = key_states
            values[base : base + rows, :, :width] = value_states
            return key_states, value_states
        assert self._row_index is not None and self._lengths is not None
        rows = self._row_index.shape[0]
        keys[self._row_index, :, self._lengths] = key_states[:, :, 0]
        values[self._row_index, :, self._lengths] = value_states[:, :, 0]
        return keys[:rows, :, : self._width], values[:rows, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the tokens of this forward, of the longest row."""
        return 0 if self._prefill_base is not None else self._width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key length, key offset) of the mask the model builds itself when none is passed."""
        return (query_length if self._prefill_base is not None else self._width), 0


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

    Returns [n, q, heads, d]. transformers repeats keys and values once per query head of a group whenever a mask is
    given, which copies the whole cache per layer and token. With one query per row the heads of a group can stand in
    the query dimension instead: same numbers (up to rounding), a fifth to a twentieth of the time on a CPU. Several
    queries per row, and masks that differ between heads, go to transformers' sdpa.
    """
    rows, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    shared_mask = attention_mask is None or (attention_mask.ndim == 4 and attention_mask.shape[1] == 1)
    if queries != 1 or not shared_mask:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, query.shape[3])
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(rows, 1, heads, value.shape[3]), None
