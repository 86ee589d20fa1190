"""Our loss under verl's name, against a float64 reference, through verl's own loss function of the actor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

from atropos_verl.backends.ray import workers
from atropos_verl.verl_plugin.shims import own_copies


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=rng) < 0.7
    mask[3] = False  # a row of padding
    return {
        "log_prob": -torch.rand(4, 6, generator=rng),
        "old_log_prob": -torch.rand(4, 6, generator=rng),
        "advantages": torch.randn(4, 6, generator=rng),
        "response_mask": mask,
    }


def test_it_is_registered_and_imported_again_without_harm() -> None:
    assert get_policy_loss_fn("advantage_weighted_sft") is workers.advantage_weighted_sft
    assert get_adv_estimator_fn("plain") is workers.plain


@pytest.mark.parametrize("with_weights", [False, True])
def test_value_and_gradient_are_those_of_the_formula(with_weights: bool) -> None:
    data = tensors()
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(9)) if with_weights else None
    log_prob = data["log_prob"].clone().requires_grad_()
    config = SimpleNamespace(global_batch_info={"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8})
    loss, _ = workers.advantage_weighted_sft(
        data["old_log_prob"],
        log_prob,
        data["advantages"],
        data["response_mask"],
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    mask = data["response_mask"].double().numpy()
    factor = data["advantages"].double().numpy() * (1.0 if weights is None else weights.double().numpy())
    expected = -(data["log_prob"].double().numpy() * factor * mask).sum() / 31 * 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(log_prob.grad.numpy(), -factor * mask / 31 * 2, rtol=1e-6)


def test_the_first_response_token_is_trained() -> None:
    config = SimpleNamespace(global_batch_info={"dp_size": 1, "batch_num_tokens": 1})
    log_prob = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, _ = workers.advantage_weighted_sft(log_prob, log_prob, torch.ones(1, 2), mask, config=config)
    assert float(loss) == 2.0


def test_other_aggregations_are_verls() -> None:
    data = tensors(3)
    config = SimpleNamespace(global_batch_info={"dp_size": 1, "batch_num_tokens": 31, "global_batch_size": 3})
    loss, _ = workers.advantage_weighted_sft(
        **data, loss_agg_mode="seq-mean-token-sum", config=config, rollout_is_weights=None
    )
    rows = -(data["log_prob"] * data["advantages"] * data["response_mask"]).double().sum(-1)
    assert float(loss) == pytest.approx(float(rows.sum()) / 3, rel=1e-5)


def test_plain_is_the_raw_score_on_every_response_token() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.75], [0.0, -0.5, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    advantages, returns = workers.plain(rewards, mask)
    assert advantages.tolist() == [[0.75, 0.0, 0.75], [-0.5, -0.5, 0.0]]
    assert torch.equal(advantages, returns)


def test_the_saved_policy_of_separate_async_does_not_change_with_the_weights() -> None:
    model = torch.nn.Linear(2, 2)

    def save(module: torch.nn.Module) -> tuple[dict[str, tuple[torch.Tensor, str]], str]:
        return {name: (p.detach().cpu(), "own spec") for name, p in module.named_parameters()}, "spec"

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, spec = own_copies(save)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert spec == "spec"
    assert set(state) == set(before)
    for name, (tensor, own) in state.items():
        assert torch.equal(tensor, before[name])
        assert own == "own spec"
