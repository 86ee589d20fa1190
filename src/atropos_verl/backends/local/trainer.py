"""``AtroposTrainer``: one optimiser step at a time, on rollouts that came through a trajectory API."""

from __future__ import annotations

import logging
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from atropos_verl.backends.local.stack import LocalStack
from atropos_verl.config.composition import fitted_to_model
from atropos_verl.config.schema import RunConfig, apply_environment, bounds_of, check_bounds
from atropos_verl.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError, WeightSyncError
from atropos_verl.http_thread import Listener
from atropos_verl.protocol.client import AtroposClient
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
from atropos_verl.training.staleness import BatchProvenance, look_up_counts, staleness_metrics
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
from atropos_verl.types import SampleReport, ScoredGroup, StepReport, TrainingSample
from atropos_verl.verl_plugin import own_rank

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_ONE_INTERRUPT_SECONDS = 1.0
"""Signals this close together are one: torchrun passes on to its workers the Ctrl-C that they got from the terminal."""

_STOPPING = "stopping: the trainer ends its step and writes its checkpoint (interrupt again to end at once)\n"


@contextmanager
def held_interrupts(*, deliver: bool = True) -> Iterator[None]:
    """Delivers SIGINT, SIGTERM and SIGHUP when the block ends, after a whole step; a second, over 1 s later, at once.

    An exception of the block drops the signal: the run is ending anyway, and its cause is the better explanation.
    ``deliver=False`` drops the first signal altogether. Blocks may be nested. Only the main thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    first: list[tuple[int, float]] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        if not first:
            logger.info("%s: finishing the current step", signal.Signals(number).name)
            if own_rank()[0] == 0:
                # Standard error may be in the middle of a write, which refuses another one, or be gone.
                with suppress(RuntimeError, OSError):
                    sys.stderr.write(_STOPPING)
                    sys.stderr.flush()
            first.append((number, time.monotonic()))
        elif time.monotonic() - first[0][1] > _ONE_INTERRUPT_SECONDS:
            restore()
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # None: not set by Python, so it could not be put back. Ignored: nohup's SIGHUP.
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if first and deliver:
        signal.raise_signal(first[0][0])


class AtroposTrainer:
    """Trains a policy in verl on rollouts that went through an Atropos trajectory API. Close it after use.

    Args:
        reward_fn: for ``rl_training_step``: ``(prompts, completions) -> scores``, flat lists of equal length.
            ``reward.path`` may name it instead.
        source: the batch source of a run that has registered already; the trainer closes it, and ``client``.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        reward_fn: RewardFunction | None = None,
        client: AtroposClient | None = None,
        run_dir: Path | None = None,
        source: BatchSource | None = None,
        gateway_listener: Listener | None = None,
    ) -> None:
        check_extensions(config)
        if config.reward.path is not None:
            if reward_fn is not None:
                raise ConfigError("a reward_fn was given as well; give one of the two", "reward.path")
            reward_fn = load_function("reward.path", config.reward.path)
        self.config = config
        self._overlapped = config.is_overlapped
        self.reward_fn = reward_fn
        self.run_dir = run_dir or config.resolve_run_dir()
        self.model_path = config.resolve_model_path()
        self.source = source or BatchSource(config, self.run_dir, client)
        self.client = self.source.client
        self.state = RunState()
        self.updating = False
        """The weights have changed, or may have, and ``step`` does not say so yet: this state must not be saved."""
        self.moments, self.totals = self.state.moments, self.state.totals
        with ExitStack() as held:
            if source is None:  # a command holds its run directory itself
                held.enter_context(locked(self.run_dir / "lock", "a training run"))
            held.callback(self.source.close)
            parts = (self, gateway_listener, self.run_dir, self.source.trace)
            self.stack = stack = LocalStack(config, self.model_path, *parts)
            held.callback(stack.close)
            self.settings = sample_settings(config, stack.engine.vocab_size)
            self._parts = held.pop_all()
        self.engine, self.tokenizer, self.sharding_manager = stack.engine, stack.tokenizer, stack.sharding_manager
        self.provenance = BatchProvenance(config.off_policy, self.stack.ledger, self.settings, self.tokenizer)
        self.source.attach(self.provenance, self.stack.throttle, self.state.totals)
        self._is_open = False
        self._log: StepLog | None = None
        self._self_play: SelfPlay | None = None
        self._saved_at = 0
        self._held_out: HeldOut
        self._evaluating: int | None = None
        """The step whose policy is being evaluated while training goes on."""
        self._held_out_figures: dict[str, float | int | None] = {}
        """Of evaluations that have ended since the last line of ``metrics.jsonl``."""
        self.engine.attend = self._attend

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, reward_fn: RewardFunction | None = None, **extra: Any
    ) -> AtroposTrainer:
        """Builds a trainer from a plain dictionary with the recipe's keys (see ``config.schema.describe``).

        ``ATROPOS_API_URL`` and ``ATROPOS_TIMEOUT`` override it. The API is not contacted yet. Raises ``ConfigError``,
        which names the key, and ``StorageInUseError`` when another trainer writes into ``run_dir``.
        """
        settings = fitted_to_model(apply_environment(dict(config)))
        for note in settings.notes:
            logger.info("%s", note)
        check_bounds(bounds_of(settings))
        return cls(settings, reward_fn=reward_fn, **extra)

    def __enter__(self) -> Self:
        return self

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
        return self.stack.worker.named_tensors()

    @property
    def gateway_url(self) -> str:
        """Base URL for environments (without ``/v1``)."""
        return self.config.gateway.advertise_url or self.stack.gateway.url

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

    # ------------------------------------------------------------------ the step, in its named phases

    def rl_training_step(self, prompts: Sequence[Any]) -> StepReport:
        """One complete step on rollouts that this trainer samples for ``prompts`` and scores with ``reward_fn``.

        Each of the P prompts, a string or a sequence of token ids, is sampled ``group_size`` times. Raises
        ``ConfigError`` without a ``reward_fn``, and ``AtroposAPIError``.
        """
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
            parts = (self.config, self.engine, self.tokenizer, self.client, self.stack.ledger, self.reward_fn)
            self._self_play = SelfPlay(*parts, register_trainer=lambda size: self.source.register(self.step, size))
        started = time.perf_counter()
        self._self_play.submit(prompts)
        data = self.source.fetch()
        data.timings["rollout"] = time.perf_counter() - started
        return data

    def compute_advantages_from_atropos(self, rollout_data: RolloutData | Sequence[ScoredGroup]) -> torch.Tensor:
        """Advantages [B, L] float32 (right-padded with 0) of the batch's B trainable sequences, which are kept in
        ``rollout_data.report``. Bad groups are written to ``run_dir/quarantine``."""
        import torch

        data = rollout_data if isinstance(rollout_data, RolloutData) else RolloutData(list(rollout_data))
        samples = self._make_samples(data).samples
        rows = torch.zeros(len(samples), max((len(sample) for sample in samples), default=0))
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample)] = torch.from_numpy(sample.advantages)
        return rows

    def _make_samples(self, data: RolloutData) -> SampleReport:
        (version, applied), data.applied = data.applied or (None, None), None
        matches = self.provenance.look_up(data.groups) if data.matches is None else data.matches
        if applied is None or version != self.policy_version:
            applied = self.provenance.apply(data.groups, matches, self.policy_version)
        data.off_policy = applied.figures
        data.report = build_samples(applied.groups, self.settings, running=self.moments)
        if data.entry is not None:
            self.source.trace.collected(data.places, data.groups, matches, applied, data.report)
        for bad in data.report.quarantined:
            self.source.quarantine.put(bad)
        return data.report

    def _prepare(self, data: RolloutData) -> None:
        """Makes a batch's samples in the source's thread, unless they depend on the batches trained before it."""
        if self.settings.normalization != "global" and self.config.off_policy.max_staleness is None:
            self._make_samples(data)

    def training_phase(self, rollout_data: RolloutData, advantages: torch.Tensor) -> dict[str, float]:
        """The optimiser step with ``advantages`` [B, L]; a batch without a trained token makes none and has loss 0.

        Returns ``loss``, ``grad_norm``, ``lr``, ``tokens`` and the loss's own figures. Raises ``DataError`` when the
        shapes do not fit or an advantage is not finite, and ``TrainingDivergedError``.
        """
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
        figures = self.stack.worker.train(samples)
        data.trainer_logprobs = self.stack.worker.logprobs
        self.state.policy_version += 1
        return {"tokens": float(tokens), **figures}

    def compute_advantage_weighted_sft_loss(
        self, input_ids: torch.Tensor, advantages: torch.Tensor, loss_mask: torch.Tensor
    ) -> torch.Tensor:
        """``sum(-logprob · advantage · mask) / sum(mask)`` of a right-padded batch [B, L] under the current policy.

        Token t is predicted from t - 1; position 0 is never trained. The loss [] has a graph to the parameters.
        """
        from atropos_verl.training.losses import compute_advantage_weighted_sft_loss

        logits = self.stack.worker.forward_logits(input_ids)
        return compute_advantage_weighted_sft_loss(
            logits, *(tensor.to(logits.device) for tensor in (input_ids, advantages, loss_mask))
        )

    # ------------------------------------------------------------------ a whole step

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
        self.source.trained(data, self.step)
        counts = {
            **{name: getattr(report, name) for name in ("groups", "dropped_overlong", "truncated")},
            "sequences": len(report.samples),
            "rollouts": len({(s.group_id, s.rollout_id) for s in report.samples}),
            "quarantined": len(report.quarantined),
            "filtered": len(report.filtered),
            "trained_tokens": int(figures.pop("tokens")),
        }
        stale = int(data.off_policy["off_policy/dropped_stale_groups"] or 0)
        self.totals.count({**counts, **look_up_counts(data.off_policy), "stale": stale})
        self.updating = False
        try:
            self.serve_newest()
            self.source.done(stale)
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
            line = self._report(data, report, figures, counts, seconds)
        self.source.ack(data)
        return line

    def _report(
        self,
        data: RolloutData,
        report: SampleReport,
        figures: dict[str, float],
        counts: dict[str, int],
        seconds: dict[str, float],
    ) -> StepReport:
        env_ids = {group.env_id for group in data.groups if group.env_id is not None}
        scores = {(s.env_id, s.group_id, s.rollout_id): s.score for s in report.samples}
        advantages = [np.abs(s.advantages[s.loss_mask]) for s in report.samples]
        last = self.sharding_manager.last_sync
        sync: Any = last if last is not None and last.policy_version == self.policy_version else None
        line = step_report(
            self.step,
            self.policy_version,
            figures.pop("loss"),
            scores=report.scores,
            environments={env: [score for (own, *_), score in scores.items() if own == env] for env in env_ids},
            counts=counts,
            seconds=seconds,
            figures={
                "advantage/mean_abs": float(np.concatenate(advantages).mean()) if counts["trained_tokens"] else None,
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

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self) -> Path:
        """Writes ``run_dir/checkpoints/global_step_N`` now; older ones beyond ``trainer.max_ckpt_to_keep`` go. Raises
        ``CheckpointError``; the checkpoint before then stays the newest one."""
        root = self.run_dir / "checkpoints"
        if self._log is not None:
            self._log.sync()
        keep = self.config.trainer.max_ckpt_to_keep
        with new_checkpoint(root, self.step, keep, spare=self._evaluating) as directory:
            self.stack.worker.save_checkpoint(directory / "actor", self.step)
            self.state.save(directory, self.config)
        self.source.batches.discard_through(self.step)
        self._saved_at = self.step
        return root / directory.name

    def resume_from_checkpoint(self, progress: Progress | None = None) -> None:
        """Loads the checkpoint that ``resume`` means, with the ledger; batches that it does not cover come first."""
        note = (progress or LoggedProgress()).note
        directory = find_checkpoint(self.run_dir / "checkpoints", self.config.resume, note)
        if directory is not None:
            saved = self.state.restore(directory)
            self.stack.worker.load_checkpoint(directory / "actor")
            note(f"resumed from {directory} at step {self.step}, policy version {self.policy_version}")
            if changes := changed_settings(saved, self.config):
                note(f"settings that have changed since: {', '.join(changes)}")
        self.provenance.resumed_at = None if self.config.resume == "disable" else self.policy_version
        if known := self.stack.ledger.persist(self.run_dir / "ledger", self.provenance.resumed_at):
            note(f"{known} completions of before the interruption are known: their groups may still come")
        if pending := self.source.resume(self.step):
            note(f"{pending} batches fetched before the interruption are trained first")

    # ------------------------------------------------------------------ environment-driven training

    def fit(
        self,
        *,
        progress: Progress | None = None,
        check_services: Callable[[], None] | None = None,
        held_out: HeldOut | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> dict[str, Any]:
        """Trains on the batches of environments up to step ``config.steps``; returns its part of ``summary.json``.

        The rollout phase stays open (newest weights served), so that an evaluation can follow. What ends the run is
        raised after the steps since the last checkpoint were saved, if that is possible. ``check_services`` is called
        while waiting, and raises when a process of the run has died; ``on_step`` with every step's report.
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
            self.stack.gateway.check_alive()
            if check_services is not None:
                check_services()

        try:
            source.start(
                check,
                starts_environment=check_services is not None,
                prepare=self._prepare if self._overlapped else None,
                attend=self._attend,
            )
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
        return outcome(
            self.step,
            self.policy_version,
            log.rewards,
            self.totals,
            mode=config.mode,
            idle_share=log.idle_share,
            weights_synced=self.sharding_manager.syncs,
        )

    def evaluate(self, label: str) -> None:
        """Waits for the evaluation ``label`` that was started, if one was, while nothing is trained."""
        self.stack.evaluated.pin()
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
            self.stack.evaluated.pin(self.engine.copy())
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
        self.stack.evaluated.unpin()
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
            self.source.batches.discard_through(self.step)  # no checkpoint will ever cover it
            return False
        is_evaluated = config.eval.keep_best and config.evaluates_at(self.step)
        return self.step % config.save_freq == 0 or self.step == last or is_evaluated

    def _save_what_was_trained(self, error: BaseException, progress: Progress) -> None:
        unusable = isinstance(error, CheckpointError | TrainingDivergedError | WeightSyncError)
        saved_at = self._saved_at
        if self.config.save_freq <= 0 or self.step == saved_at or unusable:
            return
        again = f"the same command with run_dir={self.run_dir} resume=auto"
        if self.updating:
            note = f"in the middle of an optimiser step: nothing after step {saved_at} is saved; the journal holds the "
            note += f"batches, {again} trains on them again"
        else:
            progress.phase(f"saving checkpoint {self.step}")
            try:
                with held_interrupts(deliver=False):
                    directory = self.save_checkpoint()
                note = f"steps up to {self.step} are saved in {directory}; {again} goes on"
            except CheckpointError as second:
                note = f"and the trained steps since {saved_at} could not be saved: {second}"
        error.add_note(f"({note})")
