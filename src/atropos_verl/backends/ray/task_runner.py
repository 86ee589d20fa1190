"""One run on Ray: the session of the command, the task runner that trains, and the mailbox between the two.

The task runner is a Ray actor that holds trainer, gateway and trajectory feed (verl's ``TaskRunnerV1``); it may run on
another machine than the command.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import ray

from atropos_verl.config.verl_keys import RayRun, parameter_sync_step, read_run
from atropos_verl.errors import AtroposVerlError, ServiceError
from atropos_verl.training.extensions import LAUNCH_DIRECTORY
from atropos_verl.types import StepReport

logger = logging.getLogger(__name__)

_MAILBOX = "atropos_mailbox"
"""Name of the mailbox's actor. Ray keeps the names of each run apart."""
_WAIT_INTERVAL = 0.1


class _Mailbox:
    """A Ray actor with the events of the task runner and the flags of the command. One per run."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._flags: set[str] = set()

    def put(self, kind: str, content: Any) -> None:
        self._events.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Return every event since the last call."""
        events, self._events = self._events, []
        return events

    def raise_flag(self, name: str) -> None:
        self._flags.add(name)

    def has_flag(self, name: str) -> bool:
        return name in self._flags


class RaySession:
    """Context manager. Leaving it ends every actor of the run, and Ray itself where this session started it."""

    def __init__(self, run: RayRun) -> None:
        self.run = run
        # Not the main thread, which keeps Ctrl-C.
        self._thread = threading.Thread(target=self._run, name="run-ppo", daemon=True)
        self.start_runner = self._thread.start
        self._done = threading.Event()
        self.poll = self._done.wait
        """Wait at most so many seconds for the task runner; True when it has ended."""
        self._error: BaseException | None = None
        self._result: dict[str, Any] = {}

    def __enter__(self) -> Self:
        config = self.run.verl
        variables = set_environment(str(config.trainer.device))
        from omegaconf import OmegaConf
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        settings = _given(config.ray_kwargs.ray_init)
        environment = get_ppo_ray_runtime_env(config)
        environment.setdefault("env_vars", {}).update({"TRANSFER_QUEUE_ENABLE": "1"} | variables)
        environment = _given(OmegaConf.merge(environment, settings.pop("runtime_env", {})), resolve=False)
        if "address" not in settings:
            # A cluster of its own, also where RAY_ADDRESS points at one. CPU "GPUs" are counted, not there.
            settings["address"] = "local"
            if config.trainer.device == "cpu":
                # The placement bundles that verl asks for: the trainer's, and those of standalone replicas.
                trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
                own = rollout.nnodes * rollout.n_gpus_per_node if self.run.mode == "separate_async" else 0
                settings.setdefault("num_gpus", int(trainer.nnodes * trainer.n_gpus_per_node + own))
        else:
            for name in ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard"):
                settings.pop(name, None)  # the cluster's own; Ray refuses them when attaching
        # Ray says with every cluster of its own that it is protected by a token, which is as it should be.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServiceError(f"Ray: {error}", "ray") from error
        # Ray takes SIGTERM over and exits at once; the step on its way is to be saved.
        signal.signal(signal.SIGTERM, terminate)
        self._mailbox = ray.remote(num_cpus=0)(_Mailbox).options(name=_MAILBOX).remote()
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        if self._thread.ident is not None:
            self._thread.join(10.0)

    def _run(self) -> None:
        """Call verl's ``run_ppo`` with our task runner."""
        try:
            from verl.trainer.main_ppo import run_ppo

            run_ppo(self.run.verl, ray.remote(num_cpus=1)(AtroposTaskRunner))
        except BaseException as error:  # noqa: BLE001 - raised in the main thread, by result()
            self._error = error
        finally:
            self._done.set()

    @property
    def has_ended(self) -> bool:
        """True when the task runner has returned or failed."""
        return self._done.is_set()

    def take_events(self) -> list[tuple[str, Any]]:
        """Returns the task runner's messages since the last call."""
        events: list[tuple[str, Any]] = ray.get(self._mailbox.take.remote())
        for kind, content in events:
            if kind == "result":
                self._result = content
        return [event for event in events if event[0] != "result"]

    def raise_flag(self, name: str) -> None:
        ray.get(self._mailbox.raise_flag.remote(name))

    def result(self, explain: Callable[[BaseException], BaseException]) -> dict[str, Any]:
        """Return the run's figures, or raise what ended the task runner, as ``explain`` sees it."""
        error = self._error
        if error is None:
            return self._result
        cause = getattr(error, "cause", None)
        logger.error("the task runner failed: %s", error)
        best = explain(cause if isinstance(cause, AtroposVerlError) else error)
        if isinstance(best, AtroposVerlError):
            raise best
        last = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        log = self.run.run_dir / "logs"
        raise ServiceError(
            f"verl's task runner failed: {last}\n"
            f"the whole traceback is in {log / 'command.log'}; earlier output in {log / 'task_runner.log'}",
            "task runner",
        ) from error


def set_environment(device: str) -> dict[str, str]:
    """Set and return the variables of every process of the run. Call it before the first import of verl."""
    from atropos_verl.verl_plugin import ray_environment

    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "VERL_LOGGING_LEVEL": "WARN",  # below it, verl 0.9.1's logger.info(..., flush=True) raises (separate_async)
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    given = {name: os.environ[name] for name in (*environment, LAUNCH_DIRECTORY) if name in os.environ}
    environment |= given | ray_environment(device)
    os.environ.update(environment)
    return environment


def _given(config: Any, resolve: bool = True) -> dict[str, Any]:
    """The entries of a configuration that are not None, as plain values."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if value is not None}


class AtroposTaskRunner:
    """The actor on which verl's ``run_ppo`` calls ``run``. One instance runs once."""

    def run(self, config: Any) -> None:
        """Train to the end. What fails is raised to the caller of ``run_ppo``."""
        self.cluster = run = read_run(config)
        directory = run.run_dir / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(directory / "task_runner.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger("atropos_verl").setLevel(logging.INFO)
        os.environ.setdefault("TENSORBOARD_DIR", str(run.run_dir / "tensorboard"))
        os.environ.setdefault("WANDB_DIR", str(run.run_dir))
        os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(run.run_dir / "verl_tracking.jsonl"))
        import transfer_queue as tq
        from omegaconf import OmegaConf, open_dict

        from atropos_verl.verl_plugin.shims import quiet_transfer_queue

        quiet_transfer_queue()
        with open_dict(config):
            config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        self.config = config
        self._mailbox = ray.get_actor(_MAILBOX)
        with ExitStack() as self.stack:  # what is started registers its end here, in order
            self.put("phase", "starting verl: workers, replicas, TransferQueue")
            tq.init(config.transfer_queue)
            self.stack.callback(tq.close)
            # run_ppo returns nothing; the figures of the run go the way of the events.
            self.put("result", self.train())

    def put(self, kind: str, content: Any) -> None:
        """Send the command an event, without waiting for an answer."""
        self._mailbox.put.remote(kind, content)

    def has_flag(self, name: str) -> bool:
        return bool(ray.get(self._mailbox.has_flag.remote(name)))

    def train(self) -> dict[str, Any]:
        from atropos_verl.backends.ray.trainer import MODES, AtroposAgentLoopManager, StopRequestedError
        from atropos_verl.errors import AtroposAPIError, CheckpointError, DataError
        from atropos_verl.training.step import StepLog, outcome

        self.put("phase", "loading the policy (verl)")
        self.trainer = trainer = MODES[self.cluster.mode](config=self.config)
        trainer.init()
        self.stack.callback(lambda: getattr(trainer, "logger", None) and trainer.logger.finish(exit_code=0))
        # The policy version that this process goes on at; None: nothing that an earlier one left is to be used.
        self._resumed_at = None if self.config.trainer.resume_mode == "disable" else int(trainer.global_steps)
        if trainer.global_steps:
            self.put("note", f"resumed at step {trainer.global_steps} from {trainer.checkpoint_root}")
        llm_client = trainer.get_llm_client()
        self._start_gateway(llm_client)
        feed = self._start_feed()
        self.log = StepLog(self.cluster.run_dir, trainer.global_steps)
        trainer.on_report = self._report
        trainer.on_stop = lambda: self.has_flag("stop")
        manager = AtroposAgentLoopManager(
            self.config,
            feed,
            llm_client=llm_client,
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        while not self.has_flag("train"):
            feed.check()
            time.sleep(_WAIT_INTERVAL)
        self.put("phase", "rollout: waiting for a batch")
        stopped = ""
        if trainer.global_steps < trainer.total_training_steps:
            self.source.start(None, starts_environment=not self.cluster.run.is_attached)
            try:
                trainer.fit(manager)
            except StopRequestedError as error:
                stopped = str(error)
                self.put("note", trainer.save_what_was_trained() or stopped)
            except (AtroposAPIError, CheckpointError, DataError):
                saved = trainer.save_what_was_trained()
                self.put("saved", saved)
                raise
            finally:
                self.source.stop(give_back=False)  # an evaluation may follow, whose prompts must not wait
        self.put("trained", stopped)
        while not self.has_flag("end"):
            time.sleep(_WAIT_INTERVAL)
        syncs, step = trainer.sharding_manager.syncs, trainer.served_version
        return outcome(step, step, self.log.rewards, trainer.state.totals, weights_synced=syncs, stopped=stopped)

    def _start_gateway(self, llm_client: Any) -> None:
        from atropos_verl.backends.ray.gateway import start_gateway
        from atropos_verl.provenance.ledger import Ledger
        from atropos_verl.training.staleness import make_throttle

        self.put("phase", "starting the inference gateway")
        settings = self.cluster.settings.gateway
        self.ledger = Ledger(self.cluster.settings.off_policy.ledger_bytes)
        self.stack.callback(self.ledger.close)
        if known := self.ledger.persist(self.cluster.run_dir / "ledger", self._resumed_at):
            self.put("note", f"{known} completions of before the interruption are known: their groups may still come")
        batch_size, batches = self.cluster.run.batch_size, parameter_sync_step(self.config)
        self.throttle = make_throttle(self.cluster.settings.off_policy, self.ledger, batch_size, batches)
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
        self.put("gateway", settings.advertise_url or self.gateway.url)

    def _start_feed(self) -> Any:
        from atropos_verl.backends.ray.feed import TrajectoryFeed
        from atropos_verl.backends.ray.gateway import embedding_rows
        from atropos_verl.backends.ray.trainer import TransferQueueStore
        from atropos_verl.training.batch_source import BatchSource
        from atropos_verl.training.samples import sample_settings
        from atropos_verl.training.staleness import BatchProvenance

        run, trainer = self.cluster, self.trainer
        self.source = source = BatchSource(run.run, run.run_dir)
        self.stack.callback(source.close)
        settings = sample_settings(run.run, embedding_rows(self.config.actor_rollout_ref.model))
        provenance = BatchProvenance(run.settings.off_policy, self.ledger, settings, trainer.tokenizer.decode)
        provenance.resumed_at = self._resumed_at
        source.attach(provenance, self.throttle, trainer.state.totals)
        if pending := source.resume(trainer.global_steps):
            self.put("note", f"{pending} batches fetched before the interruption are trained first")
        self.put("phase", "registering at the trajectory API")
        source.register(trainer.global_steps, run.run.batch_size, trainer.checkpoint_root)
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
        return feed

    def _report(self, report: StepReport) -> None:
        self.log.append(report)
        self.put("step", report)
