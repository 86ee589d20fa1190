"""The command with ``backend=ray``: configuration, services, Ray, progress, summary, exit code.

Exit codes: 0 done; 1 the run failed; 2 the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_verl.config.verl_keys import ClusterRun, compose_run, ray_help, read_run
from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.launch.exit_codes import exit_code_of

if TYPE_CHECKING:
    from atropos_verl.launch.evaluation import LaunchedEvaluations
    from atropos_verl.launch.services import LocalServices
    from atropos_verl.report.console import ProgressReporter

__all__ = ["main", "validate_with_verl"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_STOP_SECONDS = 300.0
"""After Ctrl-C: the step on its way, and a checkpoint, are given this long."""


def main(argv: Sequence[str] | None = None, config_dir: Path | None = None, config_name: str | None = None) -> int:
    """Run the training command with ``key=value`` words; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-name", default=config_name)
    parser.add_argument("--config-dir", type=Path, default=config_dir)
    options, overrides = parser.parse_known_args(words)
    if options.help:
        sys.stdout.write(ray_help())
        return 0
    try:
        config = compose_run(overrides, options.config_dir, options.config_name)
        run = read_run(config)
    except ConfigError as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2
    if options.cfg:
        from omegaconf import OmegaConf

        sys.stdout.write(OmegaConf.to_yaml(config, resolve=True))
        return 0
    return exit_code_of(lambda: _Command(run).execute())


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


class _Command:
    """One run, from an empty directory to its summary."""

    def __init__(self, run: ClusterRun) -> None:
        self.run = run
        self.started = time.monotonic()
        self.held_out: dict[str, float | None] = {}
        self.services: LocalServices | None = None
        self.evaluations: LocalServices | LaunchedEvaluations | None = None
        self.steps_seen = 0
        self.stop_deadline: float | None = None

    def execute(self) -> int:
        from atropos_verl.report.console import ProgressReporter

        self._prepare()
        with ProgressReporter(total_steps=self.run.run.steps) as progress:
            self.progress = progress
            try:
                self._start_services(progress)
                return self._on_ray(progress)
            finally:
                for part in (self.evaluations, self.services):
                    if part is not None:
                        part.stop()

    def _prepare(self) -> None:
        from omegaconf import OmegaConf

        from atropos_verl.config.model_checks import check_vocabulary
        from atropos_verl.storage import write_atomic

        run_dir = self.run.run_dir
        self.model_path = self.run.run.resolve_model_path()
        check_vocabulary(self.run.run, self.model_path, "actor_rollout_ref.")
        if self.run.verl.trainer.resume_mode == "disable" and (run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"{run_dir} already holds a run; choose another, or trainer.resume_mode=auto", "run_dir")
        try:
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(run_dir / "config.yaml", OmegaConf.to_yaml(self.run.verl, resolve=True), private=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {run_dir}: {error.strerror}", "run_dir") from error
        validate_with_verl(self.run.verl)
        handler = logging.FileHandler(run_dir / "logs" / "command.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        logging.getLogger("atropos_verl").setLevel(logging.INFO)

    def _start_services(self, progress: ProgressReporter) -> None:
        """Trajectory API and environment, or a look at the user's API. The gateway's port is settled here."""
        from omegaconf import open_dict

        verl = self.run.verl
        if self.run.is_attached:
            from atropos_verl.config.launch_schema import note_of_unused_keys
            from atropos_verl.protocol.client import make_client

            assert self.run.settings.api_url is not None
            with make_client(self.run.run, self.run.settings.api_url) as client:
                progress.phase(f"contacting the trajectory API at {self.run.settings.api_url}")
                client.check()
            if note := note_of_unused_keys(self.run.run, prefix="atropos."):
                progress.note(note)
            self._start_launched_evaluations(progress)
            return
        from atropos_verl.launch.plan import env_script
        from atropos_verl.launch.services import LocalServices

        env_script(self.run.run)
        self.services = self.evaluations = services = LocalServices(self.run.run, self.run.run_dir, self.model_path)
        progress.phase("starting the trajectory API")
        url = services.start_api()
        progress.phase("starting the environment")
        services.start_environment()
        if self.run.settings.eval.before and not _has_checkpoint(verl):
            services.start_evaluation("before")
        with open_dict(verl):
            verl.atropos.api_url = url
            verl.atropos.gateway = {**self.run.settings.gateway.model_dump(), "port": services.gateway_port}

    def _start_launched_evaluations(self, progress: ProgressReporter) -> None:
        """A launcher starts environments itself, and leaves the evaluations to the trainer."""
        from atropos_verl.launch.evaluation import LaunchedEvaluations

        settings = self.run.settings.eval
        if settings.commands_file is None:
            return
        path = Path(settings.commands_file)
        self.evaluations = LaunchedEvaluations(path, self.run.run_dir, timeout=settings.timeout, note=progress.note)
        if settings.before and not _has_checkpoint(self.run.verl):
            self.evaluations.start_evaluation("before")

    def _on_ray(self, progress: ProgressReporter) -> int:
        from atropos_verl.backends.ray.task_runner import RaySession

        progress.phase("starting Ray")
        ended_by: BaseException | None = None
        with RaySession(self.run) as session:
            session.start_runner()
            while True:
                try:
                    outcome = self._watch(session, progress)
                    break
                except (KeyboardInterrupt, ServiceError) as error:
                    if not self.steps_seen or ended_by is not None or session.has_ended:
                        raise
                    ended_by = error
                    progress.note("ending: the step on its way is finished and saved (Ctrl-C: at once)")
                    self.stop_deadline = time.monotonic() + _STOP_SECONDS
                    session.raise_flag("stop")
        if ended_by is not None:
            raise ended_by
        self._summarise(outcome, progress)
        return 0

    def _watch(self, session: Any, progress: ProgressReporter) -> dict[str, Any]:
        """Until the task runner has ended. Raises what ended it, or the service that died."""
        while True:
            finished = session.poll(_POLL_SECONDS)
            for kind, content in session.take_events():
                self._handle(kind, content, session, progress)
            if finished:
                result: dict[str, Any] = session.result(self._explain)
                return result
            if self.stop_deadline is None and self.services is not None:
                self.services.check()
            if self.stop_deadline is not None and time.monotonic() > self.stop_deadline:
                raise KeyboardInterrupt

    def _explain(self, error: BaseException) -> BaseException:
        """A service that died this moment explains a failure better than what it caused."""
        if self.services is not None:
            time.sleep(0.5)
            try:
                self.services.check()
            except ServiceError as cause:
                return cause
        return error

    def _handle(self, kind: str, content: Any, session: Any, progress: ProgressReporter) -> None:
        if kind == "phase":
            progress.phase(content)
        elif kind in ("note", "saved"):
            progress.note(content)
        elif kind == "step":
            self.steps_seen += 1
            progress.step(content)
            progress.phase("rollout: waiting for a batch")
        elif kind == "gateway":
            if self.run.is_attached:
                progress.note(f"environments are to use the gateway at {content}/v1 (server_type vllm)")
            self._evaluation("before", progress)
            session.raise_flag("train")
        elif kind == "trained":
            if not content and self.evaluations is not None and self.run.settings.eval.after:
                self.evaluations.start_evaluation("after")
                self._evaluation("after", progress)
            progress.phase("ending")
            session.raise_flag("end")

    def _evaluation(self, label: str, progress: ProgressReporter) -> None:
        from atropos_verl.training.step import held_out_score

        if self.evaluations is None or not self.evaluations.has_evaluation(label):
            return
        progress.phase(f"evaluating on held-out tasks {label} training")
        score = self.held_out[label] = held_out_score(self.evaluations.finish_evaluation(label))
        told = "unknown" if score is None else f"{score:.3f}"
        progress.note(f"held-out mean reward {label} training: {told}")

    def _summarise(self, outcome: dict[str, Any], progress: ProgressReporter) -> None:
        from atropos_verl.training.step import write_summary

        seconds = time.monotonic() - self.started
        progress.summary(write_summary(self.run.run_dir, outcome, held_out=self.held_out, seconds=seconds))


def _has_checkpoint(config: Any) -> bool:
    root = Path(str(config.trainer.default_local_dir))
    return config.trainer.resume_mode != "disable" and (root / "latest_checkpointed_iteration.txt").is_file()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
