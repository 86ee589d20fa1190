"""From scored groups to tensors: ``build_samples`` validates and weighs, ``batching`` pads or packs.

Torch is imported when a tensor is made, not with this package.
"""

from atropos_verl.data.advantages import group_advantages
from atropos_verl.data.batching import (
    PackedTrainingBatch,
    make_packed_batch,
    make_training_batch,
    split_for_ranks,
)
from atropos_verl.data.samples import build_samples, collect_samples, sample_settings
from atropos_verl.data.statistics import RunningMoments

__all__ = [
    "PackedTrainingBatch",
    "RunningMoments",
    "build_samples",
    "collect_samples",
    "group_advantages",
    "make_packed_batch",
    "make_training_batch",
    "sample_settings",
    "split_for_ranks",
]
