"""Exact sums of group sizes: values by hand, upstream's own cases, and every subset tried for small queues."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atropos_verl.server.batcher import oldest_subset, reachable, representable

# Sizes, target and expected indices of the 12 cases of atroposlib/tests/test_utils/test_heterogeneous_packing.py.
UPSTREAM = [
    ([1, 2, 1], 4, [0, 1, 2]),
    ([2, 2, 4], 4, [0, 1]),
    ([3, 1, 4], 5, [1, 2]),
    ([2, 4], 3, None),
    ([], 4, None),
    ([4], 4, [0]),
    ([2, 2, 2, 2], 8, [0, 1, 2, 3]),
    ([1, 2, 1, 4, 2], 8, [0, 1, 2, 3]),
    ([16, 8, 8], 32, [0, 1, 2]),
    ([2, 2, 4, 2, 2], 4, [0, 1]),
    ([2, 4, 2, 1], 6, [0, 1]),
    ([1] * 16, 8, list(range(8))),
]


@pytest.mark.parametrize(("sizes", "target", "expected"), UPSTREAM)
def test_upstreams_packing_cases(sizes: list[int], target: int, expected: list[int] | None) -> None:
    assert oldest_subset(sizes, target) == expected


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 24))
def test_it_is_the_oldest_of_all_subsets_that_fit(sizes: list[int], target: int) -> None:
    fitting = [
        list(subset)
        for count in range(1, len(sizes) + 1)
        for subset in combinations(range(len(sizes)), count)
        if sum(sizes[i] for i in subset) == target
    ]
    # Lists compare like ages: the first index in which they differ decides.
    assert oldest_subset(sizes, target) == min(fitting, default=None)


def test_reachable_is_a_set_of_bits() -> None:
    assert reachable([2, 3], 10) == (1 << 0 | 1 << 2 | 1 << 3 | 1 << 5)
    assert reachable([2, 3], 4) == (1 << 0 | 1 << 2 | 1 << 3)
    assert reachable([], 4) == 1


@pytest.mark.parametrize(
    ("sizes", "target", "possible"),
    [
        ((3,), 8, False),
        ((3,), 12, True),
        ((6,), 16, False),
        ((4,), 10, False),
        ((4, 6), 10, True),
        ((4, 6), 7, False),
        ((16,), 8, False),
        ((), 8, False),
        ((1,), 4096, True),
        ((5, 7), 23, False),
        ((5, 7), 24, True),
    ],
)
def test_whether_waiting_can_help(sizes: tuple[int, ...], target: int, possible: bool) -> None:
    assert representable(sizes, target) is possible


@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 60))
def test_representable_against_counting_up(sizes: list[int], target: int) -> None:
    made = {0}
    for total in range(1, target + 1):
        if any(total - size in made for size in sizes):
            made.add(total)
    assert representable(sizes, target) is (target in made)
