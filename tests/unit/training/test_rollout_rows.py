"""Rollouts of several rows: one score, one advantage, and a loss that does not depend on how many rows there are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.samples import built

from atropos_verl.training.losses import advantage_weighted_sft_loss, clipped_ratio_loss
from atropos_verl.types import TrainingSample

SCORES = [1.0, 0.25, -2.0]


def groups(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three rollouts of three turns each, in one row each; and the same in as many rows as they have turns: a row ends
    with its turn, and trains that alone."""
    draw = np.random.default_rng(seed)
    whole: dict[str, Any] = {"tokens": [], "masks": [], "inference_logprobs": [], "scores": SCORES}
    split: dict[str, Any] = {name: [] for name in (*whole, "rollout_ids")}
    for number, turns in enumerate(((3, 5, 4), (2, 2, 6), (7, 1, 3))):
        ids, mask, logprobs = draw.integers(3, 250, 4).tolist(), [-100] * 4, [1.0] * 4
        for written in turns:
            start = len(ids)
            own, tool = draw.integers(3, 250, written).tolist(), draw.integers(3, 250, 2).tolist()
            ids, mask, logprobs = ids + own, mask + own, logprobs + (-3 * draw.random(written)).tolist()
            row = {"tokens": ids, "masks": [-100] * start + own, "inference_logprobs": logprobs}
            for name, value in {**row, "scores": SCORES[number], "rollout_ids": 40 - number}.items():
                split[name].append(value)
            ids, mask, logprobs = ids + tool, [*mask, -100, -100], [*logprobs, 1.0, 1.0]
        for name, value in (("tokens", ids), ("masks", mask), ("inference_logprobs", logprobs)):
            whole[name].append(value)
    return whole, split


def gradient(model: torch.nn.Module, samples: list[TrainingSample], clips: bool) -> torch.Tensor:
    """Float32, over all parameters, of the loss that the samples have together."""
    model.zero_grad()
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)
        rows = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        logprobs = torch.cat([torch.zeros(1), rows.gather(1, ids[1:, None])[:, 0]])
        advantages, mask = torch.from_numpy(sample.advantages), torch.from_numpy(sample.loss_mask)
        rollout = torch.from_numpy(sample.rollout_logprobs).float()
        kept: dict[str, Any] = {"rollout_logprobs": rollout, "tis_cap": 2.0, "num_loss_tokens": tokens}
        if clips:
            old = logprobs.detach() + 0.4 * torch.sin(torch.arange(len(ids)))
            clipped_ratio_loss(logprobs, old, advantages, mask, **kept).loss.backward()
        else:
            advantage_weighted_sft_loss(logprobs, advantages, mask, **kept).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("clips", [False, True], ids=["advantage_weighted", "grpo"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "plain"])
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_the_gradient_of_a_split_rollout_is_that_of_the_whole_one(
    model_path: Path, estimator: str, clips: bool, normalization: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float32)
    one, several = (built(group, estimator=estimator, normalization=normalization) for group in groups())
    assert (len(one.samples), len(several.samples)) == (3, 9)
    expected, found = (gradient(model, report.samples, clips) for report in (one, several))
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert several.scores == one.scores == [(None, score) for score in SCORES]


def test_mini_batches_hold_whole_rollouts() -> None:
    from atropos_verl.backends.local.worker import _mini_batches

    found = []
    for pair in zip(groups(0), groups(1), strict=True):
        samples = built(*pair).samples
        names = [(sample.group_id, sample.rollout_id) for sample in samples]
        number = {name: n for n, name in enumerate(dict.fromkeys(names))}
        found.append([{number[names[i]] for i in part} for part in _mini_batches(samples, 2, 3, 5)])
    assert found[0] == found[1]
    assert [len(part) for part in found[1]] == [2] * 6


def test_weights_multiply_the_finished_advantages_but_for_forced_zeros() -> None:
    group = {"tokens": [[5, 6, 7]] * 3, "masks": [[-100, -100, 7]] * 3, "scores": [2.0, 4.0, 9.0]}
    group |= {"weights": [0.5, 1, 3], "overrides": [{}, {}, {"set_advantage_to_zero": True}]}
    report = built(group, estimator="plain", clipping=(-3.0, 3.0))
    assert [sample.advantages[2] for sample in report.samples] == [1.0, 3.0, 0.0]
