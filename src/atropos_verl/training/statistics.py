"""Mean and variance in float64: of one batch, and of a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from atropos_verl.errors import CheckpointError
from atropos_verl.types import FloatArray

__all__ = ["WHITENING_EPSILON", "RunningMoments"]

WHITENING_EPSILON = 1e-8
"""Added to the standard deviation (not to the variance) before dividing by it."""


@dataclass(slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of every value seen, merged batch by batch.

    The merge is Chan, Golub and LeVeque's (1979) parallel form of Welford's update: exact in real numbers, whatever the
    order and size of the batches, and stable where a running sum of squares cancels.

    Example: ``update([1, 3])`` then ``update([5])``: count 3, mean 3, m2 8, std 2.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of (value - mean)²."""

    def update(self, values: FloatArray) -> None:
        """Merge ``values`` [N], all finite, in. N = 0 changes nothing."""
        added = int(values.size)
        if not added:
            return
        mean = float(np.mean(values))
        # np.mean of equal values can be off by one unit in the last place, which would leave a variance that is not 0.
        if float(values.min()) == float(values.max()):
            mean = float(values.flat[0])
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
        """For a checkpoint: plain numbers that JSON can carry exactly."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            CheckpointError: a key is missing, or a value cannot be a count, mean or sum of squares.
        """
        try:
            count, mean, m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"running advantage statistics cannot be restored from {dict(state)!r}") from error
        if count < 0 or m2 < 0 or not np.isfinite([mean, m2]).all():
            raise CheckpointError(f"running advantage statistics are not valid: {dict(state)!r}")
        self.count, self.mean, self.m2 = count, mean, m2
