"""Which waiting groups make the next batch. Pure: a view of the queue in, a choice out.

A batch is a set of whole groups. In order of preference:

1. groups that add up to ``batch_size`` exactly, the oldest that do;
2. when none do, the closest batch that splits no group, as ``batch_fill`` says: ``at_most`` (the fullest below),
   ``at_least`` (the smallest above), ``exact`` (none), or ``auto``: ``at_most``, once waiting cannot help any more.

Waiting cannot help when no mix of the sizes seen makes the batch size, when the sequences of a whole batch have waited
``fill_wait`` seconds, or when less than a batch is left and no environment is there to send more.

A group that was left behind by ``MAX_PASSED_OVER`` batches is in the next one (not under ``exact``), so an odd size
grows stale by a few steps, not for ever (minimums are waived for that batch). A group larger than a batch is a batch
of its own.

Environments with a ``min_batch_allocation`` get at least ``int(batch_size * share)`` sequences; shares that add up to
more than the batch are scaled down (upstream's rule).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from atropos_verl.server.subset import oldest_subset, reachable, representable

__all__ = ["BATCH_FILLS", "MAX_PASSED_OVER", "BatchPolicy", "Candidate", "QueueView", "choose_batch"]

BATCH_FILLS = ("auto", "exact", "at_most", "at_least")
MAX_PASSED_OVER = 4
"""Batches that may hold younger groups before a group is forced into the next one."""


class Candidate(Protocol):
    """A waiting group."""

    @property
    def seq(self) -> int:
        """Order of arrival."""

    @property
    def size(self) -> int:
        """Sequences."""

    @property
    def arrived(self) -> float:
        """Seconds since the epoch."""

    @property
    def passed_over(self) -> int:
        """Batches that hold younger groups than this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """What the trainer asked for at ``/register``."""

    batch_size: int
    """Sequences."""
    fill: str = "auto"
    fill_wait: float = 5.0
    """Seconds that a whole batch's worth of sequences may wait for an exact fit."""
    tail_wait: float | None = None
    """Seconds without a new group after which less than a batch is handed out; None: only when nobody can send more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """The queue as classes of groups with the same environment and size, each in order of arrival."""

    classes: Mapping[tuple[int | None, int], Iterable[Candidate]]
    """(env_id, size) → groups; the iterables are read from the front, and only as far as needed."""
    total: int
    """Sequences waiting."""
    last_arrival: float
    """Seconds since the epoch; when the newest group came."""
    sizes_seen: frozenset[int] = frozenset()
    """Group sizes that may still come."""
    minimums: Mapping[int, int] = field(default_factory=dict)
    """env_id → least sequences in the batch."""
    anyone_sending: bool = True
    """Some environment is alive, or one is expected."""


def choose_batch(view: QueueView, policy: BatchPolicy, now: float) -> list[Candidate] | None:
    """The groups of the next batch in order of arrival, or None when it is better (or necessary) to wait."""
    if view.total == 0 or policy.batch_size < 1:
        return None
    oldest = next(_in_order(view))
    if oldest.size > policy.batch_size:
        if policy.fill != "exact":
            return [oldest]
    elif oldest.passed_over >= MAX_PASSED_OVER and policy.fill != "exact":
        return _forced(view, policy, oldest)
    if view.minimums:
        return _with_minimums(view, policy, now)
    prefix = _prefix(view, policy.batch_size)
    if prefix is not None:
        return prefix
    groups = _candidates(view.classes, policy.batch_size)
    sizes = [group.size for group in groups]
    exact = oldest_subset(sizes, policy.batch_size)
    if exact is not None:
        return [groups[i] for i in exact]
    target = _fallback_target(view, policy, now, _sums(sizes, policy))
    if target is None:
        return None
    subset = oldest_subset(sizes, target)
    return None if subset is None else [groups[i] for i in subset]


def _prefix(view: QueueView, batch_size: int) -> list[Candidate] | None:
    """The oldest groups when they add up exactly: the common case, in time proportional to the batch."""
    taken: list[Candidate] = []
    total = 0
    for group in _in_order(view):
        taken.append(group)
        total += group.size
        if total >= batch_size:
            return taken if total == batch_size else None
    return None


def _in_order(view: QueueView) -> Iterator[Candidate]:
    return heapq.merge(*view.classes.values(), key=_by_age)


def _by_age(group: Candidate) -> int:
    return group.seq


def _candidates(classes: Mapping[tuple[int | None, int], Iterable[Candidate]], limit: int) -> list[Candidate]:
    """Every group that can matter, oldest first: of each class the first ``limit // size`` (more do not fit)."""
    found: list[Candidate] = []
    for (_, size), groups in classes.items():
        found.extend(islice(groups, -(-limit // size)))
    found.sort(key=_by_age)
    return found


def _sums(sizes: Sequence[int], policy: BatchPolicy) -> int:
    # For at_least the sum may exceed the batch by less than the largest group.
    return reachable(sizes, policy.batch_size + max(sizes, default=0))


def _fallback_target(view: QueueView, policy: BatchPolicy, now: float, sums: int) -> int | None:
    """How many sequences the closest batch has; None: wait."""
    batch_size = policy.batch_size
    above = sums >> batch_size
    if view.total >= batch_size:
        if policy.fill == "at_least" and above:
            return batch_size + _lowest_bit(above)
        if policy.fill == "exact":
            return None
        if policy.fill == "auto" and not _waited(view, policy, now):
            return None
    elif policy.fill == "exact" or not _tail_due(view, policy, now):
        return None
    below = sums & ((1 << (batch_size + 1)) - 1)
    highest = below.bit_length() - 1
    return highest if highest > 0 else None


def _waited(view: QueueView, policy: BatchPolicy, now: float) -> bool:
    """Whether a batch's worth of sequences has waited long enough, or waiting is in vain."""
    if not representable(tuple(view.sizes_seen), policy.batch_size):
        return True
    total = 0
    for group in _in_order(view):
        total += group.size
        if total >= policy.batch_size:
            return now - group.arrived >= policy.fill_wait
    return False


def _tail_due(view: QueueView, policy: BatchPolicy, now: float) -> bool:
    """Whether less than a batch is handed out: nobody can send more, or the trainer does not want to wait longer."""
    quiet = now - view.last_arrival
    if policy.tail_wait is not None and quiet >= policy.tail_wait:
        return True
    return not view.anyone_sending and quiet >= policy.fill_wait


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _forced(view: QueueView, policy: BatchPolicy, oldest: Candidate) -> list[Candidate]:
    """The best batch that holds ``oldest``, left behind too often: exact, else the closest the policy allows."""
    others = [group for group in _candidates(view.classes, policy.batch_size) if group.seq != oldest.seq]
    sizes = [group.size for group in others]
    room = policy.batch_size - oldest.size
    sums = reachable(sizes, room + max(sizes, default=0))
    target = (sums & ((1 << (room + 1)) - 1)).bit_length() - 1
    if target != room and policy.fill == "at_least" and sums >> room:
        target = room + _lowest_bit(sums >> room)
    return [oldest, *(others[i] for i in oldest_subset(sizes, target) or ())]


def _with_minimums(view: QueueView, policy: BatchPolicy, now: float) -> list[Candidate] | None:
    """A batch in which each environment with a minimum has its share; None when one has too little queued."""
    pools = _pools(view, policy)
    limit = policy.batch_size + max((group.size for pool in pools for group in pool.groups), default=0)
    if any(pool.waiting < pool.minimum for pool in pools):
        return None
    makes = [_at_least(reachable([g.size for g in pool.groups], limit), pool.minimum) for pool in pools]
    # ends[i]: the totals that pools i.. can make together, each with its minimum.
    ends = [1]
    for bits in reversed(makes):
        ends.append(_added(ends[-1], bits, limit))
    ends.reverse()
    if ends[0] >> policy.batch_size & 1:
        target: int | None = policy.batch_size
    else:
        target = _fallback_target(view, policy, now, ends[0])
    if target is not None:
        return _shared_out(pools, makes, ends, target, _fair_shares(view, pools, policy.batch_size))
    if view.total >= policy.batch_size and _in_vain(ends[0], policy):
        # The minimums cannot be met without exceeding the batch, however long one waits.
        return choose_batch(replace(view, minimums={}), policy, now)
    return None


def _in_vain(sums: int, policy: BatchPolicy) -> bool:
    return policy.fill != "exact" and not sums & ((1 << (policy.batch_size + 1)) - 1)


@dataclass(frozen=True, slots=True)
class _Pool:
    groups: list[Candidate]
    minimum: int
    waiting: int
    """Sequences queued (as far as they can matter)."""


def _pools(view: QueueView, policy: BatchPolicy) -> list[_Pool]:
    """One pool per environment with a minimum, and one of everybody else's groups."""
    wanted = _scaled(view.minimums, policy.batch_size)
    pools = []
    for env_id, minimum in wanted.items():
        groups = _candidates({k: v for k, v in view.classes.items() if k[0] == env_id}, policy.batch_size)
        pools.append(_Pool(groups, minimum, sum(group.size for group in groups)))
    rest = _candidates({k: v for k, v in view.classes.items() if k[0] not in wanted}, policy.batch_size)
    pools.append(_Pool(rest, 0, sum(group.size for group in rest)))
    return pools


def _scaled(minimums: Mapping[int, int], batch_size: int) -> dict[int, int]:
    """Minimums that fit the batch together: all of them, or the same share of each, at least one sequence."""
    total = sum(minimums.values())
    if total <= batch_size:
        return {env_id: minimum for env_id, minimum in minimums.items() if minimum > 0}
    return {env_id: max(1, minimum * batch_size // total) for env_id, minimum in minimums.items() if minimum > 0}


def _at_least(bits: int, minimum: int) -> int:
    return bits >> minimum << minimum


def _added(first: int, second: int, limit: int) -> int:
    """The sums of one element of each set."""
    if first.bit_count() > second.bit_count():
        first, second = second, first
    result = 0
    while first:
        low = _lowest_bit(first)
        result |= second << low
        first &= first - 1
    return result & ((1 << (limit + 1)) - 1)


def _fair_shares(view: QueueView, pools: list[_Pool], batch_size: int) -> list[int]:
    """How many sequences of each pool are among the ``batch_size`` oldest."""
    home = {group.seq: index for index, pool in enumerate(pools) for group in pool.groups}
    shares = [0] * len(pools)
    total = 0
    for group in _in_order(view):
        if total >= batch_size:
            break
        total += group.size
        if group.seq in home:
            shares[home[group.seq]] += group.size
    return shares


def _shared_out(
    pools: list[_Pool], makes: list[int], ends: list[int], target: int, shares: list[int]
) -> list[Candidate]:
    """Groups of each pool for ``target`` sequences, each pool as near as possible to its share by age."""
    chosen: list[Candidate] = []
    left = target
    for index, pool in enumerate(pools):
        fits = [part for part in _bits(makes[index]) if part <= left and ends[index + 1] >> (left - part) & 1]
        _, part = min((abs(part - shares[index]), part) for part in fits)
        sizes = [group.size for group in pool.groups]
        chosen.extend(pool.groups[i] for i in oldest_subset(sizes, part) or ())
        left -= part
    chosen.sort(key=_by_age)
    return chosen


def _bits(bits: int) -> Iterator[int]:
    while bits:
        yield _lowest_bit(bits)
        bits &= bits - 1
