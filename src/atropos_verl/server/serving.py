"""Run the API: ``serve`` in this thread until a signal, ``TrajectoryServer`` in a thread of its own."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import signal
from dataclasses import replace
from typing import Any

from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import ServerThread, bracketed, listen, uvicorn_config
from atropos_verl.server.app import TrajectoryApi, create_app
from atropos_verl.server.auth import is_loopback
from atropos_verl.server.delivery import protocol_class
from atropos_verl.server.receiving import LONGEST_HOLD
from atropos_verl.server.settings import ServerSettings

__all__ = ["JsonFormatter", "TrajectoryServer", "check_bind", "serve"]

logger = logging.getLogger(__name__)

_SERVICE = "trajectory API"
_ADVICE = "Choose another --port."
_GRACEFUL_SHUTDOWN = 10
"""Seconds that running requests are given at the end."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of ``mallopt(3)``."""
_LARGEST_FROM_HEAP = 32 * 2**20
"""The most that glibc takes."""
_KEPT_BYTES = 256 * 2**20
"""A few batches of long sequences: each is freed as a whole, and another comes in its place."""
_HEAP_STEP = 4 * 2**20
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
    listener = listen(host, port, _SERVICE, _ADVICE)
    app = create_app(settings)
    where = f"http://{bracketed(host)}:{listener.getsockname()[1]}"
    kept = f"kept in {settings.data_dir}" if settings.data_dir else "IN MEMORY ONLY: a restart forgets everything"
    logger.info("serving at %s, data %s", where, kept, extra={"event": "serving", "url": where})
    if settings.token is None and not is_loopback(host):
        logger.warning("%s has no token: whoever reaches this address can read and write", where)
    server = uvicorn.Server(uvicorn_config(app, **_options(app)))
    # uvicorn handles both signals, and raises the one it got again once it has shut down: nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except KeyboardInterrupt:
        logger.debug("interrupted")
    finally:
        app.close()
    logger.info("stopped", extra={"event": "stopped"})


class TrajectoryServer(ServerThread):
    """The API in its own thread and event loop. Also a context manager. ``port`` 0 takes a free one."""

    def __init__(self, settings: ServerSettings | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(None, service=_SERVICE, advice=_ADVICE, host=host, port=port)
        self._settings = check_bind(host, settings or ServerSettings())
        self.app: TrajectoryApi | None = None

    def make_app(self) -> TrajectoryApi:
        """Opens the data directory. Raises ``LogDamagedError``, ``LogWriteError`` when it cannot be used."""
        self.app = create_app(self._settings)
        self._options = _options(self.app)
        return self.app

    def on_end(self) -> None:
        if self.app is not None:
            self.app.close()


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next: given back to the system and fetched again, the pages of a long
    body took a tenth of its POST. For a process of its own; does nothing under another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, _HEAP_STEP)


def _options(app: TrajectoryApi) -> dict[str, Any]:
    return {
        "http": protocol_class(app.connections, min(LONGEST_HOLD, app.store.settings.body_timeout / 4)),
        # asyncio's transports say how a connection ended, which decides whether a batch arrived.
        "loop": "asyncio",
        "lifespan": "on",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": _GRACEFUL_SHUTDOWN,
    }
