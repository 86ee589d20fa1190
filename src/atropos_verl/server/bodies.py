"""Request bodies: read with a bound on bytes and on silence, inflated with a bound on what comes out."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from atropos_verl.errors import AtroposVerlError
from atropos_verl.server.settings import ServerSettings

__all__ = ["BodyError", "Disconnected", "read_body"]

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_GZIP = 16 + zlib.MAX_WBITS
_IN_THREAD = 256 * 2**10
"""Compressed bytes from which inflating is left to a thread (zlib lets the event loop run meanwhile)."""


class BodyError(AtroposVerlError):
    """The body cannot be taken; ``status`` is the HTTP code."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Disconnected(Exception):  # noqa: N818 - nobody is there to read an error
    """The client went away while it was sending."""


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], settings: ServerSettings) -> bytes:
    """The whole body, decompressed.

    Raises:
        BodyError: 408 (silent for ``body_timeout`` seconds), 413 (longer than a bound), 415 (an encoding that is not
            gzip), 400 (not the encoding it says).
        Disconnected: the client is gone.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > settings.max_body_bytes:
        raise _too_long("body", settings.max_body_bytes, "max_body_bytes")
    body = await _receive_all(receive, settings)
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding in (b"", b"identity"):
        if len(body) > settings.max_inflated_bytes:
            raise _too_long("body", settings.max_inflated_bytes, "max_inflated_bytes")
        return body
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        name = encoding.decode("latin-1")
        raise BodyError(415, "encoding", f"content-encoding {name!r} is not supported; send gzip, or none")
    bits = zlib.MAX_WBITS if encoding == b"deflate" else _GZIP
    if len(body) < _IN_THREAD:
        return _inflate(body, bits, settings.max_inflated_bytes)
    return await asyncio.to_thread(_inflate, body, bits, settings.max_inflated_bytes)


async def _receive_all(receive: Receive, settings: ServerSettings) -> bytes:
    parts: list[bytes] = []
    length = 0
    while True:
        try:
            async with asyncio.timeout(settings.body_timeout):
                message = await receive()
        except TimeoutError:
            text = f"no data for {settings.body_timeout:g} s (body_timeout), {length} bytes came"
            raise BodyError(408, "body_timeout", text) from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        length += len(part)
        if length > settings.max_body_bytes:
            raise _too_long("body", settings.max_body_bytes, "max_body_bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _inflate(body: bytes, bits: int, limit: int) -> bytes:
    """All members of a gzip body. Stops at ``limit`` bytes, however much more there is."""
    parts: list[bytes] = []
    length = 0
    rest = body
    while rest:
        inflater = zlib.decompressobj(bits)
        try:
            part = inflater.decompress(rest, limit + 1 - length)
        except zlib.error as error:
            raise BodyError(400, "encoding", f"Invalid gzip payload: {error}") from None
        length += len(part)
        if length > limit or inflater.unconsumed_tail:
            raise _too_long("inflated body", limit, "max_inflated_bytes")
        if not inflater.eof:
            raise BodyError(400, "encoding", "Invalid gzip payload: it is cut off")
        parts.append(part)
        rest = inflater.unused_data.lstrip(b"\0")  # padding after the last member is allowed
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_long(what: str, limit: int, name: str) -> BodyError:
    return BodyError(413, "too_long", f"the {what} is longer than {limit} bytes ({name})")
