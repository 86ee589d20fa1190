"""Environments → commands: each one's command line adapted to the run, its share of the batch, its copies, its keys.

Atropos takes its settings from arguments, which every user of the machine can read in ``ps``, or from the YAML file of
``--config`` (it looks at no environment variable: the openai client's ``OPENAI_API_KEY`` serves chat only, not
``/generate``). So the gateway's key goes into a file that only its owner can read. The API's token goes there too, as
the password in the API's URL: Atropos cannot send a bearer token, but its HTTP client (aiohttp) makes HTTP Basic
authentication of a URL's password, and our API takes that.
"""

import ast
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.process import ServiceSpec

CHILD_ENV: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # environments do not compute; their thread pools would take the trainer's cores
}
_REPOSITORY = Path(__file__).resolve().parents[3]
"""The source checkout, where there is one."""
_KEY_OPTION = "--openai.api_key"
_URL_OPTION = "--env.rollout_server_url"
_NAME_OPTION = "--env.wandb_name"
_FILE_OPTION = "--config"
_ROUNDING = 1e-9


def plan_environments(
    config: RunConfig, launch: LaunchConfig, *, own_api: bool, of_training: bool = False
) -> tuple[list[ServiceSpec], list[str]]:
    """The processes of all chosen environments, and warnings.

    With ``of_training`` it is the one environment of ``main_atropos.py``: its keys are those of ``env``, and its files
    need no name. Raises ``ConfigError``: none is left; a script does not exist; group sizes or allocations do not fit
    the batch size.
    """
    chosen = launch.chosen
    if not chosen:
        raise ConfigError("no environment to start; name some, or leave environments out of only", "environments")
    embedded = own_api and config.atropos.server == "embedded"
    warnings = _check_groups(config, launch, embedded=embedded)
    allocations, notes = allocate(config, launch, embedded=embedded)
    warnings += notes
    if config.atropos.token and not embedded:
        warnings.append(
            "environments send the API's token as the password of HTTP Basic authentication, which is all that "
            "Atropos's client can do: our API takes it, one that demands a bearer token refuses them "
            "(401 in their logs)"
        )
    services: list[ServiceSpec] = []
    for name, settings in chosen.items():
        program = program_of(name, settings)
        if program[0] != "-m" and (line := bare_server_config(Path(program[0]))) is not None:
            warnings.append(
                f"environments.{name}: {program[0]}, line {line}: config_init returns a bare APIServerConfig. Atropos "
                "then ignores --openai.base_url and talks to localhost:9004-9007; return a list, [APIServerConfig(...)]"
            )
        for copy in range(1, settings.copies + 1):
            allocation = allocations[name]
            services.append(
                environment_spec(config, name, settings, of_training=of_training, copy=copy, allocation=allocation)
            )
    names = sorted(service.name for service in services)
    if twice := [name for name, other in pairwise(names) if name == other]:
        raise ConfigError(f"two processes would be called {twice[0]}; rename an environment", "environments")
    return services, warnings


def environment_spec(
    config: RunConfig,
    name: str,
    settings: EnvironmentConfig,
    *,
    of_training: bool,
    copy: int = 1,
    allocation: float | None = None,
    evaluation: str | None = None,
) -> ServiceSpec:
    """``ENV serve``, or, with the label of an ``evaluation`` (before, after), ``ENV evaluate``."""
    cwd = run_dir = config.resolve_run_dir()
    section = "env" if of_training else f"environments.{name}"
    if settings.cwd is not None:
        cwd = Path(settings.cwd).expanduser().absolute()
        if not cwd.is_dir():
            raise ConfigError(f"{cwd} is not a directory", f"{section}.cwd")
    process = name if copy == 1 else f"{name}-{copy}"
    program = program_of(name, settings)
    model = str(config.resolve_model_path())
    tokenizer = config.model.tokenizer_path or model
    ours = {
        "--env.group_size": str(settings.group_size or config.group_size),
        "--env.max_token_length": str(config.max_token_len),
        "--env.tokenizer_name": tokenizer,
        "--env.use_wandb": "false",
        # Without a name /register-env is refused with 422; this one is how the API tells the processes apart.
        _NAME_OPTION: Path(program[-1]).stem if of_training and evaluation is None else process,
        "--openai.base_url": f"{config.gateway.advertise_url}/v1",
        "--openai.model_name": model,
        "--openai.tokenizer_name": tokenizer,
        "--openai.server_type": settings.server_type,
    }
    env = dict(CHILD_ENV)
    policy: dict[str, Any] = {}
    if evaluation is not None:
        process = f"evaluate_{evaluation}" if of_training else f"evaluate_{evaluation}.{name}"
        ours["--env.data_dir_to_save_evals"] = str(evaluation_directory(config, name, evaluation, of_training))
    else:
        ours |= {
            "--env.total_steps": str(10 * config.steps + 1000),  # the trainer ends the run, not the environment
            "--env.max_batches_offpolicy": str(settings.max_batches_offpolicy or config.max_batches_offpolicy),
            "--env.inference_weight": f"{settings.weight / settings.copies:g}",
            "--slurm": "false",
        }
        if allocation is not None:
            ours["--env.min_batch_allocation"] = repr(allocation)
        if config.atropos.token:
            env["ATROPOS_API_TOKEN"] = config.atropos.token
        policy = {
            "kind": "environment",
            "restarts": settings.max_restarts if settings.restart == "always" else 0,
            "startup_timeout": settings.startup_timeout,
            "registers_as": option_value(settings.args, _NAME_OPTION) or ours[_NAME_OPTION],
        }
    file, api_url = run_dir / "launch" / f"{process}.yaml", config.atropos.api_url if evaluation is None else None
    last, files = last_words(config, settings, api_url=api_url, file=file, cwd=cwd, key=f"{section}.args")
    words = ["serve" if evaluation is None else "evaluate"]
    for option, value in ours.items():
        if option not in settings.omit and option not in settings.args and option_value(settings.args, option) is None:
            words += [option, value]
    return ServiceSpec(
        name=process,
        command=(interpreter(settings.python, f"{section}.python"), *program, *words, *last),
        env={**env, **settings.env},
        cwd=cwd,
        log_path=run_dir / "logs" / (f"{process}.log" if of_training else f"{process}.1.log"),
        files=files,
        **policy,
    )


def evaluation_directory(config: RunConfig, name: str, label: str, of_training: bool) -> Path:
    """The directory to which ``ENV evaluate`` writes ``metrics.json``."""
    directory = config.resolve_run_dir() / "eval" / label
    return directory if of_training else directory / name


def program_of(name: str, settings: EnvironmentConfig) -> tuple[str, ...]:
    """``(script,)`` or ``("-m", module)``. Raises ``ConfigError`` when the script does not exist."""
    if settings.module is not None:
        return ("-m", settings.module)
    if settings.script is None:
        return (str(demo_env_script()),)
    given = Path(settings.script).expanduser()
    places = [given.absolute()] if given.is_absolute() else [given.absolute(), _REPOSITORY / given]
    for place in places:
        if place.is_file():
            return (str(place),)
    looked = " nor ".join(str(place) for place in dict.fromkeys(places))
    raise ConfigError(f"there is no {looked}", f"environments.{name}.script")


def demo_env_script() -> Path:
    """The demo environment in a source checkout. Raises ``ConfigError`` where there is none."""
    script = _REPOSITORY / "examples" / "environments" / "spell_backward.py"
    if not script.is_file():
        raise ConfigError(f"the demo environment is not at {script} (no source checkout?); give your own", "env.script")
    return script


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


def last_words(
    config: RunConfig, settings: EnvironmentConfig, *, api_url: str | None, file: Path, cwd: Path, key: str
) -> tuple[tuple[str, ...], dict[Path, str]]:
    """Gateway key and API address for one environment, then the user's own arguments, which win; and the private files
    that must exist when it starts.

    A ``--config`` of the user's is read, and our file holds its content too; with ``--config`` among ``omit``, an
    Atropos that does not know it gets keys as arguments.

    Args:
        api_url: None: the environment is not told (``evaluate`` needs none).
        file: path of the private file.
        cwd: the environment's working directory, which a relative ``--config`` starts from.
        key: dotted name of the setting that holds the user's arguments, for the message.

    Raises:
        ConfigError: the user's ``--config`` cannot be read.
    """
    args, omit, api_key, token = settings.args, settings.omit, config.gateway.api_key, config.atropos.token
    # The openai client refuses to start without a key.
    wanted, secret = {_KEY_OPTION: api_key or "none"}, {_KEY_OPTION} if api_key else set()
    if api_url is not None:
        wanted[_URL_OPTION] = api_url
        if token:
            parts = urlsplit(api_url)
            netloc = f"atropos:{quote(token, safe='')}@{parts.netloc.rpartition('@')[2]}"
            wanted[_URL_OPTION] = parts._replace(netloc=netloc).geturl()
            secret.add(_URL_OPTION)
    given = option_value(args, _FILE_OPTION)
    content = {} if given is None or _FILE_OPTION in omit else _read(cwd / Path(given).expanduser(), key)
    servers = content.get("openai") or {}
    if isinstance(servers, list) and len(servers) > 1:
        del wanted[_KEY_OPTION]  # several servers of the user's own: Atropos takes no argument beside them
    if _FILE_OPTION in omit:
        secret = set()
    wanted = {name: value for name, value in wanted.items() if name not in omit and option_value(args, name) is None}
    words = [word for option, value in wanted.items() if option not in secret for word in (option, value)]
    private = {option: value for option, value in wanted.items() if option in secret}
    if not private:
        return (*words, *args), {}
    if _KEY_OPTION in private:
        server = servers[0] if isinstance(servers, list) and servers else servers
        content["openai"] = {**(server or {}), "api_key": private[_KEY_OPTION]}
    if _URL_OPTION in private:
        content["env"] = {**(content.get("env") or {}), "rollout_server_url": private[_URL_OPTION]}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    # Our file has taken in the user's.
    kept, rest = [], iter(args)
    for word in rest:
        if word == _FILE_OPTION:
            next(rest, None)
        elif not word.startswith(f"{_FILE_OPTION}="):
            kept.append(word)
    return (*words, _FILE_OPTION, str(file), *kept), {file: text}


def option_value(args: Sequence[str], option: str) -> str | None:
    """The value of ``option`` in ``--option value`` or ``--option=value`` form; None: it is not given."""
    for index, word in enumerate(args):
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
        if word == option and index + 1 < len(args):
            return args[index + 1]
    return None


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path} (--config): {error}", key) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} (--config) is not a mapping", key)
    return dict(content)


def allocate(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> tuple[dict[str, float | None], list[str]]:
    """``--env.min_batch_allocation`` of one process of each environment, and warnings.

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
        return result, [
            "weights are handed to the environments, but this API uses them for concurrency only: shares of the "
            "trained sequences will not follow them. Set min_batch_allocation of each environment, or use the embedded "
            "API"
        ]
    for name, settings in free.items():
        result[name] = _per_copy(config, (1 - total) * settings.weight / weights, settings)
        if result[name] is None and settings.weight > 0:
            warnings.append(
                f"environments.{name}: its share of a batch of {config.batch_size} is less than one group of "
                f"{_group_size(config, settings)}; it gets what the others leave. A larger batch_size holds the share"
            )
    return result, warnings


def _per_copy(config: RunConfig, share: float | None, settings: EnvironmentConfig) -> float | None:
    """``share`` of the batch in whole groups, divided over the copies; None: less than one group each."""
    if share is None:
        return None
    group = _group_size(config, settings)
    groups = int(share * config.batch_size / settings.copies / group + _ROUNDING)
    # The API takes int(batch_size * allocation): a hair more, so that 1/3 of 24 is 8 and not 7.
    return None if groups == 0 else min(1.0, round(groups * group / config.batch_size + _ROUNDING, 12))


def _group_size(config: RunConfig, settings: EnvironmentConfig) -> int:
    given = option_value(settings.args, "--env.group_size") or ""
    return (int(given) if given.isdigit() else 0) or settings.group_size or config.group_size


def _check_groups(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> list[str]:
    """Warnings. Raises ``ConfigError`` where no batch can be filled exactly."""
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


def parse_script(source: bytes, script: Path) -> ast.Module:
    """Parses ``source`` while nothing is collected. Raises ``SyntaxError`` or ``ValueError``.

    CPython 3.11 counts the depth of ``ast.parse`` once per interpreter. A finaliser that logs a traceback parses too;
    the outer call then raises ``SystemError`` (AST constructor recursion depth mismatch).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, str(script))
    finally:
        if was_enabled:
            gc.enable()


def bare_server_config(script: Path) -> int | None:
    """The line of ``script`` where a ``config_init`` returns a bare ``APIServerConfig``; None: none was found.

    That mistake costs most time: Atropos then ignores ``--openai.base_url`` and asks localhost:9004-9007 for ever.
    Nothing is imported or run: environments need packages that this interpreter may not have. Followed are literal
    tuples and names assigned in the same function. A file that is no Python gives None: it fails soon enough by itself.
    """
    try:
        tree = parse_script(script.read_bytes(), script)
    except (OSError, SyntaxError, ValueError):
        return None
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name == "config_init":
            return next(_bare_returns(list(ast.walk(function))), None)
    return None


def _bare_returns(nodes: Sequence[ast.AST]) -> Iterator[int]:
    assigned: dict[str, ast.expr | None] = {}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}

    def followed(value: ast.expr | None) -> ast.expr | None:
        return assigned.get(value.id, value) if isinstance(value, ast.Name) else value

    for node in nodes:
        if not isinstance(node, ast.Return):
            continue
        value = followed(node.value)
        if isinstance(value, ast.Tuple) and len(value.elts) == 2:
            server = followed(value.elts[1])
            if isinstance(server, ast.Call) and ast.unparse(server.func).split(".")[-1] == "APIServerConfig":
                yield node.lineno
