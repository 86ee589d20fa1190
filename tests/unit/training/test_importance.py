"""Truncated importance weights and their figures against float64 formulas written independently here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from atropos_verl.training.losses.policy import (
    advantage_weighted_sft_loss,
    clipped_ratio_loss,
    importance_weights,
    summarise_importance,
)

NAN = float("nan")


def case(seed: int = 0, sequences: int = 5, longest: int = 9) -> dict[str, np.ndarray]:
    """Padded float64 rows: logprobs, rollout logprobs (some missing, one row wholly), advantages, mask."""
    rng = np.random.default_rng(seed)
    shape = (sequences, longest)
    logprobs = -rng.random(shape) * 4
    rollout = logprobs - rng.normal(0, 0.7, shape)
    rollout[rng.random(shape) < 0.2] = NAN
    rollout[1] = NAN
    mask = rng.random(shape) < 0.6
    mask[:, 0] = False
    return {"logprobs": logprobs, "rollout": rollout, "advantages": rng.normal(size=shape), "mask": mask}


def weights_by_hand(c: dict[str, np.ndarray], level: str, cap: float) -> np.ndarray:
    weights = np.ones(c["mask"].shape)
    for b in range(len(weights)):
        logs = {
            t: c["logprobs"][b, t] - c["rollout"][b, t]
            for t in np.flatnonzero(c["mask"][b])
            if not math.isnan(c["rollout"][b, t])
        }
        for t in np.flatnonzero(c["mask"][b]):
            if level == "token" and t in logs:
                weights[b, t] = min(math.exp(logs[t]), cap)
            elif level == "sequence" and logs:
                weights[b, t] = min(math.exp(sum(logs.values())), cap)
    return weights


def tensors(c: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    found = {name: torch.tensor(value).to(dtype) for name, value in c.items() if name != "mask"}
    return {**found, "mask": torch.tensor(c["mask"])}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 1e9])
@pytest.mark.parametrize("packed", [False, True])
def test_weights(level: str, cap: float, packed: bool) -> None:
    c = case()
    t = tensors(c)
    args = [t[name].flatten() if packed else t[name] for name in ("logprobs", "rollout", "mask")]
    ids = torch.arange(5).repeat_interleave(9) if packed else None
    weights, truncated = importance_weights(*args, level=level, cap=cap, sequence_ids=ids)
    expected = weights_by_hand(c, level, cap)
    np.testing.assert_allclose(weights.view(5, 9).numpy(), expected, rtol=1e-12)
    free = weights_by_hand(c, level, math.inf)
    np.testing.assert_array_equal(truncated.view(5, 9).numpy(), (free > cap) & (expected == cap))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["sft", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_gradients_and_figures(level: str, loss: str, dtype: torch.dtype) -> None:
    c = case(seed=3)
    t = tensors(c, dtype)
    cap = 1.5
    weights = weights_by_hand(c, level, cap)
    tokens = c["mask"].sum()
    logprobs = t["logprobs"].clone().requires_grad_()
    extra = {"rollout_logprobs": t["rollout"], "tis_cap": cap, "importance": level}
    if loss == "sft":
        output = advantage_weighted_sft_loss(logprobs, t["advantages"], t["mask"], **extra)
        expected = -(c["logprobs"] * c["advantages"] * weights)[c["mask"]].sum() / tokens
    else:
        output = clipped_ratio_loss(logprobs, t["logprobs"], t["advantages"], t["mask"], **extra)
        expected = -(c["advantages"] * weights)[c["mask"]].sum() / tokens  # the ratio to itself is 1
    output.loss.backward()
    tight = 1e-10 if dtype == torch.float64 else 1e-5
    assert output.loss.item() == pytest.approx(expected, rel=tight)
    gradient = np.where(c["mask"], -c["advantages"] * weights / tokens, 0.0)
    np.testing.assert_allclose(logprobs.grad, gradient, rtol=max(tight, 1e-7), atol=1e-9)

    known = c["mask"] & ~np.isnan(c["rollout"])
    logs = (c["logprobs"] - c["rollout"])[known]
    used = weights[known]
    figures = summarise_importance(output.metrics)
    by_hand = {
        "ratio_mean": np.exp(logs).mean(),
        "kl_k1": -logs.mean(),
        "kl_k3": (np.exp(logs) - 1 - logs).mean(),
        "log_ratio_max_abs": np.abs(logs).max(),
        "known_logprob_share": known.sum() / tokens,
        "weight_mean": used.mean(),
        "clipped_share": (weights_by_hand(c, level, math.inf)[known] > cap).mean(),
        "effective_sample_size": used.sum() ** 2 / (len(used) * (used**2).sum()),
    }
    for name, value in by_hand.items():
        assert figures[f"off_policy/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert not [name for name in figures if name.startswith("importance/")]


def test_weights_of_the_policy_itself_change_nothing() -> None:
    t = tensors(case(seed=5), torch.float32)
    plain = advantage_weighted_sft_loss(t["logprobs"], t["advantages"], t["mask"])
    own = {"rollout_logprobs": t["logprobs"], "tis_cap": 1.0}
    for level in ("token", "sequence"):
        weighted = advantage_weighted_sft_loss(t["logprobs"], t["advantages"], t["mask"], importance=level, **own)
        assert weighted.loss == plain.loss
        figures = summarise_importance(weighted.metrics)
        assert figures["off_policy/clipped_share"] == 0.0 and figures["off_policy/log_ratio_max_abs"] == 0.0


def test_extreme_ratios_stay_finite_and_nothing_known_is_no_figure() -> None:
    logprobs = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    rollout = torch.tensor([[NAN, 0.0, -500.0]])
    mask = torch.tensor([[0, 1, 1]])
    for level in ("token", "sequence"):
        output = advantage_weighted_sft_loss(
            logprobs, torch.ones(1, 3), mask, rollout_logprobs=rollout, tis_cap=1e12, importance=level
        )
        output.loss.backward()
        assert output.loss.isfinite() and logprobs.grad is not None and logprobs.grad.isfinite().all()
    nothing = advantage_weighted_sft_loss(
        logprobs, torch.ones(1, 3), mask, rollout_logprobs=torch.full((1, 3), NAN), tis_cap=2.0
    )
    assert not [name for name in summarise_importance(nothing.metrics) if "off_policy" in name]


def test_a_packed_batch_needs_sequence_ids_and_shapes_must_fit() -> None:
    values = torch.zeros(4)
    with pytest.raises(ValueError, match="sequence_ids"):
        importance_weights(values, values, values == 0, level="sequence")
    with pytest.raises(ValueError, match="shape"):
        importance_weights(values, values[:2], values == 0)
