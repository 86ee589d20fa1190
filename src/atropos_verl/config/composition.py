"""Command line → ``RunConfig``: Hydra composes the YAML and the ``key=value`` overrides, the schema validates."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atropos_verl.config.schema import RunConfig, apply_environment, describe
from atropos_verl.errors import ConfigError

__all__ = ["compose_values", "help_text", "load_config"]

_OPEN_SECTIONS = ("atropos.headers", "model.override_config")
"""Keys whose value is a dictionary with keys of the user's own."""


def load_config(overrides: Sequence[str], config_dir: Path | None = None, config_name: str | None = None) -> RunConfig:
    """Compose and validate.

    Precedence, weakest first: schema defaults, the YAML file, environment variables, the command line.

    Args:
        overrides: Hydra's ``key=value`` words.
        config_dir, config_name: the YAML file; without them the schema's defaults are the file.

    Raises:
        ConfigError: names the key.
    """
    keys = frozenset(word.split("=", 1)[0].lstrip("+~") for word in overrides)
    values = compose_values(overrides, config_dir, config_name or "atropos_schema")
    values = apply_environment(values, command_line_keys=keys)
    return RunConfig.from_mapping(values)


def compose_values(
    overrides: Sequence[str],
    config_dir: Path | None,
    config_name: str,
    *,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    extra_keys: Sequence[str] = (),
    open_sections: Sequence[str] = (),
) -> dict[str, Any]:
    """Compose a YAML file and ``key=value`` words into a plain mapping, not yet validated.

    Args:
        schemas: further defaults that files can name, beside ``atropos_schema``.
        extra_keys: dotted keys that the command line may set beside those of ``RunConfig``.
        open_sections: sections in which it may set any key.

    Raises:
        ConfigError: an unknown key, or a file that cannot be composed.
    """
    known = [*(name for name, *_ in describe()), *extra_keys]
    sections = (*_OPEN_SECTIONS, *open_sections)
    for word in overrides:
        _check_override(word, known, sections)
    return _compose(list(overrides), config_dir, config_name, schemas or {}, sections)


def _check_override(word: str, known: Sequence[str], sections: Sequence[str]) -> None:
    key = word.split("=", 1)[0].lstrip("+~")
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"{word!r} is not of the form key=value; --help lists all keys")
    if key not in known and not key.startswith(tuple(f"{section}." for section in sections)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown key{hint} (--help lists all keys)", key)


def _compose(
    overrides: list[str],
    config_dir: Path | None,
    config_name: str,
    schemas: Mapping[str, Mapping[str, Any]],
    sections: Sequence[str],
) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="atropos_schema", node=RunConfig().model_dump(mode="json"))
    for name, node in schemas.items():
        ConfigStore.instance().store(name=name, node=dict(node))
    directory = (config_dir or Path(__file__).parent).absolute()
    words = [_allow_new_keys(word, sections) for word in overrides]
    _check_syntax(words)
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(directory), version_base=None):
            composed = compose(config_name=config_name, overrides=words)
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{str(error).strip()}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_syntax(words: list[str]) -> None:
    """Hydra's parser says where in a word it stumbled, but not in which word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for word in words:
        try:
            parser.parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word!r} cannot be read: {str(error).splitlines()[0]}") from None


def _allow_new_keys(word: str, sections: Sequence[str]) -> str:
    """``model.override_config.x=1`` adds a key; Hydra wants ``++`` for that, users should not have to."""
    return f"++{word}" if word.startswith(tuple(f"{section}." for section in sections)) else word


def help_text(program: str) -> str:
    """What ``--help`` prints: usage, every key with type, default and meaning, and some examples."""
    rows = [
        (name, kind, "null" if default is None else json.dumps(default), text)
        for name, kind, default, text in describe()
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"usage: {program} [--config-name NAME] [--config-dir DIR] [--cfg] [key=value ...]",
        "",
        "Train a policy on Atropos environments. Without atropos.api_url everything needed is started on free",
        "loopback ports: trajectory API, inference gateway, one environment. With it, only the gateway is.",
        "",
        "  -h, --help           this text",
        "  --config-name NAME   which YAML of the config directory (default: atropos)",
        "  --config-dir DIR     another config directory",
        "  --cfg                print the composed configuration and stop",
        "",
        "examples:",
        f"  {program}",
        f"  {program} steps=100 optim.lr=3e-4 run_dir=runs/mine",
        f"  {program} atropos.api_url=http://localhost:8000 gateway.port=9004 model.path=/models/my-model",
        f"  {program} env.script=path/to/my_env.py group_size=4 batch_size=32",
        "",
        "environment variables (over the file, under key=value; keys given so do not show in ps):",
        "  ATROPOS_API_URL, ATROPOS_TIMEOUT, ATROPOS_API_TOKEN, ATROPOS_GATEWAY_KEY",
        "",
        "keys (default):",
    ]
    lines += [f"  {name:<{width}}  {text} ({default})" for name, _, default, text in rows]
    return "\n".join(lines)
