"""Batches on their way to the trainer: how one is sent, and whether it arrived.

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
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atropos_verl.http_thread import disconnected
from atropos_verl.server.bodies import compressor
from atropos_verl.server.status import Counters
from atropos_verl.server.store import Batch, Store

__all__ = ["BatchResponse", "Connection", "Connections", "protocol_class"]

Address = tuple[str, int]


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


class BatchResponse(Response):
    """A batch, sent in the pieces it is stored in. Afterwards it settles what becomes of the batch."""

    def __init__(
        self,
        batch: Batch,
        parts: list[bytes],
        media_type: str,
        *,
        store: Store,
        counters: Counters,
        connection: Connection | None,
        encoding: str | None,
    ) -> None:
        self._batch, self._parts, self._encoding = batch, parts, encoding
        self._store, self._counters, self._connection = store, counters, connection
        headers = {
            "content-type": media_type,
            "x-atropos-step": str(batch.step),
            "x-atropos-delivery": str(batch.deliveries),
        }
        if batch.deadline is not None:
            headers["x-atropos-lease-id"] = batch.lease_id
            if batch.earlier:
                headers["x-atropos-earlier-lease-ids"] = ",".join(batch.earlier)
        if encoding is None:
            headers["content-length"] = str(sum(map(len, parts)))
        else:
            headers |= {"content-encoding": encoding, "vary": "Accept-Encoding"}
        self.raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(disconnected(receive))
        arrived = False
        try:
            await self._send_parts(send, gone)
            arrived = not (gone.done() if self._connection is None else self._connection.lost)
            if arrived:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._settle(arrived)

    async def _send_parts(self, send: Send, gone: asyncio.Task[None]) -> None:
        """Everything but the end of the response. Stops when the client is gone."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        made = None if self._encoding is None else compressor(self._encoding)
        for part in [*self._parts, b""]:
            if gone.done():
                break
            if made is not None:
                # In a thread: zlib and zstd let the event loop run meanwhile.
                part = await (asyncio.to_thread(made.compress, part) if part else asyncio.to_thread(made.flush))
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self._counters.bytes_out += len(part)

    def _settle(self, arrived: bool) -> None:
        store, lease_id, connection = self._store, self._batch.lease_id, self._connection

        def read(was_read: bool = True) -> None:
            if was_read:
                store.delivered(lease_id)
            else:
                store.take_back(lease_id, "the client closed the connection without reading the batch")

        if not arrived:
            store.take_back(lease_id, "the response could not be delivered")
        elif self._batch.deadline is not None:
            return
        elif connection is None or connection.lost:
            read(connection is None or not connection.reset)
        else:
            connection.when_done(read)
            asyncio.get_running_loop().call_later(store.settings.delivery_grace, read)
