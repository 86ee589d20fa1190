"""Advantages, in this order: group baseline → token-level overrides → normalise → clip → weights → forced zeros.

``set_advantage_to_zero`` is applied last, and the statistics of the normalisation are taken before it. So zeroing one
sequence never changes another one's advantage, and a zeroed sequence stays at exactly 0 where normalising would have
moved it away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_verl.errors import CheckpointError
from atropos_verl.types import FloatArray

ESTIMATORS = ("grpo", "rloo", "plain")
NORMALIZATIONS = ("none", "batch", "global")
GRPO_EPSILON = 1e-6
"""verl's (``core_algos.compute_grpo_outcome_advantage``)."""
WHITENING_EPSILON = 1e-8
"""Added to the standard deviation (not to the variance) before dividing by it."""


def group_advantages(scores: FloatArray, estimator: str = "grpo", *, norm_by_std: bool = True) -> FloatArray:
    """One advantage per rollout of a group, [G] float64, from the raw scores [G] of the rollouts.

    ``grpo``: ``(s - mean) / (std + 1e-6)`` with the sample standard deviation, or ``s - mean`` where ``norm_by_std`` is
    off (Dr. GRPO). ``rloo``: ``s`` minus the mean of the *other* scores, which is ``(s - mean) · G / (G - 1)``. Both as
    verl 0.9.1 (``verl/trainer/ppo/core_algos.py``), but that a group of one gives exactly 0 (verl: the raw score), as a
    group of equal scores does. ``plain``: ``s``.

    Example: scores ``[1, 0, 0, 1]``: grpo ±0.8660 (std 0.57735), rloo ±2/3, plain ``[1, 0, 0, 1]``."""
    scores = np.asarray(scores, dtype=np.float64)
    if estimator == "plain":
        return scores.copy()
    size = scores.size
    if size < 2 or scores.min() == scores.max():
        return np.zeros(size)
    centred: FloatArray = scores - scores.mean()
    if estimator == "rloo":
        return centred * (size / (size - 1))
    return centred / (float(np.std(scores, ddof=1)) + GRPO_EPSILON) if norm_by_std else centred


@dataclass(slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of every value seen, merged batch by batch: Chan, Golub and LeVeque's
    (1979) parallel form of Welford's update, stable where a running sum of squares cancels."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of (value - mean)²

    def update(self, values: FloatArray) -> None:
        """Merges ``values`` [N], all finite, in. N = 0 changes nothing."""
        added = int(values.size)
        if not added:
            return
        # np.mean of equal values can be off by one unit in the last place, which would leave a variance that is not 0.
        mean = float(np.mean(values) if values.min() < values.max() else values.flat[0])
        m2 = float(np.sum((values - mean) ** 2))
        total = self.count + added
        delta = mean - self.mean
        self.mean += delta * added / total
        self.m2 += m2 + delta * delta * self.count * added / total
        self.count = total

    @property
    def std(self) -> float:
        """Sample standard deviation (divisor N - 1, as verl's whitening and ``torch.std``); 0 for fewer than two."""
        return float(np.sqrt(self.m2 / (self.count - 1))) if self.count > 1 else 0.0

    def whiten(self, values: FloatArray) -> FloatArray:
        """``(values - mean) / (std + 1e-8)``. A single value, or values that never varied, give exactly 0."""
        if self.count < 2 or self.m2 == 0.0:
            return values - self.mean
        whitened: FloatArray = (values - self.mean) / (self.std + WHITENING_EPSILON)
        return whitened

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that JSON carries exactly, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave. Raises ``CheckpointError`` when it cannot be that."""
        try:
            count, mean, m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"running advantage statistics cannot be restored from {dict(state)!r}") from error
        if count < 0 or m2 < 0 or not np.isfinite([mean, m2]).all():
            raise CheckpointError(f"running advantage statistics are not valid: {dict(state)!r}")
        self.count, self.mean, self.m2 = count, mean, m2


@dataclass(frozen=True, slots=True)
class SequenceAdvantage:
    """One sequence before normalisation: ``values`` [T], trained where ``loss_mask`` [T]. ``zero``: the environment set
    ``set_advantage_to_zero``. ``replaced``: ``values`` are the environment's, not the group's baseline. ``fixed``: they
    are neither normalised nor clipped, and in no statistics (``sft``). ``weight`` multiplies the final advantages, to
    which each loss is proportional."""

    values: FloatArray
    loss_mask: NDArray[np.bool_]
    zero: bool = False
    replaced: bool = False
    fixed: bool = False
    weight: float = 1.0


def turn_advantages(turn_rewards: Sequence[FloatArray]) -> list[FloatArray]:
    """Advantages of the turns of a group's rollouts from rewards per turn, each [K_g] of rollout g.

    DeepSeekMath's process supervision (arXiv 2402.03300, 4.1.3): rewards are normalised over all turns of the group
    (``(r - mean) / (std + 1e-6)``, sample standard deviation), and a turn has the sum of its own and of later ones.

    Example: ``[[1, 0], [0, 0]]`` (mean 1/4, std 1/2) gives ``[[1, -.5], [-1, -.5]]``."""
    centred = group_advantages(np.concatenate([np.zeros(0), *turn_rewards]))
    ends = np.cumsum([len(row) for row in turn_rewards])
    return [np.cumsum(row[::-1])[::-1] for row in np.split(centred, ends[:-1])]


def finish_advantages(
    sequences: Sequence[SequenceAdvantage],
    normalization: str = "none",
    clipping: tuple[float, float] | None = None,
    running: RunningMoments | None = None,
) -> list[FloatArray]:
    """Normalises over the trained tokens of all ``sequences`` together, clips, weighs, and forces zeros. ``batch``:
    ``(a - mean) / (std + 1e-8)`` over the trained tokens of this (global) batch, sample standard deviation. ``global``:
    the same with the statistics of ``running`` (None: none yet), which this batch is merged into first. Returns one
    float64 [T] per sequence; 0 where ``loss_mask`` is False and all over a sequence with ``zero``."""
    moments = {"none": None, "batch": RunningMoments(), "global": running or RunningMoments()}[normalization]
    if moments is not None:
        moments.update(np.concatenate([np.zeros(0), *(s.values[s.loss_mask] for s in sequences if not s.fixed)]))
    finished = [np.zeros(sequence.values.shape[0]) for sequence in sequences]
    for sequence, row in zip(sequences, finished, strict=True):
        if not sequence.zero:
            values = sequence.values[sequence.loss_mask]
            if not sequence.fixed:
                values = values if moments is None else moments.whiten(values)
                values = values if clipping is None else np.clip(values, *clipping)
            row[sequence.loss_mask] = values * sequence.weight
    return finished
