"""``RequestGate`` holds requests and engine steps back while weights are swapped.

State machine::

               pause(timeout)             no step is running
        OPEN ──────────────────▶ PAUSING ─────────────────────▶ PAUSED
         ▲ │                                                    ▲  │
         │ │   drain(timeout)              no request in flight │  │
         │ └──────────────────▶ DRAINING ───────────────────────┘  │
         └──────────────────────────── resume() ◀──────────────────┘   (from any state but CLOSED)
        any ── close() ──▶ CLOSED

======== ===================== ==================
state    new request admitted  new step permitted
======== ===================== ==================
OPEN     yes                   yes
PAUSING  waits                 waits
DRAINING waits                 yes
PAUSED   waits                 waits
CLOSED   EngineStoppedError    no (``False``)
======== ===================== ==================

Two users share one gate. An engine that can stop between tokens runs each step inside ``with gate.step()``; after
``pause`` it stands at a token boundary and its requests keep their tokens. A front (the gateway) counts requests with
``async with gate.request()``; ``drain`` waits for them, for engines that cannot stop between tokens.

``pause``, ``drain`` and ``resume`` are idempotent and not counted: one ``resume`` opens the gate however often it was
paused. ``pause`` and ``drain`` raise ``EngineError`` when another thread changed the gate meanwhile, and
``TimeoutError`` naming what still runs. The gate then stays shut (nothing may run on half-swapped weights): call
``resume`` to open it, or ``pause`` / ``drain`` again. After ``close`` every call raises ``EngineStoppedError``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from enum import Enum

from atropos_verl.errors import EngineError, EngineStoppedError

__all__ = ["GateState", "RequestGate"]


class GateState(Enum):
    """The states of the module's state machine."""

    OPEN = "open"
    PAUSING = "pausing"
    DRAINING = "draining"
    PAUSED = "paused"
    CLOSED = "closed"


class RequestGate:
    """Counts requests and steps, and holds them back while paused. Safe to use from any thread and event loop."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._state = GateState.OPEN
        self._in_flight = 0
        self._waiting = 0
        self._steps = 0
        self._shut_since: float | None = None
        self._shut_seconds = 0.0
        self._async_waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> GateState:
        return self._state

    @property
    def is_open(self) -> bool:
        """True when new requests and new steps pass."""
        return self._state is GateState.OPEN

    @property
    def in_flight(self) -> int:
        """Requests inside ``request()`` now; those still waiting for admission are not counted."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for admission now."""
        return self._waiting

    @property
    def paused_seconds(self) -> float:
        """Seconds this gate was not open, in all, the present pause included."""
        with self._condition:
            running = 0.0 if self._shut_since is None else time.monotonic() - self._shut_since
            return self._shut_seconds + running

    # -- the trainer's side ------------------------------------------------------------------------------------------

    def pause(self, timeout: float = 60.0) -> None:
        """Hold new steps and requests back, and return once no step is running: a token boundary.

        Requests in flight are not waited for; they stay where they are until ``resume``. ``timeout``: seconds.
        """
        with self._condition:
            if self._state is GateState.PAUSED:
                return
            self._shut(GateState.PAUSING)
            self._wait_for(lambda: self._steps == 0, GateState.PAUSING, timeout, "pause", "an engine step to end")

    def drain(self, timeout: float = 600.0) -> None:
        """Hold new requests back, let those in flight end, and return once none is left; then it is paused.

        ``timeout``: seconds to wait for the requests in flight.
        """
        with self._condition:
            if self._state is GateState.PAUSED and self._in_flight == 0:
                return
            self._shut(GateState.DRAINING)
            self._wait_for(
                lambda: self._in_flight == 0 and self._steps == 0,
                GateState.DRAINING,
                timeout,
                "drain",
                "requests in flight to end",
            )

    def resume(self) -> None:
        """Open the gate; everything that waits goes on. Raises ``EngineStoppedError`` after ``close``."""
        with self._condition:
            self._refuse_closed()
            self._state = GateState.OPEN
            self._end_pause()
            self._wake_all()

    def close(self) -> None:
        """Shut for good: waiting requests get ``EngineStoppedError``, ``step`` yields False. Idempotent."""
        with self._condition:
            if self._state is not GateState.CLOSED:
                self._shut(GateState.CLOSED)

    def wake(self) -> None:
        """Make every ``step`` that waits look at its ``stop`` predicate again."""
        with self._condition:
            self._condition.notify_all()

    # -- the engine's side -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, timeout: float = 60.0, stop: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Run one engine step inside this block. Waits while paused, at most ``timeout`` seconds.

        Yields True when the step may run; False when it may not: closed, timed out, or ``stop()`` became true while
        waiting (``stop`` is looked at again after ``wake``). With False the body must not touch the model.
        """
        allowed = (GateState.OPEN, GateState.DRAINING)
        with self._condition:
            self._condition.wait_for(
                lambda: self._state in allowed or self._state is GateState.CLOSED or (stop is not None and stop()),
                timeout,
            )
            entered = self._state in allowed
            self._steps += entered
        try:
            yield entered
        finally:
            if entered:
                with self._condition:
                    self._steps -= 1
                    self._condition.notify_all()

    # -- the front's side --------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def request(self, timeout: float = 1200.0) -> AsyncIterator[None]:  # noqa: ASYNC109 - see _admit
        """Count one request in flight. While the gate is shut the request waits; it does not fail because of a pause.

        Raises ``TimeoutError`` when the gate stayed shut for ``timeout`` seconds (default: that of Atropos clients).
        """
        await self._admit(timeout)
        try:
            yield
        finally:
            with self._condition:
                self._in_flight -= 1
                self._condition.notify_all()

    async def _admit(self, timeout: float) -> None:  # noqa: ASYNC109 - its error names what is in flight
        deadline = time.monotonic() + timeout
        loop = asyncio.get_running_loop()
        while True:
            with self._condition:
                self._refuse_closed()
                if self._state is GateState.OPEN:
                    self._in_flight += 1
                    return
                waiter = (loop, loop.create_future())
                self._async_waiters.add(waiter)
                self._waiting += 1
            try:
                # Not asyncio.timeout: a cancellation from outside must stay a CancelledError.
                await asyncio.wait({waiter[1]}, timeout=max(0.0, deadline - time.monotonic()))
            finally:
                with self._condition:
                    self._async_waiters.discard(waiter)
                    self._waiting -= 1
            if not waiter[1].done() and time.monotonic() >= deadline:
                raise TimeoutError(
                    f"request was not admitted within {timeout:g} s: the gate is {self._state.value} with "
                    f"{self._in_flight} requests in flight; check whether the weight sync hangs"
                )

    # -- inside; the condition is held -------------------------------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._state is GateState.CLOSED:
            raise EngineStoppedError("the request gate is closed: the engine was shut down")

    def _shut(self, state: GateState) -> None:
        self._refuse_closed()
        self._state = state
        if self._shut_since is None:
            self._shut_since = time.monotonic()
        self._wake_all()

    def _end_pause(self) -> None:
        if self._shut_since is not None:
            self._shut_seconds += time.monotonic() - self._shut_since
            self._shut_since = None

    def _wait_for(self, done: Callable[[], bool], during: GateState, timeout: float, verb: str, what: str) -> None:
        self._condition.wait_for(lambda: self._state is not during or done(), timeout)
        self._refuse_closed()
        if self._state is during and done():
            self._state = GateState.PAUSED
            return
        if self._state is GateState.PAUSED:  # another thread's call got there first
            return
        if self._state is not during:
            raise EngineError(f"{verb}: another thread changed the gate to {self._state.value} meanwhile")
        raise TimeoutError(
            f"{verb}: waited {timeout:g} s for {what}; {self._steps} steps running, {self._in_flight} requests "
            "in flight. The gate stays shut until resume(); check that the engine's thread is alive"
        )

    def _wake_all(self) -> None:
        self._condition.notify_all()
        waiters, self._async_waiters = self._async_waiters, set()
        for loop, future in waiters:
            # A loop that is closed has no task left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_done, future)


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
