"""``atropos-verl serve-api``: arguments to settings, then serve."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from atropos_verl.errors import AtroposVerlError
from atropos_verl.server.serving import JsonFormatter, serve
from atropos_verl.server.settings import COMPRESSIONS, SECOND_TRAINER, ServerSettings

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve-api``. Defaults are those of ``ServerSettings``."""
    known = ServerSettings()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    add("--data-dir", type=Path, help="keep everything here, so that a restart loses nothing (default: in memory)")
    add("--fsync", action="store_true", help="wait for the disk before each answer: safe against power loss, too")
    add("--token", help="bearer token that clients must send (default: $ATROPOS_API_TOKEN; none: no check)")
    add("--insecure", action="store_true", help="allow a public --host without a token")
    add("--cors-origin", action="append", default=[], help="web origin that may call (repeat; '*': any; default: none)")
    add("--allowed-host", action="append", default=[], help="further Host name to answer to, without a token")
    add("--no-get-reset", action="store_true", help="allow /reset_data by POST only")
    add("--second-trainer", choices=SECOND_TRAINER, default=known.second_trainer, help="while one is active")
    add("--env-timeout", type=float, default=known.env_timeout, help="silent seconds until an environment is gone")
    add("--dedupe-window", type=float, default=known.dedupe_window, help="seconds in which a repeated group is dropped")
    add("--max-queue-groups", type=int, default=known.max_queue_groups)
    add("--max-queue-bytes", type=int, default=known.max_queue_bytes)
    add("--max-body-bytes", type=int, default=known.max_body_bytes, help="longest body as sent")
    add("--max-inflated-bytes", type=int, default=known.max_inflated_bytes, help="longest body once inflated")
    add("--compression", choices=COMPRESSIONS, default=known.compression, help="auto: not to this machine")
    add("--strict", action="store_true", help="check lengths of per-token extras of anonymous groups, too")
    add("--log-format", choices=("text", "json"), default="text")


def run(options: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit code: 0, or 1 with the reason in the log."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        serve(_settings(options), options.host, options.port, insecure=options.insecure)
    except AtroposVerlError as error:
        logger.error("%s", error)
        return 1
    return 0


def _settings(options: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        data_dir=options.data_dir,
        fsync=options.fsync,
        token=options.token or os.environ.get("ATROPOS_API_TOKEN") or None,
        allow_get_reset=not options.no_get_reset,
        cors_origins=tuple(options.cors_origin),
        allowed_hosts=tuple(options.allowed_host),
        max_body_bytes=options.max_body_bytes,
        max_inflated_bytes=options.max_inflated_bytes,
        max_queue_groups=options.max_queue_groups,
        max_queue_bytes=options.max_queue_bytes,
        env_timeout=options.env_timeout,
        second_trainer=options.second_trainer,
        dedupe_window=options.dedupe_window,
        compression=options.compression,
        strict=options.strict,
    )
