"""One training run on Ray, seen from the command's process: start Ray, show what the task runner reports, end it."""

import contextlib
import io
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import ray
from omegaconf import OmegaConf
from ray.exceptions import RayActorError

from atropos_verl.backends.ray.task_runner import MAILBOX, AtroposTaskRunner, Mailbox
from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY
from atropos_verl.config.verl_keys import RayRun
from atropos_verl.errors import AtroposVerlError, ConfigError, ServiceError
from atropos_verl.training.checkpoint_state import mark_best
from atropos_verl.training.step import Evaluations, HeldOut, Progress, is_best
from atropos_verl.verl_plugin import DROPOUT_VARIABLE, ray_environment

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_STOP_SECONDS = 300.0
"""After Ctrl-C: the step on its way, and a checkpoint, are given this long."""


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
    run: RayRun,
    *,
    progress: Progress,
    evaluations: Evaluations | None,
    check_services: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Train until ``trainer.total_training_steps``: the outcome for ``summary.json``, and held-out scores by label.

    ``evaluations``: the one before training has been started. ``check_services``: called while waiting; raises when the
    run cannot go on.
    """
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
        self._ended = threading.Event()
        self._error: BaseException | None = None
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
            ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
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
        except BaseException as error:  # noqa: BLE001 - raised in the main thread, by _outcome()
            self._error = error
        finally:
            self._ended.set()

    def train(self) -> dict[str, Any]:
        """Wait for the end. Raises what ended the run, once the step on its way is saved."""
        try:
            return self._watch()
        except (KeyboardInterrupt, ServiceError):
            if self._steps_seen and not self._ended.is_set():
                self._progress.note("ending: the step on its way is finished and saved (Ctrl-C: at once)")
                self._stop_deadline = time.monotonic() + _STOP_SECONDS
                self._raise_flag("stop")
                self._watch()
            raise

    def _watch(self) -> dict[str, Any]:
        """Until the task runner has ended. Raises what ended it, or the service that died."""
        while True:
            has_ended = self._ended.wait(_POLL_SECONDS)
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
            if self._run.run.is_attached:
                self._progress.note(f"environments are to use the gateway at {content}/v1 (server_type vllm)")
            self._held_out.finish("before")
            self._raise_flag("train", self._held_out.scores)
        elif kind == "held_out":
            self._held_out.scores |= content
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
        error = self._error
        if error is None:
            return self._result
        logger.error("the task runner failed: %s", error)
        time.sleep(0.5)
        self._check_services()  # a service that is gone for good explains a failure better than what it caused
        cause = getattr(error, "cause", None)
        if isinstance(cause, AtroposVerlError):
            raise cause
        if isinstance(error, RayActorError):  # nothing is in the logs of a process that was killed
            found = re.search(r"class_name: (\w+)", str(error))
            tracker = self._checkpoints / "latest_checkpointed_iteration.txt"
            saved = f"; the same command goes on from step {tracker.read_text()}" if tracker.exists() else ""
            text = f"the process of Ray's actor {found[1] if found else '?'} was killed{saved}. (The kernel kills one "
            text += "when memory runs out.)"
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
