"""verl's V1 trainers, thin: rollouts come from the trajectory feed, advantages from ``training/``, weights through
``AtroposShardingManager`` (docs/internals.md: "Modes on Ray")."""

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode, PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from atropos_verl.backends.ray.feed import ADVANTAGES, PARTITION, Slot, TrajectoryFeed, finish_batch
from atropos_verl.backends.ray.gateway import ClusterGateway
from atropos_verl.backends.ray.replicas import Replicas
from atropos_verl.backends.ray.workers import WORKERS
from atropos_verl.config.verl_keys import RayRun, parameter_sync_step, read_run
from atropos_verl.errors import CheckpointError, EngineStoppedError, TrainingDivergedError, WeightSyncError
from atropos_verl.training.checkpoint_state import (
    RunState,
    changed_settings,
    find_checkpoint,
    mark_best,
    new_checkpoint,
)
from atropos_verl.training.losses import summarise_importance
from atropos_verl.training.staleness import staleness_metrics
from atropos_verl.training.step import is_best, step_report
from atropos_verl.training.weight_sync import AtroposShardingManager
from atropos_verl.types import StepReport

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 600.0
_STOP_LOOK_SECONDS = 0.5
_REPLICA_LOOK_SECONDS = 1.0
_MOST_DEATHS = 5  # of replicas, in one call of ours to all of them


class StopRequestedError(Exception):
    """The user asked the run to end; every step so far is whole."""


class _AtroposTrainer(PPOTrainer):  # type: ignore[misc]
    """Base of the three modes. ``attach`` gives it feed and gateway after ``init`` and before ``fit``."""

    drains = False  # requests in flight end before the engine sleeps, for engines that cannot hold them
    _is_exact = False  # a canary proves after every sync that the replicas compute the trainer's logprobs, in float32

    def __init__(self, config: Any, note: Callable[[str], None]) -> None:
        """``note`` is told what the user should know."""
        self.note = note
        self.atropos: RayRun = read_run(config)
        self.state = RunState()
        self.feed: TrajectoryFeed
        self.gateway: ClusterGateway | None = None
        self.replicas: Replicas
        self.on_report: Callable[[StepReport], None] = lambda report: None
        self.on_stop: Callable[[], bool] = lambda: False
        self.on_evaluate: Callable[[str], dict[str, float | None]] = lambda label: {}
        self._held_out_figures: dict[str, float | int | None] = {}
        """Of the evaluation since the last line of ``metrics.jsonl``."""
        self._slots: list[Slot] = []
        self._counts: Counter[str] = Counter()
        self._covered_step = self._whole_step = 0
        """A checkpoint holds the effect of every batch up to this step; the last step of which everything is done."""
        self._is_updating = False
        self._next_stop_look, self._step_started, self._loss = 0.0, time.perf_counter(), 0.0
        self._rows = (1, 1)
        """Rows of the batch of this step, and rollouts, of which only as many count as a batch should have."""
        sections = [config.actor_rollout_ref.actor, *([config.critic] if "critic" in config else [])]
        self._mini_batches = [(section, int(section.ppo_mini_batch_size)) for section in sections]
        super().__init__(config)
        # verl's own hooks move the tensors between its workers and its replicas; nothing passes through this process.
        self.sharding_manager = AtroposShardingManager(self, self, gate=self, pause_timeout=_DRAIN_SECONDS)

    def attach(self, feed: TrajectoryFeed, gateway: ClusterGateway) -> None:
        """Call it after ``init`` and before ``fit``. The gateway is open from its start: the weights are there."""
        self.feed, self.gateway = feed, gateway
        self._whole_step = self._covered_step = self.global_steps
        gateway.release(self.policy_version)
        self.replay_buffer.trainer, self.replay_buffer.poll_interval = self, self.atropos.settings.poll_interval

    @property
    def policy_version(self) -> int:
        """Weights after step N are version N (verl's ``global_steps``)."""
        return int(self.global_steps)

    @property
    def served_version(self) -> int:
        """The version of the weights in the replicas; behind ``policy_version`` between an update and its sync."""
        last = self.sharding_manager.last_sync
        return self.policy_version if last is None else int(last.policy_version)

    def named_tensors(self) -> Iterable[tuple[str, Any]]:
        return ()

    def resume_memory_occupation(self) -> None:
        """Part of verl's weight update. The replicas of ``separate_async``, not the trainer's, release no memory."""

    release_memory_occupation = resume_memory_occupation

    def pause(self, timeout: float) -> None:
        """Shut the gate. Replicas of vLLM and SGLang cannot hold a request while they sleep: it ends first."""
        if self.gateway is None:
            return None
        gate, deadline = self.gateway.gate, time.monotonic() + timeout
        while True:
            try:
                return gate.drain(_REPLICA_LOOK_SECONDS) if self.drains else gate.pause(timeout)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            self.replace_dead_replicas()  # requests of a dead one wait for the next

    def resume(self) -> None:
        self.replicas.admit()
        if self.gateway is not None:
            self.gateway.release(self.policy_version)

    def _open_rollouts(self) -> None:
        """Put the newest weights into the replicas, then open the gate."""
        self._on_replicas(self.sharding_manager.__enter__)

    def _close_rollouts(self) -> None:
        """Shut the gate; the replicas sleep."""
        self._on_replicas(lambda: self.sharding_manager.__exit__(None, None, None))

    def _on_replicas(self, act: Callable[[], object]) -> None:
        """``act`` calls every replica. Those that died before or while it ran are replaced, and it is done again."""
        for _ in range(_MOST_DEATHS):
            # Before: a training worker that calls a dead server would leave the others alone in a collective.
            self.replicas.replace_dead()
            try:
                act()
            except Exception as error:
                if not self.replicas.replace_dead():
                    raise
                logger.warning("once more, with another replica: %s", error)
            else:
                if not self.replicas.replace_dead():
                    return
        raise EngineStoppedError(f"rollout replicas died {_MOST_DEATHS} times in a row; Ray's logs say of what")

    def replace_dead_replicas(self) -> None:
        """Call it while the training workers are idle. A server that a request found dead is replaced, and new ones get
        the weights that are served."""
        if self.gateway is not None and (self.gateway.lost.is_set() or self.replicas.has_newcomers):
            self.gateway.lost.clear()
            if self.replicas.replace_dead() or self.replicas.has_newcomers:
                self._on_replicas(self._renew_replicas)
            self.replicas.admit()

    def _renew_replicas(self) -> None:
        """verl sends weights to all replicas or none, so those that live stop for it: their requests go on after."""
        manager = self.checkpoint_manager
        manager.abort_replicas()
        manager.sleep_replicas()
        manager.update_weights(self.served_version)
        manager.resume_generation_replicas()
        self._check_canary()

    def _check_canary(self) -> None:
        if (canary := self.sharding_manager.canary) is not None:
            canary.check()

    def _serving_managers(self) -> list[Any]:
        return [self.llm_server_manager]

    def _setup(self) -> None:
        super()._setup()
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        managers = self._rollout_server_managers()
        self.replicas = Replicas(self.actor_rollout_wg, managers, self._serving_managers, self.note)
        computes = (actor.get("fsdp_config") or {}).get("mixed_precision") or {}
        exact = rollout.dtype == "float32" and computes.get("param_dtype") in ("fp32", "float32")
        self.sharding_manager.canary = self.replicas.canary(self.atropos.settings.sync, self.tokenizer, exact=exact)
        self._is_exact = exact and self.sharding_manager.canary is not None
        self.drains = self.drains and rollout.name != "transformers"

    on_init_end = _open_rollouts

    def _init_dataloader(self) -> None:
        config = self.config
        self.val_dataset = self.val_dataloader = _NoPrompts()
        if config.data.val_files:  # verl makes the loaders of training and validation together
            with open_dict(config):
                config.data.train_files = config.data.val_files
            super()._init_dataloader()
        self.train_dataset = self.train_dataloader = _NoPrompts()
        self.train_dataloader_it = None
        self.total_training_steps = int(config.trainer.total_training_steps)
        self.steps_per_epoch = max(self.total_training_steps, 1)
        updates = self.total_training_steps * self.parameter_sync_step
        with open_dict(config):
            # fit() ends by step; with one epoch of exactly that many, verl's epoch count does not end it before.
            config.trainer.total_epochs = max(int(config.trainer.total_epochs), 2)
            config.actor_rollout_ref.actor.optim.total_training_steps = updates
            if self.use_critic:
                config.critic.optim.total_training_steps = updates

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        # By name: Ray wraps the class it is given in a subclass of the same name.
        ours = {worker.__name__.removeprefix("Atropos"): worker for worker in WORKERS}
        for role, remote in self.role_worker_mapping.items():
            self.role_worker_mapping[role] = ray.remote(ours[remote.__ray_metadata__.modified_class.__name__])

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.__class__ = type("AtroposReplayBuffer", (_Watching, type(buffer)), {})
        return buffer

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """Names of slots, which the feed fills."""
        uids = [uuid.uuid4().hex for _ in range(num_prompts or parameter_sync_step(self.config))]
        return tu.get_tensordict({"uid": np.array(uids, dtype=object)}, {"global_steps": self.global_steps})

    def _add_async_warmup_batches(self, num_warmup_batches: float) -> None:
        slots = math.ceil(num_warmup_batches * parameter_sync_step(self.config))
        if slots > 0:
            self._add_prompts_to_generate(slots)

    def on_step_begin(self) -> None:
        self._step_started = time.perf_counter()
        self._slots = []
        super().on_step_begin()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        batch = super().step(metrics, timing_raw)
        uids = {key.split("_")[0] for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding")}
        self._slots = self.feed.trained(sorted(uids), self.global_steps)
        grad_norm = float(metrics.get("actor/grad_norm", 0.0))
        self._loss = float(metrics.get("actor/loss", metrics.get("actor/pg_loss", 0.0)))
        if not (math.isfinite(self._loss) and math.isfinite(grad_norm)):
            raise TrainingDivergedError(
                f"step {self.global_steps}: loss {self._loss}, gradient norm {grad_norm}; lower "
                "actor_rollout_ref.actor.optim.lr, or bound advantages with atropos.advantage_clipping"
            )
        self._counts = Counter()
        for slot in self._slots:
            self._counts.update(slot.counts)
        self.state.totals.count(self._counts)
        if self.config.trainer.save_freq <= 0:
            self._covered_step = self.global_steps  # no checkpoint will ever cover it
        return batch

    def _balance_batch(self, batch: KVBatchMeta, *arguments: Any, **keywords: Any) -> KVBatchMeta:
        rollouts = len({key.rsplit("_", 1)[0] for key in batch.keys})
        self._rows = (len(batch.keys), min(rollouts, self.atropos.run.batch_size))
        return super()._balance_batch(batch, *arguments, **keywords)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        # verl's mini-batches are counted in rows. Those of a batch with more rollouts than the settings say (the API
        # splits no group), or whose rollouts have several rows, hold as many more: no further optimiser steps.
        rows, rollouts = self._rows
        for section, size in self._mini_batches:
            scaled = math.ceil(size * rows / rollouts / dp_size) * dp_size
            section.ppo_mini_batch_size = size if rows == rollouts else scaled
        return int(super()._get_required_batch_multiple(dp_size))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        if not all(tag.get("rollout_log_probs", True) for tag in batch.tags):
            # verl compares zeros where an environment sent no logprobs; the figure would mean nothing.
            for key in [name for name in metrics if name.startswith("training/rollout_")]:
                del metrics[key]
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        run, algorithm = self.atropos.run, self.config.algorithm
        own = [] if algorithm.rollout_correction.bypass_mode else ["old_log_probs"]  # then verl has none
        wanted = ["response_mask", "advantages", ADVANTAGES, *own]
        values = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
        # The group baseline is that of training.advantages, as in the local backend. verl weighs a reward that it
        # changed (KL in reward), and computes its other estimators.
        ours = str(algorithm.adv_estimator) in ("grpo", "rloo", "plain") and not algorithm.use_kl_in_reward
        advantages, figures = finish_batch(
            values,
            batch.keys,
            batch.tags,
            from_data=ours,
            normalization=run.advantage_normalization,
            clipping=run.advantage_clipping,
            running=self.state.moments,
        )
        metrics.update(figures)
        computed = {"advantages": advantages, **({"trainer_logprobs": values[own[0]]} if own else {})}
        rows = {name: [row.float().numpy() for row in nested.unbind()] for name, nested in computed.items()}
        self.feed.figures_of(batch.keys, rows)
        fields = TensorDict({"advantages": advantages, "returns": advantages}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], **arguments: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **arguments)
        self.feed.acknowledge(self._slots, self._covered_step)
        self.on_report(self._step_report(metrics, timing_raw))
        self._whole_step, self._is_updating = self.global_steps, False
        self._held_out_figures = {}
        self.evaluate_if_due()
        metrics |= {name: value for name, value in self._held_out_figures.items() if value is not None}
        self._stop_if_asked()

    def evaluate_if_due(self) -> None:
        """Between two steps, while the replicas serve the newest weights: ``eval.every``'s evaluation."""
        run, step = self.atropos.run, self.global_steps
        label, scores = f"step_{step}", self.state.held_out
        if not run.evaluates_at(step) or label in scores:
            return
        if run.eval.keep_best and self._covered_step < step:
            self._save_checkpoint()
        if figures := self.on_evaluate(label):
            scores[label] = figures["held_out/score"]
            self._held_out_figures = {**figures, "held_out/step": step}
            if run.eval.keep_best and is_best(scores, label):
                mark_best(self.checkpoint_root, step)

    def _step_report(self, metrics: Mapping[str, Any], timing: Mapping[str, float]) -> StepReport:
        """Join the figures of every backend with verl's own under verl's names. ``timing``: verl's, in seconds."""
        numbers = ((name, _number(value)) for name, value in metrics.items())
        figures: dict[str, float | int | None] = {name: number for name, number in numbers if number is not None}
        posted = {f"{name}/{figure}" for name in ("distill", "ref") for figure in ("kl", "known")}
        figures |= summarise_importance({name: figures.pop(f"actor/{name}", None) or 0.0 for name in posted})
        for slot in self._slots:
            figures |= slot.off_policy
        # Behind the weights that the update began with: the asynchronous modes fill slots earlier.
        trained = [sample for slot in self._slots for sample, _ in slot.rows.values()]
        figures |= staleness_metrics(trained, self.global_steps - 1)
        sync: Any = self.sharding_manager.last_sync
        training = ("old_log_prob", "ref", "values", "adv", "update_actor")
        return step_report(
            self.global_steps,
            self.policy_version,
            self._loss,
            scores=[pair for slot in self._slots for pair in slot.scores],
            counts=self._counts,
            seconds={
                "rollout": timing.get("gen", 0.0),
                "wait": sum(slot.wait_seconds for slot in self._slots),
                "train": sum(timing.get(name, 0.0) for name in training),
                "sync": sync and sync.seconds,
                "step": time.perf_counter() - self._step_started,
            },
            figures={
                **figures,
                **self._held_out_figures,
                "sync/seconds": sync and sync.seconds,
                "sync/canary_max_abs_logprob_diff": sync and sync.canary_max_abs_logprob_diff,
                "sync/replicas_replaced": self.replicas.replaced,
            },
        )

    def _stop_if_asked(self) -> None:
        self._next_stop_look = time.monotonic() + _STOP_LOOK_SECONDS
        if self._whole_step < self.total_training_steps and self.on_stop():
            raise StopRequestedError(f"stopped after step {self._whole_step}")

    def check_while_waiting(self) -> None:
        """Runs between two looks for a finished batch."""
        self.feed.check()
        self.replace_dead_replicas()
        if time.monotonic() > self._next_stop_look:
            self._stop_if_asked()

    def save_what_was_trained(self, error: BaseException | None = None) -> str:
        """Save the last whole step after ``error`` ended ``fit``, unless that is done. Returns a note for the user."""
        # After an error of a worker (Ray's), the others may wait for it in a collective: a save would wait as well.
        fatal = CheckpointError | TrainingDivergedError | WeightSyncError | ray.exceptions.RayError
        if int(self.config.trainer.save_freq) <= 0 or not self._whole_step or isinstance(error, fatal):
            return ""
        if self._is_updating or self.local_trigger_step:
            return f"in the middle of an update: nothing after step {self._covered_step} is saved"
        if self._whole_step > self._covered_step:
            self.global_steps = self._whole_step
            self._save_checkpoint()
        return f"steps up to {self._whole_step} are saved in {self.checkpoint_root}"

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self._is_updating = True
        return super()._update_actor(batch, metrics)

    @property
    def checkpoint_root(self) -> Path:
        return Path(str(self.config.trainer.default_local_dir)).absolute()

    def _save_checkpoint(self) -> None:
        self.state.step = self.state.policy_version = self.global_steps
        given = self.config.trainer
        keep = 1 if given.get("remove_previous_ckpt_in_save") else given.get("max_actor_ckpt_to_keep")
        keep = keep if keep and keep > 0 else None  # as verl reads it
        # verl removes parts of old checkpoints before the new one is whole: leave it those that we have removed.
        spared = None if keep is None or self.atropos.run.eval.keep_best else keep + 1
        of_verl = {"max_actor_ckpt_to_keep": spared, "max_critic_ckpt_to_keep": spared}
        of_verl["remove_previous_ckpt_in_save"] = False
        with new_checkpoint(self.checkpoint_root, self.global_steps, keep, in_place=True) as directory:
            self.state.save(directory, self.atropos.run)
            with _with_settings(given, of_verl):
                super()._save_checkpoint()
        kept = {path.name for path in self.checkpoint_root.glob("global_step_*")}
        self.actor_rollout_wg.remove_checkpoints(str(self.checkpoint_root), kept)
        self._covered_step = self.global_steps

    def _load_checkpoint(self) -> None:
        given = self.config.trainer
        wanted = given.resume_from_path if given.resume_mode == "resume_path" else given.resume_mode
        directory = find_checkpoint(self.checkpoint_root, str(wanted), self.note)
        mode = "disable" if directory is None else "resume_path"
        with _with_settings(given, {"resume_mode": mode, "resume_from_path": directory and str(directory)}):
            super()._load_checkpoint()
        # Batches in flight come back from our journal, with their leases; verl's copy of them is not used.
        waiting = list((tq.kv_list(PARTITION) or {}).get(PARTITION, {}))
        if waiting:
            tq.kv_clear(keys=waiting, partition_id=PARTITION)
        self._restored_tq_prompt_count = 0
        if directory and (changes := changed_settings(self.state.restore(directory), self.atropos.run)):
            self.note(f"settings that have changed since: {', '.join(changes)}")


class _ColocatedTrainer(_AtroposTrainer):
    """Trainer and replicas share their devices: the rollout phase ends for training and begins again after it."""

    on_sample_end = _AtroposTrainer._close_rollouts
    on_step_end = _AtroposTrainer._open_rollouts

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's forward is left out where the rollouts' logprobs are what it would compute: exact, and of the policy
        that this step begins with."""
        served, tags = self.served_version, batch.tags
        known = all(tag["versions_known"] and tag["rollout_log_probs"] for tag in tags)
        known = known and all(tag["min_global_steps"] == tag["max_global_steps"] == served for tag in tags)
        if not (self._is_exact and known):
            return super()._compute_old_log_prob(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        fields = tq.kv_batch_get(**where, select_fields=["rollout_log_probs"])
        fields["old_log_probs"] = fields.pop("rollout_log_probs")
        tq.kv_batch_put(**where, fields=fields)
        return batch

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        self.checkpoint_manager.update_weights(self.global_steps)


class AtroposSyncTrainer(_ColocatedTrainer, PPOTrainerSync):  # type: ignore[misc]
    """Rollout and training take turns."""

    drains = True
    release_memory_occupation = PPOTrainerSync.on_sample_end


class AtroposColocateAsyncTrainer(_ColocatedTrainer, PPOTrainerColocateAsync):  # type: ignore[misc]
    """The next batch is already on its way; generation is cut for training and continued after."""

    release_memory_occupation = PPOTrainerColocateAsync.on_sample_end

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        super().update_weights_from_tensor(named_tensors)
        self.checkpoint_manager.resume_generation_replicas()


class AtroposSeparateAsyncTrainer(_AtroposTrainer, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Replicas of their own generate all the time; verl moves the weights through its checkpoint engine."""

    _verl_hook = PPOTrainerSeparateAsync.on_init_end

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        self._verl_hook()

    def on_step_end(self) -> None:
        self._verl_hook = lambda: PPOTrainerSeparateAsync.on_step_end(self)
        self._close_rollouts()
        self._open_rollouts()

    def _serving_managers(self) -> list[Any]:
        colocated = [self.llm_server_manager] if self.current_mode is HybridEngineMode.ROLLOUT else []
        return [*colocated, self.standalone_server_manager]

    def _renew_replicas(self) -> None:
        # Between two local updates the workers hold weights that nobody serves; verl keeps those before the first.
        workers, now = self.actor_rollout_wg, self.local_trigger_step
        if now:
            workers.save_model_to_cpu(now)
            workers.restore_model_from_cpu(0)
        self.standalone_checkpoint_manager.update_weights(self.served_version)
        if self.current_mode is HybridEngineMode.ROLLOUT:
            super()._renew_replicas()
        else:
            self._check_canary()
        if now:
            workers.restore_model_from_cpu(now)
            workers.clear_cpu_model(now)


MODES: dict[str, type[_AtroposTrainer]] = {
    "sync": AtroposSyncTrainer,
    "colocate_async": AtroposColocateAsyncTrainer,
    "separate_async": AtroposSeparateAsyncTrainer,
}
"""``trainer.v1.trainer_mode`` → trainer."""


def _number(value: Any) -> float | int | None:
    """A figure of verl's; None where it is no number (a flag, a text, an array)."""
    if isinstance(value, np.generic | np.ndarray) and value.size == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@contextmanager
def _with_settings(settings: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """``settings`` of the configuration have these values in the block, for verl to read."""
    given = {key: settings.get(key) for key in values}
    with open_dict(settings):
        settings.update(values)
        try:
            yield
        finally:
            settings.update(given)


class _NoPrompts(tuple[()]):
    """Stands for verl's training set and its loader, since environments choose the prompts. Empty, without state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class _Watching:
    """Mixin of verl's replay buffer: ``trainer`` looks around between two polls, its feed hears of too stale slots."""

    trainer: _AtroposTrainer

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        self.trainer.check_while_waiting()
        waited: float = super()._wait_for_next_poll(partition_id, last_debug_time)  # type: ignore[misc]
        return waited

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)  # type: ignore[misc]
        if partition_id == PARTITION:
            self.trainer.feed.evicted(set(uids))

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        # A slot of the training partition is a whole batch; verl counts prompts.
        wanted = 1 if partition_id == PARTITION else batch_size
        return super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=wanted)  # type: ignore[misc]


class AtroposAgentLoopManager:
    """verl's agent-loop manager, whose trajectories come from the feed. verl's own validation goes to verl's own, with
    its ``clients``: ``llm_client``, ``teacher_client``, ``reward_loop_worker_handles``."""

    def __init__(self, config: Any, feed: TrajectoryFeed, **clients: Any) -> None:
        self.config = config
        self._feed = feed
        self._clients = clients
        self._validation: Any = None

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Ask the feed for the slots that ``prompts`` name; returns at once."""
        # Not get(): that gives the wrapped value, which has no truth.
        is_validation = prompts["validate"] if "validate" in prompts else False  # noqa: SIM401
        if not is_validation:
            for uid in prompts["uid"]:
                self._feed.request(str(uid), int(prompts["global_steps"]))
            return
        if self._validation is None:
            from verl.trainer.ppo.v1 import AgentLoopManagerTQ

            self._validation = AgentLoopManagerTQ.create(config=self.config, **self._clients)
        self._validation.generate_sequences(prompts)
