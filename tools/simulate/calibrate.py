"""Measures an environment and its engine in one run with ``mode=sync``: a model of other runs with the same two.

In a sync run all groups of a batch begin together, when the gate opens. With ``start`` the moment from which the
trainer waits, and arrivals a_1 ≤ a_2 ≤ … of a batch::

    generation seconds = a_1 - start - latency - post seconds      (median over steps)
    post seconds       = mean of a_(k+1) - a_k                      (median over steps)

    slots              = inference.max_running of the run

Groups that come a latency later than the others were given up and begun again, because another one was counted twice
(``environment.py``). Of the looks at the queue while a batch is posted, n = groups * post seconds / period, each sees
such a group with probability answer seconds / post seconds::

    late batches / batches = 1 - (1 - answer seconds / post seconds)^n
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from atropos_verl.errors import ConfigError
from simulate.arrivals import HandedBatch
from simulate.recording import Recording
from simulate.workload import Layout, Workload

_MIN_STEPS = 5
_TOKENS_PER_SECOND = 1e6
"""Of each sequence: tokens are only a measure of time here. No sequence has less than one."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The measurements. Seconds."""

    generation_seconds: float
    """Of a group, when a whole batch is generated together."""
    post_seconds: float
    answer_seconds: float
    """0 when no batch was late, or no group was posted alone."""
    take_seconds: float
    """Of the trainer, from a batch's hand-out until it is ready to be trained on."""
    slots: int
    """Sequences that the engine generates at a time."""
    batches: int
    late_batches: int
    """With groups that were begun again."""

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 5) for name, value in asdict(self).items()}

    def applied(self, workload: Workload, layout: Layout) -> tuple[Workload, Layout]:
        """Both with these figures: all that the engine has room for is generated in the same time."""
        workload = replace(
            workload,
            mean_tokens=self.generation_seconds * _TOKENS_PER_SECOND,
            token_spread=0.0,
            max_tokens=10**9,
            post_seconds=self.post_seconds,
            answer_seconds=self.answer_seconds,
            take_seconds=self.take_seconds,
        )
        return workload, replace(layout, gen_capacity=1e12, sequence_rate=_TOKENS_PER_SECOND, slots=self.slots)


def calibrate(recording: Recording, batches: Sequence[HandedBatch], latency: float, period: float) -> Calibration:
    """From the steps of a sync run after the skipped ones.

    Args:
        latency: seconds from the end of a group's generation to its post; the same for all groups.
        period: seconds between two looks of an environment at the queue.

    Raises:
        ConfigError: no sync run, or too few of its steps have a record of arrivals.
    """
    if recording.setting("mode", "sync") != "sync":
        raise ConfigError("the run has mode=overlap; groups of a batch begin together only with sync", _OPTION)
    firsts, spacings, taking, late, groups = [], [], [], 0, 0
    for batch in batches:
        if not batch.groups or not recording.skip < batch.step <= recording.steps:
            continue
        times = sorted(group.at for group in batch.groups)
        together = _together(times, latency)
        waited = recording.waited[batch.step - 1]
        start = batch.at - waited
        taking.append(max(recording.rollout[batch.step - 1] - waited, 0.0))
        firsts.append(times[0] - start - latency)
        spacings.append((together[-1] - together[0]) / max(len(together) - 1, 1))
        groups += len(times)
        late += len(times) > len(together)
    if len(firsts) < _MIN_STEPS:
        raise ConfigError(f"{len(firsts)} steps have a record of arrivals; at least {_MIN_STEPS} are needed", _OPTION)
    post, count = statistics.median(spacings), len(firsts)
    return Calibration(
        generation_seconds=max(statistics.median(firsts) - post, 1e-3),
        post_seconds=post,
        answer_seconds=_answer_seconds(post, groups / count * post / period, late / count),
        take_seconds=statistics.median(taking),
        slots=recording.setting("inference.max_running", 64),
        batches=count,
        late_batches=late,
    )


def _answer_seconds(post_seconds: float, looks: float, late: float) -> float:
    """``looks`` per batch, ``late``: the share of batches; when all are late, that nearly all are."""
    if looks <= 0 or late <= 0:
        return 0.0
    return float(post_seconds * (1 - (1 - min(late, 0.98)) ** (1 / looks)))


_OPTION = "--generation-from"


def _together(times: Sequence[float], latency: float) -> Sequence[float]:
    """Takes those before the first pause that is long for a batch: half the latency, at least half a second."""
    long = max(latency / 2, 0.5)
    for count, (before, after) in enumerate(pairwise(times), start=1):
        if after - before > long:
            return times[:count]
    return times
