"""Long request bodies and small answers with less work than uvicorn's own protocol makes of them.

This is the one place that relies on the inside of uvicorn:

==================== ================================================= ================================================
what                 what uvicorn does (0.54)                          what is relied on
==================== ================================================= ================================================
``GatheringProtocol`` hands the application every 64 KiB that arrived: ``HttpToolsProtocol`` feeds ``data_received``
                     reading stops and starts, the task wakes, and the to its parser, whose callbacks are the overridden
                     body is copied four times, each into fresh pages  ones; ``cycle.body`` may be bytes
``_HeldHead``        sends head and body of an answer in two packets:  a cycle writes its answer by ``cycle.transport``
                     the client wakes twice                            (``write``, ``close``, ``is_closing``)
==================== ================================================= ================================================

Both can go when uvicorn hands over bodies in larger pieces (``HIGH_WATER_LIMIT`` of
``uvicorn/protocols/http/flow_control.py`` is no setting) and sends a short answer at once. Under a uvicorn that these
were not tested with its own protocol serves, which is correct, and slower for long bodies.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

__all__ = ["LONGEST_HOLD", "TESTED_UVICORN", "Buffers", "gathering_protocol", "http_protocol"]

logger = logging.getLogger(__name__)

TESTED_UVICORN = ("0.54",)
"""Versions (major.minor) whose inside is known."""
_READ_BYTES = 256 * 2**10
"""Most bytes taken by one read between bodies (asyncio's own size)."""
_GATHERED_FROM = 32 * 2**10
"""Bytes still to come from which a body is gathered."""
_BUFFER_BYTES = 4 * 2**20
_BUFFERS = 8
"""Together 32 MiB: however many bodies are announced, no more is set aside. Others are read as they come."""
LONGEST_HOLD = 1.0
"""Seconds that a body is held back at most while it comes: the application watches for silence."""
_SMALL_ANSWER = 64 * 2**10


class Buffers:
    """Memory that bodies are received into: its pages are fetched once and used again and again.

    ``length`` in bytes, at least that of one read (256 KiB).
    """

    def __init__(self, count: int = _BUFFERS, length: int = _BUFFER_BYTES) -> None:
        self.left = count
        """How many more may be taken."""
        self._length = length
        self._free: list[memoryview] = []

    def take(self) -> memoryview | None:
        """A buffer to be given back; None when all are in use."""
        if not self.left:
            return None
        self.left -= 1
        return self._free.pop() if self._free else memoryview(bytearray(self._length))

    def give_back(self, buffer: memoryview) -> None:
        self.left += 1
        self._free.append(buffer)


def http_protocol(longest_hold: float = LONGEST_HOLD) -> type[Any]:
    """The protocol to serve with: the gathering one, or uvicorn's own where that is not known to work.

    Args:
        longest_hold: seconds after which a body that comes slowly is handed on as far as it came.
    """
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    stock: type[Any] = AutoHTTPProtocol
    if uvicorn.__version__.rpartition(".")[0] not in TESTED_UVICORN:
        logger.info("uvicorn %s is not one of %s: bodies come in its own pieces", uvicorn.__version__, TESTED_UVICORN)
        return stock
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        logger.info("httptools is not installed: bodies come in uvicorn's own pieces")
        return stock
    return gathering_protocol(HttpToolsProtocol, longest_hold)


def gathering_protocol(
    stock: type[Any], longest_hold: float = LONGEST_HOLD, buffers: Buffers | None = None
) -> type[Any]:
    """uvicorn's httptools protocol, which receives long bodies into one buffer and hands them on whole.

    A body whose length is announced goes past the parser until it is there (or the buffer is full, or ``longest_hold``
    seconds went by); then the parser gets all of it, so that its view of the connection stays as it would be. What is
    not a long body of known length takes uvicorn's way.

    Belongs to one event loop, like everything that its connections share.
    """
    base: Any = stock
    shared = Buffers() if buffers is None else buffers
    memory = bytearray(_READ_BYTES)
    incoming = memoryview(memory)

    class GatheringProtocol(base, asyncio.BufferedProtocol):  # type: ignore[misc]
        _left = 0
        """Bytes of the body that the parser has not seen."""
        _buffer: memoryview | None = None
        _filled = 0
        _wanted = 0
        """Bytes of ``_buffer`` that are there, and that are to be."""
        _hand_on_at = 0.0

        # --- asyncio's side ---

        def get_buffer(self, sizehint: int) -> memoryview:
            return incoming if self._buffer is None else self._buffer[self._filled : self._wanted]

        def buffer_updated(self, nbytes: int) -> None:
            if self._buffer is None:
                self._take_in(nbytes)
                return
            self._filled += nbytes
            if self._filled == self._wanted or self.loop.time() > self._hand_on_at:
                self._hand_on()

        def connection_lost(self, exc: Exception | None) -> None:
            self._drop()
            super().connection_lost(exc)

        # --- the parser's side ---

        def on_headers_complete(self) -> None:
            before = self.cycle
            super().on_headers_complete()
            # After a request to speak another protocol uvicorn drops what came with it.
            self._left = 0 if self.parser.should_upgrade() else _announced(self.headers)
            if self.cycle is not before and self.scope["method"] != "HEAD" and not self.expect_100_continue:
                self.cycle.transport = _HeldHead(self.transport)

        def on_body(self, body: bytes) -> None:
            self._left = max(self._left - len(body), 0)
            cycle = self.cycle
            if cycle is not None and not cycle.body and len(body) >= _GATHERED_FROM:
                cycle.body, body = body, b""  # as it is: to append it would copy it
            elif cycle is not None and isinstance(cycle.body, bytes):
                cycle.body = bytearray(cycle.body)
            super().on_body(body)

        # --- between them ---

        def _take_in(self, nbytes: int) -> None:
            end = 0 if self._left else memory.find(b"\r\n\r\n", 0, nbytes) + 4
            if end > 4:
                # The head on its own: the application is not woken for the first bytes of a body.
                self.data_received(incoming[:end])
                rest = 0 if self.parser.should_upgrade() else nbytes - end
                if self._starts_gathering(rest):
                    assert self._buffer is not None
                    self._buffer[:rest] = incoming[end : end + rest]
                    self._filled = rest
                    return
            else:
                rest = nbytes
            if rest and self._open():
                self.data_received(incoming[nbytes - rest : nbytes])
                self._starts_gathering(0)

        def _starts_gathering(self, here: int) -> bool:
            """Whether what is left of a body now goes to a buffer. ``here`` bytes of it are there already."""
            if self._left - here < _GATHERED_FROM or not self._open():
                return False
            self._buffer = shared.take()
            if self._buffer is None:
                return False
            self._filled, self._wanted = 0, min(self._left, len(self._buffer))
            self._hand_on_at = self.loop.time() + longest_hold
            return True

        def _hand_on(self) -> None:
            assert self._buffer is not None
            buffer, self._buffer = self._buffer, None
            try:
                self.data_received(buffer[: self._filled])
            finally:
                shared.give_back(buffer)
            self._starts_gathering(0)

        def _drop(self) -> None:
            if self._buffer is not None:
                shared.give_back(self._buffer)
                self._buffer = None

        def _open(self) -> bool:
            return self.parser is not None and not self.transport.is_closing()

    return GatheringProtocol


class _HeldHead:
    """A transport that sends the head of an answer together with the body, where that is short."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        """None: not written yet; empty: sent."""

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
        elif self._head and len(data) < _SMALL_ANSWER:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        else:
            self._flush()
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)


def _announced(headers: list[tuple[bytes, bytes]]) -> int:
    """Bytes of the body by its Content-Length; 0 when it is not known."""
    length = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return 0
        if name == b"content-length" and value.isdigit():
            length = int(value)
    return length
