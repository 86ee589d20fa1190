"""``RequestGate``: what passes in which state, and that no wait is endless. ``PinnedEngine``: one version answers."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support.engines import GREEDY, engine_of, greedy_oracle, named, prompts, request, tiny_causal_lm
from support.fake_engine import FakeEngine
from support.serving import eventually, post, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine import protocol
from atropos_verl.engine.protocol import PinnedEngine, RequestGate
from atropos_verl.errors import EngineError, EngineStoppedError


def test_pause_returns_at_the_step_boundary_and_one_resume_undoes_any_number_of_pauses() -> None:
    gate = RequestGate()
    assert (gate.state, gate.is_open, gate.in_flight) == ("open", True, 0)
    with pytest.raises(ValueError, match="boom"), gate.step(timeout=1.0):
        raise ValueError("boom")  # ends the step as well
    with ThreadPoolExecutor(1) as pool, gate.step(timeout=5.0) as may_run:
        assert may_run
        pausing = pool.submit(gate.pause, 5.0)
        eventually(lambda: gate.state == "pausing", "the pause to begin")
        assert not pausing.done()
    pausing.result(5.0)
    gate.pause(timeout=1.0)  # idempotent
    assert (gate.state, gate.is_open) == ("paused", False)
    with gate.step(timeout=0.01) as may_run:
        assert not may_run
    gate.resume()
    gate.resume()
    assert gate.is_open


@pytest.mark.parametrize("resumed", [True, False])
def test_step_waits_for_resume_or_for_its_stop_predicate(resumed: bool) -> None:
    gate, stop = RequestGate(), threading.Event()
    gate.pause(timeout=1.0)

    def may_run() -> bool:
        with gate.step(timeout=30.0, stop=stop.is_set) as entered:
            return entered

    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(may_run)
        if resumed:
            gate.resume()
        else:
            stop.set()
            gate.wake()
        assert step.result(5.0) is resumed


def test_a_pause_that_does_not_succeed_says_why_and_leaves_the_gate_shut_until_resume() -> None:
    gate = RequestGate()
    with ThreadPoolExecutor(1) as pool, gate.step(timeout=1.0):
        with pytest.raises(TimeoutError, match=r"pause: waited 0.01 s; 1 steps running, 0 requests in flight"):
            gate.pause(timeout=0.01)
        with gate.step(timeout=0.01) as second:
            assert not second
        pausing = pool.submit(gate.pause, 10.0)
        eventually(lambda: pausing.running() and gate.state == "pausing", "the pause to begin")
        gate.resume()
        with pytest.raises(EngineError, match="changed the gate to open"):
            pausing.result(5.0)
    gate.pause(timeout=1.0)  # another try works
    assert gate.state == "paused"


async def _hold(gate: RequestGate, leave: asyncio.Event) -> None:
    async with gate.request(timeout=10.0):
        await leave.wait()


async def test_request_timeout_and_cancellation_leave_nothing_behind() -> None:
    gate = RequestGate()
    gate.pause(timeout=1.0)
    with pytest.raises(TimeoutError, match=r"not admitted within 0.01 s: the gate is paused with 0 requests"):
        async with gate.request(timeout=0.01):
            pytest.fail("a paused gate admitted a request")
    waiting = asyncio.create_task(_hold(gate, asyncio.Event()))
    await asyncio.to_thread(eventually, lambda: gate.waiting == 1, "it")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (gate.waiting, gate.in_flight) == (0, 0)


async def test_pause_does_not_wait_for_requests_but_drain_does() -> None:
    """Those that come late, in any event loop, wait."""
    gate, leave, done = RequestGate(), asyncio.Event(), asyncio.Event()
    done.set()
    holders = [asyncio.create_task(_hold(gate, leave)) for _ in range(3)]
    await asyncio.to_thread(eventually, lambda: gate.in_flight == 3, "it")
    gate.pause(timeout=1.0)  # returns: no step is running
    assert gate.state == "paused"
    with pytest.raises(TimeoutError, match=r"drain: waited 0.01 s; .* 3 requests in flight"):
        await asyncio.to_thread(gate.drain, 0.01)
    draining = asyncio.create_task(asyncio.to_thread(gate.drain, 10.0))
    late = [_hold(gate, leave), *(asyncio.to_thread(asyncio.run, _hold(gate, done)) for _ in range(3))]
    waiting = asyncio.gather(*late)
    await asyncio.to_thread(eventually, lambda: gate.state == "draining" and gate.waiting == 4, "it")
    with gate.step(timeout=1.0) as may_run:  # those in flight may still be decoded
        assert may_run
    leave.set()
    await asyncio.wait_for(draining, 5.0)
    assert (gate.state, gate.in_flight, gate.waiting) == ("paused", 0, 4)
    gate.resume()
    await asyncio.wait_for(asyncio.gather(waiting, *holders), 5.0)
    assert gate.in_flight == 0


def test_paused_seconds_count_the_time_the_gate_was_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(protocol, "time", SimpleNamespace(monotonic=lambda: now))
    gate = RequestGate()
    gate.pause(timeout=1.0)
    now = 103.0
    assert gate.paused_seconds == 3.0
    gate.resume()
    now = 110.0
    gate.pause(timeout=1.0)
    now = 110.5
    assert gate.paused_seconds == 3.5


def test_a_pinned_copy_keeps_its_version_while_the_engine_gets_other_weights() -> None:
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [prompt] = prompts(9)
    wanted = request(prompt, max_tokens=12, **GREEDY)
    with engine_of(tiny_causal_lm(seed=3)) as engine:
        engine.update_weights_from_tensor(named(old), policy_version=3)
        pinned = PinnedEngine(engine)
        pinned.pin(engine.copy())
        engine.update_weights_from_tensor(named(new), policy_version=4)
        [[theirs]], [evaluated] = engine.generate([wanted]), asyncio.run(pinned.agenerate(wanted))
        for answer, model, version in ((theirs, new, 4), (evaluated, old, 3)):
            assert answer.token_ids == greedy_oracle(model, prompt, 12)
            assert answer.policy_version_runs == ((version, 12),)
        assert pinned.policy_version == 3
        copy = pinned._pinned
        pinned.unpin()
        assert not pinned.gate.is_open
        with pytest.raises(EngineStoppedError):
            copy.generate([wanted])  # type: ignore[attr-defined]
        pinned.pin()
        assert asyncio.run(pinned.agenerate(wanted))[0].policy_version_runs == ((4, 12),)


def test_evaluations_wait_for_their_pin_and_for_nothing_else() -> None:
    """The gate of training, and the throttle, are for prompts that are trained on."""
    engine = FakeEngine()
    pinned, throttle = PinnedEngine(engine), Mock()
    app = serving(engine, build_tiny_tokenizer(), evaluated=pinned, throttle=throttle)
    with app as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/evaluation/health").status_code == 200
        body = {"prompt": {"prompt_token_ids": [1, 2]}, "max_tokens": 3}
        asking = pool.submit(post, client, "/evaluation/generate", **body)
        eventually(lambda: pinned.gate.waiting == 1, "the request to arrive")
        assert not engine.requests
        pinned.pin()
        assert asking.result(10.0)["token_ids"] == [[3, 4, 5]]
        pinned.unpin()
    assert throttle.admitted.call_count == 0
