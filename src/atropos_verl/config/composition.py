"""Command line → settings: Hydra composes the YAML files and the ``key=value`` words, the schema validates. Precedence,
weakest first: schema defaults, the YAML file, environment variables, the command line."""

import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.model_checks import defaults_for
from atropos_verl.config.schema import (
    Row,
    RunConfig,
    apply_environment,
    bounds_of,
    check_bounds,
    describe,
    did_you_mean,
    help_rows,
)
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import is_loopback

SHIPPED = Path(__file__).parent / "shipped"
"""The YAML files that come with the package: the default of ``--config-dir``."""
KEY_FILE = "gateway.key"
"""Below the run directory: the gateway's key for environments that are started elsewhere."""
_OF_THE_DEMO = ("optim.lr", "data.max_prompt_length", "max_response_length")
"""Keys whose default in the schema suits the demo model only."""
_SCHEMAS = ("atropos_schema", "launch_schema")
"""What files build on, and what is composed without a file: the defaults."""


def load_config(overrides: Sequence[str], config_dir: Path | None = None, config_name: str | None = None) -> RunConfig:
    """Compose and validate the settings of a training run. Raises ``ConfigError``, which names the key."""
    values = _compose(overrides, config_dir, config_name or _SCHEMAS[0])
    if of_launch := [key for key in values if key in LaunchConfig.model_fields]:
        named = f" --config-name {config_name}" if config_name else ""
        raise ConfigError(f"a key of a launch; run `atropos-verl launch{named}`", of_launch[0])
    values["gateway"] = with_key_for_network(values.get("gateway"), values.get("run_dir"), values["atropos"])
    config = fitted_to_model(values)
    check_bounds(bounds_of(config))
    return config


def load_launch(
    overrides: Sequence[str], config_dir: Path | None = None, config_name: str | None = None
) -> tuple[RunConfig, LaunchConfig]:
    """Compose and validate both halves of a launch, as ``load_config``. The gateway gets a key if it has none."""
    values = _compose(overrides, config_dir, config_name or _SCHEMAS[1])
    launch = LaunchConfig.from_mapping({key: values.pop(key) for key in LaunchConfig.model_fields if key in values})
    gateway = dict(values.get("gateway") or {})
    if launch.starts("trainer") and not gateway.get("api_key"):
        values["gateway"] = {**gateway, "api_key": gateway_key(values.get("run_dir"), launch.starts("environments"))}
    config = fitted_to_model(values)
    ranks = ("trainer_process.nproc", launch.trainer_process.nproc, "batch_size", config.batch_size)
    check_bounds([*bounds_of(config), (*ranks, "a rank would have nothing to train")])
    return config, launch


def fitted_to_model(values: Mapping[str, Any]) -> RunConfig:
    """``RunConfig.from_mapping``; keys for the demo only, absent or null, get the model's. ``notes`` names them."""
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    chosen = defaults_for((values.get("model") or {}).get("path"))
    notes = []
    for key in _OF_THE_DEMO:
        section, _, name = key.rpartition(".")
        place = values.setdefault(section, {}) if section else values
        if place.get(name) is None:
            place.pop(name, None)
            if key in chosen:
                place[name] = chosen[key]
                path = values["model"]["path"]
                notes.append(f"{key}={chosen[key]:g}, chosen by the size of {path}; set it otherwise")
    config = RunConfig.from_mapping(values)
    config._notes = tuple(notes)
    return config


def gateway_key(run_dir: str | Path | None, starts_environments: bool) -> str:
    """A new key, or that in ``KEY_FILE``, which environments elsewhere have, and may outlive the trainer with."""
    file = None if run_dir is None or starts_environments else Path(run_dir).expanduser() / KEY_FILE
    if file is not None and file.is_file() and (key := file.read_text().strip()):
        return key
    # Hex: one base64 key in 64 begins with "-", which an environment takes for an option and exits.
    return secrets.token_hex(24)


def with_key_for_network(
    gateway: Mapping[str, Any] | None, run_dir: str | Path | None, atropos: Mapping[str, Any]
) -> dict[str, Any]:
    """The section ``gateway``, with a key where other machines reach it. (On the loopback it is made later.)"""
    gateway = dict(gateway or {})
    if not gateway.get("api_key") and not is_loopback(str(gateway.get("host") or "127.0.0.1")):
        gateway["api_key"] = gateway_key(run_dir, starts_environments=not atropos.get("api_url"))
    return gateway


def key_of(word: str) -> str:
    """The dotted key of a ``key=value`` word."""
    return word.split("=", 1)[0].lstrip("+~")


@contextmanager
def composition_errors(config_name: str = "") -> Iterator[None]:
    """What Hydra, OmegaConf and YAML raise for files and words of users becomes a ``ConfigError`` naming the key."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        inner = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        # Their further lines repeat the key and name a type.
        lines = [line.strip() for line in str(inner).strip().splitlines()]
        text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=")))
        if word := getattr(error, "override", None):
            text = f"{word.lstrip('+')!r} cannot be read: {lines[0]}"
        if "is not in struct" in text:
            text = "unknown key (--cfg shows all keys; + before it adds one of verl's own)"
        if found := re.search(r"Environment variable '(.+)' not found", text):
            text = f"environment variable {found[1]} is not set; set it, or give the key another value"
        raise ConfigError(text, str(getattr(inner, "full_key", None) or "")) from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{config_name} cannot be read: {' '.join(str(error).split())}") from None


def compose_with_hydra(config_dir: Path, config_name: str, words: Sequence[str]) -> Any:
    """The ``DictConfig`` of a file and words. Raises ``ConfigError`` without a file, and Hydra's and OmegaConf's."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    there = sorted(path.stem for path in config_dir.glob("*.yaml"))
    if config_name not in _SCHEMAS and not (config_dir / f"{config_name.removesuffix('.yaml')}.yaml").is_file():
        text = f"{config_dir} holds no {config_name}.yaml{did_you_mean(config_name, there)}"
        raise ConfigError(f"{text} (there are: {', '.join(there) or 'none'})", "--config-name")
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir.absolute()), version_base=None):
        return compose(config_name=config_name, overrides=list(words))


def built_on(config_dir: Path, config_name: str, depth: int = 8) -> Iterator[dict[str, Any]]:
    """A file's content and that of files that it builds on, the weakest last; what cannot be read is left out."""
    try:
        content = yaml.safe_load((config_dir / f"{config_name.removesuffix('.yaml')}.yaml").read_text())
    except (OSError, UnicodeError, yaml.YAMLError):
        return  # composing it gives the better message
    if isinstance(content, dict) and depth > 0:
        yield content
        for below in reversed(content.get("defaults") or ()):
            yield from built_on(config_dir, str(below), depth - 1)


def _compose(overrides: Sequence[str], config_dir: Path | None, config_name: str) -> dict[str, Any]:
    """A plain mapping, not yet validated: the schema says which keys there are. Environment variables are in it."""
    from hydra.core.config_store import ConfigStore

    keys = {check_form(word, "--help lists all keys") for word in overrides}
    words = [word if word.startswith("~") else f"++{word.lstrip('+')}" for word in overrides]
    if any(word.startswith("environments=") for word in overrides):  # all of them: those of the file go
        words.insert(0, "~environments")
    defaults = RunConfig().model_dump(mode="json")
    for key in _OF_THE_DEMO:  # null where neither the file nor a word sets it
        section, _, name = key.rpartition(".")
        (defaults[section] if section else defaults)[name] = None
    # Without environments: files name their own, and composing merges mappings.
    of_launch = {**LaunchConfig().model_dump(mode="json"), "environments": {}}
    for name, node in zip(_SCHEMAS, (defaults, {**defaults, **of_launch}), strict=True):
        ConfigStore.instance().store(name=name, node=node)
    with composition_errors(config_name):
        values = plain(compose_with_hydra(config_dir or SHIPPED, config_name, words))
    return apply_environment(values, command_line_keys=keys)


def plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)
    return values


def as_yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def check_form(word: str, advice: str) -> str:
    """The dotted key of ``word``. Raises ``ConfigError``, with ``advice``, when it is not of the form ``key=value``."""
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"{word!r} is not of the form key=value; {advice}")
    return key_of(word)


_SCRIPTS = ("main_atropos.py", "launch_atropos_verl.py")
_DRY_RUN = "\n  --dry-run            print every command and stop"
_HELP = """\
usage: {program} [--config-name NAME] [--config-dir DIR] [--cfg] [key=value ...]

{about}

  -h, --help           this text
  --config-name NAME   one of: {names}
  --config-dir DIR     another config directory
  --cfg                print the composed configuration and stop{more}

examples:
{examples}

environment variables (over the file, under key=value; keys given so do not show in ps):
  ATROPOS_API_URL, ATROPOS_TIMEOUT, ATROPOS_API_TOKEN, ATROPOS_GATEWAY_KEY

keys{of_what} (value in this configuration):
"""


def help_text(
    verb: str, about: str, examples: Sequence[str], rows: Sequence[Row], values: Mapping[str, Any], of_what: str = ""
) -> str:
    """The text of ``--help``: usage, examples of words for ``verb``, every key with meaning and value."""
    program = f"python {sys.argv[0]}" if Path(sys.argv[0]).name in _SCRIPTS else f"atropos-verl {verb}"
    known = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    of_launch = {name for name in known for file in built_on(SHIPPED, name) if _SCHEMAS[1] in file["defaults"]}
    names = ", ".join(name for name in known if verb == "launch" or name not in of_launch)
    shown = "\n".join(f"  {program} {words}" for words in examples)
    texts = {"about": about, "names": names, "examples": shown, "of_what": of_what}
    return _HELP.format(program=program, more=_DRY_RUN if verb == "launch" else "", **texts) + help_rows(rows, values)


def train_help(values: Mapping[str, Any]) -> str:
    """The text of ``--help`` of the local backend. ``values``: the composed configuration."""
    about = """\
Train a policy on Atropos environments. Without atropos.api_url everything needed is started on free
loopback ports: trajectory API, inference gateway, one environment. With it, only the gateway is."""
    examples = (
        "steps=100 optim.lr=3e-4 run_dir=runs/mine",
        "atropos.api_url=http://localhost:8000 gateway.port=9004 model.path=/models/my-model",
        "env.script=path/to/my_env.py group_size=4 batch_size=32",
    )
    return help_text("train", about, examples, describe(), values)
