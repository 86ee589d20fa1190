"""Environments → commands: each one's command line adapted to the run, its share of the batch, its copies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.allocation import allocate, check_groups
from atropos_verl.launch.env_lint import bare_server_config
from atropos_verl.launch.keys import PrivateArguments, option_value, private_arguments, user_arguments
from atropos_verl.launch.plan import demo_env_script
from atropos_verl.launch.process import ServiceSpec

__all__ = [
    "CHILD_ENV",
    "EnvironmentPlan",
    "PlannedEnvironment",
    "Site",
    "evaluation_spec",
    "interpreter",
    "plan_environments",
    "program_of",
]

CHILD_ENV: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # environments do not compute; their thread pools would take the trainer's cores
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEnvironment:
    """One process of an environment."""

    environment: str
    settings: EnvironmentConfig
    spec: ServiceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentPlan:
    services: tuple[PlannedEnvironment, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where an environment finds the rest of the run."""

    run_dir: Path
    model_path: Path
    api_url: str
    gateway_url: str


def plan_environments(config: RunConfig, launch: LaunchConfig, *, site: Site, own_api: bool) -> EnvironmentPlan:
    """The processes of all chosen environments.

    Args:
        own_api: the API is started here; if not, it may be upstream's.

    Raises:
        ConfigError: none is left; a script does not exist; group sizes or allocations do not fit the batch size.
    """
    chosen = launch.chosen
    if not chosen:
        raise ConfigError("no environment to start; name some, or leave environments out of only", "environments")
    embedded = own_api and config.atropos.server == "embedded"
    warnings = list(check_groups(config, launch, embedded=embedded))
    allocations, notes = allocate(config, launch, embedded=embedded)
    warnings += notes
    if config.atropos.token and not embedded:
        warnings.append(_TOKEN)
    services: list[PlannedEnvironment] = []
    for name, settings in chosen.items():
        warnings += _trap_warnings(name, program_of(name, settings), settings)
        for copy in range(1, settings.copies + 1):
            process = name if copy == 1 else f"{name}-{copy}"
            spec = _serve_spec(config, name, settings, process, allocations[name], site)
            services.append(PlannedEnvironment(environment=name, settings=settings, spec=spec))
    names = [service.spec.name for service in services]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two processes would be called {twice[0]}; rename an environment", "environments")
    return EnvironmentPlan(services=tuple(services), warnings=tuple(warnings))


_TOKEN = (
    "environments send the API's token as the password of HTTP Basic authentication, which is all that Atropos's "
    "client can do: our API takes it, one that demands a bearer token refuses them (401 in their logs)"
)


# ---------------------------------------------------------------------- the processes


def _serve_spec(
    config: RunConfig,
    name: str,
    settings: EnvironmentConfig,
    process: str,
    allocation: float | None,
    site: Site,
) -> ServiceSpec:
    ours = {
        **_arguments(config, settings, process, site),
        "--env.total_steps": str(10 * config.steps + 1000),  # the trainer ends the run, not the environment
        "--env.max_batches_offpolicy": str(settings.max_batches_offpolicy or config.max_batches_offpolicy),
        "--env.inference_weight": f"{settings.weight / settings.copies:g}",
        "--slurm": "false",
    }
    if allocation is not None:
        ours["--env.min_batch_allocation"] = repr(allocation)
    private = _private(config, name, settings, site, process, api_url=site.api_url)
    token = {"ATROPOS_API_TOKEN": config.atropos.token} if config.atropos.token else {}
    return _spec(name, settings, site, process, ("serve", *_merged(ours, settings, private)), private, token)


def evaluation_spec(
    config: RunConfig, name: str, settings: EnvironmentConfig, *, site: Site, label: str
) -> tuple[ServiceSpec, Path]:
    """``ENV evaluate`` of one environment, and the file it writes its metrics to."""
    directory = site.run_dir / "eval" / label / name
    process = f"evaluate_{label}.{name}"
    ours = {**_arguments(config, settings, name, site), "--env.data_dir_to_save_evals": str(directory)}
    private = _private(config, name, settings, site, process)
    words = ("evaluate", *_merged(ours, settings, private))
    return _spec(name, settings, site, process, words, private, {}), directory / "metrics.json"


def _spec(
    name: str,
    settings: EnvironmentConfig,
    site: Site,
    process: str,
    words: tuple[str, ...],
    private: PrivateArguments,
    variables: Mapping[str, str],
) -> ServiceSpec:
    return ServiceSpec(
        name=process,
        command=(interpreter(settings.python, f"environments.{name}.python"), *program_of(name, settings), *words),
        env={**CHILD_ENV, **variables, **settings.env},
        cwd=_directory(name, settings, site.run_dir),
        log_path=site.run_dir / "logs" / f"{process}.1.log",
        files=private.files,
    )


def _private(
    config: RunConfig, name: str, settings: EnvironmentConfig, site: Site, process: str, api_url: str | None = None
) -> PrivateArguments:
    return private_arguments(
        api_key=config.gateway.api_key,
        api_url=api_url,
        token=config.atropos.token,
        args=settings.args,
        omit=settings.omit,
        file=site.run_dir / "launch" / f"{process}.yaml",
        cwd=_directory(name, settings, site.run_dir),
        key=f"environments.{name}.args",
    )


# ---------------------------------------------------------------------- the command line


def program_of(name: str, settings: EnvironmentConfig) -> tuple[str, ...]:
    """``(script,)`` or ``("-m", module)``. Raises ``ConfigError`` when the script does not exist."""
    if settings.module is not None:
        return ("-m", settings.module)
    if settings.script is None:
        return (str(demo_env_script()),)
    given = Path(settings.script).expanduser()
    repository = Path(__file__).resolve().parents[3]
    places = [given.absolute()] if given.is_absolute() else [given.absolute(), repository / given]
    for place in places:
        if place.is_file():
            return (str(place),)
    looked = " nor ".join(str(place) for place in dict.fromkeys(places))
    raise ConfigError(f"there is no {looked}", f"environments.{name}.script")


def _directory(name: str, settings: EnvironmentConfig, run_dir: Path) -> Path:
    if settings.cwd is None:
        return run_dir
    path = Path(settings.cwd).expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory", f"environments.{name}.cwd")
    return path


def _arguments(config: RunConfig, settings: EnvironmentConfig, process: str, site: Site) -> dict[str, str]:
    """What ``serve`` and ``evaluate`` both are given, without addresses and keys that are secret."""
    tokenizer = config.model.tokenizer_path or str(site.model_path)
    return {
        "--env.group_size": str(settings.group_size or config.group_size),
        "--env.max_token_length": str(config.max_token_len),
        "--env.tokenizer_name": tokenizer,
        "--env.use_wandb": "false",
        # Without a name /register-env is refused with 422; this one is how the API tells the processes apart.
        "--env.wandb_name": process,
        "--openai.base_url": f"{site.gateway_url}/v1",
        "--openai.model_name": str(site.model_path),
        "--openai.tokenizer_name": tokenizer,
        "--openai.server_type": settings.server_type,
    }


def _merged(ours: Mapping[str, str], settings: EnvironmentConfig, private: PrivateArguments) -> tuple[str, ...]:
    """Our arguments but for those that the user omits or gives, then the private ones, then the user's."""
    kept = [
        (key, value)
        for key, value in ours.items()
        if key not in settings.omit and option_value(settings.args, key) is None and key not in settings.args
    ]
    return (*(word for pair in kept for word in pair), *private.words, *user_arguments(settings.args, private))


def _trap_warnings(name: str, program: tuple[str, ...], settings: EnvironmentConfig) -> list[str]:
    if program[0] == "-m":
        return []
    where = bare_server_config(Path(program[0]))
    if where is None:
        return []
    return [
        f"environments.{name}: {program[0]}, line {where}: config_init returns a bare APIServerConfig. Atropos then "
        "ignores --openai.base_url and talks to localhost:9004-9007; return a list, [APIServerConfig(...)]"
    ]


def interpreter(python: str | None, key: str) -> str:
    """The interpreter that ``python`` names: a path, a virtual environment, or None for this one.

    Raises ``ConfigError`` naming ``key`` when it is none of these.
    """
    if python is None:
        return sys.executable
    path = Path(python).expanduser()
    if path.is_dir():
        path = path / "bin" / "python"
    elif "/" not in python:
        return python  # looked up in PATH when it is started
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give an interpreter or a virtual environment", key)
    # Not resolved: a virtual environment's python is a link, and is what it is by its own path.
    return str(path.absolute())
