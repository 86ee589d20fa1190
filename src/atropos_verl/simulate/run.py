"""The run itself: environments, trajectory API, engine and trainer as events on a virtual clock.

The choice of a batch is ``server.batcher.choose_batch`` on a ``server.queue.GroupQueue``; what is too old is decided by
``data.off_policy``; what waits for what by ``schedule``. All three are what the real processes run. The rest is a
model: how long things take (``Workload``), the engine as a queue (``Generation``), and environments as atroposlib's
loop runs them: at most ``workers`` groups at a time, none beyond ``max_batches_offpolicy`` batches in the queue, those
under way given up when it is full, looked at every ``environment_poll`` seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np

from atropos_verl.data.off_policy import is_too_old, versions_behind
from atropos_verl.schedule import schedule_of
from atropos_verl.server.batcher import BatchPolicy, QueueView, choose_batch
from atropos_verl.server.model import StoredGroup
from atropos_verl.server.queue import GroupQueue
from atropos_verl.simulate.generation import Generation, Group
from atropos_verl.simulate.outcome import Outcome
from atropos_verl.simulate.workload import Layout, Recording, Workload

__all__ = ["simulate"]

_MOST_EVENTS_WITHOUT_PROGRESS = 100_000
"""Polls and looks at the queue during which no sequence was finished and no step begun."""
_POLL_GROWTH = 1.5


def simulate(workload: Workload, layout: Layout, *, seed: int = 0, recording: Recording | None = None) -> Outcome:
    """Run ``workload.steps`` optimiser steps. Equal arguments give equal results.

    Args:
        recording: its seconds of training, sync and the rest take the place of the model's.

    Raises:
        RuntimeError: the configuration never finishes a step (a batch that cannot fill).
    """
    return _Run(workload, layout, seed, recording).run()


class _Run:
    def __init__(self, workload: Workload, layout: Layout, seed: int, recording: Recording | None) -> None:
        self.workload, self.layout, self.recording = workload, layout, recording
        self.schedule = schedule_of("overlap" if layout.overlap else "sync")
        self.now = 0.0
        self._rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._draws: dict[tuple[float, float], list[float]] = {}
        self.handled = 0
        self.engine = Generation(layout.gen_capacity, layout.sequence_rate, layout.slots)
        self.queue = GroupQueue()
        self.arrivals = 0
        self.posted: dict[int, Group] = {}
        """Arrival number → the group."""
        self.under_way: list[dict[Group, None]] = [{} for _ in range(workload.environments)]
        """The groups that each environment is making, oldest first."""
        self.checking = [False] * workload.environments
        self.cancelled = 0
        self.trainer = _Trainer(self)

    def run(self) -> Outcome:
        for environment in range(self.workload.environments):
            self._check_later(environment)
        self.trainer.begin()
        last, since = (0, 0.0), 0
        while self.trainer.step < self.workload.steps:
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
                    self._generated(group)
            else:
                heapq.heappop(self._events)[2]()
        return self.trainer.outcome()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    # -- environments ------------------------------------------------------------------------------------------------

    def _check_later(self, environment: int) -> None:
        if not self.checking[environment]:
            self.checking[environment] = True
            # Somewhere within the interval of its loop, which knows nothing of this moment.
            self.at(self.workload.environment_poll * self._rng.random(), lambda: self._check(environment))

    def _check(self, environment: int) -> None:
        self.checking[environment] = False
        under_way, workload = self.under_way[environment], self.workload
        allowed = self.layout.max_batches_offpolicy * workload.batch_size // workload.group_size
        wanted = min(workload.workers, max(allowed - self.queue.groups, 0))
        # atroposlib gives up the oldest first, also where the queue is not full but fuller than before.
        for group in list(islice(under_way, max(len(under_way) - wanted, 0))):
            self.engine.cancel(group)
            del under_way[group]
            self.cancelled += 1
        for _ in range(wanted - len(under_way)):
            group = Group(environment, self._lengths(), self._draw(workload.latency, workload.latency_spread))
            under_way[group] = None
            self.engine.add(group)

    def _generated(self, group: Group) -> None:
        self.at(group.latency, lambda: self._post(group))

    def _post(self, group: Group) -> None:
        if group.cancelled:
            return
        del self.under_way[group.environment][group]
        self.arrivals += 1
        self.posted[self.arrivals] = group
        self.queue.add(
            StoredGroup(
                seq=self.arrivals,
                env_id=group.environment,
                size=len(group.lengths),
                tokens=int(sum(group.lengths)),
                arrived=self.now,
                digest=b"",
                raw=b"",
            )
        )
        full = self.layout.max_batches_offpolicy * self.workload.batch_size // self.workload.group_size
        if self.queue.groups == full:  # every environment sees it at its next look
            self.wake_environments()
        else:
            self._check_later(group.environment)

    def wake_environments(self) -> None:
        for environment in range(self.workload.environments):
            self._check_later(environment)

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

    # -- trajectory API ----------------------------------------------------------------------------------------------

    def next_batch(self) -> list[Group] | None:
        """What GET /batch answers."""
        queue = self.queue
        view = QueueView(
            classes=queue.classes,
            total=queue.waiting_sequences(),
            last_arrival=queue.last_arrival,
            sizes_seen=frozenset([self.workload.group_size]),
        )
        chosen = choose_batch(view, BatchPolicy(batch_size=self.workload.batch_size), self.now)
        if chosen is None:
            return None
        seqs = {candidate.seq for candidate in chosen}
        queue.take([group for members in queue.classes.values() for group in members if group.seq in seqs])
        self.wake_environments()
        return [self.posted.pop(seq) for seq in sorted(seqs)]


class _Trainer:
    """Waits, trains, syncs. ``ahead`` batches are fetched while one is trained on."""

    def __init__(self, run: _Run) -> None:
        self.world = run
        self.step = 0
        self.version = 0
        self._ready: list[list[Group]] = []
        self._fetching = False
        self._waiting_since: float | None = None
        self._idle = 0.0
        self._groups = self._tokens = 0.0
        self._staleness: Counter[int] = Counter()
        self._dropped = self._stale_batches = 0

    def begin(self) -> None:
        """Wait for a batch, and take it as soon as it is there."""
        self._waiting_since = self.world.now
        self._fetch()
        self._take()

    def _fetch(self) -> None:
        if not self._fetching and not self._ready:
            self._fetching = True
            self._poll(0)

    def _poll(self, attempt: int) -> None:
        batch = self.world.next_batch()
        if batch is None:
            workload = self.world.workload
            delay = workload.poll_delay * _POLL_GROWTH ** min(attempt, workload.poll_attempts - 1)
            self.world.at(max(delay, 1e-3), lambda: self._poll(attempt + 1))
            return
        self._fetching = False
        self._ready.append(batch)
        self._take()

    def _take(self) -> None:
        if self._waiting_since is None or not self._ready:
            return
        bound = self.world.layout.max_staleness
        batch = self._ready.pop()
        kept = [group for group in batch if not is_too_old(group.version, self.version, bound)]
        self._dropped += len(batch) - len(kept)
        if not kept:
            self._stale_batches += 1
            self._fetch()
            return
        self._idle += self.world.now - self._waiting_since
        self._waiting_since = None
        if self.world.schedule.fetch_ahead and self.step + 1 < self.world.workload.steps:
            self._fetch()
        self._train(kept)

    def _train(self, groups: list[Group]) -> None:
        world = self.world
        tokens = sum(sum(group.lengths) for group in groups)
        self._groups += len(groups)
        self._tokens += tokens
        self._staleness.update(versions_behind(group.version, self.version) for group in groups)
        if not world.schedule.generates_while_training:
            world.engine.paused = True
        train, sync, other = tokens / world.layout.train_rate, world.workload.sync_seconds, world.workload.step_overhead
        recording = world.recording
        if recording is not None:
            at = self.step % len(recording.train)
            train, sync, other = recording.train[at], recording.sync[at], recording.other[at]
        world.at(train, lambda: self._sync(sync, other))

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
        self.step += 1
        if self.step < self.world.workload.steps:
            self.begin()

    def outcome(self) -> Outcome:
        run, seconds = self.world, self.world.now
        count = sum(self._staleness.values())
        return Outcome(
            mode="overlap" if run.layout.overlap else "sync",
            seconds=seconds,
            steps=self.step,
            groups_per_second=self._groups / seconds,
            trained_tokens_per_second=self._tokens / seconds,
            generated_tokens_per_second=run.engine.tokens / seconds,
            trainer_idle_share=self._idle / seconds,
            generation_idle_share=1 - run.engine.busy_seconds / seconds,
            generation_load=run.engine.tokens / seconds / run.layout.gen_capacity,
            staleness=dict(self._staleness),
            staleness_mean=sum(age * n for age, n in self._staleness.items()) / count if count else 0.0,
            dropped_stale_groups=self._dropped,
            stale_batches=self._stale_batches,
            cancelled_groups=run.cancelled,
            step_seconds=seconds / max(self.step, 1),
            events=run.handled,
        )
