"""Environments → commands: each one's command line adapted to the run, its share of the batch, its copies, its keys."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import xxhash
import yaml

from atropos_verl import assets
from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY, AgentConfig, EnvironmentConfig, LaunchConfig
from atropos_verl.config.model_checks import NAMES_OF_TRANSFORMERS_5, check_tokenizer, read_json
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import EVALUATION_PATH, environment_token
from atropos_verl.launch.environment_script import (
    check_needs,
    import_path,
    notes_of,
    option_value,
    server_count,
    source_of,
)
from atropos_verl.launch.process import ServiceSpec
from atropos_verl.storage import write_atomic
from atropos_verl.training.extensions import split_path

CHILD_ENV: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # environments do not compute; their thread pools would take the trainer's cores
}
_SHIPPED = Path(assets.__file__).parent / "environments"
"""The environments of the package; in a checkout a link to ``examples/environments``."""
_TMPDIR_BYTES = 70
_SERVER_PREFIX = "--openai."
_URL_OPTION = "--env.rollout_server_url"
_NAME_OPTION = "--env.wandb_name"
_FILE_OPTION = "--config"
_TOKENIZER_SETTINGS, _CLEANS = "tokenizer_config.json", "clean_up_tokenization_spaces"
_ROUNDING = 1e-9


def plan_environments(
    config: RunConfig, launch: LaunchConfig, *, own_api: bool, of_training: bool = False
) -> tuple[list[ServiceSpec], list[str]]:
    """The processes of all chosen environments, and warnings. ``of_training``: the one of ``main_atropos.py``. Raises
    ``ConfigError``: none is left; a script does not exist; sizes or allocations do not fit the batch."""
    if not (chosen := launch.chosen):
        raise ConfigError("no environment to start; name some, or leave environments out of only", "environments")
    embedded = own_api and config.atropos.server == "embedded"
    allocations, notes = allocate(config, launch, embedded=embedded)
    warnings = [*_check_groups(config, launch, embedded=embedded), *notes]
    if config.atropos.token and not embedded:
        text = "environments send the API's token as a password (HTTP Basic), all that Atropos's client can do: an API"
        warnings.append(f"{text} that demands a bearer token refuses them (401 in their logs)")
    found = check_tokenizer(Path(config.model.tokenizer_path or config.resolve_model_path()).expanduser())
    warnings += [f"tokenizer: {item.found}; {item.todo}" for item in found if item.status != "ok"]
    services, run_dir = list[ServiceSpec](), config.resolve_run_dir()
    for name, settings in chosen.items():
        section = "env" if of_training else f"environments.{name}"
        if name in launch.agents:
            _check_agent(launch.agents[name], settings, run_dir, f"agents.{name}")
        program = program_of(section, settings)
        python = interpreter(settings.python, f"{section}.python")
        key = f"{section}.{'module' if settings.module else 'script'}"
        check_needs(python, program, settings, run_dir, key)
        if name not in launch.agents and settings.ecosystem is None:
            warnings += [f"{key}: {note}" for note in notes_of(config, settings, program)]
        for copy in range(1, settings.copies + 1):
            which: dict[str, Any] = {"copy": copy, "allocation": allocations[name], "embedded": embedded}
            services.append(environment_spec(config, name, settings, of_training=of_training, **which))
    names = [service.name for service in services]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two processes would be called {twice[0]}; rename an environment", "environments")
    return services, warnings


def _check_agent(agent: AgentConfig, settings: EnvironmentConfig, run_dir: Path, section: str) -> None:
    """What can be known without its code being run. Raises ``ConfigError``: a file or a module that is not there."""
    for key in ("tasks", "eval_tasks"):
        if (file := getattr(agent, key)) is not None and not (path := Path(file).expanduser().absolute()).is_file():
            raise ConfigError(f"there is no {path}", f"{section}.{key}")
    env = {**os.environ, **import_path(), **settings.env}
    entries = [str(run_dir / entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    places = [*entries, env[LAUNCH_DIRECTORY]]
    for key in ("agent", "scorer"):
        if (path := getattr(agent, key)) is None:
            continue
        name = split_path(f"{section}.{key}", path)[0].partition(".")[0]  # below it, finding would be importing
        if agent.python is None and not (PathFinder.find_spec(name, places) or find_spec(name)):
            text = f"there is no module {name}; it is looked for in {places[-1]} and on PYTHONPATH"
            raise ConfigError(text, f"{section}.{key}")


def environment_spec(
    config: RunConfig,
    name: str,
    settings: EnvironmentConfig,
    *,
    of_training: bool,
    copy: int = 1,
    allocation: float | None = None,
    evaluation: str | None = None,
    embedded: bool = False,
) -> ServiceSpec:
    """``ENV serve``, or, with the label of an ``evaluation`` (before, …), ``ENV evaluate``. Environments of an
    ``embedded`` API get a token that does not allow ``/reset_data``."""
    cwd = run_dir = config.resolve_run_dir()
    section = "env" if of_training else f"environments.{name}"
    if settings.cwd is not None and not (cwd := Path(settings.cwd).expanduser().absolute()).is_dir():
        raise ConfigError(f"{cwd} is not a directory", f"{section}.cwd")
    process = name if copy == 1 else f"{name}-{copy}"
    program = program_of(section, settings)
    short = Path(program[-1]).stem if settings.module is None else settings.module.rpartition(".")[2]
    tokenizer = str(readable_tokenizer(config))
    ours = {
        "--env.group_size": str(settings.group_size or config.group_size),
        "--env.max_token_length": str(config.max_token_len),
        "--env.tokenizer_name": tokenizer,
        "--env.use_wandb": "false",
        # Without a name /register-env is refused with 422; this one is how the API tells the processes apart.
        _NAME_OPTION: short if of_training else process,
    }
    server = {
        "base_url": f"{config.gateway.advertise_url}{EVALUATION_PATH if evaluation else ''}/v1",
        "model_name": str(config.resolve_model_path()),
        "tokenizer_name": tokenizer,
        "server_type": settings.server_type,
        "api_key": config.gateway.api_key or "none",  # the openai client refuses to start without one
    }
    policy: dict[str, Any] = {}
    api_url, token = config.atropos.api_url, config.atropos.token
    if evaluation is not None:
        process, api_url = f"evaluate_{evaluation}" if of_training else f"evaluate_{evaluation}.{name}", None
        ours["--env.data_dir_to_save_evals"] = str(evaluation_directory(config, name, evaluation, of_training))
    else:
        ours |= {
            "--env.total_steps": str(10 * config.steps + 1000),  # the trainer ends the run, not the environment
            "--env.max_batches_offpolicy": str(settings.max_batches_offpolicy or config.max_batches_offpolicy),
            "--env.inference_weight": f"{settings.weight / settings.copies:g}",
            "--slurm": "false",
            **({} if allocation is None else {"--env.min_batch_allocation": repr(allocation)}),
        }
        policy = {
            "kind": "environment",
            "restarts": settings.max_restarts if settings.restart == "always" else 0,
            "startup_timeout": settings.startup_timeout,
            "registers_as": option_value(settings.args, _NAME_OPTION) or ours[_NAME_OPTION],
        }
    url = None if api_url is None else with_token(api_url, environment_token(token) if token and embedded else token)
    servers, file = server_count(source_of(program, settings)), run_dir / "launch" / f"{process}.yaml"
    last, files = last_words(settings, server, url, servers=servers, file=file, cwd=cwd, section=section)
    given = {*settings.omit, *(word.partition("=")[0] for word in settings.args)}
    own = [word for option, value in ours.items() if option not in given for word in (option, value)]
    return ServiceSpec(
        name=process,
        command=(
            *(interpreter(settings.python, f"{section}.python"), *program),
            *("serve" if evaluation is None else "evaluate", *own, *last),
        ),
        env={**CHILD_ENV, "TMPDIR": str(own_temporary(run_dir)), **import_path(), **direct(config), **settings.env},
        cwd=cwd,
        log_path=run_dir / "logs" / (f"{process}.log" if of_training else f"{process}.1.log"),
        files=files,
        secrets=secrets_of(config),
        **policy,
    )


def evaluation_directory(config: RunConfig, name: str, label: str, of_training: bool) -> Path:
    """The directory to which ``ENV evaluate`` writes ``metrics.json``."""
    return config.resolve_run_dir() / "eval" / label / ("" if of_training else name)


def program_of(section: str, settings: EnvironmentConfig) -> tuple[str, ...]:
    """``(script,)`` or ``("-m", module)``; the package has the files of ``examples/environments``. Raises
    ``ConfigError``, with a key of ``section``, when the script does not exist."""
    if settings.module is not None:
        return ("-m", settings.module)
    path = Path(settings.script or "examples/environments/spell_backward.py").expanduser()
    places = [path.absolute(), *([_SHIPPED / path.name] if path.parent == Path("examples/environments") else [])]
    if settings.script is None:
        places = places[1:]  # the demo's, whatever is in this directory
    if found := next((place for place in places if place.is_file()), None):
        return (str(found),)
    raise ConfigError(f"there is no {' nor '.join(map(str, places))}", f"{section}.script")


def interpreter(python: str | None, key: str) -> str:
    """That of a path, a virtual environment, or None for this one. Raises ``ConfigError`` with ``key`` for others."""
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
    settings: EnvironmentConfig,
    server: Mapping[str, str],
    api_url: str | None,
    *,
    servers: int | None,
    file: Path,
    cwd: Path,
    section: str,
) -> tuple[tuple[str, ...], dict[Path, str]]:
    """The end of one environment's command, and the private files that must exist when it starts. Our file holds the
    user's ``--config`` too; the user's arguments come last and win. With ``--config`` among ``omit`` everything is an
    argument. ``server``: our gateway, as ``APIServerConfig``; ``servers``: see ``server_count``. Raises
    ``ConfigError``: the user's ``--config`` cannot be read, or is left out where it is needed."""
    args, omit = list(settings.args), settings.omit
    wanted = {f"{_SERVER_PREFIX}{key}": value for key, value in server.items()}
    wanted |= {} if api_url is None else {_URL_OPTION: api_url}
    wanted = {name: value for name, value in wanted.items() if name not in omit and option_value(args, name) is None}
    if _FILE_OPTION in omit:
        if servers not in (None, 1):
            raise ConfigError("config_init returns no list of one server, so its --config is needed", f"{section}.omit")
        return (*(word for item in wanted.items() for word in item), *args), {}
    url = wanted.pop(_URL_OPTION, None)
    own = {name.removeprefix(_SERVER_PREFIX): value for name, value in wanted.items()}
    given = option_value(args, _FILE_OPTION)
    content: Any = {}
    if given is not None:
        path = cwd / Path(given).expanduser()
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path} (--config): {error}", f"{section}.args") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} (--config) is not a mapping", f"{section}.args")
    args, _ = _split(args, _FILE_OPTION)
    listed = content.get("openai") or {}
    entries = listed if isinstance(listed, list) else [listed]
    if len(entries) > 1:  # several servers of the user's own: those with an address keep it, and get no key of ours
        entries = [entry if entry.get("base_url") else {**own, **entry} for entry in entries]
    else:
        entries = [{**entries[0], **own} if entries else own]
        if servers != 1:
            args, given_too = _split(args, "--openai")
            entries = [{**entries[0], **given_too} for _ in range(max(2, servers or 0))]
    content["openai"] = entries
    if url is not None:
        content["env"] = {**(content.get("env") or {}), "rollout_server_url": url}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return (_FILE_OPTION, str(file), *args), {file: text}


def _split(args: Sequence[str], option: str) -> tuple[list[str], dict[str, str]]:
    """``args`` without ``--option value``, ``--option=value`` and those of ``--option.key``, and what these say."""
    kept, taken, rest = list[str](), dict[str, str](), iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == option or name.startswith(f"{option}."):
            taken[name.removeprefix(f"{option}.")] = value if equals else next(rest, "")
        else:
            kept.append(word)
    return kept, taken


def with_token(url: str, token: str | None) -> str:
    if not token:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=f"run:{quote(token, safe='')}@{parts.netloc.rpartition('@')[2]}").geturl()


def secrets_of(config: RunConfig) -> tuple[str, ...]:
    """What must show in no log: keys and tokens of the run, the longest first, as they are and as a URL has them."""
    token, key = config.atropos.token, config.gateway.api_key
    known = (token, environment_token(token) if token else None, key)
    forms = dict.fromkeys(form for secret in known if secret for form in (secret, quote(secret, safe="")))
    return tuple(sorted((form for form in forms if len(form) > 3), key=len, reverse=True))


def own_temporary(run_dir: Path) -> Path:
    """The temporary directory of a run's children, which goes with the run: wandb, which Atropos imports, leaves two
    directories in it when it is killed. Not in a run directory with a long name: Unix sockets are made there, and the
    name of one ends at 107 bytes."""
    inside = run_dir / "launch" / "tmp"  # not RUN_DIR/tmp, which may be the user's: it is emptied
    if len(os.fsencode(inside)) <= _TMPDIR_BYTES:
        return inside
    return Path(tempfile.gettempdir(), f"atropos-verl-{xxhash.xxh3_64_hexdigest(os.fsencode(run_dir))}")


def direct(config: RunConfig) -> dict[str, str]:
    """The variables by which a child asks no proxy for the parts of this run."""
    urls = (config.gateway.advertise_url, config.atropos.api_url)
    given = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    hosts = [
        *map(str.strip, given),
        "127.0.0.1",
        "localhost",
        "::1",
        *(urlsplit(url or "").hostname or "" for url in urls),
    ]
    value = ",".join(dict.fromkeys(filter(None, hosts)))
    return {"NO_PROXY": value, "no_proxy": value}


def allocate(config: RunConfig, launch: LaunchConfig, *, embedded: bool) -> tuple[dict[str, float | None], list[str]]:
    """``--env.min_batch_allocation`` of one process of each environment, and warnings. In Atropos a weight alone moves
    nothing, a least share of every batch does. Where weights differ, each environment gets its share of what explicit
    allocations leave, in whole groups; the rest is filled with the oldest groups."""
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
        text = "this API uses weights for concurrency only: shares of the trained sequences will not follow them. Set"
        return result, [f"{text} min_batch_allocation of each environment, or use the embedded API"]
    for name, settings in free.items():
        result[name] = _per_copy(config, (1 - total) * settings.weight / weights, settings)
        if result[name] is None and settings.weight > 0:
            text = f"its share of a batch of {config.batch_size} is less than one group of"
            text += f" {_group_size(config, settings)}; it gets what the others leave"
            warnings.append(f"environments.{name}: {text}. A larger batch_size holds the share")
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
            message = f"groups of {size} do not fill a batch of {config.batch_size} exactly beside groups of {largest}:"
            message += " batch_size must be a multiple of each group size, and the largest of every other"
            if not embedded:
                raise ConfigError(f"{message}; an upstream API would never deliver a batch", key)
            return [f"{key}: {message}; some batches will be smaller"]
    estimator, alone = config.algorithm.adv_estimator, [name for name, size in sizes.items() if size == 1]
    if alone and estimator != "plain" and config.algorithm.advantage_path is None:
        text = f"groups of {', '.join(alone)} have one sequence (group_size=1), whose advantage is 0 with"
        text += f" algorithm.adv_estimator={estimator}, without advantages of its own or overrides.sft"
        return [f"{text}. Raise group_size, or set algorithm.adv_estimator=plain"]
    return []


def readable_tokenizer(config: RunConfig) -> Path:
    """The tokenizer as environments can load it, most of which run on transformers 4: the model's own, or a copy in
    the run directory with the settings that only transformers 5 writes made older ones (``write_tokenizer``)."""
    own, older = _older_tokenizer(config)
    return own if older is None else config.resolve_run_dir() / "launch" / "tokenizer"


def write_tokenizer(config: RunConfig) -> None:
    """Write the copy of ``readable_tokenizer``, where one is needed: links to the files, and the changed settings."""
    own, older = _older_tokenizer(config)
    if older is None:
        return
    place = readable_tokenizer(config)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "config.json", "chat_template.jinja", "special_tokens_map.json"):
        link, target = place / name, own.absolute() / name
        link.unlink(missing_ok=True)
        if target.is_file():
            link.symlink_to(target)
    write_atomic(place / _TOKENIZER_SETTINGS, json.dumps(older, indent=1))


def _older_tokenizer(config: RunConfig) -> tuple[Path, dict[str, Any] | None]:
    """The tokenizer's directory, and its settings as transformers 4 reads them; None: those that are there will do."""
    directory = Path(config.model.tokenizer_path or config.resolve_model_path()).expanduser()
    settings, _ = read_json(directory / _TOKENIZER_SETTINGS)
    older = dict(settings)
    if settings.get("tokenizer_class") in NAMES_OF_TRANSFORMERS_5:
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = older.pop("extra_special_tokens")
        older["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or ()), *extra]
    # transformers 5 ignores it for BPE; 4 would strip spaces before punctuation from what the policy wrote.
    model = read_json(directory / "tokenizer.json")[0].get("model") if settings.get(_CLEANS) else None
    if isinstance(model, Mapping) and model.get("type") == "BPE":
        older[_CLEANS] = False
    return directory, older if older != settings and (directory / "tokenizer.json").is_file() else None
