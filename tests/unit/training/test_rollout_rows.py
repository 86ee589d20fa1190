"""Rollouts of several rows: one score, one advantage, and a loss that does not depend on how many rows there are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atropos_verl import SampleSettings, build_samples, decode_batch
from atropos_verl.training.advantages import RunningMoments, turn_advantages
from atropos_verl.training.extensions import load_advantage, load_rescoring
from atropos_verl.training.losses import advantage_weighted_sft_loss, clipped_ratio_loss
from atropos_verl.types import SampleReport, TrainingSample

SCORES = [1.0, 0.25, -2.0]


def _whole(seed: int = 0) -> dict[str, Any]:
    """Three rollouts of three turns each, in one row each."""
    draw = np.random.default_rng(seed)
    made: dict[str, Any] = {"tokens": [], "masks": [], "scores": SCORES, "inference_logprobs": []}
    for turns in ((3, 5, 4), (2, 2, 6), (7, 1, 3)):
        ids = [int(token) for token in draw.integers(3, 250, 4)]
        mask, logprobs = [-100] * 4, [1.0] * 4
        for written in turns:
            own = [int(token) for token in draw.integers(3, 250, written)]
            tool = [int(token) for token in draw.integers(3, 250, 2)]
            ids += own + tool
            mask += [*own, -100, -100]
            logprobs += [*(-3 * draw.random(written)).tolist(), 1.0, 1.0]
        for name, row in (("tokens", ids), ("masks", mask), ("inference_logprobs", logprobs)):
            made[name].append(row)
    return made


def _split(group: dict[str, Any]) -> dict[str, Any]:
    """Each rollout in as many rows as it has turns: a row ends with its turn, and trains that alone."""
    made: dict[str, Any] = {name: [] for name in (*group, "rollout_ids")}
    for number, mask in enumerate(group["masks"]):
        trained = np.array(mask) != -100
        starts = np.flatnonzero(np.diff(trained.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(trained.astype(int), append=0) == -1) + 1
        for start, end in zip(starts, ends, strict=True):
            row = [token if start <= at < end else -100 for at, token in enumerate(mask[:end])]
            made["tokens"].append(group["tokens"][number][:end])
            made["masks"].append(row)
            made["inference_logprobs"].append(group["inference_logprobs"][number][:end])
            made["scores"].append(group["scores"][number])
            made["rollout_ids"].append(40 - number)
    return made


def _build(*groups: dict[str, Any], **changes: Any) -> SampleReport:
    body = json.dumps({"batch": list(groups)}).encode()
    return build_samples(decode_batch(body), SampleSettings(**changes), running=RunningMoments())


def _gradient(model: torch.nn.Module, samples: list[TrainingSample], clips: bool) -> torch.Tensor:
    """Float32, over all parameters, of the loss that the samples have together."""
    model.zero_grad()
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)
        rows = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        logprobs = torch.cat([torch.zeros(1), rows.gather(1, ids[1:, None])[:, 0]])
        advantages, mask = torch.from_numpy(sample.advantages), torch.from_numpy(sample.loss_mask)
        assert sample.rollout_logprobs is not None
        rollout = torch.from_numpy(sample.rollout_logprobs).float()
        kept: dict[str, Any] = {"rollout_logprobs": rollout, "tis_cap": 2.0, "num_loss_tokens": tokens}
        if clips:
            old = logprobs.detach() + 0.4 * torch.sin(torch.arange(len(ids)))
            clipped_ratio_loss(logprobs, old, advantages, mask, **kept).loss.backward()  # type: ignore[no-untyped-call]
        else:
            advantage_weighted_sft_loss(logprobs, advantages, mask, **kept).loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("clips", [False, True], ids=["advantage_weighted", "grpo"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "plain"])
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_the_gradient_of_a_split_rollout_is_that_of_the_whole_one(
    model_path: Path, estimator: str, clips: bool, normalization: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float32)
    settings = {"estimator": estimator, "normalization": normalization}
    one, several = _build(_whole(), **settings), _build(_split(_whole()), **settings)
    assert (len(one.samples), len(several.samples)) == (3, 9)
    expected, found = (_gradient(model, report.samples, clips) for report in (one, several))
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert several.scores == one.scores == [(None, score) for score in SCORES]


def test_mini_batches_hold_whole_rollouts(model_path: Path) -> None:
    from atropos_verl.backends.local.worker import _mini_batches

    one, several = (
        _build(*groups).samples for groups in ([_whole(), _whole(1)], [_split(_whole()), _split(_whole(1))])
    )
    found = []
    for samples in (one, several):
        names = [(sample.group_id, sample.rollout_id) for sample in samples]
        number = {name: n for n, name in enumerate(dict.fromkeys(names))}
        found.append([{number[names[i]] for i in part} for part in _mini_batches(samples, 2, 3, 5)])
    assert found[0] == found[1]
    assert [len(part) for part in found[1]] == [2] * 6


def test_weights_multiply_the_finished_advantages_but_for_forced_zeros() -> None:
    group = {"tokens": [[5, 6, 7]] * 3, "masks": [[-100, -100, 7]] * 3, "scores": [2.0, 4.0, 9.0]}
    group |= {"weights": [0.5, 1, 3], "overrides": [{}, {}, {"set_advantage_to_zero": True}]}
    report = _build(group, estimator="plain", clipping=(-3.0, 3.0))
    assert [sample.advantages[2] for sample in report.samples] == [1.0, 3.0, 0.0]


def test_rewards_of_turns_become_the_sum_of_what_follows() -> None:
    found = turn_advantages([np.array([1.0, 0.0]), np.array([0.0, 0.0])])
    assert [row.round(5).tolist() for row in found] == [[1.0, -0.5], [-1.0, -0.5]]
    assert [row.tolist() for row in turn_advantages([np.array([2.0]), np.array([2.0, 2.0])])] == [[0.0], [0.0, 0.0]]


def by_rollout(scores: Any, group: Any) -> Any:
    assert len(scores) == 3 < len(group)
    return scores - scores.mean()


def length_of(prompts: list[str], completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def test_functions_of_the_user_see_rollouts() -> None:
    (group,) = decode_batch(json.dumps({"batch": [_split(_whole())]}).encode())
    rows = load_advantage(f"{__name__}:by_rollout")(group)
    mean = sum(SCORES) / 3
    assert [row[0] for row in rows] == pytest.approx([score - mean for score in SCORES for _ in range(3)])
    again = load_rescoring(f"{__name__}:length_of", lambda ids, **_: "x" * len(ids))(group)
    assert again.rollout_scores.tolist() == [4 + 0, 6 + 0, 3 + 0]
    assert again.scores.tolist() == [4.0] * 3 + [6.0] * 3 + [3.0] * 3
