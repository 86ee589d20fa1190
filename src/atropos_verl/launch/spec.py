"""Configuration → everything that a launch starts, as data: pure, so a plan can be printed, tested and run by hand."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from atropos_verl.config.launch_schema import LaunchConfig, check_keys
from atropos_verl.config.schema import EnvConfig, EvalConfig, RunConfig
from atropos_verl.launch.environments import CHILD_ENV, EnvironmentPlan, Site, interpreter, plan_environments
from atropos_verl.launch.evaluation import evaluations_text
from atropos_verl.launch.plan import api_spec
from atropos_verl.launch.process import ServiceSpec

__all__ = [
    "Addresses",
    "LaunchPlan",
    "Service",
    "TrainerProgram",
    "evaluations_path",
    "make_plan",
    "trainer_settings_path",
    "trainer_settings_text",
]

Kind = Literal["api", "trainer", "environment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the parts of a run reach each other."""

    api_url: str
    gateway_url: str
    """As environments reach it, without ``/v1``."""
    probe_url: str | None
    """As the launcher reaches it; None: this launch has nothing to do with a gateway."""
    gateway_port: int
    """The trainer binds it; 0 when the trainer is elsewhere."""
    own_api: bool
    """The API is started here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerProgram:
    """What the trainer's interpreter is given."""

    words: tuple[str, ...]
    restart_words: tuple[str, ...]
    """Added when it is started again: go on from the newest checkpoint, whatever the first start was told."""
    settings_file: bool = True
    """It reads ``trainer_settings_path``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One process to start and watch."""

    kind: Kind
    spec: ServiceSpec
    """Its log path is that of the first start; the supervisor numbers them."""
    restarts: int
    """How often it may be restarted in a row; 0: never."""
    startup_timeout: float
    """Seconds."""
    restart_words: tuple[str, ...] = ()
    """Added to its command from the second start on."""
    environment: str = ""
    """Name in ``environments``, which copies share."""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """A whole launch."""

    run_dir: Path
    config: RunConfig
    """Of the trainer, addresses and keys filled in."""
    launch: LaunchConfig
    addresses: Addresses
    services: tuple[Service, ...]
    """In the order of starting."""
    warnings: tuple[str, ...] = ()
    model_name: str = ""
    settings_file: bool = True
    """The trainer reads ``trainer_settings_path``."""
    evaluations: str | None = None
    """Content of ``evaluations_path``; None: no held-out evaluation."""

    def of_kind(self, kind: Kind) -> list[Service]:
        return [service for service in self.services if service.kind == kind]

    def describe(self) -> dict[str, Any]:
        """For ``plan.json``: every command with its directory and the variables it is given."""
        return {
            "run_dir": str(self.run_dir),
            "api_url": self.addresses.api_url,
            "gateway_url": self.addresses.gateway_url,
            "steps": self.config.steps,
            "services": {service.name: _described(service) for service in self.services},
            "warnings": list(self.warnings),
        }

    def text(self) -> str:
        """For ``--dry-run``: the commands as one would type them, keys left out."""
        lines = [f"run directory      {self.run_dir}", f"trajectory API     {self.addresses.api_url}"]
        lines.append(f"inference gateway  {self.addresses.gateway_url}")
        for service in self.services:
            variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in service.spec.env.items())
            lines += ["", f"{service.name} ({service.kind}; restarts: {service.restarts}, log {service.spec.log_path})"]
            lines.append(f"  cd {shlex.quote(str(service.spec.cwd))} && {variables} {shlex.join(service.spec.command)}")
        text = "\n".join(lines)
        for secret in (self.config.gateway.api_key, self.config.atropos.token):
            text = text.replace(secret, "***") if secret and len(secret) > 3 else text
        return "\n".join([text, "", *(f"warning: {warning}" for warning in self.warnings)]).rstrip()


def make_plan(
    config: RunConfig,
    launch: LaunchConfig,
    *,
    run_dir: Path,
    model_path: Path,
    addresses: Addresses,
    program: Callable[[RunConfig], TrainerProgram] | None = None,
) -> LaunchPlan:
    """The services of a run.

    Args:
        config: with ``atropos.api_url``, ``gateway.port`` and ``gateway.api_key`` as they will be.
        program: the trainer's command for the final configuration; None: the local backend's.

    Raises:
        ConfigError: an environment's script does not exist; group sizes or allocations do not fit the batch size.
    """
    site = Site(run_dir=run_dir, model_path=model_path, api_url=addresses.api_url, gateway_url=addresses.gateway_url)
    evaluations = evaluations_text(config, launch, site)
    if evaluations is not None:
        file = str(evaluations_path(run_dir))
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"commands_file": file})})
    services: list[Service] = []
    if addresses.own_api:
        services.append(_api(launch, config, run_dir, addresses))
    environments = EnvironmentPlan(services=(), warnings=())
    if launch.starts("environments"):
        environments = plan_environments(config, launch, site=site, own_api=addresses.own_api)
        services += [
            Service(
                kind="environment",
                spec=item.spec,
                restarts=item.settings.max_restarts if item.settings.restart == "always" else 0,
                startup_timeout=item.settings.startup_timeout,
                environment=item.environment,
            )
            for item in environments.services
        ]
    if launch.starts("trainer"):
        trainer = program(config) if program else _local_program(launch, run_dir)
        services.append(_trainer(launch, config, run_dir, addresses, trainer))
    return LaunchPlan(
        run_dir=run_dir,
        config=config,
        launch=launch,
        addresses=addresses,
        services=tuple(services),
        warnings=(*check_keys(config, launch, own_api=addresses.own_api), *environments.warnings),
        model_name=str(model_path),
        settings_file=program is None,
        evaluations=evaluations,
    )


def trainer_settings_path(run_dir: Path) -> Path:
    """The file that holds every setting of the trainer. Keys are in it, so it is private (0600)."""
    return run_dir / "launch" / "trainer.yaml"


def evaluations_path(run_dir: Path) -> Path:
    """The file that tells the trainer which evaluations to run; private as well."""
    return run_dir / "launch" / "evaluations.json"


def _api(launch: LaunchConfig, config: RunConfig, run_dir: Path, addresses: Addresses) -> Service:
    settings = launch.api
    port = int(addresses.api_url.rsplit(":", 1)[1])
    if config.atropos.server == "upstream":
        spec = replace(api_spec(run_dir, settings.host, port), log_path=run_dir / "logs" / "trajectory_api.1.log")
    else:
        data_dir = Path(settings.data_dir).expanduser().absolute() if settings.data_dir else run_dir / "api"
        command = (sys.executable, "-m", "atropos_verl.cli", "serve-api", "--host", settings.host, "--port", str(port))
        token = {"ATROPOS_API_TOKEN": config.atropos.token} if config.atropos.token else {}
        spec = ServiceSpec(
            name="trajectory_api",
            command=(*command, "--data-dir", str(data_dir), *settings.args),
            env={**CHILD_ENV, **_import_path(), **token},
            cwd=run_dir,
            log_path=run_dir / "logs" / "trajectory_api.1.log",
        )
    restarts = settings.max_restarts if settings.on_death == "restart" else 0
    return Service(kind="api", spec=spec, restarts=restarts, startup_timeout=settings.startup_timeout)


def _local_program(launch: LaunchConfig, run_dir: Path) -> TrainerProgram:
    file = trainer_settings_path(run_dir)
    module = ("-m", "atropos_verl.cli", "train", "--config-dir", str(file.parent), "--config-name", file.stem)
    nproc = launch.trainer_process.nproc
    ranks = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}") if nproc > 1 else ()
    return TrainerProgram(words=(*ranks, *module), restart_words=("resume=auto",))


def _trainer(
    launch: LaunchConfig, config: RunConfig, run_dir: Path, addresses: Addresses, program: TrainerProgram
) -> Service:
    settings = launch.trainer_process
    python = interpreter(settings.python, "trainer_process.python")
    # The trainer lets these variables win over its file; what the launcher decided must hold.
    variables = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "ATROPOS_API_URL": addresses.api_url}
    variables["ATROPOS_TIMEOUT"] = f"{config.atropos.timeout:g}"
    if config.atropos.token:
        variables["ATROPOS_API_TOKEN"] = config.atropos.token
    if config.gateway.api_key:
        variables["ATROPOS_GATEWAY_KEY"] = config.gateway.api_key
    spec = ServiceSpec(
        name="trainer",
        command=(python, *program.words),
        env={**variables, **_import_path(), **settings.env},
        cwd=run_dir,
        log_path=run_dir / "logs" / "trainer.1.log",
    )
    restarts = settings.max_restarts if settings.on_death == "restart" else 0
    return Service(
        kind="trainer",
        spec=spec,
        restarts=restarts,
        startup_timeout=settings.startup_timeout,
        restart_words=program.restart_words,
    )


def _import_path() -> dict[str, str]:
    """PYTHONPATH with its entries made absolute: the children run in another directory."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if all(Path(entry).is_absolute() for entry in entries):
        return {}
    return {"PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in entries)}


def _described(service: Service) -> dict[str, Any]:
    spec = service.spec
    variables: Mapping[str, str] = spec.env
    return {
        "kind": service.kind,
        "command": list(spec.command),
        "env": dict(variables),
        "cwd": str(spec.cwd),
        "log": str(spec.log_path),
        "restarts": service.restarts,
        "startup_timeout": service.startup_timeout,
        "shell": shlex.join(["env", *(f"{key}={value}" for key, value in variables.items()), *spec.command]),
    }


def trainer_settings_text(config: RunConfig) -> str:
    """The content of ``trainer_settings_path``: JSON, which YAML is a superset of."""
    values = config.model_dump(mode="json")
    values["env"] = EnvConfig().model_dump(mode="json")  # environments are the launcher's
    if config.eval.commands_file is None:
        values["eval"] = EvalConfig().model_dump(mode="json")
    return json.dumps(values, indent=1) + "\n"
