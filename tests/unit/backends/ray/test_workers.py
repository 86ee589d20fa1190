"""Our loss under verl's name, against a float64 reference, through verl's own loss function of the actor."""

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


@pytest.mark.parametrize("weights", [None, torch.rand(4, 6, generator=torch.Generator().manual_seed(9))])
@pytest.mark.parametrize(("aggregation", "divisor"), [("token-mean", 31), ("seq-mean-token-sum", 8)])
def test_value_and_gradient_are_those_of_the_formula(
    weights: torch.Tensor | None, aggregation: str, divisor: int
) -> None:
    data = tensors()
    data["response_mask"][0, 0] = True  # the first response token is trained as well
    data["log_prob"].requires_grad_()
    config = SimpleNamespace(global_batch_info={"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8})
    loss_of = get_policy_loss_fn("advantage_weighted_sft")
    loss, _ = loss_of(**data, loss_agg_mode=aggregation, config=config, rollout_is_weights=weights)
    loss.backward()
    factor = (data["advantages"] * data["response_mask"] * (1.0 if weights is None else weights)).double()
    expected = -(data["log_prob"].detach().double() * factor).sum() / divisor * 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(data["log_prob"].grad, -factor / divisor * 2, rtol=1e-6)


def test_plain_is_the_raw_score_on_every_response_token() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.75], [0.0, -0.5, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    advantages, returns = get_adv_estimator_fn("plain")(rewards, mask)
    assert advantages.tolist() == [[0.75, 0.0, 0.75], [-0.5, -0.5, 0.0]]
    assert torch.equal(advantages, returns)


def test_the_saved_policy_of_separate_async_does_not_change_with_the_weights() -> None:
    weight = torch.ones(2)
    state, spec = own_copies(lambda model: ({"weight": (model, "own spec")}, "spec"))(weight)
    weight.add_(1.0)
    tensor, own = state["weight"]
    assert (tensor.tolist(), own, spec, len(state)) == ([1.0, 1.0], "own spec", "spec", 1)


@pytest.mark.parametrize(("meanwhile", "threads"), [(False, 3), (True, 1)])
def test_a_worker_on_a_cpu_takes_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, meanwhile: bool, threads: int
) -> None:
    class Worker(workers._PreparedWorker):
        generates_meanwhile = meanwhile

    taken: list[int] = []
    monkeypatch.setattr(workers, "init_cpu_process_group", lambda: None)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(workers.torch, "set_num_threads", taken.append)
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "2")
    Worker()
    assert taken == [threads]
