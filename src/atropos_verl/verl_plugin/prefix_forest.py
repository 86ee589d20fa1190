"""Sequences → forests of shared prefixes, so that every distinct prefix of a micro-batch is computed once.

Each distinct run of tokens is a node of a forest, and the nodes, depth first, one packed row. A token attends to the
nodes above it and to what stands before it in its own. Shapes: N tokens of all sequences joined end to end, U ≤ N
distinct ones (the packed row).
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]

DENSE_TOKENS = 256
"""Subtrees of up to this many tokens take one call of attention with a mask: many small calls cost more (measured on
a CPU: 64 to 512 made no difference above 5 %)."""


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

    first: IntArray
    """[U] where (among the N tokens) each distinct token occurs first."""
    place: IntArray
    """[N] where in the row each token is."""
    calls: list[AttentionCall]

    def to(self, device: torch.device) -> Self:
        """Moves the masks there."""
        for call in self.calls:
            call.mask = None if call.mask is None else call.mask.to(device)
        return self


@dataclass(slots=True)
class _Node:
    start: int
    """First token in the row."""
    length: int
    parent: int
    """Its number; -1: none."""
    size: int = 0
    """Tokens of the node and of everything below it."""


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

    Returns positions in that order; parts are empty only where there are fewer sequences than parts.
    """
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
    return PrefixForest(whole, whole, [AttentionCall(start, end, []) for start, end in itertools.pairwise(ends)])


def build_forest(sequences: Sequence[IntArray]) -> PrefixForest:
    """The packed row of ``sequences``, each [T] token ids with positions 0 … T-1."""
    order, shared = sort_by_prefix(sequences)
    starts = np.cumsum([0, *(len(ids) for ids in sequences)])
    place = np.empty(int(starts[-1]), dtype=np.int64)
    first = [place[:0]]
    nodes: list[_Node] = []
    used = 0
    # (low, high, depth, parent): the sequences order[low:high] share `depth` tokens, which are in the row already.
    # Last in, first out: what is below a node is complete before its next sibling begins, so it is one stretch.
    waiting = [(0, len(order), 0, -1)] if order else []
    while waiting:
        low, high, depth, parent = waiting.pop()
        common = min(shared[low + 1 : high], default=len(sequences[order[low]]))
        if common > depth:
            node = _Node(used, common - depth, parent)
            used += node.length
            first.append(np.arange(starts[order[low]] + depth, starts[order[low]] + common))
            for at in order[low:high]:
                place[starts[at] + depth : starts[at] + common] = np.arange(node.start, used)
            depth, parent = common, len(nodes)
            nodes.append(node)
        if high - low > 1:
            borders = [low, *(at for at in range(low + 1, high) if shared[at] == common), high]
            waiting += [(a, b, depth, parent) for a, b in reversed(list(itertools.pairwise(borders)))]
    for node in reversed(nodes):  # children come after their parents
        node.size += node.length
        if node.parent >= 0:
            nodes[node.parent].size += node.size
    return PrefixForest(np.concatenate(first), place, _attention_calls(nodes))


def _attention_calls(nodes: list[_Node]) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    chains: dict[int, list[int]] = {-1: []}
    """Node → the calls that hold a sequence down to the end of that node, where the node has a call of its own."""
    number = 0
    while number < len(nodes):
        node, following = nodes[number], number + 1
        end = node.start + node.length
        if node.size <= DENSE_TOKENS:  # all of it, and its next siblings as long as they fit
            end = node.start + node.size
            for other in nodes[number + 1 :]:
                if other.start >= end:
                    if other.parent != node.parent or other.start + other.size > node.start + DENSE_TOKENS:
                        break
                    end = other.start + other.size
                following += 1
        else:
            chains[number] = [*chains[node.parent], len(calls)]
        block = nodes[number:following]
        mask = None if len(block) == 1 else _mask(block, number, node.start, end)
        calls.append(AttentionCall(node.start, end, chains[node.parent], mask))
        number = following
    return calls


def _mask(block: list[_Node], number: int, start: int, end: int) -> torch.Tensor:
    """[end - start, end - start] bool; ``number`` is that of the first node in ``block``."""
    inside = np.zeros((end - start, end - start), dtype=np.bool_)
    for node in block:
        rows = slice(node.start - start, node.start - start + node.length)
        if node.parent >= number:  # what its parent's last token sees, it sees too
            inside[rows] = inside[block[node.parent - number].start + block[node.parent - number].length - 1 - start]
        inside[rows, rows] |= np.tri(node.length, dtype=np.bool_)
    return torch.from_numpy(inside)
