"""Keys that a launch does not use: refused or named, never passed over in silence."""

from __future__ import annotations

from pydantic import BaseModel

from atropos_verl.config.launch_schema import ApiProcessConfig, LaunchConfig
from atropos_verl.config.schema import EnvConfig, EvalConfig, RunConfig
from atropos_verl.errors import ConfigError

__all__ = ["check_keys", "note_of_unused_keys", "unused_when_attached"]

_USED = ("max_batches_offpolicy",)
_EMBEDDED_ONLY = ("data_dir", "args")


def _changed(section: BaseModel, default: BaseModel) -> list[str]:
    """Names of the fields in which ``section`` differs from ``default``."""
    return [name for name in type(section).model_fields if getattr(section, name) != getattr(default, name)]


def unused_when_attached(config: RunConfig) -> list[str]:
    """Keys that are set and have no effect on a trainer whose API and environments run elsewhere. An evaluation that is
    switched off is none either way."""
    names = [f"env.{name}" for name in _changed(config.env, EnvConfig())]
    if config.eval.commands_file is None:
        changed = _changed(config.eval, EvalConfig())
        names += [f"eval.{name}" for name in changed if getattr(config.eval, name) is not False]
    return names


def note_of_unused_keys(config: RunConfig, prefix: str = "") -> str:
    """The same as a sentence for the user, or "". ``prefix`` is what the backend has before its keys."""
    unused = ", ".join(f"{prefix}{name}" for name in unused_when_attached(config))
    return unused and f"{unused}: not used, since atropos.api_url says that environments run elsewhere"


def check_keys(config: RunConfig, launch: LaunchConfig, *, own_api: bool) -> list[str]:
    """What to warn of.

    Raises:
        ConfigError: a key that only ``main_atropos.py`` reads, or only the other API.
    """
    for name in _changed(config.env, EnvConfig()):
        if name not in _USED:
            raise ConfigError(
                "main_atropos.py reads this key; a launch describes its environments under environments.NAME "
                f"(environments.demo.{name}=...)",
                f"env.{name}",
            )
    api = _changed(launch.api, ApiProcessConfig())
    if own_api and config.atropos.server == "upstream":
        for name in api:
            if name in _EMBEDDED_ONLY:
                raise ConfigError("the embedded API has it, atropos.server=upstream does not", f"api.{name}")
    if api and not own_api and launch.only is None:
        keys = ", ".join(f"api.{name}" for name in api)
        return [f"{keys}: not used, since atropos.api_url names an API that runs already"]
    return []
