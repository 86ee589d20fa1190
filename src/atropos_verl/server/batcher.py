"""The queue of waiting groups, the choice of those that make the next batch, and the record of what was handed out.

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
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

__all__ = [
    "ARRIVALS_FILE",
    "BATCH_FILLS",
    "MAX_PASSED_OVER",
    "ArrivalLog",
    "BatchPolicy",
    "GroupQueue",
    "QueueView",
    "StoredGroup",
    "choose_batch",
    "oldest_subset",
    "reachable",
    "representable",
]

logger = logging.getLogger(__name__)

ARRIVALS_FILE = "arrivals.jsonl"
_SIZES_REMEMBERED = 64
"""Groups of each environment whose sizes tell what may still come."""
BATCH_FILLS = ("auto", "exact", "at_most", "at_least")
MAX_PASSED_OVER = 4
"""Batches that may hold younger groups before a group is forced into the next one."""


@dataclass(slots=True)
class StoredGroup:
    """An accepted group."""

    seq: int
    env_id: int | None
    size: int
    """Sequences."""
    tokens: int
    arrived: float
    digest: bytes
    """XXH3-128 of its JSON with every key."""
    raw: bytes
    """Its JSON as received."""
    suffix: bytes = b""
    """Replaces the closing brace of ``raw`` so that every key is there (upstream's trainers read them all)."""
    packed: bytes | None = None
    """Its binary form; None until somebody wants it."""
    passed_over: int = 0

    def json_parts(self) -> list[bytes | memoryview]:
        """Its JSON with every key, in pieces: it may be long, and copying it takes time."""
        return [memoryview(self.raw)[:-1], self.suffix] if self.suffix else [self.raw]

    @property
    def held_bytes(self) -> int:
        return len(self.raw) + (len(self.packed) if self.packed is not None else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """The wishes of the trainer, from ``/register``."""

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

    classes: Mapping[tuple[int | None, int], Iterable[StoredGroup]]
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


def choose_batch(view: QueueView, policy: BatchPolicy, now: float) -> list[StoredGroup] | None:
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
    # For at_least the sum may exceed the batch by less than the largest group.
    sums = reachable(sizes, policy.batch_size + max(sizes, default=0))
    target = _fallback_target(view, policy, now, sums)
    if target is None:
        return None
    subset = oldest_subset(sizes, target)
    return None if subset is None else [groups[i] for i in subset]


def _prefix(view: QueueView, batch_size: int) -> list[StoredGroup] | None:
    """The oldest groups when they add up exactly: the common case, in time proportional to the batch."""
    taken: list[StoredGroup] = []
    total = 0
    for group in _in_order(view):
        taken.append(group)
        total += group.size
        if total >= batch_size:
            return taken if total == batch_size else None
    return None


def _in_order(view: QueueView) -> Iterator[StoredGroup]:
    return heapq.merge(*view.classes.values(), key=_by_age)


def _by_age(group: StoredGroup) -> int:
    return group.seq


def _candidates(classes: Mapping[tuple[int | None, int], Iterable[StoredGroup]], limit: int) -> list[StoredGroup]:
    """Every group that can matter, oldest first: of each class the first ``limit // size`` (more do not fit)."""
    found: list[StoredGroup] = []
    for (_, size), groups in classes.items():
        found.extend(islice(groups, -(-limit // size)))
    found.sort(key=_by_age)
    return found


def _fallback_target(view: QueueView, policy: BatchPolicy, now: float, sums: int) -> int | None:
    """Sequences of the closest batch. None: wait."""
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
    """True when a batch's worth of sequences has waited long enough, or no group that fits can come."""
    if not representable(tuple(view.sizes_seen), policy.batch_size):
        return True
    total = 0
    for group in _in_order(view):
        total += group.size
        if total >= policy.batch_size:
            return now - group.arrived >= policy.fill_wait
    return False


def _tail_due(view: QueueView, policy: BatchPolicy, now: float) -> bool:
    """True when less than a batch is handed out: nobody can send more, or the trainer has waited long enough."""
    quiet = now - view.last_arrival
    if policy.tail_wait is not None and quiet >= policy.tail_wait:
        return True
    return not view.anyone_sending and quiet >= policy.fill_wait


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _forced(view: QueueView, policy: BatchPolicy, oldest: StoredGroup) -> list[StoredGroup]:
    """The best batch that holds ``oldest``, left behind too often: exact, else the closest the policy allows."""
    others = [group for group in _candidates(view.classes, policy.batch_size) if group.seq != oldest.seq]
    sizes = [group.size for group in others]
    room = policy.batch_size - oldest.size
    sums = reachable(sizes, room + max(sizes, default=0))
    target = (sums & ((1 << (room + 1)) - 1)).bit_length() - 1
    if target != room and policy.fill == "at_least" and sums >> room:
        target = room + _lowest_bit(sums >> room)
    return [oldest, *(others[i] for i in oldest_subset(sizes, target) or ())]


def _with_minimums(view: QueueView, policy: BatchPolicy, now: float) -> list[StoredGroup] | None:
    """A batch in which each environment with a minimum has its share; None when one has too little queued."""
    pools = _pools(view, policy)
    limit = policy.batch_size + max((group.size for pool in pools for group in pool.groups), default=0)
    if any(pool.waiting < pool.minimum for pool in pools):
        return None
    makes = [reachable([group.size for group in pool.groups], limit) >> pool.minimum << pool.minimum for pool in pools]
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
    fits = ends[0] & ((1 << (policy.batch_size + 1)) - 1)
    if view.total >= policy.batch_size and policy.fill != "exact" and not fits:
        # The minimums cannot be met without exceeding the batch, however long one waits.
        return choose_batch(replace(view, minimums={}), policy, now)
    return None


@dataclass(frozen=True, slots=True)
class _Pool:
    groups: list[StoredGroup]
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


def _added(first: int, second: int, limit: int) -> int:
    """The sums of one element of each set."""
    if first.bit_count() > second.bit_count():
        first, second = second, first
    result = 0
    for bit in _bits(first):
        result |= second << bit
    return result & ((1 << (limit + 1)) - 1)


def _fair_shares(view: QueueView, pools: list[_Pool], batch_size: int) -> list[int]:
    """The sequences of each pool among the ``batch_size`` oldest."""
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
) -> list[StoredGroup]:
    """Groups of each pool for ``target`` sequences, each pool as near as possible to its share by age."""
    chosen: list[StoredGroup] = []
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


# --- subsets that add up: 0/1 knapsack over group sizes, exact, on Python integers used as bit sets ------------------
#
# Bit ``s`` of a set is 1 when ``s`` sequences can be made of some of the groups. A group of size ``g`` adds
# ``set << g``. For a batch of B sequences and n candidate groups that costs n shifts of B bits.


def _suffix_sums(sizes: Sequence[int], limit: int) -> list[int]:
    """``result[i]``: the sums up to ``limit`` that the groups ``i..n-1`` can make; ``result[n] == 1`` (only 0)."""
    mask = (1 << (limit + 1)) - 1
    sums = [1] * (len(sizes) + 1)
    for index in range(len(sizes) - 1, -1, -1):
        below = sums[index + 1]
        sums[index] = (below | below << sizes[index]) & mask if sizes[index] <= limit else below
    return sums


def reachable(sizes: Sequence[int], limit: int) -> int:
    """The sums up to ``limit`` that some of the groups can make, as a bit set."""
    return _suffix_sums(sizes, limit)[0]


def oldest_subset(sizes: Sequence[int], target: int) -> list[int] | None:
    """Indices of groups that make exactly ``target``, or None. ``sizes`` is in order of age, the oldest first.

    Of all such subsets it is the one that holds the oldest groups: the first index that two subsets do not share is in
    this one. ``[3, 1, 4]`` and 5 give ``[1, 2]``; ``[2, 2, 4, 2]`` and 4 give ``[0, 1]``.
    """
    sums = _suffix_sums(sizes, target)
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
    """True when any number of groups of these sizes can make ``target``, so that waiting for more can help."""
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


# --- the queue -------------------------------------------------------------------------------------------------------


class GroupQueue:
    """Not thread-safe: it belongs to the event loop."""

    def __init__(self) -> None:
        self.classes: dict[tuple[int | None, int], deque[StoredGroup]] = {}
        self.groups = 0
        self.sequences = 0
        self.last_arrival = 0.0
        self._in_classes = 0
        self._by_env: Counter[int | None] = Counter()
        self._by_size: Counter[int] = Counter()
        self._recent: dict[int | None, deque[int]] = {}

    def add(self, group: StoredGroup) -> None:
        """A group that just arrived (``seq`` above all others)."""
        self.classes.setdefault((group.env_id, group.size), deque()).append(group)
        self._recent.setdefault(group.env_id, deque(maxlen=_SIZES_REMEMBERED)).append(group.size)
        self.last_arrival = group.arrived
        self._in_classes += group.size
        self.count([group], 1)

    def restore(self, groups: Iterable[StoredGroup]) -> None:
        """Groups that come back, each to its old place."""
        touched: dict[tuple[int | None, int], deque[StoredGroup]] = {}
        for group in groups:
            key = (group.env_id, group.size)
            touched[key] = self.classes.setdefault(key, deque())
            touched[key].append(group)
            self._in_classes += group.size
            self.count([group], 1)
        for key, members in touched.items():
            self.classes[key] = deque(sorted(members, key=lambda group: group.seq))

    def take(self, chosen: Sequence[StoredGroup]) -> list[StoredGroup]:
        """Remove the groups of a batch. Returns the older ones that it left behind, the first of each class."""
        gone = {group.seq for group in chosen}
        for key in {(group.env_id, group.size) for group in chosen}:
            members = self.classes[key]
            while members and members[0].seq in gone:
                gone.discard(members.popleft().seq)
            if any(group.seq in gone for group in chosen if (group.env_id, group.size) == key):
                members = self.classes[key] = deque(group for group in members if group.seq not in gone)
            if not members:
                del self.classes[key]
        self._in_classes -= sum(group.size for group in chosen)
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
            self._by_env[group.env_id] += sign * group.size
            self._by_size[group.size] += sign
            if not self._by_size[group.size]:
                del self._by_size[group.size]

    def waiting_sequences(self) -> int:
        """Sequences in the deques: without those that are only counted (``count``)."""
        return self._in_classes

    def env_sequences(self) -> Mapping[int | None, int]:
        """Sequences waiting, by environment (None: posted without one)."""
        return self._by_env

    def largest_group(self) -> int:
        return max(self._by_size, default=1)

    def oldest(self) -> StoredGroup | None:
        heads = [members[0] for members in self.classes.values()]
        return min(heads, key=lambda group: group.seq, default=None)

    def sizes_of(self, env_id: int | None) -> frozenset[int]:
        """Sizes of this environment's latest groups."""
        return frozenset(self._recent.get(env_id, ()))


# --- the record ------------------------------------------------------------------------------------------------------


class ArrivalLog:
    """Appends to ``arrivals.jsonl``, which ``atropos-verl simulate --arrivals`` replays. One line a batch::

        {"step": 3, "at": 1764034.2181, "groups": [[1764031.4092, 0, 8, 181], …]}

    ``at``: the batch was handed out. A group is [arrival, environment (null: unnamed), sequences, tokens]. Times are
    seconds since the epoch. A disk that refuses is reported once, and no batch fails for it.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / ARRIVALS_FILE
        self._failed = False

    def add(self, step: int, at: float, groups: Iterable[StoredGroup]) -> None:
        """Note the batch of ``step`` (from 1), handed out ``at``."""
        if self._failed:
            return
        rows = [[round(group.arrived, 4), group.env_id, group.size, group.tokens] for group in groups]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "at": round(at, 4), "groups": rows}, separators=(",", ":")) + "\n")
        except OSError as error:
            self._failed = True
            logger.warning("cannot write %s: %s; arrivals are not recorded any more", self.path, error.strerror)
