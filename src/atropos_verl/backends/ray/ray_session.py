"""Ray for one run: a cluster of its own, or one that is there; the task runner on it; and a clean end of both."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray

from atropos_verl.backends.ray.mailbox import make_board
from atropos_verl.config.verl_keys import ClusterRun
from atropos_verl.errors import AtroposVerlError, ServiceError

__all__ = ["RaySession", "set_environment"]

logger = logging.getLogger(__name__)


class RaySession:
    """Context manager. Leaving it ends every actor of the run, and Ray itself where this session started it."""

    def __init__(self, run: ClusterRun) -> None:
        self.run = run
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: dict[str, Any] = {}

    def __enter__(self) -> Self:
        config = self.run.verl
        variables = set_environment(str(config.trainer.device))
        from omegaconf import OmegaConf, open_dict
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        asked = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
        assert isinstance(asked, dict)
        settings: dict[str, Any] = {str(key): value for key, value in asked.items() if value is not None}
        environment = get_ppo_ray_runtime_env(config)
        environment.setdefault("env_vars", {})["TRANSFER_QUEUE_ENABLE"] = "1"
        environment["env_vars"].update(variables)
        own = settings.pop("runtime_env", None) or {}
        environment = OmegaConf.to_container(OmegaConf.merge(environment, own))
        assert isinstance(environment, dict)
        environment = {key: value for key, value in environment.items() if value is not None}
        if "address" not in settings:
            # A cluster of its own, also where RAY_ADDRESS points at one. CPU "GPUs" are counted, not there.
            settings["address"] = "local"
            if config.trainer.device == "cpu":
                settings.setdefault("num_gpus", _accelerators(config))
        else:
            for name in ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard"):
                settings.pop(name, None)  # the cluster's own; Ray refuses them when attaching
        # Ray says with every cluster of its own that it is protected by a token, which is as it should be.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        try:
            ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING, **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServiceError(f"Ray: {error}", "ray") from error
        with open_dict(config):
            config.transfer_queue.enable = True
        self._board = make_board()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ray.shutdown()
        if self._thread is not None:
            self._thread.join(10.0)

    def start_runner(self) -> None:
        """verl's ``run_ppo`` with our task runner, in a thread of its own: the main thread keeps Ctrl-C."""
        from verl.trainer.main_ppo import run_ppo

        from atropos_verl.backends.ray.task_runner import runner_class

        bound = runner_class(self._board)

        def run() -> None:
            try:
                run_ppo(self.run.verl, bound)
            except BaseException as error:  # noqa: BLE001 - raised in the main thread, by result()
                self._error = error
            finally:
                self._done.set()

        self._thread = threading.Thread(target=run, name="run-ppo", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> bool:
        """Wait at most that long for the task runner; True when it has ended."""
        return self._done.wait(seconds)

    @property
    def has_ended(self) -> bool:
        """The task runner has returned or failed."""
        return self._done.is_set()

    def take_events(self) -> list[tuple[str, Any]]:
        """What the task runner said since the last call."""
        events: list[tuple[str, Any]] = ray.get(self._board.take.remote())
        for kind, content in events:
            if kind == "result":
                self._result = content
        return [event for event in events if event[0] != "result"]

    def raise_flag(self, name: str) -> None:
        ray.get(self._board.raise_flag.remote(name))

    def result(self, explain: Callable[[BaseException], BaseException]) -> dict[str, Any]:
        """The run's figures. Raises what ended the task runner, as ``explain`` sees it."""
        if self._error is None:
            return self._result
        error = self._error
        cause = getattr(error, "cause", None)
        logger.error("the task runner failed: %s", error)
        best = explain(cause if isinstance(cause, AtroposVerlError) else error)
        if isinstance(best, AtroposVerlError):
            raise best
        last = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        log = self.run.run_dir / "logs"
        raise ServiceError(
            f"verl's task runner failed: {last}\n"
            f"the whole traceback is in {log / 'command.log'}; what went before it in {log / 'task_runner.log'}",
            "task runner",
        ) from error


def set_environment(device: str) -> dict[str, str]:
    """Variables of every process of the run, this one included. Before its first import of verl."""
    from atropos_verl.verl_plugin import ray_environment

    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "VERL_LOGGING_LEVEL": "WARN",  # below it, verl 0.9.1's logger.info(..., flush=True) raises (separate_async)
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    environment |= ray_environment(device)
    os.environ.update(environment)
    return environment


def _accelerators(config: Any) -> int:
    """Placement bundles that verl will ask for: the trainer's, and those of replicas of their own."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    own = rollout.nnodes * rollout.n_gpus_per_node if trainer.v1.trainer_mode == "separate_async" else 0
    return int(trainer.nnodes * trainer.n_gpus_per_node + own)
