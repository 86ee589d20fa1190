"""Which groups add up to a batch: 0/1 knapsack over group sizes, exact, on Python integers used as bit sets.

Bit ``s`` of a set is 1 when ``s`` sequences can be made of some of the groups. Adding a group of size ``g`` is
``set | set << g``. For a batch of B sequences and n candidate groups that costs n shifts of B bits.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["oldest_subset", "reachable", "representable", "suffix_sums"]


def suffix_sums(sizes: Sequence[int], limit: int) -> list[int]:
    """``result[i]``: the sums up to ``limit`` that the groups ``i..n-1`` can make; ``result[n] == 1`` (only 0)."""
    mask = (1 << (limit + 1)) - 1
    sums = [1] * (len(sizes) + 1)
    for index in range(len(sizes) - 1, -1, -1):
        below = sums[index + 1]
        sums[index] = (below | below << sizes[index]) & mask if sizes[index] <= limit else below
    return sums


def reachable(sizes: Sequence[int], limit: int) -> int:
    """The sums up to ``limit`` that some of the groups can make, as a bit set."""
    return suffix_sums(sizes, limit)[0]


def oldest_subset(sizes: Sequence[int], target: int, sums: list[int] | None = None) -> list[int] | None:
    """Indices of groups that make exactly ``target``, or None. ``sizes`` is in order of age, the oldest first.

    Of all such subsets it is the one that holds the oldest groups: the first index that two subsets do not share is in
    this one. ``[3, 1, 4]`` and 5 give ``[1, 2]``; ``[2, 2, 4, 2]`` and 4 give ``[0, 1]``.
    """
    if sums is None:
        sums = suffix_sums(sizes, target)
    if not sums[0] >> target & 1:
        return None
    chosen = []
    left = target
    for index, size in enumerate(sizes):
        if left == 0:
            break
        if size <= left and sums[index + 1] >> (left - size) & 1:
            chosen.append(index)
            left -= size
    return chosen


def representable(sizes: Sequence[int], target: int) -> bool:
    """Whether ``target`` is a sum of any number of groups of these sizes: whether waiting for more can help."""
    mask = (1 << (target + 1)) - 1
    sums = 1
    for size in set(sizes):
        if not 0 < size <= target:
            continue
        step = size
        while step <= target:  # doubling: after k rounds, up to 2^k groups of this size
            sums |= sums << step & mask
            step *= 2
    return bool(sums >> target & 1)
