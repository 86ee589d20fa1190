"""A real HTTP server whose misbehaviour is scripted per path, so that nothing of the client has to be patched."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_TLS_HANDSHAKE = b"\x16"


@dataclass(frozen=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Link:
    """The connection a behaviour answers on."""

    connection: socket.socket
    closing: threading.Event

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def wait(self, seconds: float) -> None:
        """Sleep, or return early when the server is being closed."""
        self.closing.wait(seconds)

    def reset(self) -> None:
        """Close with RST instead of FIN: the peer's read fails with ECONNRESET."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


Behaviour = Callable[[Link], None]


def _head(status: int, length: int | None, headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}", "connection: close"]
    lines += [] if length is None else [f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Behaviour:
    """``content``: bytes as they are, anything else as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda link: link.send(_head(status, len(body), headers) + body)


def error(status: int, body: bytes = b"no luck", headers: Mapping[str, str] | None = None) -> Behaviour:
    return answer(body, status, headers)


def html_page() -> Behaviour:
    return answer(b"<!doctype html><html><body>Welcome</body></html>", headers={"content-type": "text/html"})


def silent() -> Behaviour:
    """Never answers, and keeps the connection open."""
    return lambda link: link.wait(600.0)


def reset_before_answer() -> Behaviour:
    return lambda link: link.reset()


def close_before_answer() -> Behaviour:
    return lambda link: None


def reset_mid_body(body: bytes, after: int) -> Behaviour:
    """Promise ``body``, send its first ``after`` bytes, then RST."""

    def behave(link: Link) -> None:
        link.send(_head(200, len(body)) + body[:after])
        link.wait(0.2)  # an RST overtakes what the peer has not read yet
        link.reset()

    return behave


def truncated(body: bytes, after: int, *, promise_length: bool) -> Behaviour:
    """The first ``after`` bytes of ``body``, then an orderly end; a content-length gives it away, or not."""
    return lambda link: link.send(_head(200, len(body) if promise_length else None) + body[:after])


def garbage() -> Behaviour:
    """Bytes that are not HTTP."""
    return lambda link: link.send(b"\x00\x01SSH-2.0-something\r\n\r\n")


def drip_body(body: bytes, pieces: int, interval: float) -> Behaviour:
    """``body`` in ``pieces`` parts, ``interval`` seconds between two."""

    def behave(link: Link) -> None:
        link.send(_head(200, len(body)))
        size = -(-len(body) // pieces)
        for start in range(0, len(body), size):
            link.send(body[start : start + size])
            link.wait(interval)

    return behave


class FaultServer(socketserver.ThreadingTCPServer):
    """On a free loopback port, which refuses connections until the ``with`` block begins; one request per connection.
    Paths without a script answer 404."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler, bind_and_activate=False)
        self.server_bind()
        self.requests: list[Received] = []
        self.connections = 0
        self._scripts: dict[str, list[Behaviour]] = {}
        self._used: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self.port: int = self.server_address[1]  # type: ignore[misc]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultServer:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.shutdown()
        self.server_close()

    def script(self, path: str, *behaviours: Behaviour) -> None:
        """Sets the behaviour for the first, second, … request of ``path``; the last one repeats."""
        with self._lock:
            self._scripts[path] = list(behaviours)
            self._used[path] = 0

    def count(self, path: str) -> int:
        with self._lock:
            return sum(request.path == path for request in self.requests)

    def last(self, path: str) -> Received:
        with self._lock:
            return next(request for request in reversed(self.requests) if request.path == path)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self.connections += 1
        # The client went away, or refused our certificate: both are the tests' aim.
        with contextlib.suppress(OSError):
            if self._tls is None and request.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE:
                request.sendall(_head(400, 0))  # as HTTP servers do when a client speaks TLS to them
                return
            with request if self._tls is None else self._tls.wrap_socket(request, server_side=True) as connection:
                received = _read_request(connection)
                if received is not None:
                    self._behaviour(received)(Link(connection, self._closing))

    def _behaviour(self, request: Received) -> Behaviour:
        with self._lock:
            self.requests.append(request)
            script = self._scripts.get(request.path)
            if not script:
                return error(404, b"no such path")
            index = min(self._used[request.path], len(script) - 1)
            self._used[request.path] += 1
            return script[index]


def _read_request(connection: socket.socket) -> Received | None:
    with connection.makefile("rb") as stream:
        first = stream.readline().decode("latin-1")
        headers = {name.lower(): value for name, value in http.client.parse_headers(stream).items()} if first else {}
        body = stream.read(length := int(headers.get("content-length", "0")))
    if not first or len(body) < length:
        return None
    return Received(first.split(" ")[1], headers, body)


@contextlib.contextmanager
def refused_url() -> Iterator[str]:
    """A URL whose port is taken and does not listen: every connection is refused, and nobody else can get the port."""
    server = FaultServer()
    yield server.url
    server.server_close()


@contextlib.contextmanager
def late_server(seconds: float) -> Iterator[FaultServer]:
    """A server that refuses connections for ``seconds`` and then serves."""
    server = FaultServer()
    starter = threading.Timer(seconds, server.__enter__)
    starter.start()
    try:
        yield server
    finally:
        starter.join()
        server.__exit__()


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, by the ``openssl`` program; skips where there is none."""
    certificate, key = directory / "server.crt", directory / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no openssl program to make a certificate with")
    return certificate, key
