"""The key/value cache in slots, what is stored of earlier sequences, and attention of new tokens over the slots.

Row ``r`` of every buffer, [rows, kv_heads, capacity, head_dim], a pair per layer, belongs to the sequence in slot
``r``. The rows in use are always ``0 .. n-1``, so a decode step reads a view, ``buffer[:n, :, :width]``.

Keys and values of prompts, and of sequences that leave their slot, are copied to a store of blocks, where the next
sequence that begins with the same tokens finds them: a copy takes a hundredth of the time of computing them."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SLOT_ATTENTION = "atropos_slots"

_CAPACITY_STEP = 128
BLOCK = 4  # tokens of a block of the store: what a prefix ends with beyond whole blocks is computed again
WORTH_STORING = 32  # tokens below which a common prefix is computed again: to find and copy it takes as long
UNUSED = 128  # steps that sequences ended in since something was last reused, above which one in eight is stored
_STORE_BYTES = 256 * 2**20  # of the store at most, or as many as the slots hold if that is more


class PrefixIndex:
    """Which blocks of the store hold which prefixes, found by the token ids themselves.

    The key of a block is the serial number of the one before it, and its tokens. Serial numbers are not used twice:
    what came after a block that was dropped cannot be found after the one in its place. The block used least recently
    is dropped first; one that is used counts as used after all that follow it."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], tuple[int, int]] = OrderedDict()
        """Serial number, block number."""
        self._free: list[int] = []
        self._serial = self.generation = 0
        """``generation``: how often ``age`` was called."""
        self.generations: dict[int, int] = {}
        """Of the oldest weights that went into a block."""

    def find(self, tokens: tuple[int, ...]) -> list[int]:
        """The blocks of the longest stored prefix of ``tokens`` that leaves a token to compute; [] if it is short."""
        blocks = [self._blocks[key][1] for key in self._chain(tokens[:-1])]
        return blocks if len(blocks) * BLOCK >= WORTH_STORING else []

    def add(self, tokens: tuple[int, ...], generation: int, capacity: int) -> tuple[int, list[int]]:
        """Give blocks, of ``capacity`` in all, to what is not stored of ``tokens``: (first position, blocks)."""
        if generation < self.generation - 1 or len(tokens) < WORTH_STORING:
            return 0, []
        keys = self._chain(tokens)
        parent, start = self._blocks[keys[-1]][0] if keys else 0, len(keys) * BLOCK
        count = max(0, min(len(tokens) // BLOCK, capacity) - len(keys))
        added = sorted(self._take(count, capacity))  # those that stand side by side are copied at once
        for first, block in zip(range(start, len(tokens), BLOCK), added, strict=False):
            key = parent, tokens[first : first + BLOCK]
            self._serial += 1
            parent = self._serial
            self._blocks[key] = parent, block
            self.generations[block] = generation
            keys.append(key)
        self._use(keys)
        return start, added

    def _take(self, count: int, capacity: int) -> list[int]:
        held = len(self._blocks) + len(self._free)
        self._free += range(held, min(held + max(0, count - len(self._free)), capacity))
        while len(self._free) < count:
            self._free.append(self._blocks.popitem(last=False)[1][1])
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def age(self) -> None:
        """The weights change: drop what was stored before they did the last time."""
        for key in [key for key, (_, block) in self._blocks.items() if self.generations[block] < self.generation]:
            self._free.append(self._blocks.pop(key)[1])
        self.generation += 1

    def _chain(self, tokens: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        parent, keys = 0, []
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            if (entry := self._blocks.get(key := (parent, tokens[first : first + BLOCK]))) is None:
                break
            keys.append(key)
            parent = entry[0]
        self._use(keys)
        return keys

    def _use(self, keys: list[tuple[int, tuple[int, ...]]]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)


class SlotCache(Cache):  # type: ignore[misc]
    """A ``transformers.Cache`` whose rows have lengths of their own.

    Before each forward call ``begin_prefill``, ``begin_extend`` or ``begin_decode``; the model then calls ``update``
    once per layer. Buffers are made by the first ``update`` of a layer (so any head layout will do) and grow as needed.
    They are zeroed when made: masked positions are read as well (weight 0), and 0 times a stray NaN is NaN."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._buffers: list[torch.Tensor] = []
        """Keys of layer 0, its values, keys of layer 1, …"""
        self._rows = self._capacity = 0
        self.prefixes = PrefixIndex()
        self._generations: dict[int, int] = {}
        """Of each slot, as of the blocks of the index."""
        self._store: list[torch.Tensor] = []
        """As ``_buffers``: [kv_heads, positions, head_dim], the positions of one block after another."""
        self._unused = 0
        # Of the forward under way, which of the new keys and values go where in the buffers:
        self._source: tuple[Any, ...] = ()
        self._target: tuple[Any, ...] = ()
        self._slots, self._width, self._is_prefill = slice(0), 0, False

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers and the store."""
        return sum(buffer.nbytes for buffer in (*self._buffers, *self._store))

    def reserve(self, rows: int, tokens: int, max_tokens: int) -> None:
        """Make room for ``rows`` rows of ``tokens`` positions; grows geometrically, never beyond ``max_tokens``."""
        if rows > self._rows:
            self._rows = max(rows, min(2 * self._rows, 64 + self._rows))
        if tokens > self._capacity:
            grown = max(tokens + _CAPACITY_STEP, self._capacity + self._capacity // 2)
            self._capacity = max(tokens, min(grown, max_tokens))
        for number, old in enumerate(self._buffers):
            if old.shape[0] < self._rows or old.shape[2] < self._capacity:
                # One at a time, so that only one is held twice.
                new = self._zeros(old)
                new[: old.shape[0], :, : old.shape[2]] = old
                self._buffers[number] = new

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros((self._rows, like.shape[1], self._capacity, like.shape[3]))

    def clear(self) -> None:
        """Give the memory back. Every slot loses its content, and so does the store."""
        self._buffers.clear()
        self._store.clear()
        self.prefixes = PrefixIndex()
        self._rows = self._capacity = 0

    def skips_ended(self) -> bool:
        """Counts a step in which sequences ended. True where they are not worth storing."""
        self._unused += 1
        return self._unused > UNUSED and self._unused % 8 > 0

    def begin_prefill(self, base: int, rows: int, width: int) -> None:
        """The next forward computes whole prompts, right-padded [U, P], for slots ``base .. base+U-1``."""
        # What padding writes lies beyond the row's length: masked, overwritten.
        self._source, self._target = (), (slice(base, base + rows), slice(None), slice(width))
        self._width, self._is_prefill = width, True

    def begin_extend(self, base: int, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """The next forward computes ``starts[u] .. lengths[u]-1`` of slot ``base + u``, right-padded [U, P]."""
        first, last = np.array(starts), np.array(lengths)
        rows = np.arange(len(starts)).repeat(last - first)
        new = np.concatenate([np.arange(count) for count in last - first])
        indices = (rows, new, base + rows, first[rows] + new)
        row, place, slot, column = (torch.from_numpy(index).to(self._buffers[0].device) for index in indices)
        self._source, self._target = (row, slice(None), place), (slot, slice(None), column)
        self._slots, self._width, self._is_prefill = slice(base, base + len(starts)), max(lengths), False

    def begin_decode(self, lengths: torch.Tensor, width: int) -> None:
        """The next forward computes one token for each of the first ``n`` slots. ``lengths`` [n] int64: positions that
        they hold already; ``width``: the largest plus one."""
        rows = lengths.shape[0]
        row = torch.arange(rows, device=lengths.device)
        self._source, self._target = (slice(None), slice(None), 0), (row, slice(None), lengths)
        self._slots, self._width, self._is_prefill = slice(rows), width, False

    @torch.inference_mode()
    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of slots ``sources`` to slots ``targets`` (disjoint sets)."""
        for source, target in zip(sources, targets, strict=True):
            self._generations[target] = self._generations[source]
            for buffer in self._buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    @torch.inference_mode()
    def load(self, base: int, blocks: Sequence[Sequence[int]]) -> list[int]:
        """Copy what ``prefixes`` found to the slots from ``base`` on; returns how many positions each has now."""
        starts = [len(found) * BLOCK for found in blocks]
        of = self.prefixes.generations
        for slot, found in enumerate(blocks, start=base):
            self._generations[slot] = min((of[block] for block in found), default=self.prefixes.generation)
        if any(starts):
            self._unused = 0
            runs = list(_runs((base + row, 0, found) for row, found in enumerate(blocks)))
            for buffer, store in zip(self._buffers, self._store, strict=True):
                for slot, columns, places in runs:
                    buffer[slot, :, columns] = store[:, places]
        return starts

    @torch.inference_mode()
    def store(self, contexts: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Copy what is new of ``contexts`` to the store: slots, and the tokens that they hold."""
        bytes_each = sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in self._buffers)
        capacity = max(_STORE_BYTES // bytes_each, self._rows * self._capacity) // BLOCK
        add = self.prefixes.add
        added = [(slot, *add(tokens, self._generations[slot], capacity)) for slot, tokens in contexts]
        if not any(blocks for _, _, blocks in added):
            return
        needed = (max(block for _, _, blocks in added for block in blocks) + 1) * BLOCK
        self._store = self._store or [
            buffer.new_empty((buffer.shape[1], 0, buffer.shape[3])) for buffer in self._buffers
        ]
        if needed > (held := self._store[0].shape[1]):
            more = min(max(needed, 2 * held), capacity * BLOCK) - held
            for number, store in enumerate(self._store):
                self._store[number] = torch.nn.functional.pad(store, (0, 0, 0, more))
        runs = list(_runs(added))
        for buffer, store in zip(self._buffers, self._store, strict=True):
            for slot, columns, places in runs:
                store[:, places] = buffer[slot, :, columns]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [U or n, kv_heads, P or 1, head_dim]; return those to attend to."""
        while len(self._buffers) <= 2 * layer_idx:
            self._buffers += self._zeros(key_states), self._zeros(value_states)
        keys, values = self._buffers[2 * layer_idx : 2 * layer_idx + 2]
        keys[self._target], values[self._target] = key_states[self._source], value_states[self._source]
        if self._is_prefill:  # a prompt attends to itself only
            return key_states, value_states
        return keys[self._slots, :, : self._width], values[self._slots, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the tokens of this forward, of the longest row."""
        return 0 if self._is_prefill else self._width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key length, key offset) of the mask the model builds itself when none is passed."""
        return self._width, 0


def _runs(parts: Iterable[tuple[int, int, Sequence[int]]]) -> Iterator[tuple[int, slice, slice]]:
    """Slots, positions in them, and places in the store, of ``parts``: (slot, first position, blocks)."""
    for slot, first, blocks in parts:
        cuts = [number for number in range(1, len(blocks)) if blocks[number] != blocks[number - 1] + 1]
        for start, end in itertools.pairwise([0, *cuts, len(blocks)] if blocks else []):
            place = blocks[start] * BLOCK
            columns = slice(first + start * BLOCK, first + end * BLOCK)
            yield slot, columns, slice(place, place + (end - start) * BLOCK)


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
    """A transformers attention function: query [n, heads, q, d], key and value [n, kv_heads, L, d] → [n, q, heads, d].

    transformers repeats keys and values once per query head of a group whenever a mask is given, which copies the whole
    cache per layer and token. Here the heads of a group stand in the query dimension: a fifth to a twentieth of the
    time on a CPU. Several queries without a mask (a prefill) go to transformers' sdpa."""
    rows, heads, queries, _ = query.shape
    if queries != 1 and attention_mask is None:
        rest = {"attention_mask": None, "dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, **rest)  # type: ignore[no-any-return]
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads * queries, query.shape[3])
    if attention_mask is not None and (queries != 1 or attention_mask.shape[1] != 1):
        attention_mask = attention_mask.expand(rows, heads, queries, length).reshape(rows, kv_heads, -1, length)
    attended = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(rows, heads, queries, value.shape[3]).transpose(1, 2).contiguous(), None
