"""The launch command: settings, plan, supervisor, exit code. Imports neither torch nor verl."""

from __future__ import annotations

import argparse
import logging
import re
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from atropos_verl.config.composition import SHIPPED, as_yaml, gateway_key, help_text, key_of, load_launch, plain
from atropos_verl.config.launch_schema import LaunchConfig, describe_launch
from atropos_verl.config.model_checks import check_gpu, check_usable, read_json
from atropos_verl.config.schema import RunConfig, hide_secrets
from atropos_verl.config.verl_keys import backend_of, compose_run, public, read_run
from atropos_verl.errors import AtroposVerlError, ConfigError, ServiceError
from atropos_verl.http_thread import is_loopback
from atropos_verl.launch.plan import LaunchPlan, check_trackers, make_plan, prepare_run_dir, take_run_dir, url_of
from atropos_verl.launch.probes import free_port
from atropos_verl.launch.supervisor import Supervisor
from atropos_verl.training.extensions import check_extensions

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, config_name: str | None = None) -> int:
    parser = command_parser()
    parser.add_argument("--dry-run", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    try:
        config, launch, verl = load_settings(overrides, options.config_dir, options.config_name, config_name)
        if options.cfg or options.help:
            of_launch = launch.model_dump(mode="json")
            named = (*of_launch["environments"].values(), *of_launch["agents"].values())
            hide_secrets({}, {}, of_launch["trainer_process"], *named)
            values = {**(config.public() if verl is None else public(verl)), **of_launch}
            sys.stdout.write(_help(values) if options.help else as_yaml(values))
            return 0
        plan = build_plan(config, launch, verl)
        if options.dry_run:
            sys.stdout.write(plan.text() + "\n")
            return 0
        if verl is None and launch.starts("trainer"):
            check_gpu(config)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until the supervisor has begun
        with ExitStack() as stack:
            take_run_dir(stack, plan.run_dir, is_launch=True)
            prepare_run_dir(plan)
            return _supervise(plan)
    except (ConfigError, ServiceError) as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2


def command_parser() -> argparse.ArgumentParser:
    """Of the options that every command of a run has beside its ``key=value`` words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-name")
    parser.add_argument("--config-dir", type=Path, default=SHIPPED)
    return parser


def load_settings(
    words: Sequence[str], config_dir: Path, config_name: str | None, default_name: str | None
) -> tuple[RunConfig, LaunchConfig, dict[str, Any] | None]:
    """Compose and validate the settings of a launch: those of the run, in the local backend's keys, of the launch, and
    with backend=ray every composed key, verl's own among them. Raises ``ConfigError`` naming the key."""
    if backend_of(words, config_dir, config_name) == "local":
        return (*load_launch(words, config_dir, config_name or default_name), None)
    # A file need not have the launch's sections, so its words may add what it lacks.
    of_launch = {word for word in words if re.split(r"[.@]", key_of(word))[0] in LaunchConfig.model_fields}
    own = [f"++{word.lstrip('+')}" if word in of_launch else word for word in words if not word.startswith("backend=")]
    composed = compose_run(own, config_dir, config_name)
    verl = plain(composed)
    sections = {key: verl.pop(key) for key in LaunchConfig.model_fields if key in verl}
    launch = LaunchConfig.from_mapping({**sections, "backend": "ray"})
    if launch.trainer_process.nproc > 1:
        raise ConfigError("Ray places the workers: trainer.n_gpus_per_node, trainer.nnodes", "trainer_process.nproc")
    if launch.starts("trainer") and not composed.atropos.gateway.get("api_key"):
        composed.atropos.gateway.api_key = gateway_key(composed.run_dir, launch.starts("environments"))
    return read_run(composed).run, launch, verl


def build_plan(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any] | None = None) -> LaunchPlan:
    """Choose ports, hand addresses and keys over, and list what is started. Raises ``ConfigError``."""
    model_path, prefix = config.resolve_model_path(), "" if verl is None else "actor_rollout_ref."
    if launch.starts("trainer"):
        check_usable(config, model_path, prefix)
        check_trackers(config.trainer.logger if verl is None else verl["trainer"]["logger"])
    check_extensions(config, "" if verl is None else "atropos.")
    own_api = config.atropos.api_url is None and launch.starts("api")
    if not own_api and config.atropos.api_url is None:
        raise ConfigError("give the URL of the API that runs elsewhere (or ATROPOS_API_URL)", "atropos.api_url")
    api_port = _port(launch.api.host, launch.api.port, "api.port") if own_api else 0
    api_url, token = config.atropos.api_url or url_of(launch.api.host, api_port), config.atropos.token
    is_open = config.atropos.server == "upstream" or "--insecure" in launch.api.args
    if own_api and not is_open and (launch.only is None or not is_loopback(launch.api.host)):
        token = token or secrets.token_hex(24)
    gateway_port, probe_url = 0, config.gateway.advertise_url
    if launch.starts("trainer"):
        gateway_port = _port(config.gateway.host, config.gateway.port, "gateway.port")
        probe_url = url_of(config.gateway.host, gateway_port)
    elif launch.starts("environments") and not config.gateway.advertise_url:
        raise ConfigError("give the URL of the gateway that runs elsewhere", "gateway.advertise_url")
    gateway_url = (config.gateway.advertise_url or probe_url or "").rstrip("/")
    if gateway_url.endswith("/v1"):
        raise ConfigError(f"{gateway_url}: leave the /v1 out", "gateway.advertise_url")
    # The trainer runs in the run directory, where a relative path would mean something else.
    tokenizer = config.model.tokenizer_path
    if tokenizer is not None and Path(tokenizer).expanduser().is_dir():
        tokenizer = str(Path(tokenizer).expanduser().absolute())
    filled = config.model_copy(update={"run_dir": str(config.resolve_run_dir())}).with_values(
        model={"path": None if config.model.path is None else str(model_path), "tokenizer_path": tokenizer},
        atropos={"api_url": api_url, "token": token},
        gateway={"port": gateway_port, "advertise_url": gateway_url or None},
    )
    return make_plan(filled, launch, own_api=own_api, probe_url=probe_url, verl=verl)


def _port(host: str, port: int, key: str) -> int:
    """``port``, or a free one for 0. Raises ``ConfigError`` naming ``key`` when it is taken."""
    try:
        return free_port(host, port)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror or error}; choose a free port, or 0 for any"
        raise ConfigError(text, key) from error


def _supervise(plan: LaunchPlan) -> int:
    from atropos_verl.report.console import LaunchView, log_to_file, output_may_close

    log_to_file(plan.run_dir / "logs" / "launcher.log")
    with output_may_close(), LaunchView() as view:
        for note in plan.config.notes:
            view.note(note)
        supervisor = Supervisor(plan, view.note, view)

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # ignored: by nohup
                signal.signal(signum, lambda *_: supervisor.interrupt())
        try:
            code = supervisor.run()
        except KeyboardInterrupt:
            view.note("ended at once")
            code = 130
        except (AtroposVerlError, OSError) as error:
            logger.error("the launch failed", exc_info=error)
            why = [supervisor.diagnosis] if supervisor.diagnosis else []
            sys.stderr.write("\n".join(["", *why, str(error), f"The logs are in {plan.run_dir / 'logs'}", ""]))
            code = 1
        view.note(_closing(plan, code))
    return code


def _closing(plan: LaunchPlan, code: int) -> str:
    summary, _ = read_json(plan.run_dir / "summary.json")
    if code == 0 and summary:
        from atropos_verl.report.console import summary_rows

        figures = (f"{label} {value}" for label, value in summary_rows(summary, ascii_only=False) if label)
        return "\n".join([f"training finished; {plan.run_dir}", *(f"  {figure}" for figure in figures)])
    words = {0: "finished", 130: "interrupted; the same command with this run_dir goes on"}
    return f"{words.get(code, f'ended with code {code}')}; {plan.run_dir}"


def _help(values: Mapping[str, Any]) -> str:
    about = """\
Start and watch everything of a run: trajectory API, trainer with its inference gateway, environments. The
trainer's keys: atropos-verl train --help."""
    examples = (
        "steps=100 environments.demo.copies=2 run_dir=runs/mine",
        "--config-name remote_api atropos.api_url=http://host:8000",
        "backend=ray trainer.total_training_steps=100",
    )
    return help_text("launch", about, examples, describe_launch(), values, " of a launch")
