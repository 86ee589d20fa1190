"""``RunBoard``: what the task runner says to the command, and the command to the task runner, wherever each runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

__all__ = ["BoardClient", "RunBoard", "make_board"]

_WAIT_INTERVAL = 0.1


class RunBoard:
    """A mailbox of events, and a set of flags. One per run."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._flags: set[str] = set()

    def put(self, kind: str, content: Any) -> None:
        self._events.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Every event since the last call."""
        events, self._events = self._events, []
        return events

    def raise_flag(self, name: str) -> None:
        self._flags.add(name)

    def has_flag(self, name: str) -> bool:
        return name in self._flags


def make_board() -> Any:
    """A handle to a new board, an actor that costs Ray no CPU."""
    return ray.remote(num_cpus=0)(RunBoard).remote()


class BoardClient:
    """The task runner's side. Events are sent without waiting for an answer."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def phase(self, name: str) -> None:
        """What the run is doing now."""
        self.put("phase", name)

    def note(self, message: str) -> None:
        self.put("note", message)

    def put(self, kind: str, content: Any) -> None:
        self._board.put.remote(kind, content)

    def has_flag(self, name: str) -> bool:
        return bool(ray.get(self._board.has_flag.remote(name)))

    def wait_for_flag(self, name: str, check: Callable[[], None] = lambda: None) -> None:
        """Until the command raised the flag; ``check`` raises when waiting has become pointless."""
        while not self.has_flag(name):
            check()
            time.sleep(_WAIT_INTERVAL)
