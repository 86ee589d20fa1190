"""What is settled before torch is imported, so that a wrong setting is an answer in half a second, not in five."""

from __future__ import annotations

import os
from pathlib import Path

from atropos_verl.config import RunConfig
from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.launch.readiness import try_to_listen

__all__ = ["check_gateway_port", "is_rank_zero", "resolve_model_path"]


def is_rank_zero() -> bool:
    """True in a plain process and in rank 0 of torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def resolve_model_path(config: RunConfig) -> Path:
    """The model directory. Raises ``ConfigError`` naming ``model.path`` when it is not one."""
    if config.model.path is None:
        from atropos_verl.assets import demo_model_path

        return demo_model_path()
    path = Path(config.model.path).expanduser()
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a Hugging Face model directory (no config.json in it)", "model.path")
    return path.absolute()


def check_gateway_port(config: RunConfig) -> None:
    """Raises ``ServiceError`` when ``gateway.host``:``gateway.port`` cannot be listened on at this moment.

    The gateway itself comes up only when the policy is loaded; a port that is taken shall not cost that wait.
    """
    host, port = config.gateway.host, config.gateway.port
    try:
        try_to_listen(host, port)
    except OSError as error:
        raise ServiceError(
            f"inference gateway: cannot listen on {host}:{port}: {error.strerror or error}. "
            "Set gateway.port to a free port, or to 0 to take any.",
            "inference gateway",
        ) from error
