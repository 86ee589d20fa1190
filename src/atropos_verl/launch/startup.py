"""What is settled before torch is imported, so that a wrong setting is an answer in half a second, not in five."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import listen

__all__ = ["gateway_listener", "is_rank_zero", "resolve_model_path"]


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


def gateway_listener(config: RunConfig) -> socket.socket:
    """The gateway's socket, listening from now on: the caller closes it, or the gateway that serves it.

    The gateway itself comes up only when the policy is loaded. A port that is taken shall not cost that wait, and an
    environment that asks for something before is not refused: it waits.

    Raises:
        ServiceError: ``gateway.host``:``gateway.port`` cannot be listened on.
    """
    advice = "Set gateway.port to a free port, or to 0 to take any."
    return listen(config.gateway.host, config.gateway.port, "inference gateway", advice)
