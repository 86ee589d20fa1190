"""The choice of a batch: exact sums of group sizes, each rule of the policy by example, and upstream's own cases."""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atropos_verl.protocol.messages import BatchPolicy
from atropos_verl.server.batcher import (
    MAX_PASSED_OVER,
    QueueView,
    StoredGroup,
    choose_batch,
    oldest_subset,
    representable,
)


def waiting(seq: int, size: int, env_id: int | None = None) -> StoredGroup:
    return StoredGroup(seq, env_id, size, tokens=0, arrived=0.0, digest=b"", raw=b"")


def view(groups: list[StoredGroup], **fields: Any) -> QueueView:
    classes: dict[tuple[int | None, int], list[StoredGroup]] = {}
    for group in groups:
        classes.setdefault((group.env_id, group.size), []).append(group)
    made: dict[str, Any] = {
        "total": sum(group.size for group in groups),
        "last_arrival": max((group.arrived for group in groups), default=0.0),
        "sizes_seen": frozenset(group.size for group in groups),
    }
    return QueueView(classes=classes, **{**made, **fields})


def sizes(*found: int, env_id: int | None = None) -> list[StoredGroup]:
    return [waiting(seq, size, env_id) for seq, size in enumerate(found)]


def chosen(groups: list[StoredGroup], batch_size: int, now: float = 0.0, fill: str = "auto", **fields: Any) -> Any:
    batch = choose_batch(view(groups, **fields), BatchPolicy(batch_size=batch_size, batch_fill=fill), now)
    return None if batch is None else [group.seq for group in batch]


SEEN = frozenset


@pytest.mark.parametrize(
    ("found", "batch_size", "options", "expected"),
    [
        pytest.param((4, 4, 4, 4), 8, {}, [0, 1], id="the oldest when they fit"),
        pytest.param((6, 4, 4, 2), 8, {}, [0, 3], id="the oldest exact fit"),
        pytest.param((6, 4, 4), 8, {}, [1, 2], id="an exact fit without the oldest"),
        pytest.param((4,), 8, {"now": 1e6}, None, id="less than a batch waits while somebody sends"),
        pytest.param((), 8, {}, None, id="nothing"),
        pytest.param((4,), 8, {"now": 4.9, "anyone_sending": False}, None, id="the rest waits a while"),
        pytest.param((4,), 8, {"now": 5.0, "anyone_sending": False}, [0], id="the rest when nobody can send more"),
        pytest.param((3, 3, 3), 8, {}, [0, 1], id="no waiting when no mix of 3 fits"),
        pytest.param((6, 6, 6), 16, {}, [0, 1], id="no waiting when no mix of 6 fits"),
        pytest.param((3, 3, 3), 8, {"now": 4.9, "sizes_seen": SEEN({3, 5})}, None, id="a size that fits may come"),
        pytest.param((3, 3, 3), 8, {"now": 5.0, "sizes_seen": SEEN({3, 5})}, [0, 1], id="but did not"),
        pytest.param((3, 3, 3, 3), 8, {"fill": "at_least"}, [0, 1, 2], id="at_least: the smallest above"),
        pytest.param((3, 5, 7), 8, {"fill": "at_least"}, [0, 1], id="at_least: exact"),
        pytest.param((6, 6, 5), 8, {"fill": "at_least"}, [0, 2], id="at_least: the smallest above, not the oldest"),
        pytest.param((3, 3), 8, {"fill": "at_least", "now": 1e6}, None, id="at_least: too few"),
        pytest.param((3, 5, 3), 7, {"fill": "at_most", "sizes_seen": SEEN({1})}, [0, 2], id="at_most: at once"),
        pytest.param((3, 3, 3), 8, {"fill": "at_most", "sizes_seen": SEEN({1})}, [0, 1], id="at_most: the fullest"),
        pytest.param((3, 3, 3), 8, {"fill": "exact", "now": 1e6}, None, id="exact: nothing else"),
        pytest.param((16, 4, 4), 8, {"fill": "exact"}, [1, 2], id="exact: without what is too large"),
        pytest.param((16, 4, 4), 8, {}, [0], id="a group larger than a batch is a batch"),
    ],
)
def test_the_rules_by_example(found: tuple[int, ...], batch_size: int, options: Any, expected: Any) -> None:
    assert chosen(sizes(*found), batch_size, **options) == expected


def test_the_rest_is_handed_out_after_the_trainers_own_wait() -> None:
    policy = BatchPolicy(batch_size=8, batch_tail_wait=30.0)
    assert choose_batch(view(sizes(4)), policy, 29.0) is None
    assert [group.seq for group in choose_batch(view(sizes(4)), policy, 30.0) or ()] == [0]


def test_a_group_left_behind_is_forced_in() -> None:
    groups = sizes(6, 4, 4)
    groups[0].passed_over = MAX_PASSED_OVER - 1
    assert chosen(groups, 8) == [1, 2]
    groups[0].passed_over = MAX_PASSED_OVER
    assert chosen(groups, 8) == [0]
    assert chosen(groups, 8, fill="at_least") == [0, 1]
    assert chosen(groups, 8, fill="exact") == [1, 2]
    assert chosen([*groups, waiting(3, 2)], 8) == [0, 3]


def test_minimums_that_cannot_fit_together_do_not_stall() -> None:
    groups = [waiting(0, 6, 0), waiting(1, 6, 1), waiting(2, 6, 0)]
    batch = chosen(groups, 8, now=10.0, minimums={0: 4, 1: 4})
    assert batch is not None and len(batch) == 1


def test_each_pool_gets_its_share_by_age() -> None:
    # Of the 8 oldest sequences 6 are of environment 0: it is not cut down to its minimum of 2.
    groups = [waiting(i, 1, 0) for i in range(6)] + [waiting(6, 1, 1), waiting(7, 1, 1)]
    groups += [waiting(8 + i, 1, 1) for i in range(8)]
    assert chosen(groups, 8, minimums={0: 2, 1: 2}) == [0, 1, 2, 3, 4, 5, 6, 7]


def upstream_case(queue: list[tuple[int, int]], batch_size: int, shares: dict[int, float]) -> Any:
    """A case of atroposlib/tests/test_utils/test_min_batch_allocation.py: env_id → sequences in the batch, or None.

    ``queue``: (env_id, size). ``shares``: those of connected environments."""
    groups = [waiting(seq, size, env_id) for seq, (env_id, size) in enumerate(queue)]
    minimums = {env_id: least for env_id, share in shares.items() if (least := int(batch_size * share)) > 0}
    batch = chosen(groups, batch_size, fill="exact", minimums=minimums)
    if batch is None:
        return None
    counts: Counter[int | None] = Counter()
    for seq in batch:
        counts[groups[seq].env_id] += groups[seq].size
    return counts


CASES = {
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
}


@pytest.mark.parametrize("name", CASES)
def test_upstreams_minimum_cases(name: str) -> None:
    queue, batch_size, shares, expected = CASES[name]
    assert upstream_case(queue, batch_size, shares) == expected


def test_where_upstream_stalls_on_packs_a_batch_is_formed() -> None:
    """Upstream gives None here, since one group of 2 of environment 0 makes no pack of 8. The minimums can be met."""
    queue = [(0, 2), (6, 2), (6, 2), (6, 2)] + [(2, 4)] * 5 + [(3, 8)] * 3
    counts = upstream_case(queue, 16, {0: 0.1, 3: 0.5})
    assert sum(counts.values()) == 16 and counts[0] >= 1 and counts[3] >= 8


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
