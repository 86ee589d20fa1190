"""``launch``: configuration → plan → supervisor → exit code. Imports neither torch nor verl.

Exit codes: 0 done; 1 the run failed; 2 the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from atropos_verl.config.composition import SHIPPED, load_launch
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig, describe_launch
from atropos_verl.config.schema import ModelConfig, RunConfig
from atropos_verl.errors import AtroposVerlError, ConfigError, ServiceError
from atropos_verl.launch.readiness import free_port, try_to_listen
from atropos_verl.launch.rundir import prepare_run_dir
from atropos_verl.launch.spec import Addresses, LaunchPlan, make_plan
from atropos_verl.launch.supervisor import Supervisor

if TYPE_CHECKING:
    from atropos_verl.launch.doctor import Subject
    from atropos_verl.launch.launcher_ray import RayLaunch

__all__ = ["build_plan", "load_subject", "main"]

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None, config_dir: Path | None = None, config_name: str | None = None) -> int:
    """Run the launch command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["attach"]:
        return _attach(words[1:])
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-name")
    parser.add_argument("--config-dir", type=Path, default=config_dir or SHIPPED)
    options, overrides = parser.parse_known_args(words)
    if options.help:
        sys.stdout.write(help_text(options.config_dir) + "\n")
        return 0
    try:
        config, launch, ray = _load(overrides, options.config_dir, options.config_name, config_name)
        if options.cfg:
            settings = ray.verl if ray is not None else config.model_dump(mode="json")
            values = {**settings, **launch.model_dump(mode="json")}
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
            return 0
        plan = build_plan(config, launch, ray)
        if options.dry_run:
            sys.stdout.write(plan.text() + "\n")
            return 0
        prepare_run_dir(plan)
    except (ConfigError, ServiceError) as error:
        sys.stderr.write(f"CONFIGURATION ERROR: {error}\n")
        return 2
    return _supervise(plan)


def _load(
    words: Sequence[str], config_dir: Path | None, config_name: str | None, default_name: str | None
) -> tuple[RunConfig, LaunchConfig, RayLaunch | None]:
    from atropos_verl.launch.launcher_ray import backend_of, load_ray_launch

    backend = backend_of(words, config_dir, config_name)
    if backend not in ("local", "ray"):
        raise ConfigError(f"{backend!r} is neither local nor ray", "backend")
    if backend == "local":
        return (*load_launch(words, config_dir, config_name or default_name), None)
    ray = load_ray_launch(words, config_dir or SHIPPED, config_name)
    return ray.config, ray.launch, ray


def _with_token(config: RunConfig, launch: LaunchConfig) -> RunConfig:
    """With a token for an API that listens beyond this machine."""
    public = launch.starts("api") and launch.api.host not in _LOOPBACK and "--insecure" not in launch.api.args
    if not public or config.atropos.api_url is not None or config.atropos.token:
        return config
    return config.model_copy(update={"atropos": config.atropos.model_copy(update={"token": secrets.token_hex(24)})})


def load_subject(words: Sequence[str], config_dir: Path | None, config_name: str | None) -> Subject:
    """What ``doctor`` looks at: the keys of ``train`` and of ``launch``. Raises ``ConfigError``."""
    from atropos_verl.launch.doctor import Subject

    default = "local_demo" if config_dir in (None, SHIPPED) else None
    config, launch, ray = _load(words, config_dir or SHIPPED, config_name, default)
    if config.env.script is not None or config.env.python is not None:  # main_atropos.py's one environment
        one = EnvironmentConfig(script=config.env.script, python=config.env.python, args=config.env.args)
        launch = launch.model_copy(update={"environments": {"environment": one}, "envs": None})
    return Subject(config=config, launch=launch, backend=launch.backend, verl=ray.verl if ray is not None else {})


def build_plan(config: RunConfig, launch: LaunchConfig, ray: RayLaunch | None = None) -> LaunchPlan:
    """Choose ports, hand addresses and keys over, and list what is started. Starts nothing.

    Raises:
        ConfigError: parts that are not started here have no URL; a fixed port is taken; see ``make_plan``.
    """
    from atropos_verl.config.model_checks import check_vocabulary

    config = _with_token(config, launch)
    model_path = config.resolve_model_path()
    check_vocabulary(config, model_path)
    own_api = config.atropos.api_url is None and launch.starts("api")
    if config.atropos.api_url is None and not launch.starts("api"):
        raise ConfigError("give the URL of the API that runs elsewhere (or ATROPOS_API_URL)", "atropos.api_url")
    api_port = _port(launch.api.host, launch.api.port, "api.port") if own_api else 0
    api_url = config.atropos.api_url or f"http://{_reachable(launch.api.host)}:{api_port}"
    gateway_port, probe_url = 0, config.gateway.advertise_url
    if launch.starts("trainer"):
        gateway_port = _port(config.gateway.host, config.gateway.port, "gateway.port")
        probe_url = f"http://{_reachable(config.gateway.host)}:{gateway_port}"
    elif launch.starts("environments") and not config.gateway.advertise_url:
        raise ConfigError("give the URL of the gateway that runs elsewhere", "gateway.advertise_url")
    gateway_url = (config.gateway.advertise_url or probe_url or "").rstrip("/")
    if gateway_url.endswith("/v1"):
        raise ConfigError(f"{gateway_url}: leave the /v1 out", "gateway.advertise_url")
    run_dir = config.resolve_run_dir()
    filled = config.model_copy(
        update={
            "run_dir": str(run_dir),
            "model": _absolute(config, model_path),
            "atropos": config.atropos.model_copy(update={"api_url": api_url}),
            "gateway": config.gateway.model_copy(update={"port": gateway_port, "advertise_url": gateway_url or None}),
        }
    )
    addresses = Addresses(
        api_url=api_url,
        gateway_url=gateway_url,
        probe_url=probe_url,
        gateway_port=gateway_port,
        own_api=own_api,
    )
    program = None if ray is None else lambda final: ray.program(final, model_path)
    return make_plan(filled, launch, run_dir=run_dir, model_path=model_path, addresses=addresses, program=program)


def _absolute(config: RunConfig, model_path: Path) -> ModelConfig:
    """The trainer runs in the run directory, where a relative path would mean something else."""
    tokenizer = config.model.tokenizer_path
    if tokenizer is not None and Path(tokenizer).expanduser().is_dir():
        tokenizer = str(Path(tokenizer).expanduser().absolute())
    path = None if config.model.path is None else str(model_path)
    return config.model.model_copy(update={"path": path, "tokenizer_path": tokenizer})


def _port(host: str, port: int, key: str) -> int:
    """A free port, or ``port`` if it is free. Raises ``ConfigError`` naming ``key`` when it is taken."""
    if port == 0:
        return free_port(host)
    try:
        try_to_listen(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose a free port, or 0 for any", key
        ) from error
    return port


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _supervise(plan: LaunchPlan) -> int:
    from atropos_verl.report.launch_view import LaunchView

    handler = logging.FileHandler(plan.run_dir / "logs" / "launcher.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("atropos_verl").setLevel(logging.INFO)
    with LaunchView() as view:
        supervisor = Supervisor(plan, view)

        def on_signal(signum: int, frame: FrameType | None) -> None:
            del signum, frame
            supervisor.interrupt()

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, on_signal)
        try:
            code = supervisor.run()
        except KeyboardInterrupt:
            view.note("ended at once")
            code = 130
        except (AtroposVerlError, OSError) as error:
            logger.error("the launch failed", exc_info=error)
            sys.stderr.write(f"\n{error}\nThe logs are in {plan.run_dir / 'logs'}\n")
            code = 1
        view.note(_closing(plan, code))
    return code


def _closing(plan: LaunchPlan, code: int) -> str:
    summary = plan.run_dir / "summary.json"
    if code == 0 and summary.is_file():
        values: dict[str, Any] = json.loads(summary.read_text())
        first, last = values.get("reward_first"), values.get("reward_last")
        if first is not None and last is not None:
            before, after = values.get("held_out_before"), values.get("held_out_after")
            held_out = "" if before is None or after is None else f", held-out {before:.3f} → {after:.3f}"
            reward = f"reward {first:.3f} → {last:.3f}{held_out}"
            return f"training finished: {values.get('steps')} steps, {reward}; {plan.run_dir}"
    words = {0: "finished", 130: "interrupted; the same command with this run_dir goes on"}
    return f"{words.get(code, f'ended with code {code}')}; {plan.run_dir}"


def _attach(words: Sequence[str]) -> int:
    from atropos_verl.report.launch_view import attach

    parser = argparse.ArgumentParser(prog="launch attach", description="Watch a launch from another terminal.")
    parser.add_argument("run_dir", type=Path, help="its run directory")
    parser.add_argument("--once", action="store_true", help="show it once")
    options = parser.parse_args(list(words))
    try:
        return attach(options.run_dir, once=options.once)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 0


def help_text(config_dir: Path | None) -> str:
    """What ``--help`` prints: usage, the ready-made configurations, every key of a launch."""
    program = "python recipe/atropos/launch_atropos_verl.py"
    rows = [
        (name, "null" if default is None else json.dumps(default, default=list), text)
        for name, default, text in describe_launch()
    ]
    width = max(len(name) for name, *_ in rows)
    names = sorted(path.stem for path in config_dir.glob("*.yaml")) if config_dir is not None else []
    lines = [
        f"usage: {program} [--config-name NAME] [--config-dir DIR] [--dry-run] [--cfg] [key=value ...]",
        f"       {program} attach RUN_DIR [--once]",
        "",
        "Start and watch everything of a run: trajectory API, trainer with its inference gateway, environments.",
        "",
        "  -h, --help           this text",
        f"  --config-name NAME   one of: {', '.join(names)}" if names else "  --config-name NAME   a YAML file's name",
        "  --config-dir DIR     another config directory",
        "  --dry-run            print the commands and stop",
        "  --cfg                print the composed configuration and stop",
        "",
        "examples:",
        f"  {program}",
        f"  {program} steps=100 environments.demo.copies=2 run_dir=runs/mine",
        f"  {program} --config-name two_environments envs=[words]",
        f"  {program} --config-name remote_api atropos.api_url=http://host:8000",
        f"  {program} backend=ray trainer.total_training_steps=100   (verl's own keys; docs/launcher.md)",
        f"  {program} 'only=[environments]' atropos.api_url=http://a:8000 gateway.advertise_url=http://b:9004",
        "",
        "keys of a launch (default); those of the trainer: python recipe/atropos/main_atropos.py --help",
    ]
    lines += [f"  {name:<{width}}  {text} ({default})" for name, default, text in rows]
    return "\n".join(lines)
