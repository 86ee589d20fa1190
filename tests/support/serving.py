"""A gateway over real HTTP for the length of a ``with`` block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from atropos_verl.gateway.app import GatewayServer, create_app


@contextmanager
def serving(engine: Any, tokenizer: Any, *, model_name: str = "tiny", **options: Any) -> Iterator[httpx.Client]:
    """Serve ``engine`` and yield a client of it; ``client.base_url`` is the gateway's."""
    server = GatewayServer(create_app(engine, tokenizer, model_name=model_name, **options))
    server.start(timeout=20.0)
    try:
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            yield client
    finally:
        server.stop(timeout=10.0)


def eventually(condition: Callable[[], bool], what: str, timeout: float = 15.0) -> None:
    """Wait until ``condition()`` holds; fails naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)
