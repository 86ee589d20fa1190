"""Who may call: those with the token (bearer, or the password of Basic), and no pages of other sites.

A server on the loopback without a token is still reachable by every web page the user has open. Such requests name
their site in ``Origin``, or (DNS rebinding) in ``Host``; both are checked before anything else.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from atropos_verl.server.settings import ServerSettings

__all__ = ["OPEN_PATHS", "cors_headers", "is_loopback", "refuse"]

OPEN_PATHS = frozenset({"/", "/health"})
"""Hold no data: the name of the API, and an empty page that asks for the token."""


def refuse(settings: ServerSettings, path: str, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
    """(HTTP status, why) when the request is not allowed, else None."""
    host = headers.get(b"host", b"").decode("latin-1")
    if settings.allowed_hosts and _hostname(host) not in settings.allowed_hosts:
        return 403, f"host {host!r} is not allowed; start the server with --allowed-host to add it"
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and not _allowed_origin(settings, origin, host):
        return 403, f"origin {origin!r} is not allowed; start the server with --cors-origin to add it"
    if settings.token is None or path in OPEN_PATHS:
        return None
    sent = _sent_token(headers.get(b"authorization", b""))
    if sent and hmac.compare_digest(sent, settings.token.encode()):
        return None
    return 401, "this server demands its token: send 'Authorization: Bearer TOKEN'"


def _sent_token(header: bytes) -> bytes:
    """The token of ``Bearer TOKEN`` or ``Basic base64(anything:TOKEN)``; empty when there is none.

    Atropos's client has no setting for a bearer token, but sends a password that stands in the API's URL as Basic.
    """
    scheme, _, sent = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return sent.strip()
    if scheme.lower() == b"basic":
        with contextlib.suppress(ValueError):  # no base64
            return base64.b64decode(sent.strip(), validate=True).partition(b":")[2]
    return b""


def cors_headers(settings: ServerSettings, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Headers that let a page of an allowed origin read the answer; none otherwise."""
    origin = headers.get(b"origin")
    if origin is None or not settings.cors_origins:
        return []
    if "*" not in settings.cors_origins and origin.decode("latin-1") not in settings.cors_origins:
        return []
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, idempotency-key, x-atropos-lease"),
        (b"access-control-expose-headers", b"x-atropos-lease-id, x-atropos-step, retry-after"),
        (b"vary", b"Origin"),
    ]


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _allowed_origin(settings: ServerSettings, origin: str, host: str) -> bool:
    if "*" in settings.cors_origins or origin in settings.cors_origins:
        return True
    return bool(host) and origin.partition("://")[2] == host  # the server's own page


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:  # "[" without "]"
        return ""
