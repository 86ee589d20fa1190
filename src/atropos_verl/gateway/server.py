"""Serves the gateway's application from a thread of this process: the trainer's main thread stays free."""

from __future__ import annotations

import socket
from typing import Any

from atropos_verl.http_thread import ServerThread

__all__ = ["GatewayServer"]


class GatewayServer(ServerThread):
    """``host``: interface to listen on, the loopback unless told otherwise. ``port`` 0 takes a free one.
    ``listener``: a socket that listens there already."""

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, listener: socket.socket | None = None) -> None:
        super().__init__(
            app,
            service="inference gateway",
            advice="Set gateway.port to a free port, or to 0 to take any.",
            host=host,
            port=port,
            listener=listener,
            lifespan="off",
        )
