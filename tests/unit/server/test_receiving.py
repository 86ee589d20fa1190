"""The gathering protocol beside uvicorn's own: whatever arrives in whatever pieces, clients get the same bytes."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from atropos_verl.server import receiving
from atropos_verl.server.receiving import Buffers, gathering_protocol, http_protocol

READ = 256 * 2**10
SETTLE = 40
"""Turns of the event loop, more than a request takes."""


class Wire(asyncio.Transport):
    """Records what is written; ``send`` delivers like asyncio's transports, also when reading is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.writes = 0
        self.closed = self.paused = False

    def write(self, data: Any) -> None:
        if not self.closed:
            self.written += bytes(data)
            self.writes += 1

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


async def _send(protocol: Any, wire: Wire, data: bytes) -> None:
    while data and not wire.closed:
        assert not wire.paused, "reading was stopped and never begun again"
        if isinstance(protocol, asyncio.BufferedProtocol):
            buffer = protocol.get_buffer(-1)
            count = min(len(buffer), len(data))
            assert count > 0
            buffer[:count] = data[:count]
            protocol.buffer_updated(count)
        else:
            count = min(READ, len(data))
            protocol.data_received(data[:count])
        data = data[count:]
        for _ in range(SETTLE):
            await asyncio.sleep(0)


class Echo:
    """Answers with what came: method, length and checksum of the body. ``/early`` does not read it."""

    def __init__(self) -> None:
        self.messages = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length = checksum = 0
        more = scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.messages += 1
            assert isinstance(message["body"], bytes)
            length, checksum = length + len(message["body"]), zlib.crc32(message["body"], checksum)
            more = message["more_body"]
        body = f"{scope['method']} {scope['path']} {length} {checksum}".encode()
        headers = [(b"content-length", str(len(body)).encode())] if scope["path"] != "/chunks" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": scope["path"] == "/chunks"})
        if scope["path"] == "/chunks":
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def connect(kind: type[Any], app: Any) -> tuple[Any, Wire]:
    protocol, wire = kind(config=uvicorn.Config(app, ws="none"), server_state=ServerState(), app_state={}), Wire()
    protocol.client_made(wire)
    return protocol, wire


def answers(kind: type[Any], pieces: Sequence[bytes]) -> tuple[bytes, bool]:
    async def run() -> tuple[bytes, bool]:
        protocol, wire = connect(kind, Echo())
        for piece in pieces:
            await _send(protocol, wire, piece)
        for _ in range(20 * SETTLE):  # requests that came at once are answered one after the other
            await asyncio.sleep(0)
        protocol.client_lost(None)
        return wire.written, wire.closed

    return asyncio.run(run())


def body_of(length: int) -> bytes:
    return (b"0123456789\r\n\r\nGET / HTTP/1.1\r\n\r\n" * (length // 32 + 1))[:length]


def request(method: str, path: str, length: int, how: str) -> bytes:
    head, body = f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode(), body_of(length)
    if how == "chunked":
        cuts = [body[i : i + max(length // 3, 1)] for i in range(0, length, max(length // 3, 1))]
        sent = b"".join([b"%x\r\n%s\r\n" % (len(cut), cut) for cut in cuts]) + b"0\r\n\r\n"
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + sent
    extra = {"plain": b"", "expect": b"Expect: 100-continue\r\n", "close": b"Connection: close\r\n"}[how]
    return head + extra + b"Content-Length: %d\r\n\r\n" % length + body


requests = st.builds(
    request,
    st.sampled_from(["GET", "POST", "HEAD"]),
    st.sampled_from(["/", "/early", "/chunks"]),
    st.integers(0, 3000) | st.sampled_from([READ - 1, READ, READ + 1, 700_000]),
    st.sampled_from(["plain", "plain", "plain", "chunked", "expect", "close"]),
)


@given(st.lists(requests, min_size=1, max_size=4), st.lists(st.integers(1, 400_000), max_size=5), st.booleans())
@example([request("POST", "/", 700_000, "plain")], [60, 1, 2], False)
@example([request("POST", "/", 3000, "plain"), request("POST", "/", READ, "plain")], [57], True)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_clients_get_what_uvicorn_would_answer(sent: list[bytes], cuts: list[int], no_buffers: bool) -> None:
    stream = b"".join(sent)
    pieces = []
    for cut in cuts:
        pieces.append(stream[:cut])
        stream = stream[cut:]
    pieces.append(stream)
    buffers = Buffers(0 if no_buffers else 2, READ)
    assert answers(gathering_protocol(HttpToolsProtocol, buffers=buffers), pieces) == answers(HttpToolsProtocol, pieces)
    assert buffers.left == (0 if no_buffers else 2)


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 500000\r\n\r\n" + body_of(500_000),
        b"POST / HTTP/1.1\r\nContent-Length: 50000\r\nTransfer-Encoding: chunked\r\n\r\n" + body_of(50_000),
        request("POST", "/", 100_000, "plain") + b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 50000\r\n\r\n"
        + body_of(50_000),
    ],
)
def test_what_is_not_http_is_refused_alike(garbage: bytes) -> None:
    ours = answers(gathering_protocol(HttpToolsProtocol), [garbage])
    assert ours == answers(HttpToolsProtocol, [garbage])
    assert ours[0]


def test_a_long_body_is_one_message_and_a_short_answer_one_write() -> None:
    async def run(kind: type[Any]) -> tuple[int, int]:
        app = Echo()
        protocol, wire = connect(kind, app)
        stream = request("POST", "/", 700_000, "plain")
        for start in range(0, len(stream), 50_000):
            await _send(protocol, wire, stream[start : start + 50_000])
        assert wire.written.endswith(b" 700000 %d" % zlib.crc32(body_of(700_000)))
        return app.messages, wire.writes

    assert asyncio.run(run(gathering_protocol(HttpToolsProtocol))) == (1, 1)
    messages, writes = asyncio.run(run(HttpToolsProtocol))
    assert messages > 10 and writes == 2


def test_announced_bodies_take_a_bounded_number_of_buffers() -> None:
    async def run() -> None:
        buffers = Buffers(2, READ)
        kind = gathering_protocol(HttpToolsProtocol, buffers=buffers)
        stream = request("POST", "/", 2_000_000, "plain")
        started = [connect(kind, Echo()) for _ in range(4)]
        for protocol, wire in started:
            await _send(protocol, wire, stream[:100_000])
        assert buffers.left == 0
        protocol, wire = started.pop()  # without one
        await _send(protocol, wire, stream[100_000:])
        assert b"200 OK" in wire.written
        protocol, wire = started.pop(0)  # its body is longer than its buffer
        await _send(protocol, wire, stream[100_000:])
        assert b"200 OK" in wire.written
        assert buffers.left == 1
        for protocol, _ in started:
            protocol.client_lost(ConnectionResetError())
        assert buffers.left == 2

    asyncio.run(run())


def test_a_body_that_comes_slowly_is_handed_on_while_it_comes() -> None:
    async def run() -> None:
        app = Echo()
        protocol, wire = connect(gathering_protocol(HttpToolsProtocol, longest_hold=0.0), app)
        stream = request("POST", "/", 500_000, "plain")
        for start in range(0, len(stream), 100_000):
            await _send(protocol, wire, stream[start : start + 100_000])
            await asyncio.sleep(0.001)
        assert app.messages >= 4
        assert wire.written.endswith(b" 500000 %d" % zlib.crc32(body_of(500_000)))

    asyncio.run(run())


def test_an_answer_that_fails_half_way_is_sent_as_far_as_it_came() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        raise ValueError("half-way")

    async def written(kind: type[Any]) -> tuple[bytes, bool]:
        protocol, wire = connect(kind, fails)
        await _send(protocol, wire, request("GET", "/", 0, "plain"))
        return wire.written, wire.closed

    ours = asyncio.run(written(gathering_protocol(HttpToolsProtocol)))
    assert ours == asyncio.run(written(HttpToolsProtocol))
    assert ours[0].startswith(b"HTTP/1.1 200") and ours[1]


def test_it_serves_under_the_pinned_uvicorn_and_steps_aside_under_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Callable[[], type[Any]] = http_protocol
    assert issubclass(made(), asyncio.BufferedProtocol)
    monkeypatch.setattr(receiving, "TESTED_UVICORN", ("0.1",))
    assert made() is AutoHTTPProtocol
