"""``GET /batch``: hand a batch out, send it, and find out whether it arrived.

A response is handed to the operating system long before the client has read it. A trainer with a lease says that it has
the batch. For one without, the end of the connection tells::

    sending ──connection lost──────────────────────────────▶ not delivered
       │
       └─▶ sent ──reset (the client closed with data unread)──▶ not delivered
             ├────closed in order, or used for another request─▶ delivered
             └────``delivery_grace`` seconds without either────▶ delivered
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atropos_verl.protocol.packed import MEDIA_TYPE
from atropos_verl.protocol.wire_model import Batch
from atropos_verl.server.bodies import choose_encoding, compressor, json_parts, lease_seconds, packed_parts
from atropos_verl.server.status import Counters
from atropos_verl.server.store import Store

__all__ = ["BatchDelivery", "Connection", "Connections", "protocol_class"]

logger = logging.getLogger(__name__)

Address = tuple[str, int]
_JSON = "application/json"
_NOT_REGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}


class Connection:
    """One client connection."""

    __slots__ = ("_when_done", "lost", "reset")

    def __init__(self) -> None:
        self.lost = False
        self.reset = False
        """It ended with an error: the client did not read everything."""
        self._when_done: list[Callable[[bool], None]] = []

    def when_done(self, action: Callable[[bool], None]) -> None:
        """Call ``action`` when the client has done with the last answer: it closes the connection or uses it again.
        The argument tells whether it has read the answer."""
        self._when_done.append(action)

    def done(self, read: bool = True) -> None:
        actions, self._when_done = self._when_done, []
        for action in actions:
            action(read)


class Connections:
    """The open connections by client address (``scope["client"]``), fed by ``protocol_class``."""

    def __init__(self) -> None:
        self._open: dict[Address, Connection] = {}

    def get(self, client: Any) -> Connection | None:
        """None under another server, which tells nothing."""
        return self._open.get((client[0], client[1])) if client else None

    def made(self, client: Address) -> None:
        self._open[client] = Connection()

    def lost(self, client: Address, error: Exception | None) -> None:
        connection = self._open.pop(client, None)
        if connection is not None:
            connection.lost, connection.reset = True, error is not None
            connection.done(read=error is None)


def protocol_class(connections: Connections) -> type[Any]:
    """uvicorn's HTTP protocol, which also reports how each connection ended."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class ReportingProtocol(base):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.client is not None:
                connections.made((self.client[0], self.client[1]))

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.client is not None:
                connections.lost((self.client[0], self.client[1]), exc)

    return ReportingProtocol


class BatchDelivery:
    """The handler of ``GET /batch``, the one route whose answer matters after it was sent."""

    def __init__(self, store: Store, counters: Counters, connections: Connections) -> None:
        self._store = store
        self._counters = counters
        self._connections = connections

    async def __call__(self, request: Request) -> Response:
        store = self._store
        lease = request.headers.get("x-atropos-lease")
        seconds = None if lease is None else lease_seconds(lease, store.settings.max_lease, "X-Atropos-Lease")
        wants_packed = MEDIA_TYPE in request.headers.get("accept", "")
        if store.registration is None:
            return Response(msgspec.json.encode(_NOT_REGISTERED), media_type=_JSON)
        store.hear_trainer()
        store.wants_packed = store.wants_packed or wants_packed
        batch = store.next_batch(seconds)
        await store.synced()
        if batch is None:
            return Response(b'{"batch":null}', media_type=_JSON)
        members = store.members(batch)
        tokens = sum(group.tokens for group in members)
        self._counters.happened(store.now(), batches=1)
        logger.info(
            "batch of step %d: %d groups, %d sequences, %d tokens%s",
            batch.step,
            len(members),
            sum(group.size for group in members),
            tokens,
            "" if batch.deliveries == 1 else f" (delivery number {batch.deliveries})",
            extra={
                "event": "batch",
                "step": batch.step,
                "groups": len(members),
                "tokens": tokens,
                "lease": batch.lease_id,
            },
        )
        parts = packed_parts(members) if wants_packed else json_parts(members)
        return _BatchResponse(self, batch, parts, MEDIA_TYPE if wants_packed else _JSON, request)

    async def send(self, batch: Batch, response: _BatchResponse, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, and settle what becomes of the batch."""
        connection = self._connections.get(scope.get("client"))
        gone = asyncio.create_task(_disconnected(receive))
        arrived = False
        try:
            self._counters.bytes_out += await response.send_parts(send, gone)
            arrived = not (gone.done() if connection is None else connection.lost)
            if arrived:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._settle(batch, connection, arrived)

    def _settle(self, batch: Batch, connection: Connection | None, arrived: bool) -> None:
        lease_id = batch.lease_id

        def read(was_read: bool = True) -> None:
            if was_read:
                self._store.delivered(lease_id)
            else:
                self._store.take_back(lease_id, "the client closed the connection without reading the batch")

        if not arrived:
            self._store.take_back(lease_id, "the response could not be delivered")
        elif batch.deadline is not None:
            return
        elif connection is None or connection.lost:
            read(connection is None or not connection.reset)
        else:
            connection.when_done(read)
            asyncio.get_running_loop().call_later(self._store.settings.delivery_grace, read)


class _BatchResponse(Response):
    """A batch, sent in the pieces it is stored in."""

    def __init__(
        self, delivery: BatchDelivery, batch: Batch, parts: list[bytes], media_type: str, request: Request
    ) -> None:
        self.status_code = 200
        self.background = None
        self._delivery, self._batch, self._parts = delivery, batch, parts
        length = sum(map(len, parts))
        self._encoding = choose_encoding(delivery._store.settings.compression, request, length)
        headers = {
            "content-type": media_type,
            "x-atropos-step": str(batch.step),
            "x-atropos-delivery": str(batch.deliveries),
        }
        if batch.deadline is not None:
            headers["x-atropos-lease-id"] = batch.lease_id
            if batch.earlier:
                headers["x-atropos-earlier-lease-ids"] = ",".join(batch.earlier)
        if self._encoding is None:
            headers["content-length"] = str(length)
        else:
            headers |= {"content-encoding": self._encoding, "vary": "Accept-Encoding"}
        self.raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._delivery.send(self._batch, self, scope, receive, send)

    async def send_parts(self, send: Send, gone: asyncio.Task[None]) -> int:
        """Everything but the end of the response. Stops when the client is gone. Returns the bytes sent."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        made = None if self._encoding is None else compressor(self._encoding)
        sent = 0
        for part in [*self._parts, b""]:
            if gone.done():
                break
            if made is not None:
                # In a thread: zlib and zstd let the event loop run meanwhile.
                part = await (asyncio.to_thread(made.compress, part) if part else asyncio.to_thread(made.flush))
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                sent += len(part)
        return sent


async def _disconnected(receive: Receive) -> None:
    """Returns when the client goes away (or when the response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass
