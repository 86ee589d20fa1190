"""Run the API: ``serve`` in this thread until a signal, ``TrajectoryServer`` in a thread of its own."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import signal
import socket
import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.server.app import TrajectoryApi, create_app
from atropos_verl.server.auth import is_loopback
from atropos_verl.server.delivery import protocol_class
from atropos_verl.server.settings import ServerSettings

if TYPE_CHECKING:
    import uvicorn

__all__ = ["JsonFormatter", "TrajectoryServer", "check_bind", "serve"]

logger = logging.getLogger(__name__)

_SERVICE = "trajectory API"
_BACKLOG = 2048
_KEEP_ALIVE_TIMEOUT = 75
"""Seconds an idle connection is kept: longer than clients' pools keep it, so that no request meets a closing one."""
_GRACEFUL_SHUTDOWN = 10
"""Seconds that running requests are given at the end."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``mallopt(3)``."""
_KEPT_BYTES = 32 * 2**20
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as ``extra``."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update({name: value for name, value in record.__dict__.items() if name not in self._STANDARD})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def check_bind(host: str, settings: ServerSettings, *, insecure: bool = False) -> ServerSettings:
    """The settings for listening on ``host``; on the loopback without a token, only by the loopback's names.

    Raises:
        ConfigError: a public address without a token.
    """
    if is_loopback(host):
        if settings.token is None and not settings.allowed_hosts:
            return replace(settings, allowed_hosts=(*_LOOPBACK_NAMES, host))
        if settings.token is None:
            return replace(settings, allowed_hosts=(*_LOOPBACK_NAMES, host, *settings.allowed_hosts))
        return settings
    if settings.token is None and not insecure:
        raise ConfigError(
            f"{host} is reached from other machines: give --token (or ATROPOS_API_TOKEN), "
            "or --insecure when the network itself keeps strangers out",
            "host",
        )
    return settings


def serve(settings: ServerSettings, host: str = "127.0.0.1", port: int = 8000, *, insecure: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Requests that run then are given 10 seconds.

    Raises:
        ConfigError: a public address without a token.
        ServiceError: the port is taken.
        LogDamagedError, LogWriteError: the data directory cannot be used.
    """
    import uvicorn

    settings = check_bind(host, settings, insecure=insecure)
    _keep_freed_memory()
    listener = _listen(host, port)
    app = create_app(settings)
    where = f"http://{_bracketed(host)}:{listener.getsockname()[1]}"
    kept = f"kept in {settings.data_dir}" if settings.data_dir else "IN MEMORY ONLY: a restart forgets everything"
    logger.info("serving at %s, data %s", where, kept, extra={"event": "serving", "url": where})
    if settings.token is None and not is_loopback(host):
        logger.warning("%s has no token: whoever reaches this address can read and write", where)
    server = uvicorn.Server(_config(app))
    # uvicorn handles both signals, and raises the one it got again once it has shut down: nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except KeyboardInterrupt:
        logger.debug("interrupted")
    finally:
        app.close()
    logger.info("stopped", extra={"event": "stopped"})


class TrajectoryServer:
    """The API in its own thread and event loop. Also a context manager. ``port`` 0 takes a free one."""

    def __init__(self, settings: ServerSettings | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self._settings = check_bind(host, settings or ServerSettings())
        self._host, self._port = host, port
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None
        self._failure: BaseException | None = None
        self.app: TrajectoryApi | None = None
        self.url = ""
        """``http://host:port``, once started."""

    def start(self, timeout: float = 10.0) -> str:
        """Listen; returns the URL once requests are answered.

        Raises:
            ServiceError: the port is taken, or no answer within ``timeout`` seconds.
            LogDamagedError, LogWriteError: the data directory cannot be used.
        """
        import uvicorn

        listener = _listen(self._host, self._port)
        try:
            self.app = create_app(self._settings)
        except BaseException:
            listener.close()
            raise
        self._port = listener.getsockname()[1]
        self.url = f"http://{_bracketed(self._host)}:{self._port}"
        self._server = uvicorn.Server(_config(self.app))
        self._thread = threading.Thread(
            target=self._run, args=(self._server, listener), name="trajectory-api", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + timeout
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise ServiceError(f"{_SERVICE}: not serving after {timeout} s: {self._failure!r}", _SERVICE)
            time.sleep(0.005)
        return self.url

    def stop(self, timeout: float = 10.0) -> None:
        """Stop listening and close the log; running requests are given ``timeout`` seconds. Idempotent."""
        if self._thread is None or self._server is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, int(timeout / 2))
        self._server.should_exit = True
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise ServiceError(f"{_SERVICE}: its thread did not end within {timeout} s; is a request stuck?", _SERVICE)
        self._thread = self._server = None

    def __enter__(self) -> TrajectoryServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except (Exception, SystemExit) as error:  # the thread's boundary; start() and the log report it
            self._failure = error
            logger.error("%s: the server thread failed", _SERVICE, exc_info=error)
        finally:
            listener.close()
            if self.app is not None:
                self.app.close()


def _keep_freed_memory() -> None:
    """Let glibc keep what one request frees for the next: given back and fetched again, its pages took a third of the
    time in which a long body is received. For a process of its own; does nothing under another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _config(app: TrajectoryApi) -> Any:
    import uvicorn

    return uvicorn.Config(
        app,
        http=protocol_class(app.connections),
        # asyncio's transports say how a connection ended, which decides whether a batch arrived.
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN,
        backlog=_BACKLOG,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rebind at once after a restart
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"{_SERVICE}: cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        raise ServiceError(reason, _SERVICE) from error
    return listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
