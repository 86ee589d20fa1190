"""Rollouts of several rows: one score, one advantage, and training that does not depend on how many rows there are."""

from typing import Any

import numpy as np
import pytest
from support.samples import built

from atropos_verl.types import SampleReport

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


def trained(report: SampleReport) -> dict[tuple[int, ...], tuple[float, float]]:
    """Advantage and rollout logprob of each trained token, by the ids that it ends."""
    found = {}
    for sample in report.samples:
        for t in np.flatnonzero(sample.loss_mask):
            found[(*sample.token_ids[: t + 1].tolist(),)] = sample.advantages[t], sample.rollout_logprobs[t]
    return found


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "plain"])
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_a_split_rollout_is_trained_as_the_whole_one(estimator: str, normalization: str) -> None:
    """Token by token, so that every loss has the same gradient."""
    one, several = (built(group, estimator=estimator, normalization=normalization) for group in groups())
    assert (len(one.samples), len(several.samples)) == (3, 9)
    assert trained(several) == trained(one)
    assert sum(s.loss_mask.sum() for s in several.samples) == len(trained(one)) == 33
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
