"""``create_app``: the trajectory API as an ASGI application.

Plain ASGI instead of a framework: a batch is sent in the pieces it is stored in, and the framework's part of a small
request would be most of its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from atropos_verl.protocol.schema import Refusal
from atropos_verl.segment_log import LogWriteError
from atropos_verl.server.answers import Answer, choose_encoding, compressor, json_answer
from atropos_verl.server.auth import cors_headers, refuse
from atropos_verl.server.batch_response import HandOut
from atropos_verl.server.batches import ConflictError, UnknownLeaseError
from atropos_verl.server.bodies import BodyError, Disconnected, read_body
from atropos_verl.server.delivery import Connections
from atropos_verl.server.metrics import Counters
from atropos_verl.server.request import Request
from atropos_verl.server.routes import Routes
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import QueueFullError, Store

__all__ = ["TrajectoryApi", "create_app"]

logger = logging.getLogger(__name__)

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_TICK_SECONDS = 1.0
_ERRORS = (Refusal, BodyError, QueueFullError, ConflictError, UnknownLeaseError, LogWriteError)


def create_app(settings: ServerSettings | None = None, now: Callable[[], float] = time.time) -> TrajectoryApi:
    """The API over a store that is opened here. ``now``: seconds since the epoch, for tests.

    Raises:
        LogDamagedError, LogWriteError: the data directory cannot be used.
    """
    return TrajectoryApi(Store(settings or ServerSettings(), now))


class TrajectoryApi:
    """An ASGI application. ``close`` it when no server with lifespan support does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.counters = Counters(started_at=store.now())
        self.connections = Connections()
        """Fed by ``delivery.protocol_class``."""
        self._routes = Routes(store, self.counters)
        self._paths = {path for _, path in self._routes.table} | {"/batch"}
        self._hand_out = HandOut(store, self.counters, self.connections)

    def close(self) -> None:
        self.store.persistence.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        ticker = asyncio.create_task(self._tick())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _tick(self) -> None:
        """Leases end on time, also when nobody asks."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                self.store.batches.expire()
                self._hand_out.tick()
            except LogWriteError as error:
                logger.error("%s", error)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        path, method, client = scope["path"], scope["method"], scope.get("client")
        self._hand_out.next_request(client)
        connection = self.connections.get(client)
        if connection is not None:
            connection.done()
        extra = cors_headers(self.store.settings, headers)
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        request = Request(path, query, headers, lambda: read_body(receive, headers, self.store.settings), connection)
        try:
            refused = self._refused(method, path, headers, extra)
            if refused is None and (method, path) == ("GET", "/batch"):
                status = await self._hand_out(request, client, receive, send, extra)
                self.counters.requests[path, status] += 1
                return
            answer = refused or await self._routes.table[method, path](request)
        except Disconnected:
            return
        except _ERRORS as error:
            answer = self._failed(error, path)
        self.counters.requests[path if path in self._paths else "other", answer.status] += 1
        await _send_answer(answer, self._encoding(headers, client, answer), extra, send)

    def _refused(
        self, method: str, path: str, headers: Mapping[bytes, bytes], extra: list[tuple[bytes, bytes]]
    ) -> Answer | None:
        if method == "OPTIONS" and extra:
            return Answer(204, b"")
        not_allowed = refuse(self.store.settings, path, headers)
        if not_allowed is not None:
            status, why = not_allowed
            self.counters.refused["unauthorized" if status == 401 else "forbidden"] += 1
            challenge = [(b"www-authenticate", b"Bearer")] if status == 401 else []
            return json_answer({"detail": why}, status, challenge)
        if (method, path) in self._routes.table or (method, path) == ("GET", "/batch"):
            return None
        if path in self._paths:
            allowed = ["GET"] if path == "/batch" else [known for known, other in self._routes.table if other == path]
            return json_answer({"detail": "Method Not Allowed"}, 405, [(b"allow", ", ".join(allowed).encode())])
        return json_answer({"detail": "Not Found"}, 404)

    def _failed(self, error: Exception, path: str) -> Answer:
        match error:
            case Refusal():
                self.counters.refused[error.reason] += 1
                logger.warning(
                    "%s refused: %s", path, error.message, extra={"event": "refused", "reason": error.reason}
                )
                return json_answer(error.as_fields(), 422)
            case BodyError():
                self.counters.refused[error.reason] += 1
                logger.warning("%s refused: %s", path, error)
                # The rest of the body is not read: the connection cannot be used again.
                return json_answer({"detail": str(error)}, error.status, [(b"connection", b"close")])
            case QueueFullError():
                self.counters.refused["queue_full"] += 1
                seconds = str(max(1, round(error.retry_after))).encode()
                return json_answer({"detail": str(error)}, 429, [(b"retry-after", seconds)])
            case ConflictError():
                return json_answer({"detail": str(error), "message": str(error)}, 409)
            case UnknownLeaseError():
                return json_answer({"detail": str(error), "message": str(error)}, 404)
            case _:
                logger.error("%s", error)
                return json_answer({"detail": str(error)}, 507)

    def _encoding(self, headers: Mapping[bytes, bytes], client: Any, answer: Answer) -> str | None:
        here = client[0] if client else None
        return choose_encoding(self.store.settings.compression, headers, here, len(answer.body))


async def _send_answer(answer: Answer, encoding: str | None, extra: list[tuple[bytes, bytes]], send: Send) -> None:
    body = answer.body
    headers = [(b"content-type", answer.media_type.encode()), *answer.headers, *extra]
    if encoding is not None:
        made = compressor(encoding)
        body = made.compress(body) + made.flush()
        headers += [(b"content-encoding", encoding.encode()), (b"vary", b"Accept-Encoding")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
