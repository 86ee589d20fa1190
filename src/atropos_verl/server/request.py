"""One request, and what several routes read from it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from atropos_verl.protocol.schema import Refusal
from atropos_verl.server.delivery import Connection

__all__ = ["Request", "decoded", "idempotency", "lease_seconds"]

_T = TypeVar("_T")
_MAX_KEY = 255


class Request:
    """One request: ``headers`` in lower case, ``body()`` reads and inflates the body."""

    def __init__(
        self,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[bytes, bytes],
        body: Callable[[], Awaitable[bytes]],
        connection: Connection | None = None,
    ) -> None:
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.connection = connection
        """None under a server that does not tell of connections."""

    def header(self, name: str) -> str | None:
        found = self.headers.get(name.encode())
        return None if found is None else found.decode("latin-1").strip()


def lease_seconds(value: object, longest: float, name: str) -> float:
    """A lease's length in seconds. Raises ``Refusal`` unless it is a number above 0 and at most ``longest``."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds <= longest:
        text = f"{name} = {value!r} must be a number of seconds above 0 and at most {longest:g}"
        raise Refusal("lease", text, name, value=str(value))
    return seconds


def decoded(body: bytes, kind: type[_T]) -> _T:
    """The JSON of a body as a ``kind``. Raises ``Refusal`` that names the field."""
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].strip("`") if "$." in str(error) else ""
        raise Refusal("type", str(error), field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("malformed_json", f"the body is not JSON: {error}") from None


def idempotency(request: Request, body: bytes) -> tuple[str | None, bytes]:
    """The Idempotency-Key and what tells its request from others; (None, b"") without one. Raises ``Refusal``."""
    key = request.header("idempotency-key")
    if key is None:
        return None, b""
    if not 0 < len(key) <= _MAX_KEY:
        raise Refusal("idempotency", f"Idempotency-Key must have 1 to {_MAX_KEY} characters, not {len(key)}")
    return key, hashlib.sha256(request.path.encode() + b"\n" + body).digest()[:16]
