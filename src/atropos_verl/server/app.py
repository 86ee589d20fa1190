"""``create_app``: the trajectory API as an ASGI application: who may call, routing, and errors as answers.

A server on the loopback without a token is still reachable by every web page the user has open. Such requests name
their site in ``Origin``, or (DNS rebinding) in ``Host``. Both are checked before anything else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from atropos_verl.errors import StorageWriteError
from atropos_verl.protocol.schema import Refusal
from atropos_verl.server.bodies import BatchResponse, BodyError, Connections, choose_encoding, compressor
from atropos_verl.server.routes import Handler, Routes
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.status import Counters
from atropos_verl.server.store import ConflictError, QueueFullError, Store, UnknownLeaseError

__all__ = ["TrajectoryApi", "create_app"]

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_OPEN_PATHS = frozenset({"/", "/health"})
"""Hold no data: the name of the API, and an empty page that asks for the token."""
_CLIENT_GONE = 499


def create_app(settings: ServerSettings | None = None, now: Callable[[], float] = time.time) -> TrajectoryApi:
    """The API over a store that is opened here. ``now``: seconds since the epoch, for tests.

    Raises:
        ConfigError, StorageDamagedError, StorageWriteError: the data directory cannot be used.
    """
    return TrajectoryApi(Store(settings or ServerSettings(), now))


class TrajectoryApi:
    """An ASGI application. ``close`` it when no server with lifespan support does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.counters = Counters(started_at=store.now())
        self.connections = Connections()
        """Fed by ``delivery.protocol_class``."""
        self.handlers: dict[str, dict[str, Handler]] = {}
        """By path and method."""
        for method, path, handler in Routes(store, self.counters, self.connections).table():
            self.handlers.setdefault(path, {})[method] = handler
        failures = (Refusal, BodyError, QueueFullError, ConflictError, UnknownLeaseError, StorageWriteError)
        self._app = Starlette(
            routes=[self._route(path, by_method) for path, by_method in self.handlers.items()],
            exception_handlers=dict.fromkeys([*failures, HTTPException, ClientDisconnect], self._failed),
            lifespan=self._lifespan,
        )
        self._app.router.redirect_slashes = False

    def close(self) -> None:
        self.store.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        connection = self.connections.get(scope.get("client"))
        if connection is not None:
            connection.done()
        allowed_origin = self._cors_headers(request)
        path = scope["path"] if scope["path"] in self.handlers else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *allowed_origin]
                self.counters.requests[path, message["status"]] += 1
            await send(message)

        if scope["method"] == "OPTIONS" and allowed_origin:
            refused: Response | None = Response(status_code=204)
        else:
            refused = self._refused(request)
        await (refused or self._app)(scope, receive, send_counted)

    def _route(self, path: str, by_method: dict[str, Handler]) -> Route:
        async def endpoint(request: Request) -> Response:
            response = await by_method[request.method](request)
            if isinstance(response, BatchResponse):
                return response
            encoding = choose_encoding(self.store.settings.compression, request, len(response.body))
            if encoding is not None:
                made = compressor(encoding)
                response.body = made.compress(bytes(response.body)) + made.flush()
                response.headers["content-encoding"] = encoding
                response.headers["vary"] = "Accept-Encoding"
                response.headers["content-length"] = str(len(response.body))
            return response

        route = Route(path, endpoint, methods=list(by_method))
        route.methods = set(by_method)  # without HEAD, which would hand a batch out
        return route

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        ticker = asyncio.create_task(self._tick())
        yield
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
        self.close()

    async def _tick(self) -> None:
        """Leases end on time, also when nobody asks."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            with contextlib.suppress(StorageWriteError):  # the store has logged it
                self.store.expire()
                await self.store.synced()

    async def _failed(self, request: Request, error: Exception) -> Response:
        path, detail = request.scope["path"], str(error)
        match error:
            case Refusal():
                self.counters.refused[error.reason] += 1
                logger.warning("%s refused: %s", path, error, extra={"event": "refused", "reason": error.reason})
                return _json(error.as_fields(), 422)
            case BodyError():
                self.counters.refused[error.reason] += 1
                logger.warning("%s refused: %s", path, error)
                # The rest of the body is not read: the connection cannot be used again.
                return _json({"detail": detail}, error.status, {"connection": "close"})
            case QueueFullError():
                self.counters.refused["queue_full"] += 1
                return _json({"detail": detail}, 429, {"retry-after": str(max(1, round(error.retry_after)))})
            case ConflictError():
                return _json({"detail": detail, "message": detail}, 409)
            case UnknownLeaseError():
                return _json({"detail": detail, "message": detail}, 404)
            case HTTPException():
                return _json({"detail": error.detail}, error.status_code, dict(error.headers or {}))
            case ClientDisconnect():
                return Response(status_code=_CLIENT_GONE)
            case _:
                return _json({"detail": detail}, 507)

    # --- who may call ------------------------------------------------------------------------------------------------

    def _refused(self, request: Request) -> Response | None:
        """The answer to a request that is not allowed, else None."""
        settings, headers = self.store.settings, request.headers
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if settings.allowed_hosts and _hostname(host) not in settings.allowed_hosts:
            return self._forbidden(f"host {host!r} is not allowed; start the server with --allowed-host to add it")
        own_page = bool(host) and origin.partition("://")[2] == host
        if origin and not own_page and not self._is_allowed(origin):
            return self._forbidden(f"origin {origin!r} is not allowed; start the server with --cors-origin to add it")
        if settings.token is None or request.scope["path"] in _OPEN_PATHS:
            return None
        sent = _sent_token(headers.get("authorization", "").encode("latin-1"))
        if sent and hmac.compare_digest(sent, settings.token.encode()):
            return None
        self.counters.refused["unauthorized"] += 1
        detail = "this server demands its token: send 'Authorization: Bearer TOKEN'"
        return _json({"detail": detail}, 401, {"www-authenticate": "Bearer"})

    def _forbidden(self, detail: str) -> Response:
        self.counters.refused["forbidden"] += 1
        return _json({"detail": detail}, 403)

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self.store.settings.cors_origins or origin in self.store.settings.cors_origins

    def _cors_headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        """Headers that let a page of an allowed origin read the answer; none otherwise."""
        origin = request.headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, idempotency-key, x-atropos-lease"),
            (b"access-control-expose-headers", b"x-atropos-lease-id, x-atropos-step, retry-after"),
            (b"vary", b"Origin"),
        ]


def _json(fields: Any, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(fields), status, headers, "application/json")


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


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:  # "[" without "]"
        return ""
