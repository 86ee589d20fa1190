"""Group baselines and the order of what follows, against hand-worked numbers and verl's own functions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atropos_verl.errors import CheckpointError
from atropos_verl.training.advantages import (
    RunningMoments,
    SequenceAdvantage,
    finish_advantages,
    group_advantages,
    turn_advantages,
)


def finished(*rows: list[float], skip: int = 0, zero: int | None = None, **settings: Any) -> list[list[float]]:
    """Of ``rows``, whose first ``skip`` tokens are not trained; row ``zero`` has the override."""
    sequences = [
        SequenceAdvantage(np.array(row), np.arange(len(row)) >= skip, zero=i == zero) for i, row in enumerate(rows)
    ]
    return [row.tolist() for row in finish_advantages(sequences, running=RunningMoments(), **settings)]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scores", [[0.7], [0.1] * 3, [-2.5] * 7, [1e30, 1e30]])
def test_groups_of_one_and_of_equal_scores_give_exactly_zero(estimator: str, scores: list[float]) -> None:
    assert group_advantages(np.array(scores), estimator).tolist() == [0.0] * len(scores)


def test_the_same_as_verl() -> None:
    """verl's own estimators, on three groups of different size at once."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = np.random.default_rng(0)
    groups = [generator.normal(size=n) for n in (2, 5, 8)]
    index = np.concatenate([np.full(len(g), i) for i, g in enumerate(groups)])
    rewards = torch.from_numpy(np.concatenate(groups))[:, None]
    for theirs, options, own in (
        (core.compute_grpo_outcome_advantage, {}, {}),
        (core.compute_grpo_outcome_advantage, {"norm_adv_by_std_in_grpo": False}, {"norm_by_std": False}),
        (core.compute_rloo_outcome_advantage, {}, {"estimator": "rloo"}),
    ):
        expected, _ = theirs(rewards.clone(), torch.ones_like(rewards), index, **options)
        found = np.concatenate([group_advantages(group, **own) for group in groups])
        np.testing.assert_allclose(found, expected[:, 0].numpy(), rtol=1e-9, atol=1e-12)


def test_rewards_of_turns_become_the_sum_of_what_follows() -> None:
    found = turn_advantages([np.array([1.0, 0.0]), np.array([0.0, 0.0])])
    assert [row.round(5).tolist() for row in found] == [[1.0, -0.5], [-1.0, -0.5]]
    assert [row.tolist() for row in turn_advantages([np.array([2.0]), np.array([2.0, 2.0])])] == [[0.0], [0.0, 0.0]]


@pytest.mark.parametrize("normalization", ["batch", "global"])
def test_one_token_equal_tokens_and_none_normalise_to_zero(normalization: str) -> None:
    assert finished([5.0], normalization=normalization) == [[0.0]]
    assert finished([0.1] * 3, [0.1] * 4, normalization=normalization) == [[0.0] * 3, [0.0] * 4]
    assert finished([5.0, 5.0], skip=2, normalization=normalization) == [[0.0, 0.0]]


def test_zeroed_and_masked_stay_exactly_zero_even_where_the_clipping_range_excludes_zero() -> None:
    assert finished([1.0, 3.0], [1.0, 3.0], skip=1, zero=0, clipping=(2.0, 5.0)) == [[0.0, 0.0], [0.0, 3.0]]


@given(st.lists(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), max_size=8), max_size=8))
def test_merged_moments_equal_those_of_all_values_at_once(batches: list[list[float]]) -> None:
    running = RunningMoments()
    for batch in batches:
        running.update(np.array(batch))
    values = [value for batch in batches for value in batch]
    assert running.count == len(values)
    if values:
        mean = math.fsum(values) / len(values)
        assert running.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert running.m2 == pytest.approx(math.fsum((v - mean) ** 2 for v in values), rel=1e-9, abs=1e-6)


def test_moments_are_stable_far_from_zero() -> None:
    running = RunningMoments()
    for start in (1e9, 1e9 + 2):  # 1e9 + (0, 1, 2, 3): variance 5/3; a sum of squares in float64 would lose it
        running.update(np.array([start, start + 1]))
    assert running.std == pytest.approx(math.sqrt(5 / 3), rel=1e-9)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"count": 1, "mean": "x", "m2": 0},
        {"count": -1, "mean": 0, "m2": 0},
        {"count": 1, "mean": 0, "m2": -1.0},
        {"count": 2, "mean": float("nan"), "m2": 0.0},
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    running = RunningMoments(2, 2.0, 2.0)
    with pytest.raises(CheckpointError, match="running advantage statistics"):
        running.load_state_dict(state)
    assert running.state_dict() == {"count": 2, "mean": 2.0, "m2": 2.0}
