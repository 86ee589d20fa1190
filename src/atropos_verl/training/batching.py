"""Samples → tensors: right-padded, packed, or shared out over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from atropos_verl.errors import DataError
from atropos_verl.types import FloatArray, TrainingBatch, TrainingSample

if TYPE_CHECKING:
    import torch

__all__ = ["PackedTrainingBatch", "make_packed_batch", "make_training_batch", "split_for_ranks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTrainingBatch:
    """B samples end to end, without padding; ``N`` is the sum of their lengths.

    Example: samples of 3 and 2 tokens: ``input_ids = [5, 6, 7, 5, 8]``, ``cu_seqlens = [0, 3, 5]``,
    ``position_ids = [0, 1, 2, 0, 1]``. ``torch.nested.nested_tensor_from_jagged(values, cu_seqlens)`` makes any of them
    nested.
    """

    input_ids: torch.Tensor
    """[N] int64."""
    position_ids: torch.Tensor
    """[N] int64, from 0 in each sample."""
    loss_mask: torch.Tensor
    """[N] bool. The first token of each sample is never trained."""
    advantages: torch.Tensor
    """[N] float32."""
    rollout_logprobs: torch.Tensor
    """[N] float32; NaN = no value."""
    cu_seqlens: torch.Tensor
    """[B + 1] int64: sample b is ``values[cu_seqlens[b] : cu_seqlens[b + 1]]``."""
    temperature: torch.Tensor
    """[B] float32."""
    max_seqlen: int
    num_loss_tokens: int
    """Trained tokens of the whole batch: the loss's denominator."""


def make_training_batch(samples: Sequence[TrainingSample], pad_token_id: int = 0) -> TrainingBatch:
    """Right-pad ``samples`` to the longest, L. Padding is never trained: advantage 0, rollout logprob NaN.

    Raises:
        DataError: there is no sample.
    """
    import torch

    _require(samples)
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    shape = (len(samples), int(lengths.max()))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    advantages = np.zeros(shape, dtype=np.float32)
    rollout_logprobs = np.full(shape, np.nan, dtype=np.float32)
    for b, sample in enumerate(samples):
        end = lengths[b]
        input_ids[b, :end] = sample.token_ids
        loss_mask[b, :end] = sample.loss_mask
        advantages[b, :end] = sample.advantages
        if sample.rollout_logprobs is not None:
            rollout_logprobs[b, :end] = sample.rollout_logprobs
    return TrainingBatch(
        input_ids=torch.from_numpy(input_ids),
        loss_mask=torch.from_numpy(loss_mask),
        advantages=torch.from_numpy(advantages),
        rollout_logprobs=torch.from_numpy(rollout_logprobs),
        temperature=torch.tensor([sample.temperature for sample in samples], dtype=torch.float32),
        lengths=torch.from_numpy(lengths),
        num_loss_tokens=int(loss_mask.sum()),
    )


def make_packed_batch(samples: Sequence[TrainingSample]) -> PackedTrainingBatch:
    """Join ``samples`` end to end.

    Raises:
        DataError: there is no sample.
    """
    import torch

    _require(samples)
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    cu_seqlens = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    loss_mask = np.concatenate([sample.loss_mask for sample in samples])
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    return PackedTrainingBatch(
        input_ids=torch.from_numpy(np.concatenate([sample.token_ids for sample in samples])),
        position_ids=torch.from_numpy(position_ids),
        loss_mask=torch.from_numpy(loss_mask),
        advantages=torch.from_numpy(np.concatenate([s.advantages for s in samples], dtype=np.float32)),
        rollout_logprobs=torch.from_numpy(np.concatenate([_logprobs(s) for s in samples], dtype=np.float32)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        temperature=torch.tensor([sample.temperature for sample in samples], dtype=torch.float32),
        max_seqlen=int(lengths.max()),
        num_loss_tokens=int(loss_mask.sum()),
    )


def split_for_ranks(samples: Sequence[TrainingSample], world_size: int) -> list[list[TrainingSample]]:
    """Share ``samples`` out over ``world_size`` ranks so that each gets about the same number of tokens.

    Longest first, each to the rank with the fewest tokens so far (then the fewest samples, then the lowest number): the
    heaviest rank carries at most 4/3 of the best possible (Graham 1969). Depends on the lengths only, so every rank
    computes the same shares. Within a rank the order of ``samples`` is kept. A rank's share may be empty.

    Raises:
        ValueError: ``world_size`` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size = {world_size}: must be at least 1")
    loads = [(0, 0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i)):
        tokens, count, rank = min(loads)
        loads[rank] = (tokens + len(samples[index]), count + 1, rank)
        shares[rank].append(index)
    return [[samples[index] for index in sorted(share)] for share in shares]


def _logprobs(sample: TrainingSample) -> FloatArray:
    return np.full(len(sample), np.nan) if sample.rollout_logprobs is None else sample.rollout_logprobs


def _require(samples: Sequence[TrainingSample]) -> None:
    if not samples:
        raise DataError("no sample to make a batch of: every group was quarantined, or every sequence was overlong")
