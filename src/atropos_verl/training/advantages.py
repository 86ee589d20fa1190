"""Advantages, in this order: group baseline → token-level overrides → normalise → clip → forced zeros.

``set_advantage_to_zero`` is applied last, and the statistics of the normalisation are taken before it. So zeroing one
sequence never changes another one's advantage, and a zeroed sequence stays at exactly 0 where normalising would have
moved it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atropos_verl.training.statistics import RunningMoments
from atropos_verl.types import FloatArray

__all__ = ["ESTIMATORS", "GRPO_EPSILON", "NORMALIZATIONS", "SequenceAdvantage", "finish_advantages", "group_advantages"]

ESTIMATORS = ("grpo", "rloo", "plain")
NORMALIZATIONS = ("none", "batch", "global")
GRPO_EPSILON = 1e-6
"""verl's (``core_algos.compute_grpo_outcome_advantage``)."""


def group_advantages(scores: FloatArray, estimator: str = "grpo", *, norm_by_std: bool = True) -> FloatArray:
    """One advantage per sequence of a group, from the raw scores.

    Args:
        scores: [G], finite.
        estimator: ``grpo``: ``(s - mean) / (std + 1e-6)`` with the sample standard deviation, or ``s - mean`` where
            ``norm_by_std`` is off (Dr. GRPO). ``rloo``: ``s`` minus the mean of the *other* scores, which is
            ``(s - mean) · G / (G - 1)``. Both as verl 0.9.1 (``verl/trainer/ppo/core_algos.py``). ``plain``: ``s``.

    Returns:
        [G] float64. For grpo and rloo a group of one, and a group of equal scores, give exactly 0 (verl gives the raw
        score for a group of one).

    Raises:
        ValueError: unknown estimator.

    Example: scores ``[1, 0, 0, 1]``: grpo ±0.8660 (std 0.57735), rloo ±2/3, plain ``[1, 0, 0, 1]``.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is none of {', '.join(ESTIMATORS)}")
    if estimator == "plain":
        return scores.copy()
    size = scores.size
    if size < 2 or scores.min() == scores.max():
        return np.zeros(size)
    centred: FloatArray = scores - scores.mean()
    if estimator == "rloo":
        return centred * (size / (size - 1))
    if norm_by_std:
        return centred / (float(np.std(scores, ddof=1)) + GRPO_EPSILON)
    return centred


@dataclass(frozen=True, slots=True)
class SequenceAdvantage:
    """One sequence before normalisation."""

    values: FloatArray
    """[T] group baseline, or the environment's token-level advantages."""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    zero: bool = False
    """``overrides[i].set_advantage_to_zero``."""
    replaced: bool = False
    """``values`` are the environment's token-level advantages, not the group's baseline."""


def finish_advantages(
    sequences: Sequence[SequenceAdvantage],
    normalization: str = "none",
    clipping: tuple[float, float] | None = None,
    running: RunningMoments | None = None,
) -> list[FloatArray]:
    """Normalise over the trained tokens of all ``sequences`` together, clip, and force zeros.

    Args:
        normalization: ``batch``: ``(a - mean) / (std + 1e-8)`` over the trained tokens of this (global) batch, sample
            standard deviation. ``global``: the same with the statistics of ``running``, after this batch was merged
            into it.
        running: needed for ``global``; changed.

    Returns:
        One float64 [T] per sequence; 0 where ``loss_mask`` is False and all over a sequence with ``zero``.
    """
    moments = None
    if normalization == "batch":
        moments = RunningMoments()
    elif normalization == "global":
        if running is None:
            raise ValueError("normalization 'global' needs the run's RunningMoments")
        moments = running
    if moments is not None and sequences:
        moments.update(np.concatenate([s.values[s.loss_mask] for s in sequences]))
    return [_finish(sequence, moments, clipping) for sequence in sequences]


def _finish(
    sequence: SequenceAdvantage, moments: RunningMoments | None, clipping: tuple[float, float] | None
) -> FloatArray:
    found = np.zeros(sequence.values.shape[0])
    if sequence.zero:
        return found
    values = sequence.values[sequence.loss_mask]
    if moments is not None:
        values = moments.whiten(values)
    if clipping is not None:
        values = np.clip(values, clipping[0], clipping[1])
    found[sequence.loss_mask] = values
    return found
