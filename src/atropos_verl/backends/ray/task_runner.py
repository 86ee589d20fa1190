"""The task runner of one run on Ray: an actor, perhaps on another machine than the command, that holds trainer, gateway
and trajectory feed (verl's ``TaskRunnerV1``); and the mailbox between the two."""

import time
from contextlib import ExitStack
from typing import Any

import ray

from atropos_verl.config.verl_keys import parameter_sync_step, public, read_run
from atropos_verl.report.console import log_to_file
from atropos_verl.report.trace_reader import TraceReader, send_rollouts
from atropos_verl.training.step import keep_trackers_inside
from atropos_verl.types import StepReport

MAILBOX = "atropos_mailbox"
"""Name of the mailbox's actor. Ray keeps the names of each run apart."""
_WAIT_INTERVAL = 0.1


class Mailbox:
    """A Ray actor with the events of the task runner and the flags of the command. One per run."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._flags: dict[str, Any] = {}

    def put(self, kind: str, content: Any) -> None:
        self._events.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Return every event since the last call."""
        events, self._events = self._events, []
        return events

    def raise_flag(self, name: str, content: Any = True) -> None:
        self._flags[name] = content

    def flag(self, name: str) -> Any:
        """Return what the flag was raised with; None: it was not."""
        return self._flags.get(name)


class AtroposTaskRunner:
    """The actor on which verl's ``run_ppo`` calls ``run``. One instance runs once."""

    def run(self, config: Any) -> None:
        """Train to the end. What fails is raised to the caller of ``run_ppo``."""
        self.cluster = run = read_run(config)
        directory = run.run_dir / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        log_to_file(directory / "task_runner.log")
        keep_trackers_inside(run.run_dir)
        import transfer_queue as tq
        from omegaconf import OmegaConf, open_dict

        from atropos_verl.verl_plugin.shims import let_trackers_fail

        let_trackers_fail()
        with open_dict(config):
            config.transfer_queue.enable = True
            # verl hands its configuration to the user's trackers. What needs these is made of ``run``.
            config.atropos = public(config)["atropos"]
        OmegaConf.resolve(config)
        self.config = config
        self._mailbox = ray.get_actor(MAILBOX)
        with ExitStack() as self.stack:  # what is started registers its end here, in order
            self.put("phase", "starting verl: workers, replicas, TransferQueue")
            tq.init(config.transfer_queue)
            self.stack.callback(tq.close)
            # run_ppo returns nothing; the figures of the run go the way of the events.
            self.put("result", self.train())

    def put(self, kind: str, content: Any) -> None:
        """Send the command an event, without waiting for an answer."""
        self._mailbox.put.remote(kind, content)

    def flag(self, name: str) -> Any:
        return ray.get(self._mailbox.flag.remote(name))

    def train(self) -> dict[str, Any]:
        from atropos_verl.backends.ray.trainer import MODES, AtroposAgentLoopManager, StopRequestedError
        from atropos_verl.training.step import StepLog, outcome

        self.put("phase", "loading the policy (verl)")
        self.trainer = trainer = MODES[self.cluster.mode](config=self.config)
        trainer.init()
        self.stack.callback(lambda: getattr(trainer, "logger", None) and trainer.logger.finish(exit_code=0))
        if trainer.global_steps:
            self.put("note", f"resumed at step {trainer.global_steps} from {trainer.checkpoint_root}")
        for note in trainer.notes:
            self.put("note", note)
        llm_client = trainer.get_llm_client()
        self._start_services(llm_client)
        self.log = StepLog(self.cluster.run_dir, trainer.global_steps)
        self.reader = TraceReader(self.cluster.run_dir)
        trainer.on_report = self._report
        trainer.on_stop = lambda: self.flag("stop") is not None
        trainer.on_evaluate = self._evaluate
        trainer.replicas.note = lambda text: self.put("note", text)
        clients = {"teacher_client": trainer.get_teacher_client()}
        clients |= {"llm_client": llm_client, "reward_loop_worker_handles": trainer.get_reward_handles()}
        manager = AtroposAgentLoopManager(self.config, trainer.feed, **clients)
        trainer.state.held_out |= self._wait_for("train") or {}
        self.gateway.evaluated.unpin()
        self.put("phase", "rollout: waiting for a batch")
        stopped = ""
        if trainer.global_steps < trainer.total_training_steps:
            self.source.start(None, starts_environment=not self.cluster.run.is_attached)
            try:
                trainer.evaluate_if_due()
                trainer.fit(manager)
            except StopRequestedError as error:
                stopped = str(error)
                self.put("note", trainer.save_what_was_trained() or stopped)
            except Exception as error:
                try:
                    if saved := trainer.save_what_was_trained(error):
                        self.put("saved", saved)
                except Exception as second:  # noqa: BLE001 - what ended the run is what the user is to see
                    error.add_note(f"(and the trained steps could not be saved: {second})")
                raise
            finally:
                self.source.stop(give_back=False)  # an evaluation may follow, whose prompts must not wait
        self.gateway.evaluated.pin()
        self.put("trained", stopped)
        self._wait_for("end")
        syncs, step = trainer.sharding_manager.syncs, trainer.served_version
        return outcome(step, step, self.log.rewards, trainer.state.totals, weights_synced=syncs, stopped=stopped)

    def _start_services(self, llm_client: Any) -> None:
        """Gateway and feed, attached to the trainer."""
        from atropos_verl.backends.ray.feed import TrajectoryFeed
        from atropos_verl.backends.ray.gateway import ClusterGateway, embedding_rows
        from atropos_verl.backends.ray.transfer import TransferQueueStore
        from atropos_verl.gateway.sessions import SessionStore
        from atropos_verl.provenance.ledger import Ledger
        from atropos_verl.training.batch_source import BatchSource
        from atropos_verl.training.samples import sample_settings
        from atropos_verl.training.staleness import BatchProvenance, make_throttle

        self.put("phase", "starting the inference gateway")
        config, run_dir, trainer = self.cluster.run, self.cluster.run_dir, self.trainer
        ledger = Ledger(config.off_policy.ledger_bytes)
        self.stack.callback(ledger.close)
        # The policy version that this process goes on at; None: nothing that an earlier one left is to be used.
        resumed_at = None if self.config.trainer.resume_mode == "disable" else int(trainer.global_steps)
        if known := ledger.persist(run_dir / "ledger", resumed_at):
            self.put("note", f"{known} completions of before the interruption are known: their groups may still come")
        throttle = make_throttle(config.off_policy, ledger, config.batch_size, parameter_sync_step(self.config))
        self.source = source = BatchSource(config, run_dir)
        self.stack.callback(source.close)
        sessions = SessionStore(run_dir / "gateway", source.trace.session)
        self.stack.callback(sessions.close)
        for_app = config.gateway.for_app() | {"ledger": ledger, "throttle": throttle, "sessions": sessions}
        for_app |= {"host": config.gateway.host, "port": config.gateway.port, "on_request": source.trace.request}
        self.gateway = ClusterGateway(llm_client, trainer.tokenizer, **for_app)
        self.gateway.start(timeout=30.0)
        self.stack.callback(self.gateway.stop)
        self.gateway.evaluated.pin()
        self.put("held_out", trainer.state.held_out)
        self.put("gateway", config.gateway.advertise_url or self.gateway.url)

        settings = sample_settings(config, embedding_rows(self.config.actor_rollout_ref.model))
        provenance = BatchProvenance(config.off_policy, ledger, settings, trainer.tokenizer)
        provenance.resumed_at = resumed_at
        source.attach(provenance, throttle, trainer.state.totals)
        if pending := source.resume(trainer.global_steps):
            self.put("note", f"{pending} batches fetched before the interruption are trained first")
        self.put("phase", "registering at the trajectory API")
        source.register(trainer.global_steps, config.batch_size, trainer.checkpoint_root)
        correction = self.config.algorithm.rollout_correction
        feed = TrajectoryFeed(
            source,
            TransferQueueStore(),
            provenance,
            served_version=lambda: trainer.served_version,
            needs_logprobs=bool(correction.rollout_is or correction.rollout_rs or correction.bypass_mode),
        )
        feed.start()
        self.stack.callback(feed.stop)
        trainer.attach(feed, self.gateway)

    def _wait_for(self, name: str) -> Any:
        """Wait until the command raises the flag, or asks the run to end (then None)."""
        while (content := self.flag(name)) is None and not self.trainer.on_stop():
            if name != "end":  # then it has ended
                self.trainer.feed.check()
            self.trainer.replace_dead_replicas()
            time.sleep(_WAIT_INTERVAL)
        return content

    def _evaluate(self, label: str) -> dict[str, float | None]:
        self.gateway.evaluated.pin()
        self.put("evaluate", label)
        if (figures := self._wait_for(f"evaluated {label}")) is None:
            return {}
        self.gateway.evaluated.unpin()
        return dict(figures)

    def _report(self, report: StepReport) -> None:
        self.log.append(report)
        self.put("step", report)
        if (tracking := getattr(self.trainer, "logger", None)) is not None:
            send_rollouts(tracking, self.reader, report.step)
