"""A gateway over real HTTP for the length of a ``with`` block."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from atropos_verl.gateway.app import GatewayServer, create_app


@contextmanager
def serving(engine: Any, tokenizer: Any, *, model_name: str = "tiny", **options: Any) -> Iterator[httpx.Client]:
    """Serve ``engine`` and yield a client of it; ``client.base_url`` is the gateway's. Clients' templates are run."""
    options = {"allow_client_templates": True, **options}
    server = GatewayServer(create_app(engine, tokenizer, model_name=model_name, **options))
    server.start(timeout=20.0)
    try:
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            yield client
    finally:
        server.stop(timeout=10.0)


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    """The answer to ``body``, which is served."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """The error of a ``body`` that the client is to blame for."""
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def eventually(condition: Callable[[], bool], what: str, timeout: float = 15.0) -> None:
    """Wait until ``condition()`` holds; fails naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)


def exit_code_in_a_child(action: Callable[[], int]) -> int:
    """What ``action`` returns in a fork of this process, whose limits and signals it may change; 1: it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
