"""Sequences → forests of shared prefixes, so that every distinct prefix of a micro-batch is computed once.

Each distinct run of tokens is a node of a forest, and the nodes, depth first, one packed row. A token attends to the
nodes above it and to what stands before it in its own. Shapes: N tokens of all sequences joined end to end, U ≤ N
distinct ones (the packed row).
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]

DENSE_TOKENS = 256
"""Subtrees of up to this many tokens take one call of attention with a mask: many small calls cost more (measured on
a CPU: 64 to 512 made no difference above 5 %)."""
FLEX_BLOCK = 128


@dataclass(slots=True)
class AttentionCall:
    """Tokens ``start:end`` of the row attend to all those of the calls in ``above``, and to each other by ``mask``."""

    start: int
    end: int
    above: list[int]
    mask: torch.Tensor | None = None
    """[end - start, end - start] bool, which of each other they attend to; None: causal."""


@dataclass(slots=True)
class PrefixForest:
    """One packed row."""

    first: IntArray  # [U] where (among the N tokens) each distinct token occurs first
    place: IntArray  # [N] where in the row each token is
    calls: list[AttentionCall]
    ends: IntArray  # [U] each token is seen by itself and all that follow it in the row, up to this one
    _blocks: Any = None

    def to(self, device: torch.device) -> Self:
        """Moves the masks there."""
        for call in self.calls:
            call.mask = None if call.mask is None else call.mask.to(device)
        return self

    def block_mask(self, device: torch.device) -> Any:
        """What ``calls`` say as a ``BlockMask`` of flex attention, which blocks of queries see which of keys."""
        if self._blocks is None:
            from torch.nn.attention.flex_attention import BlockMask

            ends = torch.from_numpy(self.ends).to(device)
            count = -(-len(ends) // FLEX_BLOCK)
            padded = torch.nn.functional.pad(ends, (0, count * FLEX_BLOCK - len(ends))).view(count, FLEX_BLOCK)
            keys = torch.arange(count, device=device) * FLEX_BLOCK
            queries = keys[:, None]
            whole = (keys < queries) & (padded.amin(1) >= queries + FLEX_BLOCK)
            part = (keys == queries) | (keys < queries) & (padded.amax(1) > queries) & ~whole
            tables = torch.stack((part, whole)).int()[:, None, None]
            counts, indices = tables.sum(-1).int(), tables.argsort(dim=-1, descending=True, stable=True).int()
            partly_then_wholly = counts[0], indices[0], counts[1], indices[1]
            self._blocks = BlockMask.from_kv_blocks(
                *partly_then_wholly,
                BLOCK_SIZE=FLEX_BLOCK,
                mask_mod=lambda batch, head, query, key: _sees(query, key, ends),
                seq_lengths=(len(ends), len(ends)),
            )
        return self._blocks


def sort_by_prefix(sequences: Sequence[IntArray]) -> tuple[list[int], list[int]]:
    """Returns the order in which neighbours share most, and how many tokens each shares with the one before it."""
    # Big-endian bytes sort like the numbers themselves.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0] * len(order)
    for at in range(1, len(order)):
        left, right = sequences[order[at - 1]], sequences[order[at]]
        length = min(len(left), len(right))
        differ = np.flatnonzero(left[:length] != right[:length])
        shared[at] = int(differ[0]) if differ.size else length
    return order, shared


def partition(lengths: Sequence[int], shared: Sequence[int], count: int) -> list[list[int]]:
    """Cuts sequences in the order of ``sort_by_prefix`` into ``count`` parts with few distinct tokens in the largest.

    Returns positions in that order; parts are empty only where there are fewer sequences than parts."""
    budgets = range(max(lengths, default=0), sum(lengths) + 1)
    least = bisect_left(budgets, True, key=lambda budget: len(fill(lengths, shared, budget)) <= count)
    parts = fill(lengths, shared, budgets[least])
    while len(parts) < count and any(len(part) > 1 for part in parts):
        at = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1, sum(lengths[j] for j in parts[i])))
        half = len(parts[at]) // 2
        parts[at : at + 1] = [parts[at][:half], parts[at][half:]]
    return parts + [[] for _ in range(count - len(parts))]


def fill(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[list[int]]:
    """Fills parts one after the other with up to ``budget`` distinct tokens each (one sequence may have more)."""
    parts: list[list[int]] = []
    used = 0
    for at, length in enumerate(lengths):
        new = length - shared[at]
        if parts and used + new <= budget:
            parts[-1].append(at)
            used += new
        else:
            parts.append([at])
            used = length
    return parts


def joined(lengths: Sequence[int]) -> PrefixForest:
    """The row of sequences end to end, in their order; nothing is shared."""
    ends = np.cumsum([0, *lengths]).tolist()
    whole = np.arange(ends[-1])
    calls = [AttentionCall(start, end, []) for start, end in itertools.pairwise(ends)]
    return PrefixForest(whole, whole, calls, np.repeat(ends[1:], lengths))


def build_forest(sequences: Sequence[IntArray]) -> PrefixForest:
    """The packed row of ``sequences``, each [T] token ids with positions 0 … T-1."""
    starts = np.cumsum([0, *map(len, sequences)])
    first, place, ends = np.empty((3, starts[-1]), dtype=np.int64)
    path, used = place[:0], 0
    """Where in the row the tokens of the sequence at hand are, and how many are in it. Neighbours share most: what is
    new of each sequence follows what is above it, depth first."""
    for number, shared in zip(*sort_by_prefix(sequences), strict=True):
        ends[path[shared:]] = used
        new = np.arange(len(sequences[number]) - shared)
        first[used + new] = starts[number] + shared + new
        path = np.concatenate([path[:shared], used + new])
        place[starts[number] : starts[number + 1]] = path
        used += len(new)
    ends[path] = used
    return PrefixForest(first[:used], place, _attention_calls(ends[:used]), ends[:used])


def _attention_calls(ends: IntArray) -> list[AttentionCall]:
    borders = np.append(np.flatnonzero(np.diff(ends)) + 1, len(ends))  # where one run of tokens without a branch ends
    calls: list[AttentionCall] = []
    above: list[int] = []
    start = 0
    while start < len(ends):
        above = [number for number in above if start < ends[calls[number].start]]
        run, end = int(borders[np.searchsorted(borders, start, "right")]), int(ends[start])
        if is_dense := end - start <= DENSE_TOKENS:  # all of it, and its next siblings as long as they fit
            parent = ends[calls[above[-1]].start] if above else len(ends)
            while end < parent and ends[end] - start <= DENSE_TOKENS:
                end = int(ends[end])
        else:
            end = run
        tokens = np.arange(start, end)
        mask = None if end == run else torch.from_numpy(_sees(tokens[:, None], tokens, ends))
        calls.append(AttentionCall(start, end, above, mask))
        if not is_dense:
            above = [*above, len(calls) - 1]
        start = end
    return calls


def _sees(query: Any, key: Any, ends: Any) -> Any:
    """Whether a token attends to another, by their places in the row."""
    return (key <= query) & (query < ends[key])
