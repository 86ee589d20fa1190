"""An inference engine as a queue: sequences share its tokens per second, and each has a speed it cannot exceed."""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Group:
    """One group on its way. ``version`` is that of the weights when its first token was made."""

    environment: int
    lengths: list[float]
    latency: float
    version: int = -1
    unfinished: int = 0
    running: int = 0
    """Sequences that hold a slot."""
    cancelled: bool = False
    accepted: bool = False
    """In the queue, or beyond it."""
    tokens: float = 0.0
    """Made so far; all of them once it is finished."""


class Generation:
    """Processor sharing with ``slots`` places and a line in front of them.

    All running sequences advance at the same rate, ``min(sequence_rate, capacity / running)``, so one number, the
    tokens that each would have made since the beginning of time, says which finishes next: arrivals and departures cost
    O(log n).
    """

    def __init__(self, capacity: float, sequence_rate: float, slots: int) -> None:
        self._capacity = capacity
        self._sequence_rate = sequence_rate
        self._slots = slots
        self._ends: list[tuple[float, int, Group]] = []
        self._line: deque[tuple[Group, float]] = deque()
        self._order = itertools.count()
        self._running = 0
        self._made = 0.0
        self._now = 0.0
        self.version = 0
        self.paused = False
        self.busy_seconds = 0.0
        self.tokens = 0.0

    def next_time(self) -> float:
        """Time at which the next sequence is finished, if nothing else happens; infinity: never."""
        self._drop_cancelled()
        if self.paused or not self._ends:
            return math.inf
        return self._now + max(self._ends[0][0] - self._made, 0.0) / self._rate()

    def advance(self, now: float) -> None:
        """Let the time pass; no sequence may finish before ``now``."""
        if not self.paused and self._running:
            step = self._rate() * (now - self._now)
            self._made += step
            self.tokens += step * self._running
            self.busy_seconds += now - self._now
        self._now = now

    def add(self, group: Group) -> None:
        group.unfinished = len(group.lengths)
        for length in group.lengths:
            self._line.append((group, length))
        self._fill()

    def finish_next(self) -> Group | None:
        """Take out the sequence that is finished now. Returns its group when that was the last one."""
        self._drop_cancelled()
        _, _, group = heapq.heappop(self._ends)
        self._running -= 1
        group.running -= 1
        group.unfinished -= 1
        self._fill()
        return group if group.unfinished == 0 else None

    def cancel(self, group: Group) -> None:
        """Its sequences give their places up."""
        group.cancelled = True
        self._running -= group.running
        group.running = 0
        self._fill()

    def resume(self) -> None:
        self.paused = False
        self._fill()

    def _fill(self) -> None:
        # Nobody begins while the gate is shut: a first token under the old weights would be counted as such.
        while not self.paused and self._line and self._running < self._slots:
            group, length = self._line.popleft()
            if group.cancelled:
                continue
            if group.version < 0:
                group.version = self.version
            self._running += 1
            group.running += 1
            heapq.heappush(self._ends, (self._made + length, next(self._order), group))

    def _drop_cancelled(self) -> None:
        while self._ends and self._ends[0][2].cancelled:
            heapq.heappop(self._ends)

    def _rate(self) -> float:
        return min(self._sequence_rate, self._capacity / max(self._running, 1))
