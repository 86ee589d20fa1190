"""The trainer on Ray: dead replicas, what it leaves out and saves; our loss and estimator under verl's names."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from atropos_verl.backends.ray import run as run_module
from atropos_verl.backends.ray import workers
from atropos_verl.backends.ray.trainer import MODES, AtroposAgentLoopManager, AtroposSyncTrainer
from atropos_verl.backends.ray.workers import AtroposActorRolloutRefWorker
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import compose_run, read_run
from atropos_verl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineStoppedError,
    ServiceError,
    TrainingDivergedError,
    WeightSyncError,
)
from atropos_verl.training.checkpoint_state import RunState, find_damage
from atropos_verl.verl_plugin.shims import own_copies


@pytest.mark.parametrize("extra", [{}, {"validate": True}])
@pytest.mark.parametrize("wrap", [True, False])
def test_slots_of_training_go_to_the_feed_and_prompts_of_validation_to_verls_manager(
    extra: dict[str, Any], wrap: bool
) -> None:
    feed = Mock()
    manager = AtroposAgentLoopManager(SimpleNamespace(), feed, llm_client=None)
    manager._validation = Mock()
    uids = {"uid": np.array(["a", "b"], dtype=object)}
    prompts = tu.get_tensordict(uids, {"global_steps": 7, **({} if wrap else extra)})
    for name, value in (extra if wrap else {}).items():
        tu.assign_non_tensor_data(prompts, name, value)  # as verl's trainer does
    manager.generate_sequences(prompts)
    assert feed.request.mock_calls == ([] if extra else [call("a", 7), call("b", 7)])
    assert manager._validation.generate_sequences.mock_calls == ([call(prompts)] if extra else [])


def _trainer(*deaths: int) -> Any:
    """``deaths``: of replicas, before each look at them."""
    trainer = object.__new__(AtroposSyncTrainer)
    trainer.replicas = Mock(has_newcomers=True, **{"replace_dead.side_effect": deaths})
    return trainer


@pytest.mark.parametrize(
    ("deaths", "acts"),
    [
        ([0, 0], 1),
        ([1, 0], 1),  # before the call
        ([0, 1, 0, 0], 2),  # in the call, which said nothing
        ([0, 1, 0, 1, 0, 0], 3),
    ],
)
@pytest.mark.parametrize("error", [None, RuntimeError("the actor died")])
def test_a_call_of_all_replicas_is_made_again_with_new_ones(
    deaths: list[int], acts: int, error: Exception | None
) -> None:
    trainer, act = _trainer(*deaths), Mock(side_effect=[error] * (acts - 1) + [None])
    trainer._on_replicas(act)
    assert (act.call_count, trainer.replicas.replace_dead.call_count) == (acts, len(deaths))


def test_another_failure_of_the_call_is_raised_and_endless_deaths_end_the_run() -> None:
    with pytest.raises(ValueError, match="no such tensor"):
        _trainer(0, 0)._on_replicas(Mock(side_effect=ValueError("no such tensor")))
    with pytest.raises(EngineStoppedError, match="died 5 times in a row"):
        _trainer(*[1] * 100)._on_replicas(Mock())


def test_requests_that_wait_for_a_new_replica_are_served_while_the_gate_drains() -> None:
    """The replica died before the drain, which waits for requests that wait for the replica."""
    trainer = _trainer(1, 0, 0, 0, 0)
    trainer._renew_replicas = trainer.replicas.renew
    trainer.gateway = Mock(lost=threading.Event(), **{"gate.drain.side_effect": [TimeoutError, None]})
    trainer._on_replicas(lambda: trainer.pause(600.0))
    done = [name for name, *_ in trainer.replicas.mock_calls if name != "replace_dead"]
    assert (done, trainer.gateway.gate.drain.call_count) == (["renew", "admit"], 2)


FRESH = {"versions_known": True, "rollout_log_probs": True, "min_global_steps": 4, "max_global_steps": 4}


@pytest.mark.parametrize(
    ("exact", "change", "computes"),
    [
        (True, {}, False),
        (False, {}, True),  # bfloat16, or no canary that proves it
        (True, {"min_global_steps": 3}, True),
        (True, {"min_global_steps": 3, "max_global_steps": 3}, True),
        (True, {"versions_known": False}, True),
        (True, {"rollout_log_probs": False}, True),
    ],
)
def test_verls_forward_for_old_logprobs_is_left_out_where_the_replicas_said_them(
    exact: bool, change: dict[str, Any], computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``served_version`` is 4, and only the second row is changed."""
    rows = torch.tensor([[-0.5], [-0.25]])
    queue = Mock(**{"kv_batch_get.return_value": {"rollout_log_probs": rows}})
    monkeypatch.setattr("atropos_verl.backends.ray.trainer.tq", queue)
    forward = Mock(side_effect=lambda batch, metrics: batch)
    monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", forward)
    trainer = object.__new__(AtroposSyncTrainer)
    trainer._is_exact = exact
    trainer.sharding_manager = SimpleNamespace(last_sync=SimpleNamespace(policy_version=4))
    batch = SimpleNamespace(keys=["a", "b"], partition_id="train", tags=[FRESH, {**FRESH, **change}])
    assert trainer._compute_old_log_prob(batch, {}) is batch
    assert forward.called is computes
    if not computes:
        queue.kv_batch_put.assert_called_once_with(
            keys=["a", "b"], partition_id="train", fields={"old_log_probs": rows}
        )


def test_the_configuration_that_verl_hands_to_trackers_has_no_key_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.ray, "get_actor", Mock())
    monkeypatch.setattr("transfer_queue.init", Mock())
    monkeypatch.setattr("transfer_queue.close", Mock())
    monkeypatch.setattr(run_module.AtroposTaskRunner, "train", lambda self: {})
    keys = [
        "token=of-the-api",
        "gateway.api_key=of-the-gateway",
        "headers={x-key: of-the-proxy}",
        "env.env={KEY: of-me}",
    ]
    runner = run_module.AtroposTaskRunner()
    runner.run(compose_run([*(f"atropos.{key}" for key in keys), f"run_dir={tmp_path}"]))
    settings = runner.cluster.run
    assert (settings.atropos.token, settings.gateway.api_key) == ("of-the-api", "of-the-gateway")
    assert "of-" not in OmegaConf.to_yaml(runner.config.atropos)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_actor_ckpt_to_keep": 1, "max_critic_ckpt_to_keep": 1}, [4]),
        ({"max_actor_ckpt_to_keep": 2, "max_critic_ckpt_to_keep": 1}, [3, 4]),
        ({"max_actor_ckpt_to_keep": 3, "remove_previous_ckpt_in_save": True}, [4]),
        *(({"max_actor_ckpt_to_keep": every}, [1, 2, 3, 4]) for every in (None, 0, -1)),
    ],
)
def test_verl_removes_nothing_of_a_checkpoint_before_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kept: list[int]
) -> None:
    managers = {name: object.__new__(BaseCheckpointManager) for name in ("actor", "critic")}
    for manager in managers.values():
        manager.previous_saved_paths = []
    damages: list[str | None] = []
    other = tmp_path.with_name(f"{tmp_path.name}-on-another-node")

    def save(trainer: Any) -> None:
        config, before = trainer.config.trainer, sorted(path.parent for path in tmp_path.glob("*/manifest.json"))
        for name, manager in managers.items():  # as verl's trainer and its workers do
            keep = 1 if config.get("remove_previous_ckpt_in_save") else config.get(f"max_{name}_ckpt_to_keep")
            path = tmp_path / f"global_step_{trainer.global_steps}" / name
            manager.ensure_checkpoint_capacity(keep)
            path.mkdir(parents=True)
            (path / "weights").touch()
            manager.register_checkpoint(str(path), keep)
        (other / f"global_step_{trainer.global_steps}" / "actor").mkdir(parents=True)
        damages.extend(find_damage(path) for path in before)

    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", save)
    trainer = object.__new__(AtroposSyncTrainer)
    trainer.config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), **settings}})
    OmegaConf.set_struct(trainer.config, True)
    trainer.state, trainer.atropos = RunState(), SimpleNamespace(run=RunConfig())
    remove = AtroposActorRolloutRefWorker.remove_checkpoints
    trainer.actor_rollout_wg = SimpleNamespace(remove_checkpoints=lambda _, kept: remove(None, str(other), kept))
    for trainer.global_steps in (1, 2, 3, 4):
        trainer._save_checkpoint()
    assert damages and not any(damages)
    for node in (tmp_path, other):
        assert sorted(int(path.name[-1]) for path in node.glob("global_step_*")) == kept
    assert settings.items() <= dict(trainer.config.trainer).items()


def test_a_ray_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.ray, "init", Mock(side_effect=Exception("the node timed out")))
    parts: dict[str, Any] = {"progress": Mock(), "evaluations": None, "check_services": Mock()}
    with pytest.raises(ServiceError, match="Ray: the node timed out"):
        run_module.run_on_ray(read_run(compose_run([f"run_dir={tmp_path}"])), **parts)


IN_DOUBT = (CheckpointError, TrainingDivergedError, WeightSyncError, ray.exceptions.RayError)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [EngineStoppedError, ConfigError, DataError, ValueError, *IN_DOUBT])
def test_trained_steps_are_saved_whatever_ends_the_run_unless_the_weights_are_in_doubt(
    kind: type[Exception], fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steps 1 and 2 are whole and not saved. A save that fails does not replace what ended the run."""
    error, saves, events = kind("x"), kind not in IN_DOUBT, list[tuple[str, Any]]()
    save = Mock(side_effect=ValueError("the disk is full") if fails else None)
    trainer = Mock(config=SimpleNamespace(trainer=SimpleNamespace(save_freq=20)), checkpoint_root="here")
    trainer.configure_mock(global_steps=3, total_training_steps=9, local_trigger_step=0, _save_checkpoint=save)
    trainer.configure_mock(_whole_step=2, _covered_step=0, _is_updating=False, state=RunState())
    trainer.fit.side_effect = error
    trainer.save_what_was_trained = lambda *of: AtroposSyncTrainer.save_what_was_trained(trainer, *of)
    runner = run_module.AtroposTaskRunner()
    runner.cluster = SimpleNamespace(mode="fake", run_dir=tmp_path, run=SimpleNamespace(is_attached=True))
    runner.put, runner.flag = lambda *event: events.append(event), lambda name: {}
    runner.config = runner.stack = runner.source = runner.gateway = runner._start_services = Mock()
    monkeypatch.setitem(MODES, "fake", lambda config, note: trainer)
    with pytest.raises(kind) as raised:
        runner.train()
    assert raised.value is error and save.call_count == saves
    told = ("saved", "steps up to 2 are saved in here")
    assert (told in events) is (saves and not fails)
    notes = ["(and the trained steps could not be saved: the disk is full)"] if saves and fails else []
    assert getattr(error, "__notes__", []) == notes


@pytest.mark.parametrize(
    ("rows", "size", "steps"),
    [
        ([1] * 8, 2, 1),  # eight rollouts of a row each, as ever: mini-batches of 2 prompts with 4 rollouts
        ([3, 1, 1, 1, 1, 1, 1, 1], 3, 1),
        ([2] * 16, 4, 2),
        ([5, 1, 1, 1, 1, 1, 1, 1, *[1] * 8], 3, 2),
        ([1] * 20, 3, 2),  # a batch of 16 that the API made larger, since it splits no group
    ],
)
def test_rows_and_rollouts_above_the_settings_make_no_further_optimiser_steps(
    rows: list[int], size: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOTrainer, "_balance_batch", Mock())
    trainer: Any = object.__new__(AtroposSyncTrainer)
    trainer.atropos = SimpleNamespace(run=SimpleNamespace(batch_size=16))
    actor = {"ppo_mini_batch_size": 2}
    config = {"actor_rollout_ref": {"actor": actor, "rollout": {"n": 4}}, "trainer": {"critic_warmup": 0}}
    trainer.config, trainer.use_critic, trainer.global_steps = OmegaConf.create(config), False, 1
    trainer._mini_batches = [(trainer.config.actor_rollout_ref.actor, 2)]
    keys = [f"slot_{rollout}_{row}" for rollout, count in enumerate(rows) for row in range(count)]
    trainer._balance_batch(SimpleNamespace(keys=keys))
    multiple = trainer._get_required_batch_multiple(1)
    assert trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size == size
    padded = -(-len(keys) // multiple) * multiple
    assert padded // (size * 4) == steps


@pytest.mark.parametrize("weights", [None, torch.rand(4, 6, generator=torch.Generator().manual_seed(9))])
@pytest.mark.parametrize(("aggregation", "divisor"), [("token-mean", 31), ("seq-mean-token-sum", 8)])
def test_value_and_gradient_are_those_of_the_formula(
    weights: torch.Tensor | None, aggregation: str, divisor: int
) -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 6, generator=rng) < 0.7
    mask[0, 0], mask[3] = True, False  # the first response token is trained as well; a row of padding
    log_prob, old, advantages = (torch.randn(4, 6, generator=rng) - 2 for _ in range(3))
    log_prob.requires_grad_()
    config = SimpleNamespace(global_batch_info={"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8})
    settings = {"loss_agg_mode": aggregation, "config": config, "rollout_is_weights": weights}
    loss, _ = get_policy_loss_fn("advantage_weighted_sft")(old, log_prob, advantages, mask, **settings)
    loss.backward()
    factor = (advantages * mask * (1.0 if weights is None else weights)).double()
    expected = -(log_prob.detach().double() * factor).sum() / divisor * 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(log_prob.grad, -factor / divisor * 2, rtol=1e-6)


def test_plain_is_the_raw_score_on_every_response_token() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.75], [0.0, -0.5, 0.0]])
    advantages, returns = get_adv_estimator_fn("plain")(rewards, torch.tensor([[1, 0, 1], [1, 1, 0]]))
    assert advantages.tolist() == returns.tolist() == [[0.75, 0.0, 0.75], [-0.5, -0.5, 0.0]]


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
    taken = Mock()
    monkeypatch.setattr(workers, "init_cpu_process_group", lambda: None)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(workers.torch, "set_num_threads", taken)
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "2")
    type("Worker", (workers._PreparedWorker,), {"generates_meanwhile": meanwhile})()
    taken.assert_called_once_with(threads)
