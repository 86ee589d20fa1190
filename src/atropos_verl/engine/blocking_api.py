"""How callers wait for an engine: from an event loop, whole or token by token, or for a list from a plain thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.scheduler import EngineLimits, validate
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

__all__ = ["EngineFront", "Pending"]


class Pending(Protocol):
    """A request on its way. Its future is never cancelled by those who wait for it."""

    future: Future[list[Generation]]


P = TypeVar("P", bound=Pending)


class EngineFront(Generic[P]):
    """The generating half of ``InferenceEngine`` over two verbs: submit and cancel. Safe for many threads and loops."""

    gate: RequestGate
    _limits: EngineLimits

    @property
    def weights_ready(self) -> bool:
        """Whether what the weights hold may be generated from."""
        raise NotImplementedError

    def check_alive(self) -> None:
        """Raise ``EngineStoppedError`` with the first cause when the engine is gone."""
        raise NotImplementedError

    def _submit(self, request: GenerationRequest, on_delta: Callable[[GenerationDelta], None] | None = None) -> P:
        """Queue a validated request; ``on_delta`` is called in a thread of the engine's and must not block."""
        raise NotImplementedError

    def _cancel(self, pending: Sequence[P]) -> Any:
        """Free their slots at the next token boundary; those that have ended are left alone."""
        raise NotImplementedError

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """See ``InferenceEngine``. A request stopped by ``abort`` returns what it had, finish "abort".

        Raises ``EngineError`` when a step failed, besides the errors of the protocol.
        """
        validate(request, self._limits)
        pending = self._submit(request)
        try:
            return await asyncio.wrap_future(pending.future)
        except asyncio.CancelledError:
            self._cancel([pending])
            raise

    def astream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """See ``InferenceEngine``. A bad request raises here; generation starts when the first delta is asked for."""
        self.check_alive()
        validate(request, self._limits)
        return self._stream(request)

    async def _stream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[GenerationDelta | None] = asyncio.Queue()

        def put(delta: GenerationDelta | None) -> None:
            # A loop that is closed has nobody left to read.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        pending = self._submit(request, put)
        pending.future.add_done_callback(lambda _: put(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            pending.future.result(timeout=0)  # raises what ended the request
        finally:
            self._cancel([pending])

    def generate(self, requests: Sequence[GenerationRequest], timeout: float = 3600.0) -> list[list[Generation]]:
        """See ``InferenceEngine``. Raises ``TimeoutError`` when the whole list took longer than ``timeout`` seconds."""
        for request in requests:
            validate(request, self._limits)
        deadline = time.monotonic() + timeout
        submitted: list[P] = []
        try:
            for request in requests:
                submitted.append(self._submit(request))  # noqa: PERF401 - those submitted before a failure count
            return [pending.future.result(timeout=max(0.0, deadline - time.monotonic())) for pending in submitted]
        except TimeoutError as error:
            done = sum(pending.future.done() for pending in submitted)
            raise TimeoutError(
                f"generate: {done} of {len(submitted)} requests were done after {timeout:g} s "
                f"(gate {self.gate.state.value}, weights {'ready' if self.weights_ready else 'not ready'})"
            ) from error
        finally:
            self._cancel(submitted)
