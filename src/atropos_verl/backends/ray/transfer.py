"""A batch of the trajectory API → rows of TransferQueue, with verl's keys, fields and tags (docs/internals.md).

Of a sequence, everything before the first trained token is the prompt, the rest the response, with the real mask: tool
and environment tokens between two turns are 0 in it. Later the advantages of a step replace verl's: verl's estimators
know no token-level advantages of the environment, forced zeros, normalisation over trained tokens, or clipping.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from atropos_verl.training.advantages import RunningMoments, SequenceAdvantage, finish_advantages
from atropos_verl.training.samples import posted_columns
from atropos_verl.types import UNKNOWN_VERSION, TrainingSample

ADVANTAGES = "atropos_advantages"
"""Field: float64 [R], the advantages before normalising, from ``training.advantages``."""

PARTITION = "train"
"""TransferQueue's, for training."""


class Row(NamedTuple):
    """One sequence as verl stores it."""

    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


class TransferQueueStore:
    """Writes slots to TransferQueue. ``tq.init`` must have been called in this process."""

    def running(self, uid: str) -> None:
        tq.kv_put(key=uid, partition_id=PARTITION, tag={"status": "running"})

    def put(self, uid: str, rows: Sequence[Row]) -> None:
        fields = list_of_dict_to_tensordict([row.fields for row in rows])
        tags = [row.tag for row in rows]
        tq.kv_batch_put(keys=[row.key for row in rows], fields=fields, tags=tags, partition_id=PARTITION)
        tq.kv_put(key=uid, partition_id=PARTITION, tag={"status": "finished"})


def make_rows(
    slot: str,
    samples: Sequence[TrainingSample],
    advantages: Sequence[SequenceAdvantage],
    *,
    served: int,
    global_steps: int,
    group_sizes: dict[str, int],
) -> list[Row]:
    """The rows of a batch. Sequences without a trained token add nothing and are left out.

    Args:
        slot: uid of the slot; holds no underscore.
        served: the policy version that is served now, for sequences of unknown version (verl needs a number).
        group_sizes: rollouts that each group was scored with, overlong ones included, by group id.
    """
    rows: list[Row] = []
    numbers: dict[tuple[str, int], int] = {}
    seen: Counter[int] = Counter()
    for sample, advantage in zip(samples, advantages, strict=True):
        number = numbers.setdefault((sample.group_id, sample.rollout_id), len(numbers))
        if sample.loss_mask.any():
            # verl's name for it: the rows of a session, of which its GRPO counts the last.
            fields, tag = _row(sample, advantage, served)
            tag |= {"global_steps": global_steps, "group_size": group_sizes[sample.group_id]}
            rows.append(Row(f"{slot}_{number}_{seen[number]}", fields, tag))
            seen[number] += 1
    return rows


def _row(sample: TrainingSample, advantage: SequenceAdvantage, served: int) -> tuple[dict[str, Any], dict[str, Any]]:
    # Oldest and newest version that wrote a trained token.
    versions = sample.token_versions
    known = np.zeros(0) if versions is None else versions[sample.loss_mask & (versions != UNKNOWN_VERSION)]
    stated = served if sample.policy_version is None else sample.policy_version
    oldest, newest = (int(known.min()), int(known.max())) if known.size else (stated, stated)
    start, length = int(np.argmax(sample.loss_mask)), len(sample)  # above 0: position 0 is never trained
    token_ids = torch.from_numpy(np.ascontiguousarray(sample.token_ids, dtype=np.int64))
    mask = torch.from_numpy(sample.loss_mask.astype(np.int64))
    # 0 where there is no value: such rows are tagged.
    sent = np.zeros(length) if sample.rollout_logprobs is None else np.nan_to_num(sample.rollout_logprobs, nan=0.0)
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
        "rollout_log_probs": torch.from_numpy(sent[start:].astype(np.float32)),
        "rm_scores": rewards,
        ADVANTAGES: torch.from_numpy(np.array(advantage.values[start:length], dtype=np.float64)),
        **{name: torch.from_numpy(entries) for name, [entries] in posted_columns([sample], always=True).items()},
        "num_turns": 2 * turns,
        "extra_fields": {},
        "multi_modal_inputs": {},
    }
    tag = {
        "status": "success",
        "prompt_len": start,
        "response_len": length - start,
        "seq_len": length,
        "min_global_steps": oldest,
        "max_global_steps": newest,
        "versions_known": known.size == int(sample.loss_mask.sum()),
        "advantage_to_zero": advantage.zero,
        "advantage_replaced": advantage.replaced,
        "advantage_fixed": advantage.fixed,
        "weight": advantage.weight,
        "rollout_log_probs": has_rollout_logprobs(sample),
    }
    return fields, tag


def has_rollout_logprobs(sample: TrainingSample) -> bool:
    """True when every trained token carries the logprob it was sampled with."""
    return sample.rollout_logprobs is not None and not np.isnan(sample.rollout_logprobs[sample.loss_mask]).any()


def finish_batch(
    values: Any,
    keys: Sequence[str],
    tags: Sequence[dict[str, Any]],
    *,
    from_data: bool,
    normalization: str,
    clipping: tuple[float, float] | None,
    running: RunningMoments,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Final advantages of a step, nested [B, R_b] float32, 0 where the mask is and in rows of padding; and figures.

    Args:
        values: nested fields ``response_mask``, ``advantages`` (verl's), ``atropos_advantages``.
        keys, tags: of the rows, as ``make_rows`` made them; padding is tagged ``is_padding``.
        from_data: the baseline is that of ``training.group_advantages``; otherwise verl's, unless the environment sent
            token-level advantages. (verl gives a group of one its raw score; here it gets 0.)
        running: statistics of the run for ``global``; merged with this batch.
    """
    masks, verls, ours = (list(values[name].unbind()) for name in ("response_mask", "advantages", ADVANTAGES))

    def position(i: int) -> tuple[str, int, int]:
        slot, rollout, row = keys[i].rsplit("_", 2)
        return slot, int(rollout), int(row)

    # verl sorts rows by length; the order of the batch makes sums, and so advantages, those of the local backend.
    order = sorted((i for i, tag in enumerate(tags) if not tag.get("is_padding")), key=position)
    sequences = []
    for i in order:
        tag, mask = tags[i], masks[i].bool().numpy()
        base = (ours[i] if from_data or tag["advantage_replaced"] else verls[i]).numpy().astype(np.float64)
        if not from_data and not tag["advantage_replaced"] and tag["group_size"] < 2:
            base = np.zeros_like(base)
        zero, replaced, fixed = (bool(tag[f"advantage_{name}"]) for name in ("to_zero", "replaced", "fixed"))
        sequences.append(SequenceAdvantage(base, mask, zero, replaced, fixed, tag.get("weight", 1.0)))
    finished = finish_advantages(sequences, normalization, clipping, running)
    rows = [torch.zeros(mask.numel()) for mask in masks]
    for i, row in zip(order, finished, strict=True):
        rows[i] = torch.from_numpy(row.astype(np.float32))  # 0 already where the mask is
    trained = [np.abs(row[s.loss_mask]) for s, row in zip(sequences, finished, strict=True)]
    joined = np.concatenate([np.zeros(0), *trained])
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged), {
        "advantage/mean_abs": float(joined.mean()) if joined.size else 0.0,
        "advantage/replaced_sequences": float(sum(s.replaced for s in sequences)),
        "advantage/zeroed_sequences": float(sum(s.zero for s in sequences)),
    }
