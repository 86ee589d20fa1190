"""What the gateway needs of an engine: ``GenerationEngine`` generates, ``RequestGate`` holds requests and steps back
while weights are swapped, and ``PinnedEngine`` is the engine that held-out evaluations ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Literal, Protocol, runtime_checkable

from atropos_verl.errors import EngineError
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

_END_SECONDS = 30.0  # for requests of an evaluation that was given up to let go of the engine


@runtime_checkable
class GenerationEngine(Protocol):
    """Generates from the newest weights it has. Safe to call from several threads and loops."""

    policy_version: int
    """Version of the weights it holds; -1 before the first update from a trainer."""
    max_context_len: int
    """Prompt plus completion, in tokens, at most."""
    eos_token_ids: frozenset[int]
    """They end a completion unless a request ignores them; the one that did is part of its tokens."""

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """``request.n`` completions. Cancelling the awaiting task frees the request's slots.

        Raises ``GenerationRequestError`` (bad request) or ``EngineStoppedError`` (engine closed)."""

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """The same, token by token. Closing the iterator frees the slots."""


GateState = Literal["open", "pausing", "draining", "paused"]


class RequestGate:
    """Counts requests and steps, and holds them back while weights are swapped. For any thread and event loop.

    New requests are admitted when open; new steps when open or draining. ``pause``, ``drain`` and ``resume`` are
    idempotent and not counted: one ``resume`` opens the gate however often it was paused. ``pause`` and ``drain`` raise
    ``EngineError`` when another thread changed the gate meanwhile, and ``TimeoutError`` naming what still runs; the
    gate then stays shut. docs/internals.md draws the states."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._changed = _pending()
        """Ends at the next change of the state: what waits in event loops."""
        self._steps = 0
        self._shut_since: float | None = None
        self._shut_seconds = 0.0
        self.state: GateState = "open"
        self.in_flight = 0
        """Requests inside ``request()`` now; those still waiting for admission are not counted."""
        self.waiting = 0
        """Requests that wait for admission now."""

    @property
    def is_open(self) -> bool:
        """True when new requests and new steps pass."""
        return self.state == "open"

    @property
    def paused_seconds(self) -> float:
        """Seconds this gate was not open, in all, the present pause included."""
        with self._condition:
            running = 0.0 if self._shut_since is None else time.monotonic() - self._shut_since
            return self._shut_seconds + running

    def pause(self, timeout: float = 60.0) -> None:
        """Hold new steps and requests back until ``resume``, and return once no step is running: a token boundary.
        ``timeout``: seconds."""
        with self._condition:
            if self.state != "paused":
                self._shut("pausing", timeout)

    def drain(self, timeout: float = 600.0) -> None:
        """Hold new requests back, and return once none is left in flight; then it is paused. ``timeout``: seconds."""
        with self._condition:
            if self.state != "paused" or self.in_flight:
                self._shut("draining", timeout)

    def _shut(self, state: GateState, timeout: float) -> None:
        """Change to ``state``, and to "paused" once nothing runs that it waits for. The condition is held."""
        is_drain = state == "draining"

        def done() -> bool:
            return self._steps == 0 and not (is_drain and self.in_flight)

        self._change(state)
        if self._shut_since is None:
            self._shut_since = time.monotonic()
        self._condition.wait_for(lambda: self.state != state or done(), timeout)
        verb = "drain" if is_drain else "pause"
        if self.state == state and done():
            self.state = "paused"
        elif self.state == state:
            raise TimeoutError(
                f"{verb}: waited {timeout:g} s; {self._steps} steps running, {self.in_flight} requests in flight. "
                "The gate stays shut until resume(); check that the engine's thread is alive"
            )
        elif self.state != "paused":  # paused: another thread's call got there first
            raise EngineError(f"{verb}: another thread changed the gate to {self.state} meanwhile")

    def resume(self) -> None:
        """Open the gate; everything that waits goes on."""
        with self._condition:
            if self._shut_since is not None:
                self._shut_seconds += time.monotonic() - self._shut_since
                self._shut_since = None
            self._change("open")

    def _change(self, state: GateState) -> None:
        self.state = state
        self._condition.notify_all()
        changed, self._changed = self._changed, _pending()
        changed.set_result(None)

    def wake(self) -> None:
        """Make every ``step`` that waits look at its ``stop`` predicate again."""
        with self._condition:
            self._condition.notify_all()

    @contextlib.contextmanager
    def step(self, timeout: float = 60.0, stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Run one engine step inside this block. Waits while paused, at most ``timeout`` seconds. Yields False, and the
        body must not touch the model, when it timed out, or ``stop()``, asked again after ``wake``, became true."""
        allowed = ("open", "draining")
        with self._condition:
            self._condition.wait_for(lambda: self.state in allowed or stop(), timeout)
            entered = self.state in allowed
            self._steps += entered
        try:
            yield entered
        finally:
            with self._condition:
                self._steps -= entered
                self._condition.notify_all()

    @contextlib.asynccontextmanager
    async def request(self, timeout: float = 1200.0) -> AsyncIterator[None]:  # noqa: ASYNC109 - its error says more
        """Count one request in flight. While the gate is shut the request waits; it does not fail because of a pause.

        Raises ``TimeoutError`` when the gate stayed shut for ``timeout`` seconds (default: that of Atropos clients)."""
        deadline = time.monotonic() + timeout
        while True:
            with self._condition:
                if self.is_open:
                    self.in_flight += 1
                    break
                changed = asyncio.wrap_future(self._changed)
                self.waiting += 1
            try:
                # Not asyncio.timeout: a cancellation from outside must stay a CancelledError.
                done, _ = await asyncio.wait({changed}, timeout=max(0.0, deadline - time.monotonic()))
            finally:
                changed.cancel()  # the future that all share goes on
                with self._condition:
                    self.waiting -= 1
            if not done and time.monotonic() >= deadline:
                raise TimeoutError(
                    f"request was not admitted within {timeout:g} s: the gate is {self.state} with "
                    f"{self.in_flight} requests in flight; check whether the weight sync hangs"
                )
        try:
            yield
        finally:
            with self._condition:
                self.in_flight -= 1
                self._condition.notify_all()


def _pending() -> Future[None]:
    """A future that cancelling those who wait for it does not cancel."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


class PinnedEngine:
    """A ``GenerationEngine`` whose requests wait at its ``gate`` until ``pin``, and are let in until ``unpin``.

    In between one version of the weights answers, that at ``pin``: the caller does not change them, or hands in a copy.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.gate = RequestGate()
        self.gate.pause()
        self._engine = self._pinned = engine
        self.policy_version = engine.policy_version
        """At the last ``pin``."""
        self.max_context_len, self.eos_token_ids = engine.max_context_len, engine.eos_token_ids

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        return await self._pinned.agenerate(request)

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        return self._pinned.astream(request)

    def pin(self, copy: Any = None) -> None:
        """Let requests in: to ``copy``, an engine that ``unpin`` closes, or to the engine itself."""
        self._pinned = copy or self._engine
        self.policy_version = self._pinned.policy_version
        self.gate.resume()

    def unpin(self) -> None:
        """Let no more requests in, and wait for those that are being served. Idempotent."""
        try:
            self.gate.drain(_END_SECONDS)
        except TimeoutError as error:
            logger.warning("an evaluation is over, and its requests are not: %s", error)
            self.gate.pause()
        self.close()
        self._pinned = self._engine

    def close(self) -> None:
        """End the copy, if there is one; what is being served gets ``EngineStoppedError``. Idempotent."""
        if self._pinned is not self._engine:
            self._pinned.close()  # type: ignore[attr-defined]  # the copy
