"""Aborting a replica: also the request that is on its way to the engine at that moment is returned, and at once."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

from atropos_verl.backends.ray.replica import TransformersServer
from atropos_verl.engine.gate import RequestGate


class LateEngine:
    """Knows a request only some time after it was handed over, like an engine whose task has not started yet."""

    def __init__(self) -> None:
        self.gate = RequestGate()
        self.known: dict[str, asyncio.Event] = {}

    async def request(self, key: str) -> list[object]:
        await asyncio.sleep(0.1)
        self.known[key] = asyncio.Event()
        await self.known[key].wait()
        return []

    def abort(self, key: str) -> bool:
        if key in self.known:
            self.known[key].set()
        return key in self.known


async def test_a_request_that_had_not_reached_the_engine_is_aborted_as_well() -> None:
    server = object.__new__(TransformersServer)  # the actor without a model
    engine = LateEngine()
    server._engine = engine
    server._asleep = server._aborted = server._rejecting = False
    server._gate_lock = asyncio.Lock()
    server._has_weights = True
    server.config = SimpleNamespace()
    server._running = {key: asyncio.ensure_future(engine.request(key)) for key in ("a", "b")}
    started = time.monotonic()
    answer = await asyncio.wait_for(server.abort_all_requests(), timeout=5.0)
    assert answer["aborted_count"] == 2
    assert all(task.done() for task in server._running.values())
    assert time.monotonic() - started < 2.0
    assert not engine.gate.is_open
