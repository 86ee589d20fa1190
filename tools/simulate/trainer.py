"""The trainer on the virtual clock: waits, trains, syncs, and keeps the figures of every step."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atropos_verl.protocol.client import retry_interval
from atropos_verl.training.staleness import is_stale, versions_behind
from simulate.generation import Group
from simulate.outcome import Outcome
from simulate.schedule import Schedule
from simulate.workload import Layout, StepTimes, Workload


class Engine(Protocol):
    """The generation of groups."""

    version: int
    """Of the weights that are served."""
    paused: bool
    tokens: float
    """Made since the beginning."""
    busy_seconds: float

    def resume(self) -> None:
        """Weights were exchanged: go on."""


class World(Protocol):
    """The parts of a run that the trainer talks to."""

    now: float
    workload: Workload
    layout: Layout
    schedule: Schedule
    given_up: int
    """Groups begun and given up by their environments."""
    handled: int
    """Events."""

    @property
    def engine(self) -> Engine: ...

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay`` seconds."""

    def next_batch(self) -> list[Group] | None:
        """Answers GET /batch."""


@dataclass(slots=True)
class _Step:
    """Figures at the end of a step: its own, and the engine's since the beginning."""

    ended: float
    idle: float
    groups: int
    tokens: float
    staleness: Counter[int]
    generated: float
    busy: float
    given_up: int
    dropped: int
    stale_batches: int


@dataclass(slots=True)
class _Current:
    """The step under way."""

    idle: float = 0.0
    groups: int = 0
    tokens: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)


class Trainer:
    """Waits, trains, syncs. One batch is fetched while another is trained on, where the schedule says so."""

    def __init__(self, world: World, times: StepTimes | None) -> None:
        self.world = world
        self.version = 0
        self.ended = False
        self.steps: list[_Step] = []
        self._times = times or _modelled(world)
        self._current = _Current()
        self._ready: list[list[Group]] = []
        self._fetching = False
        self._waiting_since: float | None = None
        self._dropped = self._stale_batches = 0

    @property
    def step(self) -> int:
        """Steps that have ended."""
        return len(self.steps)

    @property
    def is_waiting(self) -> bool:
        """It waits for a batch."""
        return self._waiting_since is not None and not self._ready

    def begin(self) -> None:
        """Wait for a batch, and take it as soon as it is there."""
        self._waiting_since = self.world.now
        self._fetch()
        self._take()

    def _fetch(self) -> None:
        if not self._fetching and not self._ready:
            self._fetching = True
            self._poll(0, self.world.now)

    def _poll(self, attempt: int, since: float) -> None:
        world = self.world
        batch = world.next_batch()
        if batch is None:
            left = world.workload.poll_seconds - (world.now - since)
            if left <= 1e-9:  # ``batch_max_wait_time`` is over: the next wait begins at once, with quick polls
                attempt, since, left = 0, world.now, world.workload.poll_seconds
            workload = self.world.workload
            interval = retry_interval(attempt, workload.poll_attempts, workload.poll_delay)
            delay = max(min(interval, left), 1e-3)
            world.at(delay, lambda: self._poll(attempt + 1, since))
            return
        if world.workload.take_seconds > 0:
            world.at(world.workload.take_seconds, lambda: self._fetched(batch))
        else:
            self._fetched(batch)

    def _fetched(self, batch: list[Group]) -> None:
        self._fetching = False
        self._ready.append(batch)
        self._take()

    def _take(self) -> None:
        if self._waiting_since is None or not self._ready:
            return
        bound = self.world.layout.max_staleness
        batch = self._ready.pop()
        kept = [group for group in batch if not is_stale(group.version, self.version, bound)]
        self._dropped += len(batch) - len(kept)
        if not kept:
            self._stale_batches += 1
            self._fetch()
            return
        self._current.idle += self.world.now - self._waiting_since
        self._waiting_since = None
        if self.world.schedule.fetch_ahead and self.step + 1 < self.world.workload.steps:
            self._fetch()
        self._train(kept)

    def _train(self, groups: Sequence[Group]) -> None:
        current = self._current
        tokens = sum(sum(group.lengths) for group in groups)
        current.groups += len(groups)
        current.tokens += tokens
        current.staleness.update(versions_behind(group.version, self.version) for group in groups)
        if not self.world.schedule.generates_while_training:
            self.world.engine.paused = True
        train, sync, other = self._times(self.step, tokens)
        self.world.at(train, lambda: self._sync(sync, other))

    def _sync(self, seconds: float, other: float) -> None:
        engine = self.world.engine
        self.version += 1
        if self.world.schedule.generates_while_training:
            # Weights are written beside those in use; generation stands still only for the swap, at its end.
            pause = min(self.world.workload.swap_pause, seconds)
            self.world.at(seconds - pause, lambda: setattr(engine, "paused", True))
        self.world.at(seconds, lambda: self._synced(other))

    def _synced(self, other: float) -> None:
        self.world.engine.version = self.version
        self.world.engine.resume()
        self.world.at(other, self._end_step)

    def _end_step(self) -> None:
        world, current = self.world, self._current
        self.steps.append(
            _Step(
                world.now,
                current.idle,
                current.groups,
                current.tokens,
                current.staleness,
                world.engine.tokens,
                world.engine.busy_seconds,
                world.given_up,
                self._dropped,
                self._stale_batches,
            )
        )
        self._current = _Current()
        self.ended = self.step >= world.workload.steps
        if not self.ended:
            self.begin()

    def outcome(self, skip: int = 0) -> Outcome:
        """Figures of the steps after the first ``skip`` (of all, if there are no more)."""
        world = self.world
        skip = skip if skip < self.step else 0
        zero = _Step(0.0, 0.0, 0, 0.0, Counter(), 0.0, 0.0, 0, 0, 0)
        before, last = (self.steps[skip - 1] if skip else zero), (self.steps[-1] if self.steps else zero)
        steps = self.steps[skip:]
        seconds = max(last.ended - before.ended, 1e-9)
        staleness = sum((step.staleness for step in steps), Counter())
        count = sum(staleness.values())
        generated = last.generated - before.generated
        return Outcome(
            mode="overlap" if world.layout.overlap else "sync",
            seconds=seconds,
            steps=len(steps),
            groups_per_second=sum(step.groups for step in steps) / seconds,
            trained_tokens_per_second=sum(step.tokens for step in steps) / seconds,
            generated_tokens_per_second=generated / seconds,
            trainer_idle_share=sum(step.idle for step in steps) / seconds,
            generation_idle_share=1 - (last.busy - before.busy) / seconds,
            generation_load=generated / seconds / world.layout.gen_capacity,
            staleness=dict(staleness),
            staleness_mean=sum(age * n for age, n in staleness.items()) / count if count else 0.0,
            dropped_stale_groups=last.dropped - before.dropped,
            stale_batches=last.stale_batches - before.stale_batches,
            cancelled_groups=last.given_up - before.given_up,
            step_seconds=seconds / max(len(steps), 1),
            events=world.handled,
        )


def _modelled(world: World) -> StepTimes:
    workload, rate = world.workload, world.layout.train_rate
    return lambda step, tokens: (tokens / rate, workload.sync_seconds, workload.step_overhead)
