"""The task runner: a Ray actor that holds trainer, gateway and trajectory feed of a run (verl's ``TaskRunnerV1``)."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from atropos_verl.backends.ray.mailbox import BoardClient
from atropos_verl.config.verl_keys import ClusterRun, parameter_sync_step, read_run

__all__ = ["AtroposTaskRunner", "runner_class"]

logger = logging.getLogger(__name__)


class AtroposTaskRunner:
    """``run(config)`` is what verl's ``run_ppo`` calls. One instance runs once."""

    def __init__(self, board: Any) -> None:
        self.board = BoardClient(board)

    def run(self, config: Any) -> None:
        """Train to the end. What fails is raised to the caller of ``run_ppo``."""
        run = read_run(config)
        _log_to_file(run.run_dir)
        import transfer_queue as tq
        from omegaconf import OmegaConf, open_dict

        from atropos_verl.backends.ray import policy_loss, shims  # noqa: F401  registers the loss

        shims.quiet_transfer_queue()
        with open_dict(config):
            config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        self.board.phase("starting verl: workers, replicas, TransferQueue")
        tq.init(config.transfer_queue)
        with ExitStack() as stack:
            stack.callback(tq.close)
            # run_ppo returns nothing; what came of the run goes the way of the events.
            self.board.put("result", _Session(run, config, self.board, stack).train())


class _Session:
    """One run inside the task runner. What is started registers its end on ``stack``, in order."""

    def __init__(self, run: ClusterRun, config: Any, board: BoardClient, stack: ExitStack) -> None:
        self.run, self.config, self.board, self.stack = run, config, board, stack
        self.rewards: list[float] = []
        self.syncs = 0

    def train(self) -> dict[str, Any]:
        from atropos_verl.backends.ray.agent_loop import AtroposAgentLoopManager
        from atropos_verl.backends.ray.trainer import MODES, StopRequestedError
        from atropos_verl.errors import AtroposAPIError, CheckpointError, DataError
        from atropos_verl.training.metrics_log import MetricsLog

        self.board.phase("loading the policy (verl)")
        self.trainer = trainer = MODES[self.run.mode](config=self.config)
        trainer.init()
        self.stack.callback(self._finish_tracking)
        if trainer.global_steps:
            self.board.note(f"resumed at step {trainer.global_steps} from {trainer.checkpoint_root}")
        llm_client = trainer.get_llm_client()
        self._start_gateway(llm_client)
        self.feed = self._start_feed()
        self.log = MetricsLog(self.run.run_dir / "metrics.jsonl")
        self.log.truncate_after(trainer.global_steps)
        self.rewards = self.log.rewards()
        trainer.on_report = self._report
        trainer.on_stop = lambda: self.board.has_flag("stop")
        manager = AtroposAgentLoopManager.create(
            config=self.config,
            llm_client=llm_client,
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        manager.feed = self.feed
        self.board.wait_for_flag("train", self.feed.check)
        self.board.phase("rollout: waiting for a batch")
        stopped = ""
        if trainer.global_steps < trainer.total_training_steps:
            self.flow.watch()
            try:
                trainer.fit(manager)
            except StopRequestedError as error:
                stopped = str(error)
                self.board.note(trainer.save_what_was_trained() or stopped)
            except (AtroposAPIError, CheckpointError, DataError):
                saved = trainer.save_what_was_trained()
                self.board.put("saved", saved)
                raise
            finally:
                self.flow.close()  # an evaluation may follow, which nobody may hold back
        self.board.put("trained", stopped)
        self.board.wait_for_flag("end")
        return self._summary(stopped)

    @property
    def _resumed_at(self) -> int | None:
        """The policy version that this process goes on at; None: nothing that an earlier one left is to be used."""
        return None if self.config.trainer.resume_mode == "disable" else int(self.trainer.global_steps)

    def _start_gateway(self, llm_client: Any) -> None:
        from atropos_verl.backends.ray.gateway import start_gateway
        from atropos_verl.provenance.ledger import Ledger
        from atropos_verl.training.rollout_flow import make_throttle

        self.board.phase("starting the inference gateway")
        settings = self.run.settings.gateway
        self.ledger = Ledger(self.run.settings.off_policy.ledger_bytes)
        self.stack.callback(self.ledger.close)
        if known := self.ledger.persist(self.run.run_dir / "ledger", self._resumed_at):
            self.board.note(f"{known} completions of before the interruption are known: their groups may still come")
        batch_size, batches = self.run.run.batch_size, parameter_sync_step(self.config)
        self.throttle = make_throttle(self.run.settings.off_policy, self.ledger, batch_size, batches)
        self.gateway = start_gateway(
            llm_client,
            self.trainer.tokenizer,
            host=settings.host,
            port=settings.port,
            api_key=settings.api_key,
            ledger=self.ledger,
            throttle=self.throttle,
        )
        self.stack.callback(self.gateway.stop)
        self.board.put("gateway", settings.advertise_url or self.gateway.url)

    def _start_feed(self) -> Any:
        from atropos_verl.backends.ray.agent_loop import TransferQueueStore
        from atropos_verl.backends.ray.feed import TrajectoryFeed
        from atropos_verl.protocol.connection import make_client
        from atropos_verl.protocol.journal import BatchJournal
        from atropos_verl.protocol.leases import LeasedBatches
        from atropos_verl.protocol.registration import register_trainer
        from atropos_verl.training.off_policy_book import OffPolicyBook
        from atropos_verl.training.quarantine import QuarantineStore
        from atropos_verl.training.rollout_flow import RolloutFlow

        run, trainer = self.run, self.trainer
        assert run.settings.api_url is not None
        client = make_client(run.run, run.settings.api_url)
        self.stack.callback(client.close)
        batches = LeasedBatches(client, BatchJournal(run.run_dir / "journal"))
        self.stack.callback(batches.close)
        pending = [] if self._resumed_at is None else batches.resume(self._resumed_at)
        self.flow = RolloutFlow(self.throttle, client, run.run.group_size)
        self.stack.callback(self.flow.close)
        settings = self._feed_settings()
        book = OffPolicyBook(run.settings.off_policy, self.ledger, settings.samples, trainer.tokenizer.decode)
        book.resumed_at = self._resumed_at
        feed = TrajectoryFeed(
            settings,
            batches,
            QuarantineStore(run.run_dir / "quarantine"),
            TransferQueueStore(),
            book,
            served_version=lambda: trainer.served_version,
            flow=self.flow,
        )
        feed.replay(pending)
        if pending:
            self.board.note(f"{len(pending)} batches fetched before the interruption are trained first")

        def first_poll() -> None:
            held = batches.poll({"after_step": trainer.global_steps})
            if held is not None:
                feed.replay([held])

        self.board.phase("registering at the trajectory API")
        register_trainer(
            client,
            run.run,
            run.run.batch_size,
            starting_step=trainer.global_steps,
            checkpoint_dir=trainer.checkpoint_root,
            first_poll=first_poll,
        )
        feed.start()
        self.stack.callback(feed.stop)
        trainer.attach(feed, self.gateway)
        return feed

    def _feed_settings(self) -> Any:
        from atropos_verl.backends.ray.feed import FeedSettings
        from atropos_verl.training.samples import sample_settings

        run, settings = self.run.run, self.run.settings
        correction = self.config.algorithm.rollout_correction
        return FeedSettings(
            samples=sample_settings(run, _vocab_size(self.config)),
            batch_size=run.batch_size,
            temperature=run.temperature,
            needs_logprobs=bool(correction.rollout_is or correction.rollout_rs or correction.bypass_mode),
            first_batch_timeout=settings.rollout_timeout if self.run.is_attached else settings.env.startup_timeout,
            rollout_timeout=settings.rollout_timeout,
            max_wait_time=settings.batch_max_wait_time,
        )

    def _report(self, report: Any) -> None:
        self.log.append(report)
        if report.metrics.get("reward/mean") is not None:
            self.rewards.append(report.metrics["reward/mean"])
        self.board.put("step", report)

    def _summary(self, stopped: str) -> dict[str, Any]:
        totals = self.trainer.state.totals
        done = self.trainer.sharding_manager.last_sync
        return {
            "steps": done.policy_version if done else self.trainer.global_steps,
            "policy_version": done.policy_version if done else self.trainer.global_steps,
            "rewards": self.rewards,
            "weights_synced": self.trainer.sharding_manager.syncs,
            "groups_used": totals.get("groups", 0),
            "groups_quarantined": totals.get("quarantined", 0),
            "groups_stale": totals.get("stale", 0),
            "sequences_trained": totals.get("sequences", 0),
            "sequences_dropped_overlong": totals.get("dropped_overlong", 0),
            "tokens_trained": totals.get("trained_tokens", 0),
            "stopped": stopped,
        }

    def _finish_tracking(self) -> None:
        tracking = getattr(self.trainer, "logger", None)
        if tracking is not None:
            tracking.finish(exit_code=0)


def _vocab_size(config: Any) -> int:
    """Rows of the model's embedding, from its configuration file."""
    from transformers import AutoConfig

    model = config.actor_rollout_ref.model
    found = AutoConfig.from_pretrained(
        model.hf_config_path or model.path, trust_remote_code=model.get("trust_remote_code", False)
    )
    return int(getattr(found, "vocab_size", None) or found.get_text_config().vocab_size)


def runner_class(board: Any) -> Any:
    """A class for ``run_ppo(config, task_runner_class)``: verl makes it without arguments."""

    class _Bound:
        @staticmethod
        def remote() -> Any:
            return ray.remote(num_cpus=1)(AtroposTaskRunner).remote(board)

        @staticmethod
        def options(**options: Any) -> Any:
            class _WithOptions:
                @staticmethod
                def remote() -> Any:
                    return ray.remote(num_cpus=1)(AtroposTaskRunner).options(**options).remote(board)

            return _WithOptions

    return _Bound


def _log_to_file(run_dir: Path) -> None:
    directory = run_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(directory / "task_runner.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("atropos_verl").setLevel(logging.INFO)
    os.environ.setdefault("TENSORBOARD_DIR", str(run_dir / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(run_dir / "verl_tracking.jsonl"))
