"""Environment-driven training: serve the policy, take batches, train, sync, until the steps are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atropos_verl.backends.local.batch_feed import make_feed
from atropos_verl.backends.local.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from atropos_verl.backends.local.interrupts import held_interrupts
from atropos_verl.backends.local.rollout_data import IdleShare
from atropos_verl.backends.local.selfplay import register_trainer
from atropos_verl.errors import AtroposAPIError, AtroposHTTPStatusError, AtroposTimeoutError
from atropos_verl.training.metrics_log import MetricsLog
from atropos_verl.types import StepReport

if TYPE_CHECKING:
    from atropos_verl.backends.local.trainer import AtroposTrainer, RolloutData

__all__ = ["Progress", "fit", "resume_if_asked"]

logger = logging.getLogger(__name__)

_MOST_LOST_BATCHES = 5
"""Answers of 500 to GET /batch in a row after which the API is taken to be broken."""


class Progress(Protocol):
    """Where a run says what it is doing."""

    def phase(self, name: str) -> None: ...

    def note(self, message: str) -> None: ...

    def step(self, report: StepReport) -> None: ...


class _Silent:
    def phase(self, name: str) -> None:
        logger.info("%s", name)

    def note(self, message: str) -> None:
        logger.info("%s", message)

    def step(self, report: StepReport) -> None:
        logger.info("step %d: loss %.4g, reward %s", report.step, report.loss, report.metrics["reward/mean"])


def resume_if_asked(trainer: AtroposTrainer, progress: Progress) -> dict[str, Any]:
    """Load the checkpoint that ``resume`` means, take in what the ledger knew, and queue the journalled batches that
    the checkpoint does not cover."""
    directory = find_checkpoint(trainer.run_dir, trainer.config.resume)
    state: dict[str, Any] = {}
    if directory is not None:
        state = load_checkpoint(trainer, directory)
        progress.note(f"resumed from {directory} at step {trainer.step}, policy version {trainer.policy_version}")
    resumes = trainer.config.resume != "disable"
    trainer.off_policy.resumed_at = trainer.policy_version if resumes else None
    known = trainer.stack.ledger.persist(trainer.run_dir / "ledger", trainer.off_policy.resumed_at)
    if known:
        progress.note(f"{known} completions of before the interruption are known: their groups may still come")
    pending = trainer.intake.resume(trainer.step)
    if pending:
        progress.note(f"{len(pending)} batches fetched before the interruption are trained first")
        trainer.in_hand.replay(pending, trainer.step)
    return state


def fit(
    trainer: AtroposTrainer,
    *,
    progress: Progress | None = None,
    check_services: Callable[[], None] | None = None,
    before_first_step: Callable[[], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    checkpoint_extra: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run ``trainer`` from its current step to ``config.steps``.

    The trainer is left with the rollout phase open (newest weights served), so that an evaluation can follow.
    With ``mode=overlap`` the next batch is fetched while one is trained on; one that was fetched and not trained on,
    because the run ended, stays in the journal.

    Args:
        check_services: called while waiting; raises when a process of the run has died.
        before_first_step: called once, with the policy being served, before the first optimiser step.
        on_step: called with every step's report, for trackers.

    Raises:
        AtroposAPIError, ServiceError, EngineStoppedError, WeightSyncError, TrainingDivergedError, CheckpointError.
        Whatever ends the run, what was trained since the last checkpoint is saved first if that is possible.
    """
    config = trainer.config
    progress = progress or _Silent()
    log = MetricsLog(trainer.run_dir / "metrics.jsonl")
    log.truncate_after(trainer.step)
    extra = checkpoint_extra or dict
    saved_at = trainer.step
    rewards = log.rewards()
    idle = IdleShare()
    if not trainer.intake.is_registered:
        progress.phase("registering at the trajectory API")
    register_trainer(trainer, config.batch_size)
    trainer.open_rollouts()
    if before_first_step is not None:
        before_first_step()
    trainer.flow.watch()
    wait = _Waiter(trainer, progress, starts_environment=check_services is not None)

    def check() -> None:
        trainer.engine.check_alive()
        if check_services is not None:
            check_services()

    feed = make_feed(trainer, wait, check)
    try:
        while trainer.step < config.steps:
            started = time.perf_counter()
            progress.phase("rollout: waiting for a batch")
            data = feed.take(more=trainer.step + 1 < config.steps)
            with held_interrupts():
                if trainer.discard_if_stale(data):
                    continue
            data.timings["rollout"] = time.perf_counter() - started
            with held_interrupts():
                report = trainer.train_on(data, started)
                log.append(report)
            idle.add(report)
            progress.step(report)
            if on_step is not None:
                on_step(report)
            if isinstance(report.metrics["reward/mean"], float):
                rewards.append(report.metrics["reward/mean"])
            if config.save_freq > 0 and (trainer.step % config.save_freq == 0 or trainer.step == config.steps):
                progress.phase(f"saving checkpoint {trainer.step}")
                with held_interrupts():
                    save_checkpoint(trainer, extra())
                    saved_at = trainer.step
            elif config.save_freq <= 0:
                trainer.batches.discard_through(trainer.step)  # no checkpoint will ever cover it
        feed.close()
        trainer.in_hand.give_back()
        trainer.flow.close()  # an evaluation may follow, which nobody may hold back
    except BaseException as error:
        try:
            _save_what_was_trained(trainer, error, saved_at, extra)
        finally:
            feed.close()  # last: it waits for a request that an API which hangs may never answer
        raise
    return {"rewards": rewards, "idle_share": idle.value, "metrics_path": str(log.path)}


def _save_what_was_trained(
    trainer: AtroposTrainer, error: BaseException, saved_at: int, extra: Callable[[], dict[str, Any]]
) -> None:
    from atropos_verl.errors import CheckpointError, TrainingDivergedError, WeightSyncError

    unusable = (CheckpointError, TrainingDivergedError, WeightSyncError)
    if trainer.config.save_freq <= 0 or trainer.step == saved_at or isinstance(error, unusable):
        return
    if trainer.updating:
        error.add_note(
            f"(in the middle of an optimiser step: the weights are not those of step {trainer.step} any more, and "
            f"nothing after step {saved_at} is saved; the journal holds the batches, resume=auto trains on them again)"
        )
        return
    try:
        with held_interrupts(deliver=False):
            directory: Path = save_checkpoint(trainer, extra())
    except CheckpointError as second:
        error.add_note(f"(and the trained steps since {saved_at} could not be saved: {second})")
    else:
        error.add_note(
            f"(steps up to {trainer.step} are saved in {directory}; the same command with resume=auto goes on)"
        )


class _Waiter:
    """Waits for the next batch, however often it takes. With ``mode=overlap`` it runs in the prefetching thread."""

    def __init__(self, trainer: AtroposTrainer, progress: Progress, *, starts_environment: bool) -> None:
        self._trainer = trainer
        self._progress = progress
        # An environment that we started has to import, register and roll out first; one that never does is found soon.
        self._is_starting = starts_environment and not trainer.totals.groups_used

    def __call__(self, check: Callable[[], None] | None) -> RolloutData:
        config, trainer, progress = self._trainer.config, self._trainer, self._progress
        limit = config.env.startup_timeout if self._is_starting else config.atropos.rollout_timeout
        deadline = time.monotonic() + limit
        lost = 0
        while True:
            remaining = deadline - time.monotonic()
            try:
                data = trainer.fetch_rollouts(min(config.batch_max_wait_time, max(remaining, 0.1)), check)
                self._is_starting = False
                return data
            except AtroposTimeoutError as error:
                if time.monotonic() >= deadline:
                    raise
                progress.note(error.reason)
            except AtroposHTTPStatusError as error:
                # Upstream encodes a batch after taking it off its queue: one NaN score in it gives 500, and the batch
                # is gone. The next one may be fine, so the run goes on, and says what was lost.
                lost += 1
                if error.status_code != 500 or lost > _MOST_LOST_BATCHES or time.monotonic() >= deadline:
                    raise
                trainer.totals.batches_lost_at_api += 1
                progress.note(f"{error.reason}: the API lost a batch (an upstream API does, on a NaN score); going on")
            except AtroposAPIError:
                # The API we started may have died this moment: then its own log is the better explanation.
                if check is not None:
                    time.sleep(0.5)
                    check()
                raise
