"""``AtroposTrainer``: one optimiser step at a time, on rollouts that came through a trajectory API.

``rl_training_step(prompts)`` lets the trainer itself sample and score rollouts; ``fit()`` trains on whatever the
environments behind the API send. Both do, in this order::

    rollout (gate open, engine holds the newest weights) → batch → samples → optimiser step → weight sync → ack
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from atropos_verl.backends.local.in_hand import InHand
from atropos_verl.backends.local.intake import Intake
from atropos_verl.backends.local.interrupts import held_interrupts
from atropos_verl.backends.local.rollout_data import RolloutData, RunTotals, step_report
from atropos_verl.backends.local.stack import LocalStack, padded_rows
from atropos_verl.config.schema import RunConfig, apply_environment
from atropos_verl.errors import ConfigError, DataError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.off_policy_book import OffPolicyBook
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.training.rollout_flow import RolloutFlow
from atropos_verl.training.samples import build_samples, sample_settings
from atropos_verl.training.staleness import staleness_metrics
from atropos_verl.types import SampleReport, ScoredGroup, StepReport

if TYPE_CHECKING:
    import torch

    from atropos_verl.backends.local.selfplay import RewardFunction

__all__ = ["AtroposTrainer", "RolloutData", "RunTotals"]

logger = logging.getLogger(__name__)


class AtroposTrainer:
    """Trains a policy in verl on rollouts that went through an Atropos trajectory API.

    Use it as a context manager, or call ``close()``: it owns an engine thread, a gateway port and temporary state.

    Args:
        config: the run's settings.
        reward_fn: for ``rl_training_step``: ``(prompts, completions) -> scores``, flat lists of equal length.
        client: an ``AtroposClient`` to use instead of one made from the configuration.
        intake: client, journal and registration, where the run has them already; the trainer closes it.
        gateway_listener: a socket that listens already, where the gateway is to serve.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        reward_fn: RewardFunction | None = None,
        client: AtroposClient | None = None,
        run_dir: Path | None = None,
        intake: Intake | None = None,
        gateway_listener: socket.socket | None = None,
    ) -> None:
        self.config = config
        self.reward_fn = reward_fn
        self.run_dir = run_dir or config.resolve_run_dir()
        self.model_path = config.resolve_model_path()
        self.intake = intake or Intake(config, self.run_dir, client)
        self.client = self.intake.client
        self.moments = RunningMoments()
        self.totals = RunTotals()
        self.step = 0
        self.updating = False
        """The weights have changed, or may have, and ``step`` does not say so yet: not a state to be saved."""
        self.journal = self.intake.journal
        self.batches = self.intake.batches
        self.quarantine = QuarantineStore(self.run_dir / "quarantine")
        self.stack = LocalStack.build(config, self.model_path, gateway_listener=gateway_listener)
        self.flow = RolloutFlow(self.stack.throttle, self.client, config.group_size)
        self._rollouts: ExitStack | None = None
        self._self_play: Any = None
        self.settings = sample_settings(config, self.stack.vocab_size)
        self.off_policy = OffPolicyBook(config.off_policy, self.stack.ledger, self.settings, self.tokenizer.decode)
        self.in_hand = InHand(self.batches, self.off_policy, self.quarantine, self.flow)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, reward_fn: RewardFunction | None = None, **extra: Any
    ) -> AtroposTrainer:
        """Build from a plain dictionary with the recipe's keys (see ``design.md`` and ``config.describe``).

        ``ATROPOS_API_URL`` and ``ATROPOS_TIMEOUT`` override the dictionary's values. The API is not contacted yet.

        Raises:
            ConfigError: names the key that is unknown, of the wrong type or contradictory.
        """
        values = apply_environment(dict(config))
        return cls(RunConfig.from_mapping(values), reward_fn=reward_fn, **extra)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the rollout phase, the gateway, the engine and the connection. Safe to call twice."""
        try:
            self.close_rollouts()
        finally:
            self.stack.close()
            self.flow.close()
            self.intake.close()

    # ------------------------------------------------------------------ parts

    @property
    def sharding_manager(self) -> Any:
        """The ``AtroposShardingManager`` of this run."""
        return self.stack.sharding_manager

    @property
    def engine(self) -> Any:
        """The embedded inference engine."""
        return self.stack.engine

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.stack.tokenizer

    @property
    def gateway_url(self) -> str:
        """Base URL for environments (without ``/v1``)."""
        return self.config.gateway.advertise_url or self.stack.gateway.url

    @property
    def policy_version(self) -> int:
        """Optimiser steps taken since the run began, resumes included."""
        return self.stack.policy.policy_version

    def open_rollouts(self) -> None:
        """Enter the rollout phase: memory back, newest weights in, canary, gate open. No-op when open.

        With ``mode=overlap`` it lasts to the end of the run, and ``serve_newest`` swaps weights within it.
        """
        if self._rollouts is None:
            stack = ExitStack()
            stack.enter_context(self.stack.sharding_manager)
            self._rollouts = stack

    def serve_newest(self) -> None:
        """The engine holds the newest weights and serves them, whatever it did before."""
        sync = self.sharding_manager.last_sync
        if self._rollouts is None:
            self.open_rollouts()
        elif self.config.is_overlapped and (sync is None or sync.policy_version != self.policy_version):
            self.sharding_manager.swap()

    def _end_rollout_phase(self) -> None:
        if not self.config.is_overlapped:
            self.close_rollouts()

    def close_rollouts(self) -> None:
        """Leave the rollout phase: gate shut at a token boundary, engine memory released. No-op when closed."""
        if self._rollouts is not None:
            stack, self._rollouts = self._rollouts, None
            stack.close()

    # ------------------------------------------------------------------ the step, in its named phases

    def rl_training_step(self, prompts: Sequence[Any]) -> StepReport:
        """One complete step on rollouts that this trainer samples for ``prompts`` and scores with ``reward_fn``.

        Args:
            prompts: P prompts, each a string or a sequence of token ids. Each is sampled ``group_size`` times.

        Raises:
            ConfigError: no ``reward_fn`` was given.
            AtroposAPIError: the trajectory API failed.
        """
        started = time.perf_counter()
        self.open_rollouts()
        try:
            rollout_data = self.rollout_phase(prompts)
        finally:
            self._end_rollout_phase()
        report = self.train_on(rollout_data, started)
        if self.config.save_freq > 0 and self.step % self.config.save_freq == 0:
            self.save_checkpoint()
        elif self.config.save_freq <= 0:
            self.batches.discard_through(self.step)
        return report

    def save_checkpoint(self) -> Path:
        """Write ``run_dir/checkpoints/global_step_N`` now; see ``local.checkpoint``. Raises ``CheckpointError``."""
        from atropos_verl.backends.local.checkpoint import save_checkpoint

        return save_checkpoint(self)

    def rollout_phase(self, prompts: Sequence[Any]) -> RolloutData:
        """Sample, score, submit to the trajectory API and fetch a batch back. Opens the rollout phase if needed."""
        if self.reward_fn is None:
            raise ConfigError("rl_training_step needs a reward_fn(prompts, completions); environments use fit()")
        from atropos_verl.backends.local.selfplay import SelfPlay

        self.open_rollouts()
        if self._self_play is None:
            self._self_play = SelfPlay(self, self.reward_fn)
        started = time.perf_counter()
        self._self_play.submit(prompts)
        data = self.fetch_rollouts()
        data.timings["rollout"] = time.perf_counter() - started
        return data

    def fetch_rollouts(
        self, max_wait_time: float | None = None, should_stop: Callable[[], None] | None = None
    ) -> RolloutData:
        """The next batch of the API, journalled to the run directory before anything else happens to it.

        Raises:
            AtroposTimeoutError: no batch within ``max_wait_time`` (default ``batch_max_wait_time``) seconds.
        """
        early = self.in_hand.next()
        return early or self.in_hand.decode(self.batches.fetch(max_wait_time, should_stop, {"after_step": self.step}))

    def start_api(self) -> None:
        """One GET /batch: an upstream API lets environments register only after it. A batch it returns is kept."""
        self.intake.poll(self.step)
        self.take_polled()

    def take_polled(self) -> None:
        """What the API answered to the first GET /batch, which may have come before this trainer, is trained on."""
        self.in_hand.take(self.intake.take_polled())

    def compute_advantages_from_atropos(self, rollout_data: RolloutData | Sequence[ScoredGroup]) -> torch.Tensor:
        """Advantages [B, L] (right-padded with 0) of the batch's B trainable sequences.

        Group baseline, token-level overrides, normalisation, clipping: see ``data.advantages``. Bad groups are
        written to ``run_dir/quarantine`` with the reason. The samples are kept in ``rollout_data.report``.
        """
        data = rollout_data if isinstance(rollout_data, RolloutData) else RolloutData(list(rollout_data))
        return padded_rows(self._make_samples(data).samples)

    def prepare(self, rollout_data: RolloutData) -> None:
        """Make a batch's samples ahead of its step, from any thread. Left to the step where they depend on the batches
        trained before it ("global" statistics, a bound on staleness)."""
        if self.settings.normalization != "global" and self.config.off_policy.max_staleness is None:
            self._make_samples(rollout_data)

    def discard_if_stale(self, data: RolloutData) -> bool:
        """True when every group is older than ``off_policy.max_staleness``: the batch is done with, without a step."""
        matches = self.off_policy.look_up(data.groups) if data.matches is None else data.matches
        if not self.off_policy.all_stale(data.groups, matches, self.policy_version):
            return False
        logger.warning("every group of a batch is older than off_policy.max_staleness; it is not trained on")
        self.totals.batches_stale += 1
        if data.entry is not None:
            self.batches.trained(data.entry, self.step)
            self.off_policy.consumed(matches)
            self.batches.ack(data.entry)
        self.flow.done()
        return True

    def _make_samples(self, data: RolloutData) -> SampleReport:
        matches = self.off_policy.look_up(data.groups) if data.matches is None else data.matches
        applied = self.off_policy.apply(data.groups, matches, self.policy_version)
        data.off_policy = applied.figures
        report = build_samples(applied.groups, self.settings, running=self.moments)
        for bad in report.quarantined:
            path = self.quarantine.put(bad)
            logger.warning("group quarantined: %s (%s)", bad.reason, path)
        data.report = report
        return report

    def training_phase(self, rollout_data: RolloutData, advantages: torch.Tensor) -> dict[str, float]:
        """The optimiser step. Returns its figures (``loss``, ``grad_norm``, ``lr``, ``tokens`` and the loss's own).

        ``advantages`` [B, L] is what is trained with, also where it differs from what was computed.
        A batch without a trained token makes no step and returns loss 0.

        Raises:
            DataError: the shapes do not belong together, or an advantage is not finite.
            TrainingDivergedError: the loss or the gradient norm is not finite.
        """
        if rollout_data.report is None:
            self.compute_advantages_from_atropos(rollout_data)
        assert rollout_data.report is not None
        samples = rollout_data.report.samples
        values = advantages.detach().cpu().numpy().astype(np.float64)
        if values.shape[0] != len(samples) or any(values.shape[1] < len(s) for s in samples):
            raise DataError(f"advantages {values.shape} do not fit {len(samples)} samples")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise DataError(f"advantages[{row}][{column}] = {values[row, column]} is not finite")
        samples = [replace(s, advantages=values[i, : len(s)] * s.loss_mask) for i, s in enumerate(samples)]
        tokens = sum(int(s.loss_mask.sum()) for s in samples)
        if tokens == 0:
            self.totals.steps_without_data += 1
            logger.warning("the batch holds no token that can be trained; no optimiser step")
            return {"loss": 0.0, "tokens": 0.0}
        self._end_rollout_phase()
        self.updating = True
        rollout_data.off_policy |= staleness_metrics(samples, self.policy_version)
        output = self.stack.worker.train(samples)
        self.stack.policy.policy_version += 1
        self.totals.sequences_trained += len(samples)
        self.totals.tokens_trained += tokens
        figures = {"loss": output.loss, "grad_norm": output.grad_norm, "lr": output.lr, "tokens": float(tokens)}
        return {**figures, **output.metrics}

    def compute_advantage_weighted_sft_loss(
        self, input_ids: torch.Tensor, advantages: torch.Tensor, loss_mask: torch.Tensor
    ) -> torch.Tensor:
        """``sum(-logprob · advantage · mask) / sum(mask)`` of a right-padded batch under the current policy.

        Args:
            input_ids: [B, L]; advantages: [B, L]; loss_mask: [B, L]. Token t is predicted from t - 1; position 0 is
                never trained.

        Returns:
            The loss [], with a graph to the policy's parameters. It has no lower bound for negative advantages; the
            clipped-ratio loss is ``use_advantage_weighting=false``.
        """
        from atropos_verl.training.losses import compute_advantage_weighted_sft_loss

        logits = self.stack.worker.forward_logits(input_ids)
        return compute_advantage_weighted_sft_loss(
            logits, input_ids.to(logits.device), advantages.to(logits.device), loss_mask.to(logits.device)
        )

    # ------------------------------------------------------------------ a whole step

    def train_on(self, rollout_data: RolloutData, started: float | None = None) -> StepReport:
        """Advantages, optimiser step, weight sync, ack: everything after a batch is in hand.

        Args:
            started: ``time.perf_counter()`` at the beginning of the step, for ``timing/step``.
        """
        begin = time.perf_counter()
        started = begin if started is None else started
        with held_interrupts():
            return self._whole_step(rollout_data, begin, started)

    def _whole_step(self, rollout_data: RolloutData, begin: float, started: float) -> StepReport:
        report = rollout_data.report
        moments = self.moments.state_dict()
        # Computed before by the caller? Then not again: "global" statistics would count the batch twice.
        try:
            advantages = padded_rows(report.samples) if report else self.compute_advantages_from_atropos(rollout_data)
            figures = self.training_phase(rollout_data, advantages)
        except BaseException:
            self.moments.load_state_dict(moments)  # the batch counts when it is trained on, which is yet to come
            raise
        trained = time.perf_counter()
        self.step += 1
        if rollout_data.entry is not None:
            self.batches.trained(rollout_data.entry, self.step)
        self.off_policy.consumed(rollout_data.matches or [])
        self.updating = False
        self.serve_newest()
        self.flow.done()
        synced = time.perf_counter()
        if rollout_data.entry is not None:
            self.batches.ack(rollout_data.entry)
        assert rollout_data.report is not None
        self.totals.count(rollout_data.report)
        seconds = {"train": trained - begin, "sync": synced - trained, "step": synced - started}
        sync = self.sharding_manager.last_sync
        return step_report(self.step, self.policy_version, rollout_data, figures, seconds, sync)

    # ------------------------------------------------------------------ environment-driven training

    def fit(self, **arguments: Any) -> dict[str, Any]:
        """Train on what environments send until ``steps`` are done. See ``local.fit.fit``; returns the summary."""
        from atropos_verl.backends.local.fit import fit

        return fit(self, **arguments)
