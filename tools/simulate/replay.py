"""Recorded groups once more, as they came, through batcher, staleness and schedule with other settings of the trainer.

Open loop: groups arrive when they did, whatever the trainer does now. Environments would have sent more to a faster
trainer, and would have paused for a slower one; ``held_back_share`` says for how much of the time.

The first token of a group is as old as the weights that made it. Which weights that was follows from the recorded
staleness: groups of a batch that were ``k`` versions behind began while version ``step - 1 - k`` was served, the oldest
ones first. Where between two syncs they began was not recorded, so the middle is taken: a run's own settings give its
own staleness again; with others a group may be one version off.
"""

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from atropos_verl.errors import ConfigError
from simulate.arrivals import Arrival, HandedBatch
from simulate.generation import Group
from simulate.outcome import Outcome
from simulate.queue import TrajectoryQueue
from simulate.recording import Recording
from simulate.schedule import schedule_of
from simulate.trainer import Trainer
from simulate.workload import Layout, StepTimes, Workload

_OPTION = "--arrivals"
_WAITED = 0.1
"""Seconds from which the trainer counts as having waited for a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """Seconds since the trainer began its first step; negative ones were before."""

    began: float
    arrived: float
    environment: int
    size: int
    tokens: int


def recorded_groups(recording: Recording, batches: Sequence[HandedBatch]) -> list[RecordedGroup]:
    """All groups that were handed out, in order of arrival.

    Raises:
        ConfigError: arrivals and ``metrics.jsonl`` are not those of one run.
    """
    steps = {batch.step: batch for batch in batches if batch.step <= recording.steps}
    if 1 not in steps:
        raise ConfigError("the record of arrivals does not hold the batch of step 1: it is of another run", _OPTION)
    ends = list(itertools.accumulate(recording.whole, initial=0.0))
    """After n steps, since the first began."""
    waited = [step for step in steps if recording.rollout[step - 1] > _WAITED] or [1]
    begin = statistics.median(steps[step].at - ends[step - 1] - recording.rollout[step - 1] for step in waited)
    first = min(group.at for batch in batches for group in batch.groups) - begin
    found = []
    for batch in batches:
        arrivals = sorted(batch.groups, key=lambda group: group.at)
        for group, version in zip(arrivals, _versions(recording, batch.step, len(arrivals)), strict=True):
            at = group.at - begin
            low = ends[version] if version else min(first, 0.0)
            high = min(ends[version + 1] if version + 1 < len(ends) else math.inf, at)
            found.append(_group(group, (min(low, high) + high) / 2, at))
    return sorted(found, key=lambda group: group.arrived)


def _group(group: Arrival, began: float, arrived: float) -> RecordedGroup:
    environment = -1 if group.environment is None else group.environment
    return RecordedGroup(began=began, arrived=arrived, environment=environment, size=group.size, tokens=group.tokens)


def _versions(recording: Recording, step: int, groups: int) -> list[int]:
    """Of the weights under which the groups of a step began, the oldest first; fresh ones where nothing is known."""
    fresh = max(step - 1, 0)
    ages = recording.staleness[step - 1] if step <= recording.steps else {}
    known = sorted(max(fresh - age, 0) for age, count in ages.items() for _ in range(count))[:groups]
    return known + [fresh] * (groups - len(known))


def recorded_times(recording: Recording, batches: Sequence[HandedBatch], batch_size: int) -> StepTimes:
    """Seconds of a step: as recorded where batches have the size they had, else in proportion to their tokens."""
    if batch_size == recording.sequences:
        return recording.times
    tokens = {batch.step: sum(group.tokens for group in batch.groups) for batch in batches}
    counted = [step for step in range(recording.skip + 1, recording.steps + 1) if step in tokens]
    if not counted:
        raise ConfigError("none of the steps that count has a record of arrivals", _OPTION)
    trained = max(sum(tokens[step] for step in counted), 1)  # recorded steps may have trained on nothing
    per_token = sum(recording.train[step - 1] for step in counted) / trained
    sync = statistics.fmean(recording.sync[recording.skip :])
    other = statistics.fmean(recording.other[recording.skip :])
    return lambda step, tokens: (tokens * per_token, sync, other)


def replay(
    groups: Sequence[RecordedGroup], workload: Workload, layout: Layout, times: StepTimes, skip: int = 0
) -> Outcome:
    """Until ``workload.steps`` steps have ended, or the groups have run out.

    Raises:
        ConfigError: there are not enough groups for more than ``skip`` steps.
    """
    run = _Replay(groups, workload, layout, times)
    run.run()
    if run.trainer.step <= skip:
        raise ConfigError(
            f"{len(groups)} recorded groups are enough for {run.trainer.step} steps of {workload.batch_size} "
            f"sequences, and --skip leaves out {skip}; take a smaller --batch-size",
            _OPTION,
        )
    outcome = run.trainer.outcome(skip)
    return replace(
        outcome,
        generation_idle_share=None,
        generation_load=None,
        generated_tokens_per_second=None,
        cancelled_groups=None,
        held_back_share=run.held_back / max(run.now, 1e-9),
    )


class _Engine:
    """Of which only the weights matter: its groups are made already."""

    def __init__(self) -> None:
        self.version = 0
        self.paused = False
        self.tokens = 0.0
        self.busy_seconds = 0.0

    def resume(self) -> None:
        self.paused = False


class _Replay:
    """The world that the trainer meets."""

    def __init__(self, groups: Sequence[RecordedGroup], workload: Workload, layout: Layout, times: StepTimes) -> None:
        self.workload, self.layout = workload, layout
        self.schedule = schedule_of("overlap" if layout.overlap else "sync")
        self.now = min([0.0, *(group.began for group in groups)])
        self.engine = _Engine()
        self.given_up = 0
        self.handled = 0
        self.held_back = 0.0
        """Seconds during which environments would have paused."""
        self._full = layout.max_batches_offpolicy * workload.batch_size
        self._queue = TrajectoryQueue(workload.batch_size, frozenset(group.size for group in groups))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._to_come = len(groups)
        self.trainer = Trainer(self, times)
        for group in groups:
            self._plan(group)

    def _plan(self, recorded: RecordedGroup) -> None:
        group = Group(recorded.environment, [recorded.tokens / recorded.size] * recorded.size, 0.0)

        def begin() -> None:
            group.version = self.engine.version

        def arrive() -> None:
            self._to_come -= 1
            self._queue.add(group, self.now)

        self.at(recorded.began - self.now, begin)
        self.at(max(recorded.arrived, recorded.began) - self.now, arrive)

    def run(self) -> None:
        self.at(-self.now, self.trainer.begin)
        while not self.trainer.ended and self._events:
            at, _, action = heapq.heappop(self._events)
            if self._queue.sequences >= self._full:
                self.held_back += at - max(self.now, 0.0) if at > 0 else 0.0
            self.now = at
            self.handled += 1
            action()
            if not self._to_come and self.trainer.is_waiting and self._queue.sequences < self.workload.batch_size:
                break

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    def next_batch(self) -> list[Group] | None:
        return self._queue.next_batch(self.now)
