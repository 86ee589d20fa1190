"""verl's contract with the agent-loop manager (slots to the feed, validation prompts to verl's own manager), what
the trainer does when a replica dies, and what verl is not told."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from atropos_verl.backends.ray import run as run_module
from atropos_verl.backends.ray.trainer import MODES, AtroposAgentLoopManager, AtroposSyncTrainer
from atropos_verl.backends.ray.workers import AtroposActorRolloutRefWorker
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import compose_run
from atropos_verl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineStoppedError,
    TrainingDivergedError,
    WeightSyncError,
)
from atropos_verl.training.checkpoint_state import RunState, find_damage


@pytest.mark.parametrize("extra", [{}, {"validate": True}])
@pytest.mark.parametrize("wrap", [True, False])
def test_slots_of_training_go_to_the_feed_and_prompts_of_validation_to_verls_manager(
    extra: dict[str, Any], wrap: bool
) -> None:
    feed, validation = Mock(), Mock()
    manager = AtroposAgentLoopManager(SimpleNamespace(), feed, llm_client=None)
    manager._validation = validation
    uids = {"uid": np.array(["a", "b"], dtype=object)}
    prompts = tu.get_tensordict(uids, {"global_steps": 7, **({} if wrap else extra)})
    for name, value in (extra if wrap else {}).items():
        tu.assign_non_tensor_data(prompts, name, value)  # as verl's trainer does
    manager.generate_sequences(prompts)
    assert feed.request.mock_calls == ([] if extra else [call("a", 7), call("b", 7)])
    assert validation.generate_sequences.mock_calls == ([call(prompts)] if extra else [])


class _Replicas:
    """``deaths`` before each look at them; notes what is done, in order."""

    def __init__(self, deaths: list[int]) -> None:
        self.deaths, self.done, self.has_newcomers = deaths, [], False

    def replace_dead(self) -> int:
        count = self.deaths.pop(0) if self.deaths else 0
        self.done += ["replace"] * bool(count)
        self.has_newcomers = self.has_newcomers or bool(count)
        return count

    def admit(self) -> None:
        self.has_newcomers = False
        self.done.append("admit")


def _trainer(deaths: list[int], drain: Callable[[float], None] = lambda seconds: None) -> Any:
    trainer = object.__new__(AtroposSyncTrainer)
    trainer.replicas = replicas = _Replicas(deaths)
    trainer.gateway = SimpleNamespace(lost=threading.Event(), gate=SimpleNamespace(drain=drain))
    trainer._renew_replicas = lambda: replicas.done.append("weights")
    return trainer


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [
        ([0, 0], ["act"]),
        ([1, 0], ["replace", "act"]),  # before the call
        ([0, 1, 0, 0], ["act", "replace", "act"]),  # in the call, which said nothing
        ([0, 1, 0, 1, 0, 0], ["act", "replace"] * 2 + ["act"]),
    ],
)
@pytest.mark.parametrize("raises", [True, False])
def test_a_call_of_all_replicas_is_made_again_with_new_ones(
    deaths: list[int], expected: list[str], raises: bool
) -> None:
    trainer = _trainer(list(deaths))

    def act() -> None:
        trainer.replicas.done.append("act")
        if raises and trainer.replicas.deaths[:1] == [1]:
            raise RuntimeError("the actor died")

    trainer._on_replicas(act)
    assert trainer.replicas.done == expected


def test_another_failure_of_the_call_is_raised_and_endless_deaths_end_the_run() -> None:
    with pytest.raises(ValueError, match="no such tensor"):
        _trainer([])._on_replicas(Mock(side_effect=ValueError("no such tensor")))
    with pytest.raises(EngineStoppedError, match="died 5 times in a row"):
        _trainer([1] * 100)._on_replicas(lambda: None)


def test_requests_that_wait_for_a_new_replica_are_served_while_the_gate_drains() -> None:
    """The replica died before the drain, which waits for requests that wait for the replica."""

    def drain(seconds: float) -> None:
        if trainer.replicas.has_newcomers:
            raise TimeoutError

    trainer = _trainer([1], drain)
    trainer._on_replicas(lambda: trainer.pause(600.0))
    assert trainer.replicas.done == ["replace", "weights", "admit"]


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
    stored = {"rollout_log_probs": torch.tensor([[-0.5], [-0.25]])}
    queue = SimpleNamespace(kv_batch_get=Mock(return_value=dict(stored)), kv_batch_put=Mock())
    monkeypatch.setattr("atropos_verl.backends.ray.trainer.tq", queue)
    forward = Mock(side_effect=lambda batch, metrics: batch)
    monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", lambda _self, batch, metrics: forward(batch, metrics))
    trainer = object.__new__(AtroposSyncTrainer)
    trainer._is_exact = exact
    trainer.sharding_manager = SimpleNamespace(last_sync=SimpleNamespace(policy_version=4))
    batch = SimpleNamespace(keys=["a", "b"], partition_id="train", tags=[FRESH, {**FRESH, **change}])
    assert trainer._compute_old_log_prob(batch, {}) is batch
    assert forward.called is computes
    if not computes:
        fields = queue.kv_batch_put.call_args.kwargs["fields"]
        assert list(fields) == ["old_log_probs"]
        assert fields["old_log_probs"] is stored["rollout_log_probs"]


def test_the_configuration_that_verl_hands_to_trackers_has_no_key_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.ray, "get_actor", Mock())
    monkeypatch.setattr("transfer_queue.init", Mock())
    monkeypatch.setattr("transfer_queue.close", Mock())
    monkeypatch.setattr(run_module.AtroposTaskRunner, "train", lambda self: {})
    secrets = [
        "atropos.token=of-the-api",
        "atropos.gateway.api_key=of-the-gateway",
        "atropos.headers={x-key: of-the-proxy}",
        "atropos.env.env={KEY: of-the-user}",
    ]
    runner = run_module.AtroposTaskRunner()
    runner.run(compose_run([*secrets, f"run_dir={tmp_path}"]))
    settings = runner.cluster.run
    assert (settings.atropos.token, settings.gateway.api_key) == ("of-the-api", "of-the-gateway")
    assert "of-the" not in OmegaConf.to_yaml(runner.config)


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
    workers = partial(AtroposActorRolloutRefWorker.remove_checkpoints, None, str(other))
    trainer.actor_rollout_wg = SimpleNamespace(remove_checkpoints=lambda _, kept: workers(kept))
    for trainer.global_steps in (1, 2, 3, 4):
        trainer._save_checkpoint()
    assert damages and not any(damages)
    for node in (tmp_path, other):
        assert [int(path.name[-1]) for path in sorted(node.glob("global_step_*"))] == kept
    assert settings.items() <= dict(trainer.config.trainer).items()


def _end_with(error: Exception, save: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Steps 1 and 2 are whole and not saved when ``error`` ends ``fit``. Returns the events."""
    trainer = Mock(config=SimpleNamespace(trainer=SimpleNamespace(save_freq=20)), checkpoint_root="here")
    trainer.configure_mock(global_steps=3, total_training_steps=9, local_trigger_step=0, _save_checkpoint=save)
    trainer.configure_mock(_whole_step=2, _covered_step=0, _is_updating=False, state=RunState())
    trainer.fit.side_effect = error
    trainer.save_what_was_trained = lambda *of: AtroposSyncTrainer.save_what_was_trained(trainer, *of)
    runner, events = run_module.AtroposTaskRunner(), []
    runner.config = SimpleNamespace(trainer=SimpleNamespace(resume_mode="disable"))
    runner.cluster = SimpleNamespace(mode="fake", run_dir=tmp_path, run=SimpleNamespace(is_attached=True))
    runner.put, runner.flag = lambda *event: events.append(event), lambda name: {}
    runner.stack, runner.source, runner.gateway = Mock(), Mock(), Mock()
    runner._start_services = Mock()
    monkeypatch.setitem(MODES, "fake", lambda config, note: trainer)
    with pytest.raises(type(error)) as raised:
        runner.train()
    assert raised.value is error
    return events


IN_DOUBT = (CheckpointError, TrainingDivergedError, WeightSyncError, ray.exceptions.RayError)


@pytest.mark.parametrize("error", [EngineStoppedError, ConfigError, DataError, ValueError, *IN_DOUBT])
def test_trained_steps_are_saved_whatever_ends_the_run_unless_the_weights_are_in_doubt(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events = _end_with(error("x"), save := Mock(), monkeypatch, tmp_path)
    assert save.call_count == (error not in IN_DOUBT)
    told = ("saved", "steps up to 2 are saved in here; the same command goes on")
    assert (told in events) is (error not in IN_DOUBT)


def test_a_save_that_fails_does_not_replace_what_ended_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = DataError("a bad group")
    _end_with(error, Mock(side_effect=ValueError("the disk is full")), monkeypatch, tmp_path)
    assert error.__notes__ == ["(and the trained steps could not be saved: the disk is full)"]


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
    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda trainer, batch: None)
    trainer: Any = object.__new__(AtroposSyncTrainer)
    trainer.atropos = SimpleNamespace(run=SimpleNamespace(batch_size=16))
    actor = {"ppo_mini_batch_size": 2}
    config = {"actor_rollout_ref": {"actor": actor, "rollout": {"n": 4}}, "trainer": {"critic_warmup": 0}}
    trainer.config = OmegaConf.create(config)
    trainer.use_critic, trainer.global_steps = False, 1
    trainer._mini_batches = [(trainer.config.actor_rollout_ref.actor, 2)]
    keys = [f"slot_{rollout}_{row}" for rollout, count in enumerate(rows) for row in range(count)]
    trainer._balance_batch(SimpleNamespace(keys=keys))
    multiple = trainer._get_required_batch_multiple(1)
    mini_batch = trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert mini_batch == size
    padded = -(-len(keys) // multiple) * multiple
    assert padded // (mini_batch * 4) == steps
