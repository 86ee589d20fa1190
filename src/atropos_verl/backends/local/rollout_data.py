"""One batch on its way through a step, the run's counters, and the step's line in ``metrics.jsonl``."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

import numpy as np

from atropos_verl.protocol.journal import JournalEntry
from atropos_verl.training.off_policy_book import BatchMatches
from atropos_verl.training.weight_sync import SyncReport
from atropos_verl.types import SampleReport, ScoredGroup, StepReport

__all__ = ["IdleShare", "RolloutData", "RunTotals", "step_report"]


@dataclass
class RolloutData:
    """One batch on its way to the optimiser."""

    groups: list[ScoredGroup]
    entry: JournalEntry | None = None
    """Where its bytes are kept until the step is durable."""
    matches: BatchMatches | None = None
    """What the ledger knows of each sequence; None: not looked up."""
    off_policy: dict[str, float | int | None] = field(default_factory=dict)
    """Figures of look-up and staleness, filled when the samples are made and when they are trained on."""
    report: SampleReport | None = None
    """Filled by ``compute_advantages_from_atropos``."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds: ``rollout``, ``wait``, ``decode``, ``prefetch``."""


@dataclass
class RunTotals:
    """Counters of the whole run; saved with checkpoints."""

    groups_used: int = 0
    groups_quarantined: int = 0
    sequences_trained: int = 0
    sequences_dropped_overlong: int = 0
    tokens_trained: int = 0
    steps_without_data: int = 0
    batches_lost_at_api: int = 0
    """Answers of 500 to GET /batch: an upstream API drops the batch it could not encode."""
    batches_stale: int = 0
    """Given up without a step: all their groups were older than ``off_policy.max_staleness``."""

    def count(self, report: SampleReport) -> None:
        """Add what became of one batch's groups."""
        self.groups_used += report.groups
        self.groups_quarantined += len(report.quarantined)
        self.sequences_dropped_overlong += report.dropped_overlong


class IdleShare:
    """Of the time that steps took, how much the trainer stood waiting for rollouts."""

    def __init__(self) -> None:
        self._waited = self._total = 0.0
        self._steps = 0

    def add(self, report: StepReport) -> None:
        """Count a step in. The first is left out: it waited for the environment to start."""
        self._steps += 1
        if self._steps > 1:
            self._waited += report.metrics["timing/rollout"] or 0.0
            self._total += report.metrics["timing/step"] or 0.0

    @property
    def value(self) -> float | None:
        """In [0, 1]; None before the second step."""
        return self._waited / self._total if self._total > 0 else None


def step_report(
    step: int,
    policy_version: int,
    data: RolloutData,
    figures: dict[str, float],
    seconds: dict[str, float],
    sync: SyncReport | None,
) -> StepReport:
    """Figures of one step.

    Args:
        figures: what ``training_phase`` returned.
        seconds: ``train``, ``sync`` and ``step``. ``timing/rollout`` is how long the trainer stood waiting for this
            batch, and ``perf/idle_share`` its part of the step; ``timing/wait`` is how long the API was asked for it,
            ``timing/prefetch`` how long it was in the making beside the step before (``mode=overlap``).
        sync: the weight sync after the step; None only where nothing was ever synced.
    """
    report = data.report
    assert report is not None, "a step ends after its samples were made"
    tokens, loss = figures["tokens"], figures["loss"]
    scores = report.scores
    metrics: dict[str, float | int | None] = {
        "reward/mean": float(scores.mean()) if scores.size else None,
        "reward/std": float(scores.std()) if scores.size else None,
        "data/groups": report.groups,
        "data/sequences": len(report.samples),
        "data/quarantined": len(report.quarantined),
        "data/dropped_overlong": report.dropped_overlong,
        "data/truncated": report.truncated,
        "data/trained_tokens": int(tokens),
        "advantage/mean_abs": _mean_abs_advantage(report),
        "sync/seconds": sync.seconds if sync else None,
        "sync/paused_seconds": sync.paused_seconds if sync else None,
        "sync/bytes": sync.bytes_copied if sync else None,
        "sync/canary_max_abs_logprob_diff": sync.canary_max_abs_logprob_diff if sync else None,
        "timing/rollout": data.timings.get("rollout", 0.0),
        "timing/wait": data.timings.get("wait", 0.0),
        "timing/prefetch": data.timings.get("prefetch", 0.0),
        "timing/train": seconds["train"],
        "timing/sync": seconds["sync"],
        "timing/step": seconds["step"],
        "perf/trained_tokens_per_second": tokens / seconds["step"] if seconds["step"] > 0 else 0.0,
        "perf/idle_share": data.timings.get("rollout", 0.0) / seconds["step"] if seconds["step"] > 0 else 0.0,
        "perf/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    metrics.update(data.off_policy)
    metrics.update(_per_environment(data, report))
    own = {key: value for key, value in figures.items() if key not in ("tokens", "loss")}
    metrics.update({key if "/" in key else f"actor/{key}": value for key, value in own.items()})
    return StepReport(step=step, policy_version=policy_version, loss=loss, metrics=metrics)


def _per_environment(data: RolloutData, report: SampleReport) -> dict[str, float | int | None]:
    """Trained sequences and mean reward of each environment, by the id that the API gave it."""
    found: dict[str, float | int | None] = {}
    for env_id in sorted({group.env_id for group in data.groups if group.env_id is not None}):
        scores = np.array([sample.score for sample in report.samples if sample.env_id == env_id])
        found[f"env/{env_id}/sequences"] = int(scores.size)
        found[f"env/{env_id}/reward"] = float(scores.mean()) if scores.size else None
    return found


def _mean_abs_advantage(report: SampleReport) -> float | None:
    values = [np.abs(s.advantages[s.loss_mask]) for s in report.samples]
    joined = np.concatenate(values) if values else np.zeros(0)
    return float(joined.mean()) if joined.size else None
