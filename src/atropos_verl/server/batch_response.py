"""``GET /batch``: hand a batch out, send it, and find out whether it arrived."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from atropos_verl.protocol.packed import MEDIA_TYPE
from atropos_verl.protocol.wire_model import Batch
from atropos_verl.server.answers import choose_encoding, compressor, json_answer, json_parts, packed_parts
from atropos_verl.server.delivery import Connection, Connections
from atropos_verl.server.metrics import Counters
from atropos_verl.server.request import Request, lease_seconds
from atropos_verl.server.store import Store

__all__ = ["HandOut"]

logger = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

_NOT_REGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}


class HandOut:
    """The one route whose answer matters after it was sent."""

    def __init__(self, store: Store, counters: Counters, connections: Connections) -> None:
        self._store = store
        self._counters = counters
        self._connections = connections
        connections.on_lost = self._connection_lost

    async def __call__(
        self, request: Request, client: Any, receive: Receive, send: Send, extra: list[tuple[bytes, bytes]]
    ) -> int:
        """Answer the request; returns the HTTP status."""
        store = self._store
        lease = request.header("x-atropos-lease")
        seconds = None if lease is None else lease_seconds(lease, store.settings.max_lease, "X-Atropos-Lease")
        wants_packed = MEDIA_TYPE in (request.header("accept") or "")
        if store.state.registration is None:
            await _send_small(send, _NOT_REGISTERED, extra)
            return 200
        store.hear_trainer()
        store.wants_packed = store.wants_packed or wants_packed
        batch = store.batches.next_batch(seconds)
        if batch is None:
            await store.persistence.synced()
            await _send_small(send, {"batch": None}, extra)
            return 200
        members = store.state.members(batch)
        parts = packed_parts(members) if wants_packed else json_parts(members)
        tokens = sum(group.tokens for group in members)
        self._counters.happened(store.now(), batches=1)
        logger.info(
            "batch of step %d: %d groups, %d sequences, %d tokens%s",
            batch.step,
            len(members),
            sum(group.size for group in members),
            tokens,
            "" if batch.deliveries == 1 else f" (handed out for the {batch.deliveries}. time)",
            extra={
                "event": "batch",
                "step": batch.step,
                "groups": len(members),
                "tokens": tokens,
                "lease": batch.lease_id,
            },
        )
        headers = [*extra, *_headers(batch, MEDIA_TYPE if wants_packed else "application/json")]
        await self._deliver(batch, parts, headers, request, client, receive, send)
        return 200

    async def _deliver(
        self,
        batch: Batch,
        parts: list[bytes],
        headers: list[tuple[bytes, bytes]],
        request: Request,
        client: Any,
        receive: Receive,
        send: Send,
    ) -> None:
        connection = self._connections.get(client)
        gone = asyncio.create_task(_disconnected(receive))
        arrived = False
        try:
            await self._store.persistence.synced()
            length = sum(map(len, parts))
            encoding = choose_encoding(
                self._store.settings.compression, request.headers, client[0] if client else None, length
            )
            self._counters.bytes_out += await _send_parts(parts, length, encoding, headers, send, gone)
            arrived = not _is_gone(gone, connection)
            if arrived:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._settle(batch, connection, arrived)

    def _settle(self, batch: Batch, connection: Connection | None, arrived: bool) -> None:
        if not arrived:
            self._store.batches.take_back(batch.lease_id, "the response could not be delivered")
        elif batch.deadline is None:
            if connection is None or connection.lost:
                if connection is not None and connection.reset:
                    self._store.batches.take_back(batch.lease_id, "the connection was reset")
                else:
                    self._store.batches.close(batch.lease_id)
            else:
                connection.pending, connection.since = batch.lease_id, self._store.now()

    def _connection_lost(self, connection: Connection) -> None:
        if connection.pending is None:
            return
        lease_id, connection.pending = connection.pending, None
        if connection.reset:
            self._store.batches.take_back(lease_id, "the client closed the connection without reading the batch")
        else:
            self._store.batches.close(lease_id)

    def next_request(self, client: Any) -> None:
        """Another request on the same connection: what was sent on it before was read."""
        connection = self._connections.get(client)
        if connection is not None and connection.pending is not None:
            lease_id, connection.pending = connection.pending, None
            self._store.batches.close(lease_id)

    def tick(self) -> None:
        """Count batches as delivered whose connection has been quiet for ``delivery_grace`` seconds."""
        for connection in self._connections.pending():
            if self._store.now() - connection.since >= self._store.settings.delivery_grace:
                assert connection.pending is not None
                lease_id, connection.pending = connection.pending, None
                self._store.batches.close(lease_id)


async def _disconnected(receive: Receive) -> None:
    """Ends when the client goes away (or when the response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_gone(gone: asyncio.Task[None], connection: Connection | None) -> bool:
    return gone.done() if connection is None else connection.lost


def _headers(batch: Batch, media_type: str) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"content-type", media_type.encode()),
        (b"x-atropos-step", str(batch.step).encode()),
        (b"x-atropos-delivery", str(batch.deliveries).encode()),
    ]
    if batch.deadline is not None:
        headers.append((b"x-atropos-lease-id", batch.lease_id.encode()))
        if batch.earlier:
            headers.append((b"x-atropos-earlier-lease-ids", ",".join(batch.earlier).encode()))
    return headers


async def _send_small(send: Send, fields: Any, extra: list[tuple[bytes, bytes]]) -> None:
    answer = json_answer(fields)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer.body)).encode()), *extra]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})


async def _send_parts(
    parts: list[bytes],
    length: int,
    encoding: str | None,
    headers: list[tuple[bytes, bytes]],
    send: Send,
    gone: asyncio.Task[None],
) -> int:
    """Everything but the end of the response. Stops when the client is gone. Returns the bytes sent."""
    if encoding is None:
        headers = [*headers, (b"content-length", str(length).encode())]
    else:
        headers = [*headers, (b"content-encoding", encoding.encode()), (b"vary", b"Accept-Encoding")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    made = None if encoding is None else compressor(encoding)
    sent = 0
    for part in [*parts, b""]:
        if gone.done():
            break
        if made is not None:
            # In a thread: zlib and zstd let the event loop run meanwhile.
            part = await asyncio.to_thread(made.compress if part else _flush(made), part)
        if part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            sent += len(part)
    return sent


def _flush(made: Any) -> Callable[[bytes], bytes]:
    def finish(_: bytes) -> bytes:
        end: bytes = made.flush()
        return end

    return finish
