"""One training run on Ray: the command's process starts Ray, shows what the task runner reports, and ends it.

The task runner (verl's ``TaskRunnerV1``) is an actor, perhaps on another machine than the command, that holds trainer,
gateway and trajectory feed. A mailbox, an actor too, is between the two."""

import contextlib
import io
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Self

import ray
from omegaconf import OmegaConf, open_dict
from ray.exceptions import RayActorError

from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY
from atropos_verl.config.verl_keys import RayRun, parameter_sync_step, public, read_run
from atropos_verl.errors import AtroposVerlError, ConfigError, ServiceError
from atropos_verl.report.console import log_to_file
from atropos_verl.report.trace_reader import TraceReader, send_rollouts
from atropos_verl.training.checkpoint_state import mark_best
from atropos_verl.training.step import Evaluations, HeldOut, Progress, StepLog, is_best, keep_trackers_inside, outcome
from atropos_verl.types import StepReport
from atropos_verl.verl_plugin import DROPOUT_VARIABLE, ray_environment
from atropos_verl.verl_plugin.shims import start_ray

logger = logging.getLogger(__name__)

MAILBOX = "atropos_mailbox"
"""Name of the mailbox's actor. Ray keeps the names of each run apart."""
_WAIT_INTERVAL = 0.1
_POLL_SECONDS = 0.2
_STOP_SECONDS = 300.0  # after Ctrl-C: the step on its way, and a checkpoint, are given this long


def set_environment(device: str) -> dict[str, str]:
    """Set and return the variables of every process of the run. Call it before the first import of verl."""
    environment = ray_environment(device)
    os.environ.update(environment)
    return environment | {name: os.environ[name] for name in (LAUNCH_DIRECTORY,) if name in os.environ}


def validate_with_verl(config: Any) -> None:
    """verl's own checks of its configuration. Raises ``ConfigError`` with verl's words."""
    set_environment(str(config.trainer.device))
    # With a handler there already, verl's basicConfig adds none that writes between the lines of the progress.
    logging.getLogger().addHandler(logging.NullHandler())
    from hydra.errors import HydraException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints that all is well
            validate_config(config, need_reference_policy(config), need_critic(config))
    except ModuleNotFoundError as error:  # the rank of LoRA is asked of vLLM itself
        raise ConfigError(f"verl: {error}", "actor_rollout_ref.rollout.name") from error
    except (AssertionError, ValueError, HydraException) as error:
        raise ConfigError(f"verl: {error.__cause__ or error}") from error


def run_on_ray(
    run: RayRun, *, progress: Progress, evaluations: Evaluations | None, check_services: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Train until ``trainer.total_training_steps``: the outcome for ``summary.json``, and held-out scores by label. The
    evaluation before training has been started. ``check_services`` raises when the run cannot go on."""
    progress.phase("starting Ray")
    held_out = HeldOut(evaluations, progress, {})
    with _Session(run, progress, held_out, check_services) as session:
        return session.train(), held_out.scores


class _Session:
    """Watches the task runner, and answers what it asks. Leaving it ends every actor of the run, and its own Ray."""

    def __init__(self, run: RayRun, progress: Progress, held_out: HeldOut, check_services: Callable[[], None]) -> None:
        self._run, self._progress, self._held_out, self._check_services = run, progress, held_out, check_services
        self._checkpoints = Path(str(run.verl.trainer.default_local_dir)).absolute()
        # Not the main thread, which keeps Ctrl-C.
        self._thread = threading.Thread(target=self._run_ppo, name="run-ppo", daemon=True)
        self._end: Future[None] = Future()
        self._result: dict[str, Any] = {}
        self._steps_seen = 0
        self._stop_deadline: float | None = None

    def __enter__(self) -> Self:
        config = self._run.verl
        variables = set_environment(str(config.trainer.device))
        if self._run.run.model.dropout:
            variables[DROPOUT_VARIABLE] = "1"
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
                own = rollout.nnodes * rollout.n_gpus_per_node if self._run.mode == "separate_async" else 0
                settings.setdefault("num_gpus", int(trainer.nnodes * trainer.n_gpus_per_node + own))
        else:
            for name in ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard"):
                settings.pop(name, None)  # the cluster's own; Ray refuses them when attaching
        # Ray says with every cluster of its own that it is protected by a token, which is as it should be.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            start_ray(runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING, **settings)
        except Exception as error:  # a plain one on a machine so loaded that Ray starts too slowly
            raise ServiceError(f"Ray: {error}", "ray") from error
        # Ray takes SIGTERM over and exits at once; the step on its way is to be saved.
        signal.signal(signal.SIGTERM, terminate)
        self._mailbox = ray.remote(num_cpus=0)(Mailbox).options(name=MAILBOX).remote()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        self._thread.join(10.0)

    def _run_ppo(self) -> None:
        """Call verl's ``run_ppo`` with our task runner."""
        try:
            from verl.trainer.main_ppo import run_ppo

            run_ppo(self._run.verl, ray.remote(num_cpus=1)(AtroposTaskRunner))
            self._end.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread, by _outcome()
            self._end.set_exception(error)

    def train(self) -> dict[str, Any]:
        """Wait for the end. Raises what ended the run, once the step on its way is saved."""
        try:
            return self._watch()
        except (KeyboardInterrupt, ServiceError):
            if self._steps_seen and not self._end.done():
                self._progress.note("ending: what was trained is saved first (Ctrl-C: at once)")
                self._stop_deadline = time.monotonic() + _STOP_SECONDS
                self._raise_flag("stop")
                self._watch()
            raise

    def _watch(self) -> dict[str, Any]:
        """Until the task runner has ended. Raises what ended it, or the service that died."""
        while True:
            has_ended = bool(wait([self._end], _POLL_SECONDS).done)
            with contextlib.suppress(RayActorError):  # without its mailbox the task runner ends as well
                for kind, content in ray.get(self._mailbox.take.remote()):
                    self._handle(kind, content)
            if has_ended:
                return self._outcome()
            if self._stop_deadline is None:
                self._check_services()
            elif time.monotonic() > self._stop_deadline:
                raise KeyboardInterrupt

    def _raise_flag(self, name: str, content: Any = True) -> None:
        ray.get(self._mailbox.raise_flag.remote(name, content))

    def _handle(self, kind: str, content: Any) -> None:
        if kind == "result":
            self._result = content
        elif kind == "phase":
            self._progress.phase(content)
        elif kind in ("note", "saved"):
            self._progress.note(content)
        elif kind == "step":
            self._steps_seen += 1
            self._progress.step(content)
            self._progress.phase("rollout: waiting for a batch")
        elif kind == "gateway":
            url, scores = content
            self._held_out.scores |= scores
            if self._run.run.is_attached:
                self._progress.note(f"environments are to use the gateway at {url}/v1 (server_type vllm)")
            self._held_out.finish("before")
            self._raise_flag("train", self._held_out.scores)
        elif kind == "evaluate":
            figures = self._held_out.finish(content) if self._held_out.start(content) else {}
            self._raise_flag(f"evaluated {content}", figures)
        elif kind == "trained":
            if not content and self._run.settings.eval.after:
                self._held_out.start("after")
                self._held_out.finish("after")
                if self._run.run.eval.keep_best and is_best(self._held_out.scores, "after"):
                    mark_best(self._checkpoints, self._run.run.steps)
            self._progress.phase("ending")
            self._raise_flag("end")

    def _outcome(self) -> dict[str, Any]:
        """The run's figures. Raises what ended the task runner, or the service whose end explains it."""
        if (error := self._end.exception()) is None:
            return self._result
        logger.error("the task runner failed: %s", error)
        time.sleep(0.5)
        self._check_services()  # a service that is gone for good explains a failure better than what it caused
        cause = getattr(error, "cause", None)
        if isinstance(cause, AtroposVerlError):
            raise cause
        if isinstance(error, RayActorError):  # nothing is in the logs of a process that was killed
            found = re.search(r"class_name: (\w+)", str(error))
            text = f"the process of Ray's actor {found[1] if found else '?'} was killed. (The kernel kills one when "
            text += "memory runs out.)"
        else:
            text = f"verl's task runner failed: {(str(error).strip() or repr(error)).splitlines()[-1]}"
        log = self._run.run_dir / "logs"
        where = f"its output until then is in {log / 'task_runner.log'}, the whole traceback in {log / 'command.log'}"
        raise ServiceError(f"{text}\n{where}", "task runner") from error


def _given(config: Any, resolve: bool = True) -> dict[str, Any]:
    """The entries of a configuration that are not None, as plain values."""
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if value is not None}


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

        from atropos_verl.verl_plugin.shims import let_trackers_fail

        let_trackers_fail()
        with open_dict(config):
            config.transfer_queue.enable = True
            # verl hands its configuration to the user's trackers. What needs these is made of ``run``.
            config.atropos = public(config)["atropos"]
        OmegaConf.resolve(config)
        self.config = config
        self._mailbox = ray.get_actor(MAILBOX)
        with contextlib.ExitStack() as self.stack:  # what is started registers its end here, in order
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

        self.put("phase", "loading the policy (verl)")
        self.trainer = trainer = MODES[self.cluster.mode](self.config, lambda text: self.put("note", text))
        trainer.init()
        self.stack.callback(lambda: getattr(trainer, "logger", None) and trainer.logger.finish(exit_code=0))
        if trainer.global_steps:
            self.put("note", f"resumed at step {trainer.global_steps} from {trainer.checkpoint_root}")
        llm_client = trainer.get_llm_client()
        self._start_services(llm_client)
        self.log = StepLog(self.cluster.run_dir, trainer.global_steps)
        self.reader = TraceReader(self.cluster.run_dir)
        trainer.on_report = self._report
        trainer.on_stop = lambda: self.flag("stop") is not None
        trainer.on_evaluate = self._evaluate
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
        from atropos_verl.backends.ray.feed import TrajectoryFeed, TransferQueueStore
        from atropos_verl.backends.ray.gateway import ClusterGateway, embedding_rows
        from atropos_verl.gateway.sessions import SessionStore
        from atropos_verl.provenance.ledger import Ledger
        from atropos_verl.training.batch_source import BatchSource
        from atropos_verl.training.samples import sample_settings
        from atropos_verl.training.staleness import BatchProvenance, make_throttle

        self.put("phase", "starting the inference gateway")
        config, run_dir, trainer = self.cluster.run, self.cluster.run_dir, self.trainer
        ledger = Ledger(config.off_policy.ledger_bytes)
        self.stack.callback(ledger.close)
        throttle = make_throttle(config.off_policy, ledger, config.batch_size, parameter_sync_step(self.config))
        self.source = source = BatchSource(config, run_dir)
        self.stack.callback(source.close)
        settings = sample_settings(config, embedding_rows(self.config.actor_rollout_ref.model))
        provenance = BatchProvenance(config.off_policy, ledger, settings, trainer.tokenizer)
        source.attach(provenance, throttle, trainer.state.totals)
        source.go_on(trainer.global_steps, trainer.global_steps, trainer.note)
        sessions = SessionStore(run_dir / "gateway", source.trace.session)
        self.stack.callback(sessions.close)
        own: dict[str, Any] = {"ledger": ledger, "throttle": throttle, "sessions": sessions}
        own |= {"on_request": source.trace.request, "host": config.gateway.host, "port": config.gateway.port}
        self.gateway = ClusterGateway(llm_client, trainer.tokenizer, **own, **config.gateway.for_app())
        self.gateway.start(timeout=30.0)
        self.stack.callback(self.gateway.stop)
        self.gateway.evaluated.pin()
        self.put("gateway", (config.gateway.advertise_url or self.gateway.url, trainer.state.held_out))
        self.put("phase", "registering at the trajectory API")
        source.register(trainer.global_steps, config.batch_size, trainer.checkpoint_root)
        correction = self.config.algorithm.rollout_correction
        feed = TrajectoryFeed(
            source,
            TransferQueueStore(),
            settings,
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
