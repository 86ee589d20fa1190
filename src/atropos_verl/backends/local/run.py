"""One training run in this process. Nothing here imports torch before ``run``."""

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import Listener
from atropos_verl.training.batch_source import BatchSource
from atropos_verl.training.checkpoint_state import saved_step
from atropos_verl.training.step import Evaluations, HeldOut, Progress, keep_trackers_inside
from atropos_verl.types import StepReport


def run(
    config: RunConfig,
    *,
    listener: Listener,
    progress: Progress,
    evaluations: Evaluations | None,
    start_environment: Callable[[], None] | None,
    check_services: Callable[[], None],
    stop_services: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Trains until ``config.steps``; returns the outcome for ``summary.json``, and the held-out scores by label.

    ``listener``: the socket of the gateway, which listens. ``start_environment`` is called once the trainer is
    registered (None: environments run elsewhere), ``check_services`` while waiting (it raises when the run cannot go
    on), ``stop_services`` before the engine ends: requests of an environment would otherwise be waited for."""
    run_dir = config.resolve_run_dir()
    with ExitStack() as stack:
        source = stack.enter_context(closing(BatchSource(config, run_dir)))
        if start_environment is not None:
            # Before torch is imported. An environment of atroposlib may register only after the trainer, and sleeps for
            # 5 s before it asks for a first completion (0.4.0, env_manager): both pass beside that import.
            progress.phase("registering at the trajectory API")
            step = saved_step(run_dir / "checkpoints", config.resume)
            source.resume(step)
            source.register(step, config.batch_size)
            start_environment()
        progress.phase("loading the policy (verl)")
        with paused_collection():
            from atropos_verl.backends.local.trainer import AtroposTrainer
            from atropos_verl.backends.local.worker import import_verl

            import_verl(config)
        on_step = _make_tracker(config, run_dir)
        trainer = AtroposTrainer(config, source=source, gateway_listener=listener)
        stack.callback(trainer.close)
        stack.callback(stop_services)
        if start_environment is None:
            progress.note(f"environments are to use the gateway at {trainer.gateway_url}/v1 (server_type vllm)")
        trainer.resume_from_checkpoint(progress)
        held_out = HeldOut(evaluations, progress, trainer.state.held_out)
        outcome = trainer.fit(progress=progress, check_services=check_services, held_out=held_out, on_step=on_step)
        if config.eval.after:
            held_out.start("after")
            trainer.evaluate("after")
        return outcome, held_out.scores


def _make_tracker(config: RunConfig, run_dir: Path) -> Callable[[StepReport], None] | None:
    """Makes a function that sends a step's figures to verl's ``trainer.logger``; None when that list is empty."""
    if not config.trainer.logger:
        return None
    keep_trackers_inside(run_dir)
    from verl.utils.tracking import Tracking

    from atropos_verl.report.trace_reader import TraceReader, send_rollouts
    from atropos_verl.verl_plugin.shims import let_trackers_fail

    let_trackers_fail()
    names = list(config.trainer.logger)
    try:
        tracking = Tracking(config.trainer.project_name, config.trainer.experiment_name, names, config.public())
    except Exception as error:  # each tracker has its own
        raise ConfigError(f"{', '.join(names)} cannot be started: {error!r}", "trainer.logger") from error
    reader = TraceReader(run_dir)

    def send(report: StepReport) -> None:
        figures = {"loss": report.loss, "policy_version": report.policy_version, **report.metrics}
        tracking.log(data={k: v for k, v in figures.items() if v is not None}, step=report.step)
        send_rollouts(tracking, reader, report.step)

    return send


def serve_rank(config: RunConfig) -> None:
    """Serve rank 0 of torchrun until the run ends."""
    with paused_collection():
        from atropos_verl.backends.local.worker import PolicyWorker, import_verl

        import_verl(config)
    # Until the ranks have met, a signal ends this one at once: nothing here is worth saving.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker = PolicyWorker(config, config.resolve_model_path())
    # From now on rank 0 decides: a Ctrl-C reaches every rank, and rank 0 needs this one to save what was trained. When
    # rank 0 dies without a word the connection breaks, and serve() raises.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    worker.serve()


@contextmanager
def paused_collection() -> Iterator[None]:
    """Switches the collector off for long imports, and afterwards hides from it the million objects that they made:
    looking through them is a quarter of the time of the import, and most of the time that the interpreter needs to end.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()
