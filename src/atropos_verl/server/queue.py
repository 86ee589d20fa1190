"""``GroupQueue``: the groups that wait, in order of arrival, with the counts that ``/status-env`` asks for.

Every question is answered in time that does not grow with the queue: groups lie in one deque per (environment, size),
and counts are kept as groups come and go.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from atropos_verl.protocol.wire_model import StoredGroup

__all__ = ["GroupQueue"]

_SIZES_REMEMBERED = 64
"""Groups of each environment whose sizes tell what may still come."""


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

    def take(self, chosen: Sequence[StoredGroup]) -> None:
        """Remove the groups of a batch, and note which older ones it left behind."""
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
        for members in self.classes.values():
            if members[0].seq < newest:
                members[0].passed_over += 1

    def count(self, groups: Iterable[StoredGroup], sign: int) -> None:
        """Count groups as waiting (1) or not (-1) that lie elsewhere: those of returned batches."""
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

    def senders(self) -> list[int | None]:
        """Environments (None: unnamed posts) that have sent anything."""
        return list(self._recent)
