"""Serves an ASGI application from a thread of this process: the main thread stays free."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from atropos_verl.errors import ServiceError

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

_PROBE_INTERVAL = 0.005
_PROBE_TIMEOUT = 2.0
_KEEP_ALIVE_TIMEOUT = 75
"""Seconds an idle connection is kept: longer than a client's pool keeps it, so that no request meets a closing one."""
_BACKLOG = 2048
"""Connections waiting to be accepted: environments open up to 576 at once each."""


class ServerThread:
    """uvicorn in its own thread and event loop, for an application that answers ``GET /health``.

    Also a context manager (start / stop). It can be started again after ``stop``, on the same port.

    Args:
        app: the application.
        service: its name in messages; ``advice``: what to do when the port is taken.
        port: 0 takes a free one.
        listener: listens there already, for the first start: who connects before waits in it. The server closes it.
        options: for ``uvicorn.Config``.
    """

    def __init__(
        self,
        app: Any,
        *,
        service: str,
        advice: str,
        host: str,
        port: int,
        listener: socket.socket | None = None,
        **options: Any,
    ) -> None:
        self._app, self._options = app, options
        self._service, self._advice = service, advice
        self._host, self._port, self._listener = host, port, listener
        self._was_started = False
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` without a path, to be called from this machine. Raises ``ServiceError`` before start."""
        if not self._was_started:
            raise ServiceError(f"{self._service}: not started; call start() first", self._service)
        return f"http://{bracketed(reachable(self._host))}:{self._port}"

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, timeout: float = 10.0) -> str:
        """Listen, and return ``url`` once GET /health answers 200. Starting a running server returns its url.

        Raises ``ServiceError`` when the port is taken, or when the application fails to start or does not answer within
        ``timeout`` seconds.
        """
        import uvicorn

        if self.is_running:
            return self.url
        listener, self._listener = self._listener, None
        if listener is None:
            listener = listen(self._host, self._port, self._service, self._advice)
        self._server = server = uvicorn.Server(uvicorn_config(self._app, **self._options))
        self._port, self._was_started, self._failure = int(listener.getsockname()[1]), True, None
        name = self._service.replace(" ", "-")
        self._thread = threading.Thread(target=self._serve, args=(server, listener), name=name, daemon=True)
        self._thread.start()
        try:
            self._wait_until_serving(timeout)
        except ServiceError:
            self.stop(timeout=_PROBE_TIMEOUT)
            raise
        logger.info("%s: serving at %s", self._service, self.url)
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
            text = f"{self._service}: its thread did not end within {timeout} s; is a request stuck?"
            raise ServiceError(text, self._service)
        self._thread = self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except (Exception, SystemExit) as error:  # the thread's boundary; start() and the log report it
            self._failure = error
            logger.error("%s: the server thread failed", self._service, exc_info=error)
        finally:
            listener.close()

    def _wait_until_serving(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if not self.is_running:
                text = f"{self._service}: failed to start: {self._failure!r}"
                raise ServiceError(text, self._service) from self._failure
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(reachable(self._host), self._port, timeout=_PROBE_TIMEOUT)
                with contextlib.closing(connection):
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        return
            if time.monotonic() > deadline:
                text = f"{self._service}: no answer from {self.url}/health within {timeout} s of starting"
                raise ServiceError(f"{text} (start timeout)", self._service)
            time.sleep(_PROBE_INTERVAL)


async def disconnected(receive: Any) -> None:
    """Returns when the client of an ASGI request goes away (or when its response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


def uvicorn_config(app: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's settings that every server of this project shares."""
    import uvicorn

    return uvicorn.Config(
        app,
        log_config=None,  # uvicorn's loggers propagate to the application's logging like everybody else's
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_TIMEOUT,
        backlog=_BACKLOG,
        ws="none",
        **options,
    )


def listen(host: str, port: int, service: str, advice: str) -> socket.socket:
    """A listening socket: a second process learns here, and not later, that the port is taken.

    Raises ``ServiceError`` with address, cause and ``advice``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rebind at once after a restart
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"{service}: cannot listen on {host}:{port}: {error.strerror or error}. {advice}"
        raise ServiceError(reason, service) from error
    return listener


def bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def reachable(host: str) -> str:
    """An address of this machine for a wildcard one."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
