"""``atropos-verl serve-api``: runs the API until a signal."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from atropos_verl.errors import AtroposVerlError, ConfigError
from atropos_verl.http_thread import bracketed, is_loopback, listen, uvicorn_config
from atropos_verl.server.app import TrajectoryApi
from atropos_verl.server.settings import COMPRESSIONS, SECOND_TRAINER, ServerSettings

logger = logging.getLogger(__name__)

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as ``extra``."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname, "logger": record.name}
        fields["message"] = record.getMessage()
        fields |= {name: value for name, value in record.__dict__.items() if name not in self._STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def check_bind(host: str, settings: ServerSettings, *, insecure: bool = False) -> ServerSettings:
    """The settings for listening on ``host``; on the loopback, only by the loopback's names. Raises ``ConfigError`` for
    a public address without a token."""
    if is_loopback(host):
        return replace(settings, allowed_hosts=(*_LOOPBACK_NAMES, host, *settings.allowed_hosts))
    if settings.token is None and not insecure:
        text = f"{host} is reached from other machines: give --token (or ATROPOS_API_TOKEN), or --insecure if only"
        raise ConfigError(f"{text} trusted machines reach it", "host")
    return settings


def serve(settings: ServerSettings, host: str = "127.0.0.1", port: int = 8000, *, insecure: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Requests that run then are given 10 seconds.

    Raises ``ConfigError`` (a public address without a token, a data directory of 0.1.0), ``ServiceError`` (the port is
    taken), ``StorageError``.
    """
    import uvicorn

    settings = check_bind(host, settings, insecure=insecure)
    listener = listen(host, port, "trajectory API", "Choose another --port.")
    app = TrajectoryApi(settings)
    where = f"http://{bracketed(host)}:{listener.getsockname()[1]}"
    kept = f"kept in {settings.data_dir}" if settings.data_dir else "IN MEMORY ONLY: a restart forgets everything"
    logger.info("serving at %s, data %s", where, kept, extra={"event": "serving", "url": where})
    if settings.token is None and not is_loopback(host):
        logger.warning("%s has no token: everybody who reaches this address can read and write", where)
    server = uvicorn.Server(uvicorn_config(app, listener, **uvicorn_options(app)))
    # uvicorn handles both signals, and raises the one it got again once it has shut down: nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except KeyboardInterrupt:
        logger.debug("interrupted")
    finally:
        app.store.close()
    logger.info("stopped", extra={"event": "stopped"})


def uvicorn_options(app: TrajectoryApi) -> dict[str, Any]:
    """What the API needs beside ``uvicorn_config``'s own settings."""
    return {
        "connections": app.connections,
        "lifespan": "on",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": 10,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve-api``. Defaults are those of ``ServerSettings``."""
    known, add = ServerSettings(), parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    add("--data-dir", type=Path, help="keep everything here, so that a restart loses nothing (default: in memory)")
    add("--fsync", action="store_true", help="wait for the disk before each answer: safe against power loss, too")
    add(
        "--token",
        default=os.environ.get("ATROPOS_API_TOKEN") or None,
        help="bearer token that clients must send (default: $ATROPOS_API_TOKEN)",
    )
    add("--insecure", action="store_true", help="allow a public --host without a token")
    append: dict[str, Any] = {"action": "append", "default": []}
    add("--cors-origin", dest="cors_origins", **append, help="web origin that may call (repeat; '*': any)")
    add("--allowed-host", dest="allowed_hosts", **append, help="further Host name to answer to on the loopback")
    add("--no-get-reset", dest="allow_get_reset", action="store_false", help="allow /reset_data by POST only")
    add("--second-trainer", choices=SECOND_TRAINER, default=known.second_trainer, help="while one is active")
    add("--env-timeout", type=float, default=known.env_timeout, help="silent seconds until an environment is gone")
    add("--dedupe-window", type=float, default=known.dedupe_window, help="seconds in which a repeated group is dropped")
    add("--max-queue-groups", type=int, default=known.max_queue_groups)
    add("--max-queue-bytes", type=int, default=known.max_queue_bytes)
    add("--max-body-bytes", type=int, default=known.max_body_bytes, help="longest body as sent")
    add("--max-inflated-bytes", type=int, default=known.max_inflated_bytes, help="longest body once inflated")
    add("--max-bytes-at-once", type=int, default=known.max_bytes_at_once, help="of all requests being read")
    add("--compression", choices=COMPRESSIONS, default=known.compression, help="auto: not to this machine")
    add("--strict", action="store_true", help="check lengths of per-token extras of anonymous groups, too")
    add("--log-format", choices=("text", "json"), default="text")


def run(options: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit code: 0, or with the reason in the log 2 (configuration) or 1."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        values = {field.name: getattr(options, field.name) for field in fields(ServerSettings) if field.name in options}
        serve(ServerSettings(**values), options.host, options.port, insecure=options.insecure)
    except AtroposVerlError as error:
        logger.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
