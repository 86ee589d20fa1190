"""The advantages of a step, put over verl's: the code of the local backend, on the rows of TransferQueue.

verl's estimators see scores and masks. What they cannot do is done here, by ``data.advantages``: token-level advantages
of the environment, forced zeros, normalisation over the trained tokens of the step, clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atropos_verl.backends.ray.transfer import ADVANTAGES, advantage_field
from atropos_verl.training.advantages import RunningMoments, SequenceAdvantage, finish_advantages

__all__ = ["FinishedBatch", "finish_batch"]


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    nested: torch.Tensor
    """[B, R_b] float32, in the order of the rows; 0 in rows of padding."""
    metrics: dict[str, float]


def finish_batch(
    values: Any,
    keys: Sequence[str],
    tags: Sequence[dict[str, Any]],
    *,
    from_data: bool,
    normalization: str,
    clipping: tuple[float, float] | None,
    running: RunningMoments,
) -> FinishedBatch:
    """Final advantages of a step.

    Args:
        values: nested fields ``response_mask``, ``advantages`` (verl's), ``atropos_advantages``.
        keys, tags: of the rows, as ``transfer.make_rows`` made them; padding is tagged ``is_padding``.
        from_data: the baseline is that of ``data.group_advantages``; otherwise verl's, unless the environment sent
            token-level advantages. (verl gives a group of one its raw score; here it gets 0.)
        running: statistics of the run for ``global``; merged with this batch.
    """
    masks = list(values["response_mask"].unbind())
    verls = list(values["advantages"].unbind())
    ours = list(values[ADVANTAGES].unbind())
    # verl sorts rows by length; the order of the batch makes sums, and so advantages, those of the local backend.
    order = sorted((i for i, tag in enumerate(tags) if not tag.get("is_padding")), key=lambda i: _position(keys[i]))
    sequences = []
    for i in order:
        tag, mask = tags[i], masks[i].bool().numpy()
        base = (ours[i] if from_data or tag["advantage_replaced"] else verls[i]).numpy().astype(np.float64)
        if not from_data and not tag["advantage_replaced"] and tag["group_size"] < 2:
            base = np.zeros_like(base)
        sequences.append(SequenceAdvantage(base, mask, bool(tag["advantage_to_zero"]), bool(tag["advantage_replaced"])))
    finished = finish_advantages(sequences, normalization, clipping, running)
    rows: list[np.ndarray[Any, Any]] = [np.zeros(mask.numel()) for mask in masks]
    for i, row in zip(order, finished, strict=True):
        rows[i] = row
    return FinishedBatch(advantage_field(rows, masks), _metrics(sequences, finished))


def _position(key: str) -> tuple[str, int]:
    slot, index, _ = key.rsplit("_", 2)
    return slot, int(index)


def _metrics(sequences: Sequence[SequenceAdvantage], finished: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    trained = [np.abs(row[s.loss_mask]) for s, row in zip(sequences, finished, strict=True)]
    joined = np.concatenate(trained) if trained else np.zeros(0)
    return {
        "advantage/mean_abs": float(joined.mean()) if joined.size else 0.0,
        "advantage/replaced_sequences": float(sum(s.replaced for s in sequences)),
        "advantage/zeroed_sequences": float(sum(s.zero for s in sequences)),
    }
