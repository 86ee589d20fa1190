"""One environment as atroposlib runs it (``BaseEnv.env_manager`` and ``add_train_workers``, atroposlib 0.4.0).

::

    every 0.1 s and a round trip:  q = queue_size of /status-env
      q full (max_batches_offpolicy batches)   every group under way is given up
      as many workers as it may ever have      nothing
      else                                     allowed = min(workers, full - q);
                                               too many workers: the oldest are given up; too few: new ones begin
    a group:  generation, latency  ─▶  posting (no longer a "running item")  ─▶  in the queue  ─▶  no longer a worker

Between the last two arrows a group counts both in ``q`` and as a worker. A look at that moment sees one group too many
and gives up another one: the oldest, which has come furthest. It begins again at the next look, and arrives as late as
a new one. One environment posts one group at a time, since it is one Python process.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from simulate.generation import Group


class World(Protocol):
    """The parts of a run that an environment talks to."""

    now: float

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay`` seconds."""

    def queued(self) -> int:
        """Groups in the queue."""

    def begin(self, environment: int) -> Group:
        """A new group, given to the engine; ``Environment.generated`` is called when its last sequence is finished."""

    def give_up(self, group: Group) -> None:
        """The group is wanted no more."""

    def accept(self, group: Group) -> None:
        """The group enters the queue."""


class Environment:
    """Looks are made only when something has changed since the last one: any other would do nothing.

    Args:
        workers: groups that it makes at a time.
        full: groups in the queue at which all stop: ``max_batches_offpolicy * batch_size // group_size``.
        period: seconds from one look to the next.
        phase: when its first look is; at most ``period``.
        drift: draws from [0, 1). Real intervals are a few milliseconds longer now and shorter then, so that after more
            than one of them nobody knows when the next look is; None: they are all equal.
        post_seconds: that it is busy with a group that it posts (JSON, gzip, the connection).
        answer_seconds: from the arrival of a group in the queue until it no longer counts as a worker, less what the
            answer of /status-env takes on its way.
    """

    def __init__(
        self,
        world: World,
        number: int,
        *,
        workers: int,
        full: int,
        period: float,
        phase: float,
        drift: Callable[[], float] | None = None,
        post_seconds: float,
        answer_seconds: float,
    ) -> None:
        self._world = world
        self.number = number
        self._most, self._full = workers, full
        self._period, self._phase, self._drift = period, phase - period, drift
        # ``_phase``: of some look, the last one or (at first) the one before the first.
        self._post_seconds, self._answer_seconds = post_seconds, answer_seconds
        self.workers: dict[Group, None] = {}
        self._running: dict[Group, None] = {}
        """Lists those of them that are not being posted, oldest first."""
        self._busy_until = 0.0
        self._look_is_due = False

    def wake(self) -> None:
        """Something that it looks at has changed."""
        if self._look_is_due:
            return
        self._look_is_due = True
        if self._period <= 0:
            self._world.at(0.0, self._look)
            return
        # Looks follow each other at equal intervals; those that would change nothing are left out.
        now = self._world.now
        passed = max(math.floor((now - self._phase) / self._period), -1)
        if passed >= 1 and self._drift is not None:
            self._phase = now - self._drift() * self._period
            passed = 0
        self._world.at(max(self._phase + (passed + 1) * self._period - now, 0.0), self._look)

    def queue_has_grown(self) -> None:
        """Another environment has posted: it matters only when more are under way than now may be."""
        if len(self.workers) + self._world.queued() > self._full:
            self.wake()

    def generated(self, group: Group) -> None:
        self._world.at(group.latency, lambda: self._scored(group))

    def _look(self) -> None:
        self._look_is_due = False
        self._phase = self._world.now
        queued = self._world.queued()
        if queued >= self._full:
            for group in list(self.workers):
                self._drop(group)
        elif len(self.workers) < self._most:
            allowed = min(self._most, self._full - queued)
            for group in list(islice(self._running, max(len(self.workers) - allowed, 0))):
                self._drop(group)
            for _ in range(allowed - len(self.workers)):
                group = self._world.begin(self.number)
                self.workers[group] = self._running[group] = None

    def _drop(self, group: Group) -> None:
        del self.workers[group]
        self._running.pop(group, None)
        self._world.give_up(group)
        self.wake()  # the look that freed its place left no room for another; the next one may

    def _scored(self, group: Group) -> None:
        if group.cancelled:
            return
        begin = max(self._world.now, self._busy_until)
        self._busy_until = begin + self._post_seconds
        self._world.at(begin - self._world.now, lambda: self._post(group))

    def _post(self, group: Group) -> None:
        if group.cancelled:
            return
        del self._running[group]
        self._world.at(self._post_seconds, lambda: self._posted(group))

    def _posted(self, group: Group) -> None:
        if group.cancelled:
            return
        self._world.accept(group)
        if self._answer_seconds > 0:
            self._world.at(self._answer_seconds, lambda: self._done(group))
            self.wake()
        else:
            self._done(group)

    def _done(self, group: Group) -> None:
        self.workers.pop(group, None)
        self.wake()
