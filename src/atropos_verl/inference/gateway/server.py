"""Serves an ASGI application from a thread of this process: the trainer's main thread stays free."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from atropos_verl.errors import ServiceError

if TYPE_CHECKING:
    import uvicorn

__all__ = ["GatewayServer"]

logger = logging.getLogger(__name__)

_SERVICE = "inference gateway"
_PROBE_INTERVAL = 0.02
_PROBE_TIMEOUT = 2.0
_KEEP_ALIVE_TIMEOUT = 75
"""Seconds an idle connection is kept: longer than a client's pool keeps it, so that no request meets a closing one."""
_BACKLOG = 2048
"""Connections waiting to be accepted: environments open up to 576 at once each."""


class GatewayServer:
    """uvicorn in its own thread and event loop.

    ``host``: interface to listen on, the loopback unless told otherwise. ``port`` 0 takes a free one. Signal handlers
    stay the main thread's. Also a context manager (start / stop). A server can be started again after ``stop``.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._bound_port = 0
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` without a path, to be called from this machine. Raises ``ServiceError`` before start."""
        if self._thread is None:
            raise ServiceError(f"{_SERVICE}: not started; call start() first", _SERVICE)
        return f"http://{_bracketed(_reachable(self._host))}:{self._bound_port}"

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, timeout: float = 10.0) -> str:
        """Listen, and return ``url`` once GET /health answers 200.

        Raises ``ServiceError`` when the port is taken (naming ``gateway.port``), when the application fails to start,
        or when it does not answer within ``timeout`` seconds. Starting a running server returns its url.
        """
        import uvicorn

        if self.is_running:
            return self.url
        listener = self._listen()
        self._bound_port = int(listener.getsockname()[1])
        self._failure = None
        config = uvicorn.Config(
            self._app,
            log_config=None,  # uvicorn's loggers propagate to the application's logging like everybody else's
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_TIMEOUT,
            backlog=_BACKLOG,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._serve, args=(self._server, listener), name="inference-gateway", daemon=True
        )
        self._thread.start()
        try:
            self._wait_until_serving(timeout)
        except ServiceError:
            self.stop(timeout=_PROBE_TIMEOUT)
            raise
        logger.info("%s: serving at %s", _SERVICE, self.url)
        return self.url

    def stop(self, timeout: float = 10.0) -> None:
        """Stop listening, let running requests finish for half of ``timeout`` seconds, then cancel them.

        Idempotent. Raises ``ServiceError`` when the thread has not ended within ``timeout`` seconds.
        """
        thread, server = self._thread, self._server
        if thread is None or server is None:
            return
        server.config.timeout_graceful_shutdown = max(timeout / 2, 0.1)
        server.should_exit = True
        thread.join(timeout)
        if thread.is_alive():
            server.force_exit = True
            thread.join(1.0)
        if thread.is_alive():
            raise ServiceError(f"{_SERVICE}: its thread did not end within {timeout} s; is a request stuck?", _SERVICE)
        self._thread = self._server = None

    def __enter__(self) -> GatewayServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rebind at once after a restart
        try:
            listener.bind((self._host, self._port))
            listener.listen(_BACKLOG)  # now, so that a second process learns here that the port is taken
        except OSError as error:
            listener.close()
            raise ServiceError(
                f"{_SERVICE}: cannot listen on {self._host}:{self._port}: {error.strerror or error}. "
                "Set gateway.port to a free port, or to 0 to take any.",
                _SERVICE,
            ) from error
        return listener

    def _serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except (Exception, SystemExit) as error:  # the thread's boundary; start() and the log report it
            self._failure = error
            logger.error("%s: the server thread failed", _SERVICE, exc_info=error)
        finally:
            listener.close()

    def _wait_until_serving(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if not self.is_running:
                raise ServiceError(f"{_SERVICE}: failed to start: {self._failure!r}", _SERVICE) from self._failure
            if self._probe():
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{_SERVICE}: no answer from {self.url}/health within {timeout} s of starting (start timeout)",
                    _SERVICE,
                )
            time.sleep(_PROBE_INTERVAL)

    def _probe(self) -> bool:
        connection = http.client.HTTPConnection(_reachable(self._host), self._bound_port, timeout=_PROBE_TIMEOUT)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _reachable(host: str) -> str:
    """An address of this machine for a wildcard one."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
