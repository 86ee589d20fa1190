"""A real HTTP server whose misbehaviour is scripted per path, so that nothing of the client has to be patched."""

import contextlib
import http.client
import itertools
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

_TLS_HANDSHAKE = b"\x16"


class Link(BaseHTTPRequestHandler):
    """One request as it arrived, and the connection that a behaviour answers on."""

    server: "FaultServer"
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, data: bytes) -> None:
        self.wfile.write(data)

    def wait(self, seconds: float) -> None:
        """Sleep, or return early when the server is being closed."""
        self.server.closing.wait(seconds)

    def reset(self) -> None:
        """Close with RST instead of FIN: the peer's read fails with ECONNRESET."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        self.server.connections += 1
        # The client went away, or refused our certificate: both are the tests' aim.
        with contextlib.suppress(OSError):
            if not self.server.tls and self.connection.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE:
                self.send(_head(400, 0))  # as HTTP servers do when a client speaks TLS to them
            else:
                super().handle()

    def do_POST(self) -> None:
        self.headers: Any = {name.lower(): value for name, value in self.headers.items()}
        self.body = self.rfile.read(length := int(self.headers.get("content-length", 0)))
        if len(self.body) == length:
            self.server.requests.append(self)
            next(self.server.scripts.get(self.path, _NO_SUCH_PATH))(self)

    do_GET = do_POST  # noqa: N815


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


_NO_SUCH_PATH = itertools.repeat(error(404, b"no such path"))


class FaultServer(socketserver.ThreadingTCPServer):
    """On a free loopback port, which refuses connections until the ``with`` block begins; one request per connection.
    Paths without a script answer 404."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, tls: tuple[Path, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Link, bind_and_activate=False)
        self.server_bind()
        self.tls = tls
        self.requests: list[Link] = []
        self.connections = 0
        self.scripts: dict[str, Iterator[Behaviour]] = {}
        self.closing = threading.Event()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{int(self.server_address[1])}"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def __enter__(self) -> Self:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def script(self, path: str, *behaviours: Behaviour) -> None:
        """Sets the behaviour for the first, second, … request of ``path``; the last one repeats."""
        self.scripts[path] = itertools.chain(behaviours, itertools.repeat(behaviours[-1]))

    def count(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)

    def last(self, path: str) -> Link:
        return next(request for request in reversed(self.requests) if request.path == path)


@contextlib.contextmanager
def refused_url() -> Iterator[str]:
    """A URL whose port is taken and does not listen: every connection is refused, and nobody else can get the port."""
    server = FaultServer()
    yield server.url
    server.server_close()
