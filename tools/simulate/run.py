"""The run itself: environments, trajectory API, engine and trainer as events on a virtual clock.

The choice of a batch (``server.batcher.choose_batch`` on a ``server.batcher.GroupQueue``) and the rule of which groups
are too stale (``training.staleness``) are the code of a real run. The rest is a model: what waits for what
(``schedule``), durations (``Workload``), the engine as a queue (``Generation``), and environments as atroposlib's
loop runs them (``Environment``).
"""

import heapq
import itertools
import math
from collections.abc import Callable

import numpy as np

from simulate.environment import Environment
from simulate.generation import Generation, Group
from simulate.outcome import Outcome
from simulate.queue import TrajectoryQueue
from simulate.schedule import schedule_of
from simulate.trainer import Trainer
from simulate.workload import Layout, StepTimes, Workload

_MOST_EVENTS_WITHOUT_PROGRESS = 100_000
"""Polls and looks at the queue during which no sequence was finished and no step begun."""


def simulate(
    workload: Workload, layout: Layout, *, seed: int = 0, times: StepTimes | None = None, skip: int = 0
) -> Outcome:
    """Run ``workload.steps`` optimiser steps. Equal arguments give equal results.

    Args:
        times: seconds of training, sync and the rest; they take the place of the model's.
        skip: steps at the beginning that the figures leave out: the queue is empty then, and the pipeline not full.

    Raises:
        RuntimeError: the configuration never finishes a step (a batch that cannot fill).
    """
    run = Run(workload, layout, seed=seed, times=times)
    run.run()
    return run.trainer.outcome(skip)


class Run:
    """The world that environments and trainer meet."""

    def __init__(self, workload: Workload, layout: Layout, *, seed: int, times: StepTimes | None) -> None:
        self.workload, self.layout = workload, layout
        self.schedule = schedule_of("overlap" if layout.overlap else "sync")
        self.now = 0.0
        self._rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._draws: dict[tuple[float, float], list[float]] = {}
        self.handled = 0
        self.engine = Generation(layout.gen_capacity, layout.sequence_rate, layout.slots)
        self.queue = TrajectoryQueue(workload.batch_size, frozenset([workload.group_size]))
        self.given_up = 0
        self.full = layout.max_batches_offpolicy * workload.batch_size // workload.group_size
        self.environments = [self._environment(number) for number in range(workload.environments)]
        self._has_several_workers = workload.workers > 1
        self.trainer = Trainer(self, times)

    def _environment(self, number: int) -> Environment:
        workload = self.workload
        return Environment(
            self,
            number,
            workers=workload.workers,
            full=self.full,
            period=workload.environment_period,
            phase=workload.environment_period * self._rng.random(),
            drift=self._rng.random,
            post_seconds=workload.post_seconds,
            answer_seconds=workload.answer_seconds,
        )

    def run(self) -> None:
        """Until the last step has ended. Raises ``RuntimeError`` when it never comes."""
        self.wake_environments()
        self.trainer.begin()
        last, since = (0, 0.0), 0
        while not self.trainer.ended:
            progress = (self.trainer.step, self.engine.tokens)
            if progress != last:
                last, since = progress, self.handled
            finish = self.engine.next_time()
            event = self._events[0][0] if self._events else math.inf
            if min(finish, event) == math.inf or self.handled - since > _MOST_EVENTS_WITHOUT_PROGRESS:
                raise RuntimeError(
                    f"step {self.trainer.step + 1} never comes: {self.queue.sequences} sequences wait, a batch is "
                    f"{self.workload.batch_size}; raise workers or max_batches_offpolicy"
                )
            self.handled += 1
            self.now = min(finish, event)
            self.engine.advance(self.now)
            if finish <= event:
                group = self.engine.finish_next()
                if group is not None:
                    self.environments[group.environment].generated(group)
            else:
                heapq.heappop(self._events)[2]()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    # -- for environments --------------------------------------------------------------------------------------------

    def queued(self) -> int:
        return self.queue.groups

    def begin(self, environment: int) -> Group:
        workload = self.workload
        group = Group(environment, self._lengths(), self._draw(workload.latency, workload.latency_spread))
        self.engine.add(group)
        return group

    def give_up(self, group: Group) -> None:
        self.engine.cancel(group)
        self.given_up += not group.accepted

    def accept(self, group: Group) -> None:
        self.queue.add(group, self.now)
        if self.queue.groups == self.full:  # every environment sees it at its next look
            self.wake_environments()
        elif self._has_several_workers and self.queue.groups + self.workload.workers > self.full:
            for environment in self.environments:
                environment.queue_has_grown()

    def wake_environments(self) -> None:
        for environment in self.environments:
            environment.wake()

    def _lengths(self) -> list[float]:
        workload = self.workload
        drawn = (self._draw(workload.mean_tokens, workload.token_spread) for _ in range(workload.group_size))
        return [min(max(length, 1.0), float(workload.max_tokens)) for length in drawn]

    def _draw(self, mean: float, spread: float) -> float:
        """Log-normal with that mean; drawn by the thousand, numpy's calls being slow."""
        if spread <= 0 or mean <= 0:
            return mean
        ready = self._draws.get((mean, spread))
        if not ready:
            values = self._rng.lognormal(math.log(mean) - spread**2 / 2, spread, 4096)
            ready = self._draws[mean, spread] = values.tolist()
        return ready.pop()

    # -- for the trainer ---------------------------------------------------------------------------------------------

    def next_batch(self) -> list[Group] | None:
        """Answers GET /batch."""
        batch = self.queue.next_batch(self.now)
        if batch is not None:
            self.wake_environments()
        return batch
