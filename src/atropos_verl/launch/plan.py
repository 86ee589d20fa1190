"""Configuration → everything that a run starts, as data, to be printed, tested and run by hand; its directory."""

import configparser
import json
import netrc
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any
from urllib.parse import urlsplit

from atropos_verl.config.composition import KEY_FILE
from atropos_verl.config.launch_schema import ApiProcessConfig, EnvironmentConfig, LaunchConfig, check_keys
from atropos_verl.config.schema import ProgramConfig, RunConfig, did_you_mean
from atropos_verl.errors import ConfigError, StorageInUseError
from atropos_verl.http_thread import bracketed, reachable
from atropos_verl.launch.environment_script import import_path
from atropos_verl.launch.environments import (
    CHILD_ENV,
    direct,
    interpreter,
    own_temporary,
    plan_environments,
    secrets_of,
    write_tokenizer,
)
from atropos_verl.launch.evaluation import EVALUATIONS, PlannedEvaluation, plan_evaluations
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.storage import locked, write_atomic

_EVALUATIONS = Path("launch", "evaluations.json")
_LAUNCH_OF = "ATROPOS_VERL_LAUNCH_OF"
"""Variable: the run directory of the launch that started this process."""
_PACKAGES = ("wandb", "mlflow", "swanlab", "clearml", "trackio", "tensorboard")
_TRACKERS = (*_PACKAGES, "console", "file", "rl_insight", "vemlp_wandb", "tracking")
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Where its own server is; since 0.31 the second."""
DISK_FULL_BYTES = 1 << 20
"""With less than this free, a service that died has died of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    run_dir: Path
    config: RunConfig
    """Of the trainer. ``run_dir``, ``atropos.api_url``, ``gateway.port``, ``gateway.advertise_url`` (the gateway as
    environments reach it, without ``/v1``) and keys are filled in."""
    launch: LaunchConfig
    probe_url: str | None
    """The gateway as the supervisor reaches it; None: this launch has nothing to do with a gateway."""
    services: tuple[ServiceSpec, ...]
    evaluations: dict[str, list[PlannedEvaluation]]
    """Label (before, during, after) → the processes of that held-out evaluation."""
    warnings: tuple[str, ...] = ()
    trains_here: bool = False
    """The trainer runs in the process of the supervisor."""

    @property
    def api_url(self) -> str:
        return str(self.config.atropos.api_url)

    @property
    def gateway_url(self) -> str:
        return self.config.gateway.advertise_url or ""

    def describe(self) -> dict[str, Any]:
        """The content of ``plan.json``; keys are left out of single words: quoted, one may look different."""
        hide = self._without_secrets
        return {
            "run_dir": str(self.run_dir),
            "api_url": hide(self.api_url),
            "gateway_url": self.gateway_url,
            "steps": self.config.steps,
            "services": {
                spec.name: {
                    "kind": spec.kind,
                    "command": list(map(hide, spec.command)),
                    "env": {key: hide(value) for key, value in spec.env.items()},
                    "cwd": str(spec.cwd),
                    "log": str(spec.log_path),
                }
                for spec in self.services
            },
            "warnings": list(map(hide, self.warnings)),
        }

    def text(self) -> str:
        """The output of ``--dry-run``: the commands as one would type them, keys left out."""
        plan = self.describe()
        lines = [f"{key:<11} {plan[key]}" for key in ("run_dir", "api_url", "gateway_url")]
        for spec, entry in zip(self.services, plan["services"].values(), strict=True):
            command = shlex.join(["env", *(f"{key}={value}" for key, value in entry["env"].items()), *entry["command"]])
            lines += ["", f"{spec.name} ({spec.kind}; restarts: {spec.restarts}, log {spec.log_path})"]
            lines.append(f"  cd {shlex.quote(str(spec.cwd))} && {command}")
            if spec.kind == "environment":
                for path, text in spec.files.items():
                    lines += [f"  {path}:", indent(self._without_secrets(text.rstrip()), "    ")]
        return "\n".join(lines + [f"\nwarning: {warning}" for warning in plan["warnings"]])

    def _without_secrets(self, text: str) -> str:
        for secret in secrets_of(self.config):
            text = text.replace(secret, "***")
        return text


def make_plan(
    config: RunConfig,
    launch: LaunchConfig,
    *,
    own_api: bool,
    probe_url: str | None,
    verl: Mapping[str, Any] | None = None,
    trains_here: bool = False,
) -> LaunchPlan:
    """The services of a run; ``verl``: every key of a trainer on Ray. Raises as ``plan_environments``."""
    run_dir = config.resolve_run_dir()
    evaluations = plan_evaluations(config, launch, of_training=trains_here)
    if evaluations and not trains_here:
        config = config.with_values(eval={"commands_file": str(run_dir / _EVALUATIONS)})
    warnings = [] if trains_here else check_keys(config, launch, own_api=own_api)
    services: list[ServiceSpec] = []
    if own_api:
        services.append(_api(launch, config, run_dir, "trajectory_api.log" if trains_here else "trajectory_api.1.log"))
    if launch.starts("environments"):
        environments, notes = plan_environments(config, launch, own_api=own_api, of_training=trains_here)
        services += environments
        warnings += notes
    if launch.starts("trainer") and not trains_here:
        services.append(_trainer(launch, config, run_dir, verl))
    return LaunchPlan(
        run_dir=run_dir,
        config=config,
        launch=launch,
        probe_url=probe_url,
        services=tuple(services),
        evaluations=evaluations,
        warnings=tuple(warnings),
        trains_here=trains_here,
    )


def one_environment(config: RunConfig) -> LaunchConfig:
    program = {name: getattr(config.env, name) for name in (*ProgramConfig.model_fields, "startup_timeout")}
    if config.env.script is None and config.env.module is None:
        program["args"] = ("--env.seed", str(config.seed), *config.env.args)
    environment = EnvironmentConfig(**program)
    # Upstream's API comes back knowing nobody, and this process cannot start its trainer anew.
    api = ApiProcessConfig(on_death="stop" if config.atropos.server == "upstream" else "restart")
    return LaunchConfig(environments={"environment": environment}, api=api)


def _api(launch: LaunchConfig, config: RunConfig, run_dir: Path, log: str) -> ServiceSpec:
    settings = launch.api
    port = str(config.atropos.api_url).rsplit(":", 1)[1]
    module: tuple[str, ...] = ("atroposlib.cli.run_api",)
    more: tuple[str, ...] = ()
    env: dict[str, str] = {}
    if config.atropos.server == "embedded":
        data_dir = Path(settings.data_dir).expanduser().absolute() if settings.data_dir else run_dir / "api"
        # The lock of the run directory says that there is one trainer: this one is never an earlier one's rival, not
        # even in a directory that was moved or copied.
        one = ("--second-trainer", "replace") if launch.starts("trainer") else ()
        module, more = ("atropos_verl.cli", "serve-api"), ("--data-dir", str(data_dir), *one, *settings.args)
        # Empty where this API has none: a token meant for another API would only lock the environments out.
        env = {**import_path(), "ATROPOS_API_TOKEN": config.atropos.token or ""}
    return ServiceSpec(
        name="trajectory_api",
        command=(sys.executable, "-m", *module, "--host", settings.host, "--port", port, *more),
        env={**CHILD_ENV, "TMPDIR": str(own_temporary(run_dir)), **env},
        secrets=secrets_of(config),
        cwd=run_dir,
        log_path=run_dir / "logs" / log,
        kind="api",
        restarts=settings.max_restarts if settings.on_death == "restart" else 0,
        startup_timeout=settings.startup_timeout,
    )


def _trainer(launch: LaunchConfig, config: RunConfig, run_dir: Path, verl: Mapping[str, Any] | None) -> ServiceSpec:
    file, settings = run_dir / "launch" / "trainer.yaml", launch.trainer_process
    ranks: tuple[str, ...] = ()
    if settings.nproc > 1:
        ranks = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings.nproc}")
    # The trainer lets these variables win over its file; what the launch decided must hold.
    variables = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ATROPOS_API_URL": config.atropos.api_url,
        "ATROPOS_TIMEOUT": f"{config.atropos.timeout:g}",
        "ATROPOS_API_TOKEN": config.atropos.token,
        "ATROPOS_GATEWAY_KEY": config.gateway.api_key,
    }
    given = {name: value for name, value in variables.items() if value}
    program = ("-m", "atropos_verl.cli", "train", "--config-dir", str(file.parent), "--config-name", file.stem)
    # JSON, which YAML is a superset of.
    text = json.dumps(_trainer_settings(config, verl), indent=1)
    return ServiceSpec(
        name="trainer",
        command=(interpreter(settings.python, "trainer_process.python"), *ranks, *program),
        env={**given, **import_path(), **direct(config), **settings.env},
        files={file: f"{text}\n"},
        secrets=secrets_of(config),
        cwd=run_dir,
        log_path=run_dir / "logs" / "trainer.1.log",
        kind="trainer",
        restarts=settings.max_restarts if settings.on_death == "restart" else 0,
        startup_timeout=settings.startup_timeout,
        # It goes on from the newest checkpoint, whatever the first start was told.
        restart_words=("resume=auto" if verl is None else "trainer.resume_mode=auto",),
    )


def _trainer_settings(config: RunConfig, verl: Mapping[str, Any] | None) -> dict[str, Any]:
    """The trainer's file; environments, and the plan of evaluations, are the launch's."""
    evaluation = {} if config.eval.commands_file is None else config.eval.model_dump(mode="json")
    ours: dict[str, Any] = {"env": {}, "eval": evaluation}
    if verl is None:
        return {**config.model_dump(mode="json"), **ours}
    of_model = {**verl["actor_rollout_ref"]["model"], "path": str(config.resolve_model_path())}
    return {
        **verl,
        "backend": "ray",
        "run_dir": config.run_dir,
        "actor_rollout_ref": {**verl["actor_rollout_ref"], "model": of_model},
        "atropos": {**verl["atropos"], **ours, "gateway": config.gateway.model_dump(mode="json")},
    }


def url_of(host: str, port: int) -> str:
    """The URL at which this machine reaches what listens on ``host``:``port``."""
    return f"http://{bracketed(reachable(host))}:{port}"


def take_run_dir(stack: ExitStack, run_dir: Path, *, is_launch: bool = False) -> None:
    """Until ``stack`` ends no other run or launch writes into ``run_dir``. Raises ``ConfigError``, with who does."""
    launch_lock, who = run_dir / "launch" / "lock", "a launch" if is_launch else "a training run"
    is_its_trainer = not is_launch and os.environ.get(_LAUNCH_OF) == str(run_dir)
    try:
        if is_launch or (launch_lock.exists() and not is_its_trainer):
            stack.enter_context(locked(launch_lock, who))
        lock = stack.enter_context(ExitStack())
        lock.enter_context(locked(run_dir / "lock", who))
        if is_its_trainer:
            return
        if is_launch:
            os.environ[_LAUNCH_OF] = str(run_dir)
            lock.close()  # its trainer takes it
        temporary = own_temporary(run_dir)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(0o700)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
    except StorageInUseError as error:
        raise ConfigError(str(error), "run_dir") from error
    except OSError as error:
        raise unwritable(run_dir, error) from error


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    text = f"cannot write to {run_dir}: {error.strerror or error}"
    return ConfigError(f"{run_dir} is a file" if run_dir.is_file() else text, "run_dir")


def prepare_run_dir(plan: LaunchPlan) -> None:
    """Make the run directory with its private files. Raises ``ConfigError`` when that fails, or the disk is full."""
    run_dir = plan.run_dir
    files = {run_dir / "plan.json": f"{json.dumps(plan.describe(), indent=1)}\n".encode()}
    if plan.launch.starts("trainer") and not plan.launch.starts("environments"):
        files[run_dir / KEY_FILE] = f"{plan.config.gateway.api_key}\n".encode()
    if plan.evaluations:
        files[run_dir / _EVALUATIONS] = EVALUATIONS.dump_json(plan.evaluations, indent=1)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "launch").mkdir(exist_ok=True)
        for path, content in files.items():
            write_atomic(path, content, private=True)
        write_tokenizer(plan.config)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    if (free := shutil.disk_usage(run_dir).free) < DISK_FULL_BYTES:
        raise ConfigError(f"the disk of {run_dir} is full ({free} bytes free)", "run_dir")


def check_trackers(names: Sequence[str]) -> None:
    """What is missing for a tracker is said before anything slow starts. Raises ``ConfigError``."""
    for name in names:
        if name not in _TRACKERS:
            text = f"{name!r} is no tracker of verl: {', '.join(_TRACKERS)}{did_you_mean(name, _TRACKERS)}"
            raise ConfigError(text, "trainer.logger")
        if name in _PACKAGES and find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install {name}", "trainer.logger")
    if "wandb" not in names:
        return
    # What 'wandb offline' left here; its own place for it becomes the run directory, where it would not be found.
    stored, here = configparser.ConfigParser(interpolation=None), Path(os.environ.get("WANDB_DIR") or ".")
    with suppress(configparser.Error, UnicodeError):
        stored.read([here / "wandb" / "settings", here / ".wandb" / "settings"])
        if mode := stored.get("default", "mode", fallback=""):
            os.environ.setdefault("WANDB_MODE", mode)
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared", "run"):
        return
    own, known = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname, dict[str, Any]()
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not has_key and known.keys().isdisjoint([own] if own else _WANDB_HOSTS):
        text = "there is no API key for wandb: run 'wandb login', or set WANDB_API_KEY, or WANDB_MODE=offline"
        raise ConfigError(text, "trainer.logger")
