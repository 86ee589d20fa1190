"""One training run on Ray, seen from the command's process: start Ray, show what the task runner reports, end it.

The processes around it belong to the caller, who hands in callables.
"""

import contextlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atropos_verl.config.verl_keys import RayRun
from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.training.step import Evaluations, HeldOut, Progress

_POLL_SECONDS = 0.2
_STOP_SECONDS = 300.0
"""After Ctrl-C: the step on its way, and a checkpoint, are given this long."""


def validate_with_verl(config: Any) -> None:
    """verl's own checks of its configuration. Raises ``ConfigError`` with verl's words."""
    from atropos_verl.backends.ray.task_runner import set_environment

    set_environment(str(config.trainer.device))  # before the first import of verl
    # With a handler there already, verl's basicConfig adds none that writes between the lines of the progress.
    logging.getLogger().addHandler(logging.NullHandler())
    from hydra.errors import HydraException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints that all is well
            validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError, HydraException) as error:
        raise ConfigError(f"verl: {error.__cause__ or error}") from error


def run_on_ray(
    run: RayRun,
    *,
    progress: Progress,
    evaluations: Evaluations | None,
    check_services: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Train until ``trainer.total_training_steps``.

    Args:
        run: with the URL of the API and the port of the gateway.
        evaluations: the one before training has been started.
        check_services: called while waiting; raises when the run cannot go on.

    Returns:
        The outcome for ``summary.json``, and the held-out scores by label.
    """
    from atropos_verl.backends.ray.task_runner import RaySession

    progress.phase("starting Ray")
    held_out = HeldOut(evaluations, progress, {})
    with RaySession(run) as session:
        session.start_runner()
        return _Driver(run, session, progress, held_out, check_services).train(), held_out.scores


@dataclass
class _Driver:
    """Watches the task runner, and answers what it asks."""

    run: RayRun
    session: Any
    progress: Progress
    held_out: HeldOut
    check_services: Callable[[], None]
    steps_seen: int = 0
    stop_deadline: float | None = None

    def train(self) -> dict[str, Any]:
        """Wait for the end. Raises what ended the run, once the step on its way is saved."""
        try:
            return self._watch()
        except (KeyboardInterrupt, ServiceError):
            if self.steps_seen and not self.session.has_ended:
                self.progress.note("ending: the step on its way is finished and saved (Ctrl-C: at once)")
                self.stop_deadline = time.monotonic() + _STOP_SECONDS
                self.session.raise_flag("stop")
                self._watch()
            raise

    def _watch(self) -> dict[str, Any]:
        """Until the task runner has ended. Raises what ended it, or the service that died."""
        while True:
            finished = self.session.poll(_POLL_SECONDS)
            for kind, content in self.session.take_events():
                self._handle(kind, content)
            if finished:
                result: dict[str, Any] = self.session.result(self._explain)
                return result
            if self.stop_deadline is None:
                self.check_services()
            elif time.monotonic() > self.stop_deadline:
                raise KeyboardInterrupt

    def _explain(self, error: BaseException) -> BaseException:
        """A service that is gone for good explains a failure better than the failures it caused."""
        time.sleep(0.5)
        try:
            self.check_services()
        except ServiceError as cause:
            return cause
        return error

    def _handle(self, kind: str, content: Any) -> None:
        if kind == "phase":
            self.progress.phase(content)
        elif kind in ("note", "saved"):
            self.progress.note(content)
        elif kind == "step":
            self.steps_seen += 1
            self.progress.step(content)
            self.progress.phase("rollout: waiting for a batch")
        elif kind == "gateway":
            if self.run.run.is_attached:
                self.progress.note(f"environments are to use the gateway at {content}/v1 (server_type vllm)")
            self.held_out.finish("before")
            self.session.raise_flag("train")
        elif kind == "trained":
            if not content and self.run.settings.eval.after:
                self.held_out.start("after")
                self.held_out.finish("after")
            self.progress.phase("ending")
            self.session.raise_flag("end")
