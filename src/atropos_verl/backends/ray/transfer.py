"""A batch of the trajectory API → rows of TransferQueue, with verl's keys, fields and tags.

One *slot* is one batch. Its key is the slot's uid, tagged ``pending`` → ``running`` → ``finished``; the rows of its
sequences are ``{uid}_{i}_0``. The field ``uid`` of a row is its *group*, which is what verl's estimators group by::

    slot 3f2a…       is_prompt, status finished                 (what verl's replay buffer samples)
      3f2a…_0_0      uid = group a   prompts | responses         tags: lengths, min/max_global_steps
      3f2a…_1_0      uid = group a
      3f2a…_2_0      uid = group b

Of a sequence, everything before the first trained token is the prompt, the rest the response, with the real mask: tool
and environment tokens between two turns are 0 in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from atropos_verl.training.advantages import SequenceAdvantage
from atropos_verl.types import UNKNOWN_VERSION, TrainingSample

__all__ = [
    "ADVANTAGES",
    "Row",
    "Rows",
    "Versions",
    "advantage_field",
    "has_rollout_logprobs",
    "make_rows",
    "versions_of",
]

ADVANTAGES = "atropos_advantages"
"""Field: float64 [R], the advantages before normalising, from ``data.advantages``."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Oldest and newest policy version that wrote the trained tokens of a sequence."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence as verl stores it."""

    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


@dataclass(slots=True)
class Rows:
    """The rows of one slot, and what was left out."""

    rows: list[Row] = field(default_factory=list)
    untrained: int = 0
    """Sequences without a trained token: they would add nothing."""
    trained_tokens: int = 0

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self.rows]

    @property
    def tags(self) -> list[dict[str, Any]]:
        return [row.tag for row in self.rows]

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [row.fields for row in self.rows]


def make_rows(
    slot: str,
    samples: Sequence[TrainingSample],
    advantages: Sequence[SequenceAdvantage],
    versions: Sequence[Versions],
    *,
    global_steps: int,
    group_sizes: dict[str, int],
) -> Rows:
    """The rows of a batch.

    Args:
        slot: uid of the slot; holds no underscore.
        samples, advantages, versions: of the same length, sequence by sequence.
        global_steps: training step that asked for this batch.
        group_sizes: sequences that each group was scored with, overlong ones included, by group id.
    """
    found = Rows()
    for index, (sample, advantage, version) in enumerate(zip(samples, advantages, versions, strict=True)):
        trained = int(sample.loss_mask.sum())
        if not trained:
            found.untrained += 1
            continue
        found.trained_tokens += trained
        found.rows.append(
            _row(f"{slot}_{index}_0", sample, advantage, version, global_steps, group_sizes[sample.group_id])
        )
    return found


def _row(
    key: str, sample: TrainingSample, advantage: SequenceAdvantage, version: Versions, step: int, group_size: int
) -> Row:
    start = int(np.argmax(sample.loss_mask))  # above 0: position 0 is never trained
    token_ids = torch.from_numpy(np.ascontiguousarray(sample.token_ids, dtype=np.int64))
    mask = torch.from_numpy(sample.loss_mask.astype(np.int64))
    length = len(sample)
    rewards = torch.zeros(length - start, dtype=torch.float32)
    rewards[-1] = sample.score
    turns = int(np.count_nonzero(np.diff(sample.loss_mask.astype(np.int8)) == 1))
    fields = {
        "uid": sample.group_id,
        "prompts": token_ids[:start],
        "responses": token_ids[start:],
        "response_mask": mask[start:],
        # Over the whole sequence: only its sum is read by verl's engines, and ours looks up positions in it.
        "loss_mask": mask,
        "input_ids": token_ids,
        "position_ids": torch.arange(length),
        "rollout_log_probs": _rollout_logprobs(sample)[start:],
        "rm_scores": rewards,
        ADVANTAGES: torch.from_numpy(np.array(advantage.values[start:length], dtype=np.float64)),
        "num_turns": 2 * turns,
        "extra_fields": {},
        "multi_modal_inputs": {},
    }
    tag = {
        "status": "success",
        "prompt_len": start,
        "response_len": length - start,
        "seq_len": length,
        "global_steps": step,
        "min_global_steps": version.first,
        "max_global_steps": version.last,
        "group_size": group_size,
        "advantage_to_zero": advantage.zero,
        "advantage_replaced": advantage.replaced,
        "rollout_log_probs": has_rollout_logprobs(sample),
    }
    return Row(key, fields, tag)


def has_rollout_logprobs(sample: TrainingSample) -> bool:
    """True when every trained token carries the logprob it was sampled with."""
    return sample.rollout_logprobs is not None and not np.isnan(sample.rollout_logprobs[sample.loss_mask]).any()


def versions_of(sample: TrainingSample, served: int) -> Versions:
    """Oldest and newest policy of a sequence's trained tokens; ``served`` where nobody knows (verl needs a number)."""
    row = sample.token_versions
    written = np.zeros(0) if row is None else row[sample.loss_mask & (row != UNKNOWN_VERSION)]
    if written.size:
        return Versions(int(written.min()), int(written.max()))
    stated = served if sample.policy_version is None else sample.policy_version
    return Versions(stated, stated)


def _rollout_logprobs(sample: TrainingSample) -> torch.Tensor:
    """[T] float32; 0 where there is no value (such rows are tagged)."""
    if sample.rollout_logprobs is None:
        return torch.zeros(len(sample))
    return torch.from_numpy(np.nan_to_num(sample.rollout_logprobs, nan=0.0).astype(np.float32))


def advantage_field(values: Sequence[np.ndarray[Any, Any]], response_masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Nested float32 [B, R_b]: final advantages row by row, 0 where the mask is."""
    rows = [
        torch.from_numpy(np.asarray(row, dtype=np.float32))[: mask.numel()] * mask.to(torch.float32)
        for row, mask in zip(values, response_masks, strict=True)
    ]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
