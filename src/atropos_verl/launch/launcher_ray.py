"""A launch with ``backend=ray``: the keys of a launch beside verl's own, and the trainer's command.

The trainer is ``main_atropos.py backend=ray``, attached to the API of the launch, so every key of verl's ppo_trainer is
set under its own name; words and sections that belong to ``LaunchConfig`` are taken out. Imports no torch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.config.verl_keys import RAY_DEFAULT, compose_run, read_run
from atropos_verl.errors import ConfigError
from atropos_verl.launch.spec import TrainerProgram

__all__ = ["RayLaunch", "backend_of", "is_launch_key", "load_ray_launch"]

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+-]*")


@dataclass(frozen=True, slots=True)
class RayLaunch:
    """What a command line means with ``backend=ray``."""

    config: RunConfig
    """The run in the local backend's words: what environments, API and supervisor need to know."""
    launch: LaunchConfig
    verl: dict[str, Any]
    """Every composed key, verl's own among them."""
    config_dir: Path
    config_name: str
    words: tuple[str, ...]
    """Those of the trainer."""

    def program(self, config: RunConfig, model_path: Path) -> TrainerProgram:
        """The trainer's command for ``config`` (addresses filled in), relative paths made absolute."""
        settings = {
            "run_dir": config.run_dir,
            "actor_rollout_ref.model.path": str(model_path),
            "atropos.gateway.port": config.gateway.port,
            "atropos.gateway.advertise_url": config.gateway.advertise_url,
            "atropos.eval.commands_file": config.eval.commands_file,
        }
        own = tuple(f"{key}={_quoted(value)}" for key, value in settings.items() if value is not None)
        given = tuple(word for word in self.words if word.split("=", 1)[0].lstrip("+") not in settings)
        place = ("--config-dir", str(self.config_dir.absolute()), "--config-name", self.config_name)
        return TrainerProgram(
            words=("-m", "atropos_verl.backends.ray", *place, *given, *own),
            restart_words=("trainer.resume_mode=auto",),
            settings_file=False,
        )


def is_launch_key(word: str) -> bool:
    """Whether a ``key=value`` word belongs to the launch; the others are the trainer's."""
    return re.split(r"[.=@]", word.lstrip("+~"), maxsplit=1)[0] in LaunchConfig.model_fields


def backend_of(words: Sequence[str], config_dir: Path | None, config_name: str | None) -> str:
    """``local`` or ``ray``: as a word says, else the file or one that it builds on, else local."""
    for word in reversed(words):
        if word.startswith("backend="):
            return word.partition("=")[2]
    return _backend_in(config_dir, config_name) or "local"


def load_ray_launch(words: Sequence[str], config_dir: Path, config_name: str | None) -> RayLaunch:
    """Compose and validate.

    Raises:
        ConfigError: names the key.
    """
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    name = config_name or RAY_DEFAULT
    own = tuple(word for word in words if not is_launch_key(word))
    # A file need not have the launch's sections, so its words may add what it lacks.
    of_launch = [f"++{word.lstrip('+')}" for word in words if is_launch_key(word) and not word.startswith("backend=")]
    try:
        composed = compose_run([*own, *of_launch], config_dir, name)
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split()), str(getattr(error, "full_key", "") or name)) from None
    assert isinstance(values, dict)
    verl = {str(key): value for key, value in values.items()}
    sections = {key: verl.pop(key) for key in LaunchConfig.model_fields if key in verl}
    launch = LaunchConfig.from_mapping({**sections, "backend": "ray"})
    if launch.trainer_process.nproc > 1:
        raise ConfigError("Ray places the workers: trainer.n_gpus_per_node, trainer.nnodes", "trainer_process.nproc")
    if launch.starts("trainer") and not composed.atropos.gateway.get("api_key"):
        with open_dict(composed):
            composed.atropos.gateway.api_key = secrets.token_hex(24)
    config = read_run(composed).run
    return RayLaunch(config, launch, verl, config_dir, name, own)


def _backend_in(config_dir: Path | None, config_name: str | None, depth: int = 8) -> str | None:
    import yaml

    if config_dir is None or config_name is None or depth == 0:
        return None
    try:
        content = yaml.safe_load((config_dir / f"{config_name.removesuffix('.yaml')}.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None  # composing it gives the better message
    if not isinstance(content, dict):
        return None
    if content.get("backend"):
        return str(content["backend"])
    below = [item for item in content.get("defaults") or () if isinstance(item, str) and item != "_self_"]
    found = (_backend_in(config_dir, item, depth - 1) for item in reversed(below))
    return next((backend for backend in found if backend), None)


def _quoted(value: object) -> str:
    """As Hydra's grammar reads it back."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
