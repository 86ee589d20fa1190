"""verl's metrics of a step → a line of ``metrics.jsonl`` with the local backend's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atropos_verl.backends.ray.step_batches import Slot
from atropos_verl.training.weight_sync import SyncReport
from atropos_verl.types import StepReport

__all__ = ["cluster_step_report"]

_OWN = ("step", "policy_version", "loss")


def cluster_step_report(
    slots: Sequence[Slot],
    metrics: Mapping[str, Any],
    timing: Mapping[str, float],
    *,
    step: int,
    loss: float,
    seconds: float,
    sync: SyncReport | None,
) -> StepReport:
    """Figures of one step: those every backend has, then verl's own under verl's names.

    Args:
        metrics: verl's (``actor/grad_norm``, ``training/rollout_probs_diff_mean``, …).
        timing: verl's, in seconds (``gen``, ``old_log_prob``, ``update_actor``, ``update_weights``, …).
        seconds: of the whole step.
    """
    scores = np.array([score for slot in slots for score in slot.scores])
    counts: dict[str, int] = {}
    for slot in slots:
        for name, number in slot.counts.items():
            counts[name] = counts.get(name, 0) + number
    tokens = counts.pop("trained_tokens", 0)
    figures: dict[str, float | int | None] = {
        "reward/mean": float(scores.mean()) if scores.size else None,
        "reward/std": float(scores.std()) if scores.size else None,
        **{f"data/{name}": number for name, number in sorted(counts.items())},
        "data/trained_tokens": tokens,
        "timing/rollout": timing.get("gen", 0.0),
        "timing/wait": sum(slot.wait_seconds for slot in slots),
        "timing/train": sum(timing.get(name, 0.0) for name in ("old_log_prob", "ref", "values", "adv", "update_actor")),
        "timing/sync": None if sync is None else sync.seconds,
        "timing/step": seconds,
        "sync/seconds": None if sync is None else sync.seconds,
        "perf/trained_tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
    }
    figures.update(_environments(slots))
    for slot in slots:
        figures.update(slot.off_policy)
    for name, value in metrics.items():
        figure = _number(value)
        if figure is not None and name not in figures and name not in _OWN:
            figures[name] = figure
    return StepReport(step=step, policy_version=step, loss=loss, metrics=figures)


def _environments(slots: Sequence[Slot]) -> dict[str, float | int | None]:
    joined: dict[int, list[float]] = {}
    for slot in slots:
        for env_id, scores in slot.env_scores.items():
            joined.setdefault(env_id, []).extend(scores)
    found: dict[str, float | int | None] = {}
    for env_id, scores in sorted(joined.items()):
        found[f"env/{env_id}/sequences"] = len(scores)
        found[f"env/{env_id}/reward"] = float(np.mean(scores))
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()):
        value = value.item()
    return float(value) if isinstance(value, int | float) else None
