"""A gateway over real HTTP for the length of a ``with`` block."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx


@contextmanager
def serving(engine: Any, tokenizer: Any, *, model_name: str = "tiny", **options: Any) -> Iterator[httpx.Client]:
    """Serve ``engine`` and yield a client of it; ``client.base_url`` is the gateway's."""
    from atropos_verl.gateway.app import GatewayServer, create_app

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


def raw_post(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """Send a request, in the same bytes as ``client`` does, and leave the answer unread: who closes it hangs up."""
    data = json.dumps(body, separators=(",", ":")).encode()
    lines = {"host": "x", "content-type": "application/json", "content-length": str(len(data)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10)
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    return connection


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
