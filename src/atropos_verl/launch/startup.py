"""What is settled before torch is imported, so that a wrong setting is an answer in half a second, not in five."""

from __future__ import annotations

import os
import socket

from atropos_verl.config.schema import RunConfig
from atropos_verl.http_thread import listen

__all__ = ["gateway_listener", "is_rank_zero"]


def is_rank_zero() -> bool:
    """True in a plain process and in rank 0 of torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def gateway_listener(config: RunConfig) -> socket.socket:
    """The gateway's socket, listening from now on: the caller closes it, or the gateway that serves it.

    The gateway itself comes up only when the policy is loaded. A port that is taken shall not cost that wait, and an
    environment that asks for something before is not refused: it waits.

    Raises:
        ServiceError: ``gateway.host``:``gateway.port`` cannot be listened on.
    """
    advice = "Set gateway.port to a free port, or to 0 to take any."
    return listen(config.gateway.host, config.gateway.port, "inference gateway", advice)
