"""The choice of a batch: exact sums of group sizes, each rule of the policy by example, and upstream's own cases."""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atropos_verl.protocol.messages import BatchPolicy
from atropos_verl.server.batcher import QueueView, StoredGroup, choose_batch, oldest_subset, representable

Size = int | tuple[int, int]
"""Of a group without an environment, or (env_id, size)."""


def chosen(found: list[Size], batch_size: int, now: float = 0.0, passed_over: int = 0, **options: Any) -> Any:
    """Indices of the groups of the next batch. ``passed_over``: of the first of them."""
    classes: dict[tuple[int | None, int], list[StoredGroup]] = {}
    for seq, entry in enumerate(found):
        env_id, size = (None, entry) if isinstance(entry, int) else entry
        group = StoredGroup(seq, env_id, size, tokens=0, arrived=0.0, digest=b"", raw=b"")
        group.passed_over = 0 if seq else passed_over
        classes.setdefault((env_id, size), []).append(group)
    sizes = [size for (_, size), groups in classes.items() for _ in groups]
    fields: dict[str, Any] = {"total": sum(sizes), "last_arrival": 0.0, "sizes_seen": {*sizes}, **options}
    policy = {name: fields.pop(name) for name in options if name.startswith("batch_")}
    batch = choose_batch(QueueView(classes=classes, **fields), BatchPolicy(batch_size=batch_size, **policy), now)
    return None if batch is None else [group.seq for group in batch]


LATE = {"passed_over": 4}


@pytest.mark.parametrize(
    ("found", "batch_size", "options", "expected"),
    [
        pytest.param([4, 4, 4, 4], 8, {}, [0, 1], id="the oldest when they fit"),
        pytest.param([6, 4, 4, 2], 8, {}, [0, 3], id="the oldest exact fit"),
        pytest.param([6, 4, 4], 8, {}, [1, 2], id="an exact fit without the oldest"),
        pytest.param([4], 8, {"now": 1e6}, None, id="less than a batch waits while somebody sends"),
        pytest.param([], 8, {}, None, id="nothing"),
        pytest.param([4], 8, {"now": 4.9, "anyone_sending": False}, None, id="the rest waits a while"),
        pytest.param([4], 8, {"now": 5.0, "anyone_sending": False}, [0], id="the rest when nobody can send more"),
        pytest.param([4], 8, {"now": 29.0, "batch_tail_wait": 30.0}, None, id="the rest waits as the trainer says"),
        pytest.param([4], 8, {"now": 30.0, "batch_tail_wait": 30.0}, [0], id="and no longer"),
        pytest.param([3, 3, 3], 8, {}, [0, 1], id="no waiting when no mix of 3 fits"),
        pytest.param([6, 6, 6], 16, {}, [0, 1], id="no waiting when no mix of 6 fits"),
        pytest.param([3, 3, 3], 8, {"now": 4.9, "sizes_seen": {3, 5}}, None, id="a size that fits may come"),
        pytest.param([3, 3, 3], 8, {"now": 5.0, "sizes_seen": {3, 5}}, [0, 1], id="but did not"),
        pytest.param([3, 3, 3, 3], 8, {"batch_fill": "at_least"}, [0, 1, 2], id="at_least: the smallest above"),
        pytest.param([3, 5, 7], 8, {"batch_fill": "at_least"}, [0, 1], id="at_least: exact"),
        pytest.param([6, 6, 5], 8, {"batch_fill": "at_least"}, [0, 2], id="at_least: not the oldest"),
        pytest.param([3, 3], 8, {"batch_fill": "at_least", "now": 1e6}, None, id="at_least: too few"),
        pytest.param([3, 5, 3], 7, {"batch_fill": "at_most", "sizes_seen": {1}}, [0, 2], id="at_most: at once"),
        pytest.param([3, 3, 3], 8, {"batch_fill": "at_most", "sizes_seen": {1}}, [0, 1], id="at_most: the fullest"),
        pytest.param([3, 3, 3], 8, {"batch_fill": "exact", "now": 1e6}, None, id="exact: nothing else"),
        pytest.param([16, 4, 4], 8, {"batch_fill": "exact"}, [1, 2], id="exact: without what is too large"),
        pytest.param([16, 4, 4], 8, {}, [0], id="a group larger than a batch is a batch"),
        pytest.param([6, 4, 4], 8, {"passed_over": 3}, [1, 2], id="passed over once more"),
        pytest.param([6, 4, 4], 8, LATE, [0], id="passed over too often: forced in"),
        pytest.param([6, 4, 4, 2], 8, LATE, [0, 3], id="forced in with what fits"),
        pytest.param([6, 4, 4], 8, {"batch_fill": "at_least", **LATE}, [0, 1], id="forced in, at_least"),
        pytest.param([6, 4, 4], 8, {"batch_fill": "exact", **LATE}, [1, 2], id="exact: never forced in"),
        pytest.param([(0, 6), (1, 6), (0, 6)], 8, {"minimums": {0: 4, 1: 4}}, [0], id="minimums that cannot fit"),
        # Of the 8 oldest sequences 6 are of environment 0: it is not cut down to its minimum.
        pytest.param([(0, 1)] * 6 + [(1, 1)] * 10, 8, {"minimums": {0: 2, 1: 2}}, [*range(8)], id="shares by age"),
    ],
)
def test_the_rules_by_example(found: list[Size], batch_size: int, options: Any, expected: list[int] | None) -> None:
    assert chosen(found, batch_size, **options) == expected


# Of atroposlib/tests/test_utils/test_min_batch_allocation.py: (env_id, size) of the groups, the batch size, the shares
# of connected environments, and env_id → sequences in the batch.
CASES: dict[str, tuple[list[Size], int, dict[int, float], Any]] = {
    "basic": ([(0, 2), (1, 2), (0, 2), (1, 2)], 8, {0: 0.25, 1: 0.5}, {0: 4, 1: 4}),
    "no minimums": ([(0, 1), (1, 1), (0, 1), (1, 1)], 4, {}, {0: 2, 1: 2}),
    "conflicting minimums": ([(0, 2), (1, 2)], 4, {0: 0.7, 1: 0.6}, {0: 2, 1: 2}),
    "an environment has nothing": ([(0, 2), (0, 2)], 4, {0: 0.3, 1: 0.5}, None),
    "disconnected": ([(0, 1), (1, 1)], 2, {0: 0.25}, {0: 1, 1: 1}),
    "empty": ([], 4, {0: 0.5}, None),
    "too few": ([(0, 1)], 4, {0: 0.5}, None),
    "three ones and a four": ([(0, 1)] * 3 + [(1, 4)], 4, {0: 0.25}, None),
    "three twos and an eight": ([(0, 2)] * 3 + [(1, 8)], 8, {0: 0.25}, None),
    "first in first out": ([(0, 1)] * 8, 4, {}, {0: 4}),
    "exact boundary": ([(0, 2), (0, 2), (1, 2), (1, 2)], 8, {0: 0.5, 1: 0.5}, {0: 4, 1: 4}),
    "zero minimum": ([(0, 1), (1, 1)], 2, {0: 0.0, 1: 0.5}, {0: 1, 1: 1}),
    "minimum below one sequence": ([(0, 1), (0, 1)], 2, {0: 0.5, 2: 0.3}, {0: 2}),
    "more than everything": ([(0, 1)] * 8, 4, {0: 1.5}, {0: 4}),
    "mixed": ([(0, 2)] * 4 + [(1, 2)] * 2 + [(2, 2)] * 2, 16, {0: 0.4, 1: 0.2}, {0: 8, 1: 4, 2: 4}),
    "dominated": ([(1, 1)] * 100, 10, {0: 0.5, 1: 0.3}, None),
    "dominated, no minimum": ([(1, 1)] * 100, 10, {1: 0.3}, {1: 10}),
    "mixed sizes": ([(0, 1), (0, 1), (1, 1)], 7, {0: 0.5, 1: 0.25}, None),
    "several packs": ([(0, 1)] * 16 + [(1, 1)] * 2, 16, {0: 0.75}, {0: 16}),
    # Upstream stalls (None), since one group of 2 of environment 0 makes no pack of 8.
    "packs": ([(0, 2)] + [(6, 2)] * 3 + [(2, 4)] * 5 + [(3, 8)] * 3, 16, {0: 0.1, 3: 0.5}, {0: 2, 6: 6, 3: 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_upstreams_minimum_cases(name: str) -> None:
    found, batch_size, shares, expected = CASES[name]
    minimums = {env_id: least for env_id, share in shares.items() if (least := int(batch_size * share)) > 0}
    batch = chosen(found, batch_size, batch_fill="exact", minimums=minimums)
    counts: Counter[int] = Counter()
    for env_id, size in [found[seq] for seq in batch or ()]:  # type: ignore[misc]
        counts[env_id] += size
    assert (None if batch is None else counts) == expected


@example([16, 8, 8], 32)
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


@example([1], 4096)
@example([16], 8)
@example([5, 7], 23)
@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 60))
def test_representable_against_counting_up(sizes: list[int], target: int) -> None:
    made = {0}
    for total in range(1, target + 1):
        if any(total - size in made for size in sizes):
            made.add(total)
    assert representable(sizes, target) is (target in made)
