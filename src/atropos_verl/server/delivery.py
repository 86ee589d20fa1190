"""Did the response arrive? What the connection tells, for trainers that know no leases.

A response is handed to the operating system long before the client has read it. Whether it was read shows in how the
connection ends::

    sending ──connection lost──────────────────────────────▶ not delivered
       │
       └─▶ sent ──reset (the client closed with data unread)──▶ not delivered
             ├────closed in order, or used for another request─▶ delivered
             └────``delivery_grace`` seconds without either────▶ delivered
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atropos_verl.server.receiving import LONGEST_HOLD, http_protocol

__all__ = ["Connection", "Connections", "protocol_class"]

Address = tuple[str, int]


class Connection:
    """One client connection."""

    __slots__ = ("_when_done", "lost", "pending", "reset", "since")

    def __init__(self) -> None:
        self.lost = False
        self.reset = False
        """It ended with an error: the client did not read everything."""
        self.pending: str | None = None
        """Lease id of the batch that was sent last, until it is known to have arrived."""
        self.since = 0.0
        """When it was sent (seconds since the epoch)."""
        self._when_done: list[Callable[[], None]] = []

    def when_done(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the client has done with the last answer: it closes the connection or uses it again."""
        self._when_done.append(action)

    def done(self) -> None:
        """The client has done with the last answer."""
        actions, self._when_done = self._when_done, []
        for action in actions:
            action()


class Connections:
    """The open connections by client address (``scope["client"]``), fed by the protocol class below."""

    def __init__(self) -> None:
        self._open: dict[Address, Connection] = {}
        self.on_lost: Callable[[Connection], None] = lambda connection: None

    def get(self, client: Any) -> Connection | None:
        """None under another server, which tells nothing."""
        return self._open.get((client[0], client[1])) if client else None

    def pending(self) -> list[Connection]:
        return [connection for connection in self._open.values() if connection.pending is not None]

    def made(self, client: Address) -> None:
        self._open[client] = Connection()

    def lost(self, client: Address, error: Exception | None) -> None:
        connection = self._open.pop(client, None)
        if connection is not None:
            connection.lost = True
            connection.reset = error is not None
            connection.done()
            self.on_lost(connection)


def protocol_class(connections: Connections, longest_hold: float = LONGEST_HOLD) -> type[Any]:
    """The HTTP protocol to serve with, which also reports how each connection ended. See ``receiving``."""
    base: Any = http_protocol(longest_hold)

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
