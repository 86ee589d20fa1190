"""Environments → commands: each one's command line adapted to the run, its share of the batch, its copies."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atropos_verl.config import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.launch_config import EnvironmentConfig, LaunchConfig
from atropos_verl.launch.plan import demo_env_script
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.launch.trap import bare_server_config

__all__ = ["CHILD_ENV", "EnvironmentPlan", "PlannedEnvironment", "interpreter", "plan_environments"]

CHILD_ENV: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # environments do not compute; their thread pools would take the trainer's cores
}
_ROUNDING = 1e-9


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


def plan_environments(
    config: RunConfig,
    launch: LaunchConfig,
    *,
    run_dir: Path,
    model_path: Path,
    api_url: str,
    gateway_url: str,
    own_api: bool,
) -> EnvironmentPlan:
    """The processes of all chosen environments.

    Args:
        own_api: the API is started here; if not, it may be upstream's.

    Raises:
        ConfigError: none is left; a script does not exist; group sizes or allocations do not fit the batch size.
    """
    chosen = launch.chosen
    if not chosen:
        raise ConfigError("no environment to start; name some, or leave environments out of only", "environments")
    embedded = own_api and launch.api.server == "embedded"
    warnings = list(_check_groups(config, launch, embedded=embedded))
    allocations, notes = allocate(config, launch, embedded=embedded)
    warnings += notes
    token = {"ATROPOS_API_TOKEN": config.atropos.token} if config.atropos.token else {}
    if token:
        warnings.append(_TOKEN)
    services: list[PlannedEnvironment] = []
    for name, settings in chosen.items():
        program = _program(name, settings)
        warnings += _trap_warnings(name, program, settings)
        for copy in range(1, settings.copies + 1):
            process = name if copy == 1 else f"{name}-{copy}"
            ours = _arguments(config, settings, process, model_path, api_url, gateway_url)
            ours["--env.inference_weight"] = f"{settings.weight / settings.copies:g}"
            if allocations[name] is not None:
                ours["--env.min_batch_allocation"] = repr(allocations[name])
            command = (
                interpreter(settings.python, f"environments.{name}.python"),
                *program,
                "serve",
                *_merged(ours, settings),
            )
            spec = ServiceSpec(
                name=process,
                command=command,
                env={**CHILD_ENV, **token, **settings.env},
                cwd=_directory(name, settings, run_dir),
                log_path=run_dir / "logs" / f"{process}.1.log",
            )
            services.append(PlannedEnvironment(environment=name, settings=settings, spec=spec))
    names = [service.spec.name for service in services]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two processes would be called {twice[0]}; rename an environment", "environments")
    return EnvironmentPlan(services=tuple(services), warnings=tuple(warnings))


# ---------------------------------------------------------------------- shares of the batch


def allocate(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> tuple[dict[str, float | None], list[str]]:
    """``--env.min_batch_allocation`` of one process of each environment, and what to warn of.

    Atropos itself uses weights only to bound concurrent requests (512 times the share, which seldom binds), so a
    weight alone moves nothing. A least share of every batch does. Where weights differ, each environment therefore
    gets its share of what explicit allocations leave, rounded down to whole groups; what rounding leaves is filled
    with the oldest groups.
    """
    chosen = launch.chosen
    total = sum(settings.min_batch_allocation or 0.0 for settings in chosen.values())
    if total > 1 + _ROUNDING:
        raise ConfigError(f"min_batch_allocation of all environments adds up to {total:g}, above 1", "environments")
    result = {name: _per_copy(config, settings.min_batch_allocation, settings) for name, settings in chosen.items()}
    free = {name: settings for name, settings in chosen.items() if settings.min_batch_allocation is None}
    weights = sum(settings.weight for settings in free.values())
    uneven = len({settings.weight / settings.copies for settings in chosen.values()}) > 1
    warnings: list[str] = []
    if len(chosen) < 2 or not uneven or weights <= 0 or not free:
        return result, warnings
    if not embedded:  # upstream stops delivering when an environment with an allocation dies: only where asked for
        return result, [_WEIGHTS_ONLY]
    for name, settings in free.items():
        result[name] = _per_copy(config, (1 - total) * settings.weight / weights, settings)
        if result[name] is None and settings.weight > 0:
            warnings.append(
                f"environments.{name}: its share of a batch of {config.batch_size} is less than one group of "
                f"{_group_size(config, settings)}; it gets what the others leave. A larger batch_size holds the share"
            )
    return result, warnings


_WEIGHTS_ONLY = (
    "weights are handed to the environments, but this API uses them for concurrency only: shares of the trained "
    "sequences will not follow them. Set min_batch_allocation of each environment, or use the embedded API"
)


_TOKEN = (
    "the API demands a token, which Atropos's own client cannot send: environments find it in ATROPOS_API_TOKEN, but "
    "unmodified ones need an API without a token (on this machine, or through a tunnel)"
)


def _per_copy(config: RunConfig, share: float | None, settings: EnvironmentConfig) -> float | None:
    """``share`` of the batch in whole groups, divided over the copies; None: less than one group each."""
    if share is None:
        return None
    group = _group_size(config, settings)
    groups = int(share * config.batch_size / settings.copies / group + _ROUNDING)
    # The API takes int(batch_size * allocation): a hair more, so that 1/3 of 24 is 8 and not 7.
    return None if groups == 0 else min(1.0, round(groups * group / config.batch_size + _ROUNDING, 12))


def _group_size(config: RunConfig, settings: EnvironmentConfig) -> int:
    given = _given(settings.args, "--env.group_size")
    if given is not None and given.isdigit() and int(given) > 0:
        return int(given)
    return settings.group_size or config.group_size


def _check_groups(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> list[str]:
    """Raises ``ConfigError`` where no batch can be filled exactly; what to warn of otherwise."""
    sizes = {name: _group_size(config, settings) for name, settings in launch.chosen.items()}
    largest = max(sizes.values())
    for name, size in sizes.items():
        key = f"environments.{name}.group_size"
        if size > config.batch_size:
            raise ConfigError(f"{size} is above batch_size {config.batch_size}: no batch would hold a group", key)
        if config.batch_size % size or largest % size:
            message = (
                f"groups of {size} do not fill a batch of {config.batch_size} exactly beside groups of {largest}: "
                "batch_size must be a multiple of each group size, and the largest of every other"
            )
            if not embedded:
                raise ConfigError(f"{message}; an upstream API would never deliver a batch", key)
            return [f"{key}: {message}; some batches will be smaller"]
    return []


# ---------------------------------------------------------------------- the command line


def _program(name: str, settings: EnvironmentConfig) -> tuple[str, ...]:
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


def _arguments(
    config: RunConfig, settings: EnvironmentConfig, process: str, model_path: Path, api_url: str, gateway_url: str
) -> dict[str, str]:
    tokenizer = config.model.tokenizer_path or str(model_path)
    return {
        "--env.rollout_server_url": api_url,
        "--env.group_size": str(settings.group_size or config.group_size),
        "--env.max_token_length": str(config.max_token_len),
        "--env.tokenizer_name": tokenizer,
        "--env.use_wandb": "false",
        # Without a name /register-env is refused with 422; this one is how the API tells the processes apart.
        "--env.wandb_name": process,
        "--env.total_steps": str(10 * config.steps + 1000),  # the trainer ends the run, not the environment
        "--env.max_batches_offpolicy": str(settings.max_batches_offpolicy or config.env.max_batches_offpolicy),
        "--openai.base_url": f"{gateway_url}/v1",
        "--openai.model_name": str(model_path),
        "--openai.tokenizer_name": tokenizer,
        "--openai.server_type": settings.server_type,
        "--openai.api_key": config.gateway.api_key or "none",
        "--slurm": "false",
    }


def _merged(ours: Mapping[str, str], settings: EnvironmentConfig) -> tuple[str, ...]:
    """Our arguments but for those that the user omits or gives, then the user's."""
    kept = [
        (key, value)
        for key, value in ours.items()
        if key not in settings.omit and _given(settings.args, key) is None and key not in settings.args
    ]
    return (*(word for pair in kept for word in pair), *settings.args)


def _given(args: Sequence[str], key: str) -> str | None:
    """The value of ``key`` in ``--key value`` or ``--key=value`` form."""
    for index, word in enumerate(args):
        if word.startswith(f"{key}="):
            return word.split("=", 1)[1]
        if word == key and index + 1 < len(args):
            return args[index + 1]
    return None


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
