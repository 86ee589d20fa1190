"""The queue of waiting groups, and the choice of those that make the next batch: a set of whole groups.

Preferred are groups that add up to ``batch_size`` exactly, the oldest that do. docs/internals.md has the other rules.
"""

import bisect
import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from operator import attrgetter
from typing import NamedTuple

from atropos_verl.protocol.messages import BatchPolicy

_SIZES_REMEMBERED = 64  # groups of each environment whose sizes tell what may still come
BATCH_FILLS = ("auto", "exact", "at_most", "at_least")
_by_age = attrgetter("seq")
MAX_PASSED_OVER = 4  # batches that may hold younger groups before a group is forced into the next one


@dataclass(slots=True)
class StoredGroup:
    """An accepted group."""

    seq: int
    env_id: int | None
    # As in ``CheckedGroup``:
    size: int
    tokens: int
    arrived: float
    digest: bytes
    raw: bytes
    suffix: bytes = b""
    packed: bytes | None = None  # its binary form; None until somebody wants it
    passed_over: int = 0

    def json_parts(self) -> list[bytes | memoryview]:
        """Its JSON with every key, in pieces: it may be long, and copying it takes time."""
        return [memoryview(self.raw)[:-1], self.suffix] if self.suffix else [self.raw]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """The queue as classes of groups with the same environment and size, each in order of arrival."""

    classes: Mapping[tuple[int | None, int], Iterable[StoredGroup]]
    """(env_id, size) → groups; the iterables are read from the front, and only as far as needed."""
    total: int  # sequences waiting
    last_arrival: float  # seconds since the epoch; when the newest group came
    sizes_seen: frozenset[int] = frozenset()  # group sizes that may still come
    minimums: Mapping[int, int] = field(default_factory=dict)  # env_id → least sequences in the batch
    anyone_sending: bool = True  # some environment is alive, or one is expected

    def in_order(self) -> Iterator[StoredGroup]:
        return heapq.merge(*self.classes.values(), key=_by_age)


class _Pool(NamedTuple):
    """The groups that can matter of an environment with a minimum, or of everybody else."""

    groups: list[StoredGroup]
    makes: int  # the sums from the minimum on that some of the groups make, as a bit set


def choose_batch(view: QueueView, policy: BatchPolicy, now: float) -> list[StoredGroup] | None:
    """The groups of the next batch in order of arrival, or None when it is better (or necessary) to wait."""
    batch_size = policy.batch_size
    if view.total == 0 or batch_size < 1:
        return None
    oldest = next(view.in_order())
    if policy.batch_fill != "exact" and oldest.size > batch_size:
        return [oldest]
    if policy.batch_fill != "exact" and oldest.passed_over >= MAX_PASSED_OVER:
        return _forced(view, policy, oldest)
    head = _head(view, batch_size)
    if not view.minimums and sum(group.size for group in head) == batch_size:
        return head  # the common case, in time proportional to the batch
    # The sum may exceed the batch by less than the largest group (``at_least``).
    limit = batch_size + max(size for _, size in view.classes)
    pools = _pools(view, batch_size, limit)
    if any(not pool.makes for pool in pools):
        return None
    # ends[i]: the totals that pools i.. can make together, each with its minimum.
    ends = [*accumulate(reversed(pools), lambda sums, pool: _added(sums, pool.makes, limit), initial=1)][::-1]
    target = batch_size if ends[0] >> batch_size & 1 else _fallback_target(view, policy, now, head, ends[0])
    if target is not None:
        return _shared_out(pools, ends, target, head)
    may_differ = policy.batch_fill != "exact" and view.total >= batch_size
    if view.minimums and may_differ and _highest(ends[0], batch_size) < 0:
        # The minimums cannot be met without exceeding the batch, however long one waits.
        return choose_batch(replace(view, minimums={}), policy, now)
    return None


def _head(view: QueueView, batch_size: int) -> list[StoredGroup]:
    """The oldest groups, until they are at least a batch."""
    taken: list[StoredGroup] = []
    for group in view.in_order():
        taken.append(group)
        batch_size -= group.size
        if batch_size <= 0:
            break
    return taken


def _candidates(classes: Mapping[tuple[int | None, int], Iterable[StoredGroup]], limit: int) -> list[StoredGroup]:
    """Every group that can matter, oldest first: of each class the first ``limit // size`` (more do not fit)."""
    found = [group for (_, size), groups in classes.items() for group in islice(groups, -(-limit // size))]
    return sorted(found, key=_by_age)


def _fallback_target(
    view: QueueView, policy: BatchPolicy, now: float, head: Sequence[StoredGroup], sums: int
) -> int | None:
    """Sequences of the closest batch of those in ``sums``. None: wait."""
    batch_size = policy.batch_size
    if policy.batch_fill == "exact":
        return None
    if view.total < batch_size:
        quiet = now - view.last_arrival
        trainer_waited = policy.batch_tail_wait is not None and quiet >= policy.batch_tail_wait
        if not trainer_waited and (view.anyone_sending or quiet < policy.batch_fill_wait):
            return None
    elif policy.batch_fill == "at_least" and sums >> batch_size:
        return batch_size + _lowest(sums >> batch_size)
    elif policy.batch_fill == "auto":
        # ``head`` is a batch's worth of sequences: its last group came when there were enough.
        may_fit = representable(tuple(view.sizes_seen), batch_size)
        if may_fit and now - head[-1].arrived < policy.batch_fill_wait:
            return None
    highest = _highest(sums, batch_size)
    return highest if highest > 0 else None


def _forced(view: QueueView, policy: BatchPolicy, oldest: StoredGroup) -> list[StoredGroup]:
    """The best batch that holds ``oldest``, left behind too often: exact, else the closest the policy allows."""
    others = [group for group in _candidates(view.classes, policy.batch_size) if group is not oldest]
    sizes = [group.size for group in others]
    room = policy.batch_size - oldest.size
    sums = _suffix_sums(sizes, room + max(sizes, default=0))[0]
    target = _highest(sums, room)
    if target != room and policy.batch_fill == "at_least" and sums >> room:
        target = room + _lowest(sums >> room)
    return [oldest, *(others[i] for i in oldest_subset(sizes, target) or ())]


def _pools(view: QueueView, batch_size: int, limit: int) -> list[_Pool]:
    """One pool per environment with a minimum, and one of everybody else's groups. Minimums that do not fit the batch
    together become the same share of it each, at least one sequence."""
    total = sum(view.minimums.values())
    minimums: dict[int | None, int] = {env_id: least for env_id, least in view.minimums.items() if least > 0}
    if total > batch_size:
        minimums = {env_id: max(1, least * batch_size // total) for env_id, least in minimums.items()}
    pools = []
    for owner in (*minimums, None):
        owned = {k: groups for k, groups in view.classes.items() if (k[0] if k[0] in minimums else None) == owner}
        candidates, least = _candidates(owned, batch_size), minimums.get(owner, 0)
        makes = _suffix_sums([group.size for group in candidates], limit)[0] >> least << least
        pools.append(_Pool(candidates, makes))
    return pools


def _shared_out(
    pools: Sequence[_Pool], ends: Sequence[int], target: int, head: Sequence[StoredGroup]
) -> list[StoredGroup]:
    """Groups of each pool for ``target`` sequences, each pool as near as possible to its share of the oldest."""
    shares = {group.seq: group.size for group in head}
    chosen: list[StoredGroup] = []
    for pool, rest in zip(pools, ends[1:], strict=True):
        share = sum(shares.get(group.seq, 0) for group in pool.groups)
        fits = [part for part in _bits(pool.makes) if part <= target and rest >> (target - part) & 1]
        part = min(fits, key=lambda part: (abs(part - share), part))
        chosen.extend(pool.groups[i] for i in oldest_subset([group.size for group in pool.groups], part) or ())
        target -= part
    return sorted(chosen, key=_by_age)


# Sums of group sizes: a 0/1 knapsack, exact, on Python integers used as bit sets. Bit ``s`` of a set is 1 when some of
# the groups make ``s`` sequences. A group of size ``g`` adds ``set << g``.


def _bits(bits: int) -> Iterator[int]:
    while bits:
        yield _lowest(bits)
        bits &= bits - 1


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _highest(bits: int, limit: int) -> int:
    """The highest element up to ``limit``; -1: none."""
    return _up_to(bits, limit).bit_length() - 1


def _up_to(bits: int, limit: int) -> int:
    return bits & ((1 << (limit + 1)) - 1)


def _added(first: int, second: int, limit: int) -> int:
    """The sums of one element of each set."""
    if first.bit_count() > second.bit_count():
        first, second = second, first
    result = 0
    for bit in _bits(first):
        result |= second << bit
    return _up_to(result, limit)


def _suffix_sums(sizes: Sequence[int], limit: int) -> list[int]:
    """``result[i]``: the sums up to ``limit`` that the groups ``i..n-1`` can make; ``result[n] == 1`` (only 0)."""
    sums = [1] * (len(sizes) + 1)
    for index in range(len(sizes) - 1, -1, -1):
        below = sums[index + 1]
        sums[index] = _up_to(below | below << sizes[index], limit) if sizes[index] <= limit else below
    return sums


def oldest_subset(sizes: Sequence[int], target: int) -> list[int] | None:
    """Indices of groups that make exactly ``target``, or None. ``sizes`` is in order of age, the oldest first. Of all
    such subsets it is the one that holds the oldest groups: the first index that two subsets do not share is in this
    one. ``[3, 1, 4]`` and 5 give ``[1, 2]``; ``[2, 2, 4, 2]`` and 4 give ``[0, 1]``."""
    sums = _suffix_sums(sizes, target)
    if not sums[0] >> target & 1:
        return None
    chosen, left = [], target
    for index, size in enumerate(sizes):
        if 0 < size <= left and sums[index + 1] >> (left - size) & 1:
            chosen.append(index)
            left -= size
    return chosen


def representable(sizes: Sequence[int], target: int) -> bool:
    """True when any number of groups of these sizes can make ``target``, so that waiting for more can help."""
    sums = 1
    for size in set(sizes):
        step = size
        while 0 < step <= target:  # doubling: after k rounds, up to 2^k groups of this size
            sums |= _up_to(sums << step, target)
            step *= 2
    return bool(sums >> target & 1)


class GroupQueue:
    """Not thread-safe: it belongs to the event loop."""

    def __init__(self) -> None:
        self.classes: dict[tuple[int | None, int], deque[StoredGroup]] = {}
        self.groups = 0
        self.sequences = 0
        self.in_classes = 0  # sequences in ``classes``: without those that are only counted (``count``)
        self.by_env: Counter[int | None] = Counter()
        """Sequences waiting, by environment (None: posted without one)."""
        self.last_arrival = 0.0
        self._by_size: Counter[int] = Counter()
        self._recent: dict[int | None, deque[int]] = {}

    def add(self, group: StoredGroup) -> None:
        """A group that just arrived (``seq`` above all others)."""
        self._recent.setdefault(group.env_id, deque(maxlen=_SIZES_REMEMBERED)).append(group.size)
        self.last_arrival = group.arrived
        self.restore([group])

    def restore(self, groups: Iterable[StoredGroup]) -> None:
        """Groups that come back, each to its old place."""
        for group in groups:
            bisect.insort(self.classes.setdefault((group.env_id, group.size), deque()), group, key=_by_age)
            self.in_classes += group.size
            self.count([group], 1)

    def take(self, chosen: Sequence[StoredGroup]) -> list[StoredGroup]:
        """Remove the groups of a batch. Returns the older ones that it left behind, the first of each class."""
        for group in chosen:
            members = self.classes[key := (group.env_id, group.size)]
            members.remove(group)  # near the front: see ``_candidates``
            if not members:
                del self.classes[key]
        self.in_classes -= sum(group.size for group in chosen)
        self.count(chosen, -1)
        newest = max(group.seq for group in chosen)
        passed_over = [members[0] for members in self.classes.values() if members[0].seq < newest]
        for group in passed_over:
            group.passed_over += 1
        return passed_over

    def count(self, groups: Iterable[StoredGroup], sign: int) -> None:
        """Count groups that are not in the deques, those of returned batches, as waiting (1) or not (-1)."""
        for group in groups:
            self.groups += sign
            self.sequences += sign * group.size
            self.by_env[group.env_id] += sign * group.size
            self._by_size[group.size] += sign
            if not self._by_size[group.size]:
                del self._by_size[group.size]

    def largest_group(self) -> int:
        return max(self._by_size, default=1)

    def oldest(self) -> StoredGroup | None:
        return min((members[0] for members in self.classes.values()), key=_by_age, default=None)

    def sizes_of(self, env_id: int | None) -> frozenset[int]:
        """Sizes of this environment's latest groups."""
        return frozenset(self._recent.get(env_id, ()))
