"""The training command: settings, the processes around the trainer, the trainer in this process, exit code."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from atropos_verl.config.composition import KEY_FILE, as_yaml, gateway_key, load_config, train_help
from atropos_verl.config.launch_schema import LaunchConfig, note_of_unused_keys
from atropos_verl.config.model_checks import check_gpu, check_usable, read_json
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import RayRun, backend_of, compose_run, notes_for_model, public, ray_help, read_run
from atropos_verl.errors import AtroposTimeoutError, AtroposVerlError, ConfigError, ServiceError
from atropos_verl.http_thread import listen
from atropos_verl.launch.environments import direct, own_temporary, write_tokenizer
from atropos_verl.launch.evaluation import EVALUATIONS, EvaluationProcesses
from atropos_verl.launch.launch import command_parser
from atropos_verl.launch.orphan_reaper import TOKEN_VARIABLE
from atropos_verl.launch.plan import (
    LaunchPlan,
    check_trackers,
    make_plan,
    one_environment,
    take_run_dir,
    unwritable,
    url_of,
)
from atropos_verl.launch.probes import free_port
from atropos_verl.launch.process import ended_with_this_process
from atropos_verl.launch.supervisor import Supervisor
from atropos_verl.protocol.client import make_client
from atropos_verl.report.console import ProgressReporter, log_to_file, output_may_close
from atropos_verl.server.store import STORE_FILE
from atropos_verl.storage import write_atomic
from atropos_verl.training.checkpoint_state import TRACKER, find_checkpoint, saved_step
from atropos_verl.training.extensions import check_extensions
from atropos_verl.training.step import write_summary
from atropos_verl.verl_plugin import own_rank

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"


def main(argv: Sequence[str] | None = None, config_name: str | None = None) -> int:
    """Train with ``backend=local`` (whose file is ``config_name``) or ``backend=ray``; returns the exit code."""
    options, words = command_parser().parse_known_args(argv)
    overrides = [word for word in words if not word.startswith("backend=")]
    where: tuple[Path, str | None] = (options.config_dir, options.config_name)
    train: Callable[[], int]
    try:
        if backend_of(words, *where) == "ray":
            run = read_run(compose_run(overrides, *where))
            values, help_of, train = public(run.verl), ray_help, partial(_train_on_ray, run)
        else:
            config = load_config(overrides, options.config_dir, options.config_name or config_name)
            # Threads that wait for work sleep instead of spinning: with an environment on the other core a training
            # step of the demo took 5 s spinning and 0.4 s sleeping. OpenMP reads it when torch is imported.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            values, help_of = config.public(), train_help
            train = partial(_train_locally if own_rank()[0] == 0 else _serve_rank, config)
    except ConfigError as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2
    if options.help or options.cfg:
        sys.stdout.write(help_of(values) if options.help else as_yaml(values))
        return 0
    return _exit_code_of(train)


def _exit_code_of(run: Callable[[], int]) -> int:
    """Run a command; an exception becomes a message and an exit code. From here on ``kill`` and a terminal that closes
    end the process as Ctrl-C does: every ``finally`` runs, and so the children end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup, and a shell for what is in its background, want it
            signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    with output_may_close():
        try:
            return run()
        except (KeyboardInterrupt, AtroposVerlError, OSError) as error:
            code, text = 1, str(error)
            if isinstance(error, KeyboardInterrupt):
                code, text = 130, "interrupted"
            elif isinstance(error, ConfigError):
                code, text = 2, f"CONFIGURATION ERROR: {error}"
            elif logging.getLogger().handlers:  # without one, logging would print a traceback before the message
                logger.error("the run failed", exc_info=error)
            start = "" if code == 2 else "\n"  # a wrong configuration is the first that is said
            sys.stderr.write(start + "\n".join([text, *getattr(error, "__notes__", [])]) + "\n")
            return code


def _interrupt_again(ignored: Any) -> None:
    """Python drops an exception in a finaliser, and with it Ctrl-C or ``kill``."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


class TrainingServices:
    """Trajectory API, environment and held-out evaluations of a trainer in this process. With ``atropos.api_url`` they
    are somebody else's: the API is contacted and watched, and evaluations are a launch's. The backend puts ``prefix``
    before its keys. Raises ``ConfigError`` when the environment cannot be started."""

    def __init__(self, config: RunConfig, gateway_port: int, *, is_resumed: bool = False, prefix: str = "") -> None:
        self.run_dir = config.resolve_run_dir()
        if not config.gateway.api_key:
            key = gateway_key(self.run_dir, starts_environments=not config.is_attached)
            config = config.with_values(gateway={"api_key": key})
        self.config = config
        self.evaluations: EvaluationProcesses | None = None
        self._evaluates_before = config.eval.before and not is_resumed
        self._prefix = prefix
        self._supervisor: Supervisor | None = None
        self._plan: LaunchPlan | None = None
        url = url_of(config.gateway.host, gateway_port)
        filled = config.with_values(gateway={"advertise_url": config.gateway.advertise_url or url})
        if not config.is_attached:
            # Made anew in each run: a token meant for another API is none of this one's. Upstream's asks for none.
            token = None if config.atropos.server == "upstream" else secrets.token_hex(24)
            filled = filled.with_values(atropos={"api_url": url_of(_HOST, free_port(_HOST)), "token": token})
            os.environ.update(direct(filled))
            self._plan = make_plan(filled, one_environment(config), own_api=True, probe_url=url, trains_here=True)
        elif TOKEN_VARIABLE not in os.environ:  # else a launch watches
            trainer = LaunchConfig(only=("trainer",))
            self._plan = make_plan(filled, trainer, own_api=False, probe_url=url, trains_here=True)

    def contact_api(self, progress: ProgressReporter) -> None:
        """Ask the user's, before a file is made or torch imported: is there one at all? Raises ``AtroposAPIError``."""
        if self.config.is_attached:
            url = str(self.config.atropos.api_url)
            logging.getLogger().addHandler(logging.NullHandler())  # of the tries; there is no log yet
            progress.phase(f"contacting the trajectory API at {url}")
            with make_client(self.config, url) as client:
                client.check()

    def start_api(self, progress: ProgressReporter) -> RunConfig:
        """Start the API, or begin to watch the user's; the settings with its URL. Raises ``ServiceError``."""
        self._progress = progress
        plan, settings = self._plan, self.config.eval
        evaluations = {} if plan is None else plan.evaluations
        if plan is not None:
            self._supervisor = Supervisor(plan, progress.note)
        if self.config.is_attached:
            if (file := settings.commands_file) is not None:
                try:
                    evaluations = EVALUATIONS.validate_json(Path(file).read_bytes())
                except (OSError, ValueError) as error:
                    raise ConfigError(f"cannot read {file}: {error}", "eval.commands_file") from error
            if self._supervisor is not None:  # else a launch has handed the key over
                place = self.run_dir / KEY_FILE
                write_atomic(place, f"{self.config.gateway.api_key}\n", private=True)
                progress.note(f"environments are to send the gateway's key, in {place} (or set gateway.api_key)")
                self._supervisor.start()
            if note := note_of_unused_keys(self.config, self._prefix):
                progress.note(note)
        else:
            assert plan is not None and self._supervisor is not None
            progress.phase("starting the trajectory API")
            data_dir = self.run_dir / "api"
            if self.config.resume == "disable" and (data_dir / STORE_FILE).is_file():
                logger.info("resume=disable: the state of an earlier API in %s is removed", data_dir)
                shutil.rmtree(data_dir)
            write_tokenizer(plan.config)
            self._supervisor.start_api()
        if evaluations:
            self.evaluations = EvaluationProcesses(
                evaluations, self.run_dir, timeout=settings.timeout, note=progress.note, check=self.check
            )
        if self.config.is_attached:
            self._evaluate_before()
        started = (self.config if plan is None else plan.config).atropos
        return self.config.with_values(atropos={"api_url": started.api_url, "token": started.token})

    def start_environment(self) -> None:
        """Start the environment, which waits by itself for gateway and trainer, and the evaluation before training."""
        assert self._supervisor is not None
        self._progress.phase("starting the environment")
        self._supervisor.start()
        self._evaluate_before()

    def _evaluate_before(self) -> None:
        if self.evaluations is not None and self._evaluates_before:
            self.evaluations.start_evaluation("before")

    @contextmanager
    def running(self, progress: ProgressReporter) -> Iterator[RunConfig]:
        """Gives what ``start_api`` does, and ends every process. An error that says only that no batch came is replaced
        by one that says why."""
        try:
            yield self.start_api(progress)
        except AtroposTimeoutError as error:
            self.stop()
            if self._supervisor is None or not self._supervisor.diagnosis:
                raise
            raise ServiceError(self._supervisor.diagnosis) from error
        finally:
            self.stop()

    def check(self) -> None:
        """Raise what ends the run: a service that it cannot do without is gone for good."""
        if self._supervisor is not None:
            self._supervisor.check()

    def stop(self) -> None:
        """End every process of the run. Safe at any time, and again."""
        for part in (self.evaluations, self._supervisor):
            if part is not None:
                part.stop()


def _train_locally(config: RunConfig) -> int:
    from atropos_verl.backends.local.run import run

    started = time.monotonic()
    run_dir = config.resolve_run_dir()
    config = config.model_copy(update={"run_dir": str(run_dir)})
    # Everything that can be known to be wrong is, before a file is made, a process started or torch imported.
    check_usable(config, config.resolve_model_path())
    check_gpu(config)
    check_extensions(config)
    check_trackers(config.trainer.logger)
    checkpoints, progress = run_dir / "checkpoints", ProgressReporter(total_steps=config.steps)
    is_trained = (step := saved_step(checkpoints, config.resume)) >= config.steps
    if is_trained and (read_json(run_dir / "summary.json")[0].get("steps") or -1) >= step:
        progress.note(f"{run_dir} is complete at step {step}; raise steps= or choose another run_dir")
        return 0
    # The gateway comes up only when the policy is loaded. A port that is taken shall not cost that wait, and an
    # environment that asks for something before is not refused: it waits in this socket.
    advice = "Set gateway.port to a free port, or to 0 to take any."
    with ExitStack() as stack:
        try:
            listener = listen(config.gateway.host, config.gateway.port, "inference gateway", advice)
        except ServiceError as error:
            if TOKEN_VARIABLE in os.environ:  # a launch, which has found it free: it is to start this trainer again
                raise
            raise ConfigError(str(error), "gateway.port") from error
        stack.callback(listener.close)
        services = TrainingServices(config, listener.getsockname()[1], is_resumed=step > 0)
        services.contact_api(progress)
        text = json.dumps(config.public(), indent=2)
        _prepare_run_dir(stack, config, "config.json", text, log="trainer.log", advice="resume=auto")
        # torch makes it in the temporary directory when it is imported; nothing of this backend is compiled.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_temporary(run_dir) / "torchinductor"))
        stack.enter_context(progress)
        start_environment = services.start_environment
        if is_trained:
            progress.note(f"every step of {run_dir} is trained; the end of an earlier command is made up for")
            start_environment = lambda: None  # noqa: E731 - an evaluation is a process of its own
        for note in config.notes:
            progress.note(note)
        attached = stack.enter_context(services.running(progress))
        outcome, held_out = run(
            attached,
            listener=listener,
            progress=progress,
            evaluations=services.evaluations,
            start_environment=None if config.is_attached else start_environment,
            check_services=services.check,
            stop_services=services.stop,
        )
        progress.summary(write_summary(run_dir, outcome, held_out=held_out, seconds=time.monotonic() - started))
    return 0


def _serve_rank(config: RunConfig) -> int:
    from atropos_verl.backends.local.run import serve_rank

    # What all ranks say is in rank 0's log already; on the terminal only what goes wrong here.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)  # libraries give their own loggers lower levels
    # The only handler of the root logger: verl's basicConfig then adds none.
    logging.getLogger().addHandler(handler)
    _quiet_libraries()
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    serve_rank(config)
    return 0


def _train_on_ray(run: RayRun) -> int:
    started = time.monotonic()
    config, verl, run_dir = run.run, run.verl, run.run_dir
    check_usable(config, config.resolve_model_path(), "actor_rollout_ref.")
    check_extensions(config, "atropos.")
    check_trackers(verl.trainer.logger)
    gateway_port = config.gateway.port or free_port(_HOST)
    wanted = verl.trainer.resume_from_path if verl.trainer.resume_mode == "resume_path" else config.resume
    is_resumed = find_checkpoint(Path(str(verl.trainer.default_local_dir)), str(wanted)) is not None
    services = TrainingServices(config, gateway_port, is_resumed=is_resumed, prefix="atropos.")
    progress = ProgressReporter(total_steps=config.steps)
    services.contact_api(progress)
    with ExitStack() as stack:
        advice = "trainer.resume_mode=auto"
        _prepare_run_dir(stack, config, "config.yaml", as_yaml(public(verl)), log="command.log", advice=advice)

        from atropos_verl.backends.ray.run import run_on_ray, validate_with_verl

        validate_with_verl(verl)
        stack.enter_context(progress)
        for note in notes_for_model(verl):
            progress.note(note)
        attached = stack.enter_context(services.running(progress))
        verl.atropos.api_url, verl.atropos.token = attached.atropos.api_url, attached.atropos.token
        gateway = {"port": gateway_port, "api_key": attached.gateway.api_key}
        verl.atropos.gateway = {**run.settings.gateway.model_dump(), **gateway}
        if not run.run.is_attached:
            services.start_environment()
        stack.enter_context(ended_with_this_process())
        outcome, held_out = run_on_ray(
            run, progress=progress, evaluations=services.evaluations, check_services=services.check
        )
        progress.summary(write_summary(run_dir, outcome, held_out=held_out, seconds=time.monotonic() - started))
    return 0


def _prepare_run_dir(stack: ExitStack, config: RunConfig, name: str, settings: str, *, log: str, advice: str) -> None:
    run_dir = config.resolve_run_dir()
    if config.resume == "disable" and any((run_dir / found).exists() for found in ("metrics.jsonl", "checkpoints")):
        raise ConfigError(f"{run_dir} already holds a run; choose another, or {advice}", "run_dir")
    take_run_dir(stack, run_dir)

    @stack.push
    def say_how_to_go_on(_kind: object, error: BaseException | None, _trace: object) -> None:
        tracker, here = run_dir / "checkpoints" / TRACKER, shlex.quote(f"run_dir={run_dir}")
        if error is not None and not isinstance(error, ConfigError) and tracker.exists():
            error.add_note(f"(the same command with {here} {advice} goes on from step {tracker.read_text()})")

    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / name, settings, private=True)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    log_to_file(run_dir / "logs" / log)
    _quiet_libraries()


def _quiet_libraries() -> None:
    logging.captureWarnings(True)
    # torch writes this one deprecation of its own past every handler, onto the terminal.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
