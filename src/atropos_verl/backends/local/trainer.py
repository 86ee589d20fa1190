"""``AtroposTrainer``: one optimiser step at a time, on rollouts that came through a trajectory API."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atropos_verl.backends.local.worker import PolicyWorker, held_interrupts, import_verl
from atropos_verl.config.composition import fitted_to_model
from atropos_verl.config.schema import RunConfig, apply_environment, bounds_of, check_bounds
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import PinnedEngine, RequestGate
from atropos_verl.engine.runner import engine_threads
from atropos_verl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    TrainingDivergedError,
    WeightSyncError,
)
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.http_thread import Listener
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.storage import locked
from atropos_verl.training.batch_source import BatchSource, RolloutData
from atropos_verl.training.checkpoint_state import (
    RunState,
    changed_settings,
    find_checkpoint,
    mark_best,
    new_checkpoint,
)
from atropos_verl.training.extensions import check_extensions, load_function
from atropos_verl.training.samples import build_samples, sample_settings
from atropos_verl.training.selfplay import RewardFunction, SelfPlay
from atropos_verl.training.staleness import BatchProvenance, look_up_counts, make_throttle, staleness_metrics
from atropos_verl.training.step import (
    NO_SIGNAL,
    HeldOut,
    LoggedProgress,
    Progress,
    StepLog,
    is_best,
    outcome,
    step_report,
)
from atropos_verl.training.weight_sync import AtroposShardingManager, Canary
from atropos_verl.types import SampleReport, ScoredGroup, StepReport, TrainingSample

logger = logging.getLogger(__name__)


class AtroposTrainer(AbstractContextManager["AtroposTrainer"]):
    """Trains a policy in verl on rollouts that went through an Atropos trajectory API. Close it after use.

    Args:
        reward_fn: for ``rl_training_step``: ``(prompts, completions) -> scores``, flat lists of equal length.
            ``reward.path`` may name it instead.
        source: the batch source of a run that has registered already; the trainer closes it."""

    def __init__(
        self,
        config: RunConfig,
        *,
        reward_fn: RewardFunction | None = None,
        source: BatchSource | None = None,
        gateway_listener: Listener | None = None,
    ) -> None:
        check_extensions(config)
        if config.reward.path is not None:
            if reward_fn is not None:
                raise ConfigError("a reward_fn was given as well; give one of the two", "reward.path")
            reward_fn = load_function("reward.path", config.reward.path)
        self.config, self.reward_fn, self._overlapped = config, reward_fn, config.is_overlapped
        self.source = source or BatchSource(config, config.resolve_run_dir())
        self.run_dir, self.client = self.source.run_dir, self.source.client
        self.state = RunState()
        self.updating = False
        """The weights have changed, or may have, and ``step`` does not say so yet: this state must not be saved."""
        self.moments, self.totals = self.state.moments, self.state.totals
        with ExitStack() as held:
            if source is None:  # a command holds its run directory itself
                held.enter_context(locked(self.run_dir / "lock", "a training run"))
            held.callback(self.source.close)
            self._build(held, gateway_listener)
            self.settings = sample_settings(config, self.engine.vocab_size)
            self._parts = held.pop_all()
        provenance = BatchProvenance(config.off_policy, self.ledger, self.settings, self.tokenizer)
        self.source.attach(provenance, self.throttle, self.totals)
        self.engine.attend = self._attend
        self._is_open, self._saved_at = False, 0
        self._log: StepLog | None = None
        self._self_play: SelfPlay | None = None
        self._held_out: HeldOut
        self._evaluating: int | None = None  # the step whose policy is being evaluated while training goes on
        self._held_out_figures: dict[str, float | int | None] = {}
        """Of evaluations that have ended since the last line of ``metrics.jsonl``."""

    def _build(self, held: ExitStack, gateway_listener: Listener | None) -> None:
        """Loads model and tokenizer, builds engine and worker, starts the gateway (gate closed, no weights yet). A part
        that fails to stop, or a second Ctrl-C, does not spare the others in ``held``."""
        from transformers import AutoConfig, AutoTokenizer

        config, trace = self.config, self.source.trace
        model_path, self.gate = config.resolve_model_path(), RequestGate()
        device = import_verl(config)
        model = AutoConfig.from_pretrained(str(model_path), trust_remote_code=config.model.trust_remote_code)
        threads, trainer_threads = share_cores(config, device, model)
        self.worker = PolicyWorker(config, model_path)
        held.callback(self.worker.close)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer_path or str(model_path))
        self.engine = TransformersEngine.from_pretrained(
            model_path,
            tokenizer=self.tokenizer,
            trust_remote_code=config.model.trust_remote_code,
            gate=self.gate,
            # The trainer computes in this dtype whatever the checkpoint holds; logprobs must be of the same policy.
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.compute_dtype],
            device=device,
            max_running=config.inference.max_running,
            max_context_len=config.inference.max_context_len or config.max_token_len,
            release_weights=config.inference.release_weights,
            keep_kv=config.overlap.kv_after_swap == "keep",
            seed=config.seed,
            num_threads=threads,
        )
        held.callback(self.engine.close)
        if trainer_threads is not None:
            torch.set_num_threads(trainer_threads)  # of this thread, the trainer's
        self.gate.pause(timeout=60.0)
        self.engine.release_memory_occupation()
        self.ledger = Ledger(config.off_policy.ledger_bytes)
        held.callback(self.ledger.close)
        self.throttle = make_throttle(config.off_policy, self.ledger, config.batch_size)
        sessions = SessionStore(self.run_dir / "gateway", trace.session)
        held.callback(sessions.close)
        self.evaluated = PinnedEngine(self.engine)
        app = create_app(
            self.engine,
            self.tokenizer,
            gate=self.gate,
            ledger=self.ledger,
            throttle=self.throttle,
            evaluated=self.evaluated,
            max_new_tokens=config.max_response_length,
            model_name=str(model_path),
            sessions=sessions,
            on_request=trace.request,
            **config.gateway.for_app(),
        )
        host, port = config.gateway.host, config.gateway.port
        self.gateway = GatewayServer(app, host=host, port=port, listener=gateway_listener)
        self.gateway.start(timeout=30.0)
        held.callback(self.gateway.stop, timeout=10.0)
        held.callback(self.evaluated.close)
        canary = self._canary() if config.sync.canary else None
        self.sharding_manager = AtroposShardingManager(self.engine, self, gate=self.gate, canary=canary)
        # First: who waits at a shut gate is told at once, and the gateway has nobody left to wait for.
        held.callback(self.engine.close)

    def _canary(self) -> Canary:
        ids = list(self.tokenizer.encode(self.config.sync.canary_text, add_special_tokens=False))
        if len(ids := ids[: self.config.max_token_len]) < 2:
            raise ConfigError(f"{self.config.sync.canary_text!r} has fewer than two tokens", "sync.canary_text")
        mask = np.arange(len(ids)) > 0
        sample = TrainingSample(token_ids=np.array(ids), loss_mask=mask, advantages=np.zeros(len(ids)))

        def engine_logprobs() -> list[float]:
            try:
                return list(self.engine.compute_logprobs(ids))
            except EngineError as error:
                raise WeightSyncError(f"after the weight sync the engine gives no logprobs: {error}") from error

        return Canary(
            trainer_logprobs=lambda: self.worker.compute_logprobs([sample])[0][1:].tolist(),
            engine_logprobs=engine_logprobs,
            staged_logprobs=lambda: self.engine.compute_staged_logprobs(ids),
            threshold=self.config.canary_threshold,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, reward_fn: RewardFunction | None = None, **extra: Any
    ) -> AtroposTrainer:
        """Builds a trainer from a plain dictionary with the recipe's keys, which ``ATROPOS_API_URL`` and
        ``ATROPOS_TIMEOUT`` override. The API is not contacted yet. Raises ``ConfigError``, which names the key, and
        ``StorageInUseError`` when another trainer writes into ``run_dir``."""
        settings = fitted_to_model(apply_environment(dict(config)))
        for note in settings.notes:
            logger.info("%s", note)
        check_bounds(bounds_of(settings))
        return cls(settings, reward_fn=reward_fn, **extra)

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the rollout phase, the gateway, the engine and the connection. Safe to call twice."""
        with self._parts:
            self.close_rollouts()

    @property
    def step(self) -> int:
        """Batches that were trained on since the run began, resumes included."""
        return self.state.step

    @property
    def policy_version(self) -> int:
        """Optimiser steps since the run began; a batch without a trained token is a step without one."""
        return self.state.policy_version

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights by Hugging Face name. Consume all of it: other ranks take part in each."""
        return self.worker.named_tensors()

    @property
    def gateway_url(self) -> str:
        """Base URL for environments (without ``/v1``)."""
        return self.config.gateway.advertise_url or self.gateway.url

    def open_rollouts(self) -> None:
        """Enters the rollout phase: memory back, newest weights in, canary, gate open. No-op when open."""
        if not self._is_open:
            self.sharding_manager.__enter__()
            self._is_open = True

    def serve_newest(self) -> None:
        """Makes the engine hold the newest weights and serve them, whatever it did before."""
        sync = self.sharding_manager.last_sync
        if not self._is_open:
            self.open_rollouts()
        elif self._overlapped and (sync is None or sync.policy_version != self.policy_version):
            self.sharding_manager.swap()
        else:
            self._attend()

    def _attend(self) -> None:
        """Gives an engine that lost its weights the newest ones. Called in this thread, also while it waits."""
        self.engine.check_alive()
        if self._is_open and not self.engine.weights_ready:
            self.sharding_manager.restore()

    def close_rollouts(self) -> None:
        """Leaves the rollout phase: gate shut at a token boundary, engine memory released. No-op when closed."""
        if self._is_open:
            self._is_open = False
            self.sharding_manager.__exit__(None, None, None)

    def rl_training_step(self, prompts: Sequence[Any]) -> StepReport:
        """One complete step on rollouts that this trainer samples for ``prompts`` (strings or sequences of token ids),
        ``group_size`` of each, and scores with ``reward_fn``. Raises ``ConfigError`` and ``AtroposAPIError``."""
        started = time.perf_counter()
        try:
            rollout_data = self.rollout_phase(prompts)
        finally:
            if not self._overlapped:
                self.close_rollouts()
        report = self.train_on(rollout_data, started)
        if self._is_checkpoint_due():
            self.save_checkpoint()
        return report

    def rollout_phase(self, prompts: Sequence[Any]) -> RolloutData:
        """Samples, scores, submits to the trajectory API and fetches a batch back."""
        if self.reward_fn is None:
            raise ConfigError("rl_training_step needs a reward_fn(prompts, completions); environments use fit()")
        self.open_rollouts()
        if self._self_play is None:
            parts = (self.config, self.engine, self.tokenizer, self.client, self.ledger, self.reward_fn)
            self._self_play = SelfPlay(*parts, register_trainer=lambda size: self.source.register(self.step, size))
        started = time.perf_counter()
        self._self_play.submit(prompts)
        data = self.source.fetch()
        data.timings["rollout"] = time.perf_counter() - started
        return data

    def compute_advantages_from_atropos(self, rollout_data: RolloutData | Sequence[ScoredGroup]) -> torch.Tensor:
        """Advantages [B, L] float32 (right-padded with 0) of the batch's B trainable sequences, which are kept in
        ``rollout_data.report``. Bad groups are written to ``run_dir/quarantine``."""
        data = rollout_data if isinstance(rollout_data, RolloutData) else RolloutData(list(rollout_data))
        samples = self._make_samples(data).samples
        rows = torch.zeros(len(samples), max((len(sample) for sample in samples), default=0))
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample)] = torch.from_numpy(sample.advantages)
        return rows

    def _make_samples(self, data: RolloutData) -> SampleReport:
        make = partial(build_samples, settings=self.settings, running=self.moments)
        return self.source.collect(data, self.policy_version, make)

    def _prepare(self, data: RolloutData) -> None:
        """Makes a batch's samples in the source's thread, unless they depend on the batches trained before it."""
        if self.settings.normalization != "global" and self.config.off_policy.max_staleness is None:
            self._make_samples(data)

    def training_phase(self, rollout_data: RolloutData, advantages: torch.Tensor) -> dict[str, float]:
        """The optimiser step with ``advantages`` [B, L]; a batch without a trained token makes none and has loss 0.
        Returns ``loss``, ``grad_norm``, ``lr``, ``tokens`` and the loss's own figures. Raises ``DataError`` when the
        shapes do not fit or an advantage is not finite, and ``TrainingDivergedError``."""
        samples = (rollout_data.report or self._make_samples(rollout_data)).samples
        values = advantages.detach().cpu().numpy().astype(np.float64)
        if values.shape[0] != len(samples) or any(values.shape[1] < len(s) for s in samples):
            raise DataError(f"advantages {values.shape} do not fit {len(samples)} samples")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise DataError(f"advantages[{row}][{column}] = {values[row, column]} is not finite")
        samples = [replace(s, advantages=row[: len(s)] * s.loss_mask) for s, row in zip(samples, values, strict=True)]
        return self._update(rollout_data, samples)

    def _update(self, data: RolloutData, samples: list[TrainingSample]) -> dict[str, float]:
        tokens = sum(int(s.loss_mask.sum()) for s in samples)
        if tokens == 0:
            logger.warning("the batch has no token to train on; no optimiser step")
            return {"loss": 0.0, "tokens": 0.0}
        if not any(s.advantages.any() or s.teacher is not None for s in samples):
            logger.warning("step %d: %s", self.step + 1, NO_SIGNAL)
        if not self._overlapped:
            self.close_rollouts()
        self.updating = True
        data.off_policy |= staleness_metrics(samples, self.policy_version)
        figures = self.worker.train(samples)
        data.trainer_logprobs = self.worker.logprobs
        self.state.policy_version += 1
        return {"tokens": float(tokens), **figures}

    def compute_advantage_weighted_sft_loss(
        self, input_ids: torch.Tensor, advantages: torch.Tensor, loss_mask: torch.Tensor
    ) -> torch.Tensor:
        """``sum(-logprob · advantage · mask) / sum(mask)`` of a right-padded batch [B, L] under the current policy.

        Token t is predicted from t - 1; position 0 is never trained. The loss [] has a graph to the parameters."""
        from atropos_verl.training.losses import compute_advantage_weighted_sft_loss

        logits = self.worker.forward_logits(input_ids)
        return compute_advantage_weighted_sft_loss(
            logits, *(tensor.to(logits.device) for tensor in (input_ids, advantages, loss_mask))
        )

    @held_interrupts()
    def train_on(self, rollout_data: RolloutData, started: float | None = None) -> StepReport:
        """Everything after a batch was fetched. ``started``: ``time.perf_counter()`` at the beginning of the step."""
        data, begin = rollout_data, time.perf_counter()
        moments = self.moments.state_dict()
        try:
            # Computed before by the caller? Then not again: "global" statistics would count the batch twice.
            report = data.report or self._make_samples(data)
            figures = self._update(data, report.samples)
        except BaseException:
            self.moments.load_state_dict(moments)  # the batch counts when it is trained on
            raise
        trained = time.perf_counter()
        self.state.step += 1
        self.source.trained(data, self.step, trainer_logprobs=data.trainer_logprobs_by_place())
        looked_up = look_up_counts(data.off_policy)
        self.totals.count(report.counts | looked_up)
        self.updating = False
        try:
            self.serve_newest()
            self.source.done(looked_up["stale"])
        finally:  # whatever failed since, the step was taken: its line must not be missing
            synced = time.perf_counter()
            seconds = {
                # How long the trainer waited for this batch; how long the API was asked for it; how long it was in the
                # making beside the step before (mode=overlap).
                **{name: data.timings.get(name, 0.0) for name in ("rollout", "wait", "prefetch")},
                "train": trained - begin,
                "sync": synced - trained,
                "step": synced - (begin if started is None else started),
            }
            line = self._report(data, report, figures, seconds)
        self.source.ack(data)
        return line

    def _report(
        self, data: RolloutData, report: SampleReport, figures: dict[str, float], seconds: dict[str, float]
    ) -> StepReport:
        advantages = [np.abs(s.advantages[s.loss_mask]) for s in report.samples]
        last = self.sharding_manager.last_sync
        sync: Any = last if last is not None and last.policy_version == self.policy_version else None
        line = step_report(
            self.step,
            self.policy_version,
            figures.pop("loss"),
            scores=report.scores,
            counts=report.counts,
            seconds=seconds,
            figures={
                "advantage/mean_abs": float(np.concatenate(advantages).mean()) if figures.pop("tokens") else None,
                "sync/seconds": sync and sync.seconds,
                "sync/paused_seconds": sync and sync.paused_seconds,
                "sync/bytes": sync and sync.bytes_copied,
                "sync/canary_max_abs_logprob_diff": sync and sync.canary_max_abs_logprob_diff,
                "engine/rebuilds": self.engine.stats().rebuilds,
                "perf/idle_share": seconds["rollout"] / seconds["step"] if seconds["step"] > 0 else 0.0,
                "perf/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                **data.off_policy,
                **self._held_out_figures,
                **{key if "/" in key else f"actor/{key}": value for key, value in figures.items()},
            },
        )
        self._held_out_figures = {}
        if self._log is not None:
            self._log.append(line)
        return line

    def save_checkpoint(self) -> Path:
        """Writes ``run_dir/checkpoints/global_step_N`` now; older ones beyond ``trainer.max_ckpt_to_keep`` go. Raises
        ``CheckpointError``; the checkpoint before then stays the newest one."""
        root = self.run_dir / "checkpoints"
        if self._log is not None:
            self._log.sync()
        keep = self.config.trainer.max_ckpt_to_keep
        with new_checkpoint(root, self.step, keep, spare=self._evaluating) as directory:
            self.worker.save_checkpoint(directory / "actor", self.step)
            self.state.save(directory, self.config)
        self.source.journal.discard_through(self.step)
        self._saved_at = self.step
        return root / directory.name

    def resume_from_checkpoint(self, progress: Progress | None = None) -> None:
        """Loads the checkpoint that ``resume`` means, with the ledger; batches that it does not cover come first."""
        note = (progress or LoggedProgress()).note
        directory = find_checkpoint(self.run_dir / "checkpoints", self.config.resume, note)
        if directory is not None:
            saved = self.state.restore(directory)
            self.worker.load_checkpoint(directory / "actor")
            note(f"resumed from {directory} at step {self.step}, policy version {self.policy_version}")
            if changes := changed_settings(saved, self.config):
                note(f"settings that have changed since: {', '.join(changes)}")
        self.source.go_on(self.step, self.policy_version, note)

    def fit(
        self,
        *,
        progress: Progress | None = None,
        check_services: Callable[[], None] | None = None,
        held_out: HeldOut | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> dict[str, Any]:
        """Trains on the batches of environments up to step ``config.steps``; returns its part of ``summary.json``.

        The rollout phase stays open for an evaluation. What ends the run is raised after the steps since the last
        checkpoint were saved, if possible. ``check_services`` is called while waiting; it raises when a process died.
        """
        source, config, progress = self.source, self.config, progress or LoggedProgress()
        source.note = progress.note
        self._log = log = StepLog(self.run_dir, self.step)
        self._saved_at = self.step
        if not source.is_registered:
            progress.phase("registering at the trajectory API")
            source.register(self.step, config.batch_size)
        self.open_rollouts()
        self._held_out = held_out or HeldOut(None, progress, {})
        self.evaluate("before")

        def check() -> None:
            self.engine.check_alive()
            self.gateway.check_alive()
            if check_services is not None:
                check_services()

        try:
            starts, prepare = check_services is not None, self._prepare if self._overlapped else None
            source.start(check, starts_environment=starts, prepare=prepare, attend=self._attend)
            while self.step < config.steps:
                self._evaluate_if_due(progress)
                self._next_step(progress, on_step)
            source.stop(give_back=True)
            self._collect_evaluation(wait=True)
        except BaseException as error:
            try:
                self._save_what_was_trained(error, progress)
            finally:
                source.stop(give_back=False)  # last: it waits for a request that an API which hangs may never answer
            raise
        own = {"mode": config.mode, "idle_share": log.idle_share, "weights_synced": self.sharding_manager.syncs}
        return outcome(self.step, self.policy_version, log.rewards, self.totals, **own)

    def evaluate(self, label: str) -> None:
        """Waits for the evaluation ``label`` that was started, if one was, while nothing is trained."""
        self.evaluated.pin()
        self._finish_evaluation(label, self.step)

    def _evaluate_if_due(self, progress: Progress) -> None:
        """Starts ``eval.every``'s evaluation of the policy served now, and with ``mode=sync`` waits for it."""
        self._collect_evaluation(wait=False)
        held_out, label = self._held_out, f"step_{self.step}"
        if not self.config.evaluates_at(self.step) or label in held_out.scores:
            return
        if self._evaluating is not None:
            progress.note(f"step {self.step} is not evaluated: the evaluation of step {self._evaluating} goes on")
        elif held_out.start(label) and self._overlapped:
            self._attend()
            self.evaluated.pin(self.engine.copy())
            self._evaluating = self.step
        else:
            self.evaluate(label)

    def _collect_evaluation(self, *, wait: bool) -> None:
        """Notes the result of the evaluation that goes on beside training, if it has ended, or ``wait``."""
        step = self._evaluating
        if step is not None and (wait or self._held_out.is_over(f"step_{step}")):
            self._evaluating = None
            self._finish_evaluation(f"step_{step}", step)

    def _finish_evaluation(self, label: str, step: int) -> None:
        figures = self._held_out.finish(label, self._attend)
        self.evaluated.unpin()
        if figures:
            self._held_out_figures = {**figures, "held_out/step": step}
        if self.config.eval.keep_best and is_best(self._held_out.scores, label):
            mark_best(self.run_dir / "checkpoints", step)

    def _next_step(self, progress: Progress, on_step: Callable[[StepReport], None] | None) -> None:
        config, started = self.config, time.perf_counter()
        progress.phase("rollout: waiting for a batch")
        data = self.source.take(more=self.step + 1 < config.steps)
        with held_interrupts():
            if self.source.discard_if_stale(data, self.policy_version):
                return
        data.timings["rollout"] = time.perf_counter() - started
        report = self.train_on(data, started)
        progress.step(report)
        if on_step is not None:
            on_step(report)
        if self._is_checkpoint_due(last=config.steps):
            progress.phase(f"saving checkpoint {self.step}")
            with held_interrupts():
                self.save_checkpoint()

    def _is_checkpoint_due(self, last: int | None = None) -> bool:
        config = self.config
        if config.save_freq <= 0:
            self.source.journal.discard_through(self.step)  # no checkpoint will ever cover it
            return False
        is_evaluated = config.eval.keep_best and config.evaluates_at(self.step)
        return self.step % config.save_freq == 0 or self.step == last or is_evaluated

    def _save_what_was_trained(self, error: BaseException, progress: Progress) -> None:
        unusable, saved_at = CheckpointError | TrainingDivergedError | WeightSyncError, self._saved_at
        if self.config.save_freq <= 0 or isinstance(error, unusable) or not (self.updating or self.step > saved_at):
            return
        if self.updating:
            note = f"in the middle of an optimiser step: a resumed run trains the steps after {saved_at} again"
        else:
            progress.phase(f"saving checkpoint {self.step}")
            try:
                with held_interrupts(deliver=False):
                    directory = self.save_checkpoint()
                note = f"steps up to {self.step} are saved in {directory}"
            except CheckpointError as second:
                note = f"and the trained steps since {saved_at} could not be saved: {second}"
        error.add_note(f"({note})")


def share_cores(config: RunConfig, device: str, model: Any, cores: int | None = None) -> tuple[int | None, int | None]:
    """Torch threads of engine and trainer; None: torch's default. On a CPU, unless the settings or ``OMP_NUM_THREADS``
    say otherwise, ``mode=overlap`` gives each half the cores: two pools that each expect every core wait for each other
    at every barrier; the engine of a small ``model`` (its Hugging Face configuration) gets one. ``cores`` None: all."""
    engine, trainer = config.inference.num_threads, config.trainer.num_threads
    if device == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        cores = cores or len(os.sched_getaffinity(0))
        half = max(1, cores // 2) if config.is_overlapped else None
        engine = engine or engine_threads(model, config.inference.max_running, half)
        if config.is_overlapped:
            trainer = trainer or max(1, cores - (engine or 1))
    return engine, trainer
