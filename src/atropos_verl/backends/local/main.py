"""The training command: configuration, services, trainer, summary, exit code.

Exit codes: 0 done; 1 the run failed (API, a service, diverged, …); 2 the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_verl.config.composition import load_config, train_help
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.exit_codes import exit_code_of
from atropos_verl.launch.startup import gateway_listener, is_rank_zero

if TYPE_CHECKING:
    from atropos_verl.backends.local.trainer import AtroposTrainer
    from atropos_verl.launch.evaluation import LaunchedEvaluations
    from atropos_verl.launch.services import LocalServices
    from atropos_verl.report.console import ProgressReporter
    from atropos_verl.training.batch_source import BatchSource

__all__ = ["main"]

logger = logging.getLogger(__name__)


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
        sys.stdout.write(train_help("python recipe/atropos/main_atropos.py") + "\n")
        return 0
    try:
        config = load_config(overrides, options.config_dir, options.config_name)
    except ConfigError as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2
    if options.cfg:
        sys.stdout.write(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        return 0
    return _run(config)


def _run(config: RunConfig) -> int:
    # Threads that wait for work sleep instead of spinning: with an environment on the other core a training step of
    # the demo took 5 s spinning and 0.4 s sleeping. Read by the OpenMP runtime when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return exit_code_of(lambda: _Run(config).execute() if is_rank_zero() else _serve_rank(config))


@contextmanager
def paused_collection() -> Iterator[None]:
    """For imports that last: no collection meanwhile, and what was made is never looked through afterwards.

    torch, verl and transformers make more than a million objects that live as long as the process. Looking through
    them again and again is a quarter of the time their import takes, and most of the time that the interpreter needs
    to end. Where the collector is off already, nothing changes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _log_to(handler: logging.Handler) -> None:
    # The only handler of the root logger: verl's basicConfig then adds none that writes into the live table.
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    # torch writes this one deprecation of its own past every handler, onto the terminal.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _serve_rank(config: RunConfig) -> int:
    # What all ranks say is in rank 0's log already; on the terminal only what goes wrong here.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)  # libraries give their own loggers lower levels
    _log_to(handler)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    with paused_collection():
        from atropos_verl.backends.local.worker import PolicyWorker, import_verl

        import_verl(config)
    # Until the ranks have met, whoever ends this one ends it at once: nothing here is worth saving.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker = PolicyWorker(config, config.resolve_model_path())
    # From now on rank 0 decides: a Ctrl-C reaches every rank, and rank 0 needs this one to save what was trained. When
    # rank 0 dies without a word the connection breaks, and serve() raises.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    worker.serve()
    return 0


class _Run:
    """One training run from an empty directory to its summary."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run_dir = config.resolve_run_dir()
        self.started = time.monotonic()

    def execute(self) -> int:
        from atropos_verl.report.console import ProgressReporter

        model_path = self._check_what_it_needs()
        with closing(gateway_listener(self.config)) as listener:
            self._prepare_run_dir()
            with ProgressReporter(total_steps=self.config.steps) as progress:
                if (step := self._saved_step()) >= self.config.steps:
                    progress.note(f"{self.run_dir} is complete at step {step}; raise steps= or choose another run_dir")
                    return 0
                if self.config.is_attached:
                    return self._attached(listener, progress)
                from atropos_verl.launch.services import LocalServices

                services = LocalServices(self.config, self.run_dir, model_path, listener.getsockname()[1])
                try:
                    return self._with_services(services, listener, progress)
                finally:
                    services.stop()

    def _check_what_it_needs(self) -> Path:
        """Everything that can be known to be wrong before a file is made, a process started or torch imported."""
        from atropos_verl.config.model_checks import check_vocabulary
        from atropos_verl.launch.plan import env_script
        from atropos_verl.training.checkpoint_state import find_checkpoint

        model_path = self.config.resolve_model_path()
        check_vocabulary(self.config, model_path)
        find_checkpoint(self.run_dir, self.config.resume)
        if not self.config.is_attached:
            env_script(self.config)
        return model_path

    def _attached(self, listener: socket.socket, progress: ProgressReporter) -> int:
        from atropos_verl.config.launch_schema import note_of_unused_keys
        from atropos_verl.protocol.client import make_client

        assert self.config.atropos.api_url is not None
        # First of all, and before torch is imported: is there an API at all?
        with make_client(self.config, self.config.atropos.api_url) as client:
            progress.phase(f"contacting the trajectory API at {self.config.atropos.api_url}")
            client.check()
        evaluations = self._launched_evaluations(progress)
        if note := note_of_unused_keys(self.config):
            progress.note(note)
        try:
            if evaluations is not None and self._evaluates_before():
                evaluations.start_evaluation("before")
            trainer = self._build_trainer(self.config, None, listener, progress)
            try:
                progress.note(f"environments are to use the gateway at {trainer.gateway_url}/v1 (server_type vllm)")
                return self._train(trainer, None, progress, evaluations)
            finally:
                trainer.close()
        finally:
            if evaluations is not None:
                evaluations.stop()

    def _launched_evaluations(self, progress: ProgressReporter) -> LaunchedEvaluations | None:
        from atropos_verl.launch.evaluation import LaunchedEvaluations

        settings = self.config.eval
        if settings.commands_file is None:
            return None
        path = Path(settings.commands_file)
        return LaunchedEvaluations(path, self.run_dir, timeout=settings.timeout, note=progress.note)

    def _with_services(self, services: LocalServices, listener: socket.socket, progress: ProgressReporter) -> int:
        from atropos_verl.training.batch_source import BatchSource

        progress.phase("starting the trajectory API")
        url = services.start_api()
        config = self.config.model_copy(update={"atropos": self.config.atropos.model_copy(update={"api_url": url})})
        with ExitStack() as stack:
            source = stack.enter_context(BatchSource(config, self.run_dir))
            # Before torch is imported: the environment, which waits for it, then starts beside that import.
            progress.phase("registering at the trajectory API")
            step = self._saved_step()
            source.resume(step)
            source.register(step, config.batch_size)
            progress.phase("starting the environment")
            services.start_environment()
            if self._evaluates_before():
                services.start_evaluation("before")
            trainer = self._build_trainer(config, source, listener, progress)
            stack.callback(trainer.close)
            # Before the trainer: what an environment has asked for would otherwise be waited for.
            stack.callback(services.stop)
            return self._train(trainer, services, progress, services)

    def _build_trainer(
        self, config: RunConfig, source: BatchSource | None, listener: socket.socket, progress: ProgressReporter
    ) -> AtroposTrainer:
        progress.phase("loading the policy (verl)")
        with paused_collection():
            from atropos_verl.backends.local.trainer import AtroposTrainer
            from atropos_verl.backends.local.worker import import_verl

            import_verl(config)
        return AtroposTrainer(config, run_dir=self.run_dir, source=source, gateway_listener=listener)

    def _saved_step(self) -> int:
        from atropos_verl.training.checkpoint_state import saved_step

        return saved_step(self.run_dir, self.config.resume)

    def _train(
        self,
        trainer: AtroposTrainer,
        services: LocalServices | None,
        progress: ProgressReporter,
        evaluations: LocalServices | LaunchedEvaluations | None,
    ) -> int:
        from atropos_verl.training.step import HeldOut, write_summary
        from atropos_verl.verl_plugin.tracking import make_tracker

        trainer.resume_from_checkpoint(progress)
        held_out = HeldOut(evaluations, progress, trainer.state.held_out)
        result = trainer.fit(
            progress=progress,
            check_services=None if services is None else services.check,
            before_first_step=lambda: held_out.finish("before"),
            on_step=make_tracker(self.config, self.run_dir),
        )
        if self.config.eval.after:
            held_out.start("after")
            held_out.finish("after")
        seconds = time.monotonic() - self.started
        progress.summary(write_summary(self.run_dir, result, held_out=held_out.scores, seconds=seconds))
        return 0

    def _evaluates_before(self) -> bool:
        from atropos_verl.training.checkpoint_state import find_checkpoint

        return self.config.eval.before and find_checkpoint(self.run_dir, self.config.resume) is None

    def _prepare_run_dir(self) -> None:
        from atropos_verl.storage import write_atomic

        metrics = self.run_dir / "metrics.jsonl"
        if self.config.resume == "disable" and metrics.exists():
            raise ConfigError(f"{self.run_dir} already holds a run; choose another, or resume=auto", "run_dir")
        try:
            (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(
                self.run_dir / "config.json", json.dumps(self.config.model_dump(mode="json"), indent=2), private=True
            )
        except OSError as error:
            raise ConfigError(f"cannot write to {self.run_dir}: {error.strerror}", "run_dir") from error
        handler = logging.FileHandler(self.run_dir / "logs" / "trainer.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log_to(handler)
        logging.getLogger("atropos_verl").setLevel(logging.INFO)
