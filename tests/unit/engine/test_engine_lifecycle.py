"""The embedded engine over time: slots and queue, aborts, failures, the end."""

import asyncio
import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.engines import (
    GREEDY,
    StepCounter,
    check_greedy,
    engine_of,
    greedy_oracle,
    logprob_oracle,
    named,
    one,
    prompts,
    request,
    tiny_causal_lm,
)
from support.serving import eventually

from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.gate import RequestGate
from atropos_verl.errors import EngineError, EngineStoppedError

# -- slots and queue ---------------------------------------------------------------------------------------------------


def test_more_sequences_than_slots_are_served_in_order_of_arrival() -> None:
    model = tiny_causal_lm()
    given = prompts(*range(4, 14))
    finished: list[int] = []
    counter = StepCounter(copy.deepcopy(model), hold_at=0)
    with engine_of(counter.model, max_running=2) as engine:
        tickets = []
        for index, prompt in enumerate(given):
            ticket = engine._submit(request(prompt, max_tokens=6, **GREEDY))
            ticket.future.add_done_callback(lambda _, index=index: finished.append(index))
            tickets.append(ticket)
        assert counter.held.wait(10.0)
        assert engine.stats().running + engine.stats().waiting == 10
        assert engine.stats().running <= 2
        counter.go_on.set()
        answers = [ticket.future.result(30.0) for ticket in tickets]
    assert finished == list(range(10))  # equal lengths: first come, first done
    for prompt, [answer] in zip(given, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, 6)


def test_sequences_that_join_and_leave_do_not_disturb_the_others() -> None:
    """Lengths from 1 to 60 through 5 slots: every compaction and every growth of the cache is crossed."""
    model = tiny_causal_lm()
    given = prompts(*[1 + (17 * i) % 140 for i in range(24)])
    steps = [1 + (23 * i) % 60 for i in range(24)]
    with engine_of(copy.deepcopy(model), max_running=5, max_prefill_tokens=200) as engine:
        answers = engine.generate([request(p, max_tokens=k, **GREEDY) for p, k in zip(given, steps, strict=True)])
        assert (engine.stats().finished, engine.stats().generated_tokens) == (24, sum(steps))
    for prompt, count, [answer] in zip(given, steps, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, count)


def test_many_threads_and_event_loops_at_once() -> None:
    model = tiny_causal_lm()
    given = prompts(*range(2, 18))
    with engine_of(copy.deepcopy(model), max_running=6) as engine:

        def from_own_loop(prompt: tuple[int, ...]) -> tuple[int, ...]:
            [answer] = asyncio.run(engine.agenerate(request(prompt, max_tokens=7, **GREEDY)))
            return answer.token_ids

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(from_own_loop, given, timeout=60.0))
    assert [list(a) for a in answers] == [greedy_oracle(model, p, 7) for p in given]


# -- aborts ------------------------------------------------------------------------------------------------------------


async def test_cancelling_the_task_frees_the_slots() -> None:
    model = tiny_causal_lm()
    counter = StepCounter(copy.deepcopy(model), hold_at=3)
    [long, short] = prompts(5, 9)
    with engine_of(counter.model, max_running=4) as engine:
        task = asyncio.create_task(engine.agenerate(request(long, n=4, max_tokens=400, ignore_eos=True)))
        waiting = asyncio.create_task(engine.agenerate(request(short, max_tokens=6, **GREEDY)))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        assert (engine.stats().running, engine.stats().waiting) == (4, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        counter.go_on.set()
        [answer] = await asyncio.wait_for(waiting, 30.0)
        stats = engine.stats()
    assert list(answer.token_ids) == greedy_oracle(model, short, 6)
    assert (stats.aborted, stats.finished, stats.requests, stats.running, stats.waiting) == (1, 1, 2, 0, 0)
    assert counter.steps < 50  # the 400 tokens were not generated


async def test_cancelling_a_waiting_request_while_paused_empties_the_queue() -> None:
    gate = RequestGate()
    with engine_of(tiny_causal_lm(), gate=gate) as engine:
        gate.pause(timeout=10.0)
        task = asyncio.create_task(engine.agenerate(request((1, 2), n=3, max_tokens=4)))
        await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 3, "the request to wait")
        task.cancel()
        await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 0, "its sequences to leave")
        assert engine.stats().aborted == 1
        assert not gate.is_open


async def test_closing_a_stream_frees_its_slots() -> None:
    with engine_of(tiny_causal_lm()) as engine:
        stream = engine.astream(request((1, 2, 3), n=2, max_tokens=480, ignore_eos=True))
        seen = [await anext(stream) for _ in range(6)]
        await stream.aclose()
        await asyncio.to_thread(eventually, lambda: engine.stats().running == 0, "the slots to be freed")
        assert len(seen) == 6
        assert engine.stats().aborted == 1
        assert engine.stats().generated_tokens < 2 * 480


async def test_abort_by_id_returns_what_there_is() -> None:
    model = tiny_causal_lm()
    counter = StepCounter(copy.deepcopy(model), hold_at=4)
    [prompt] = prompts(5)
    with engine_of(counter.model) as engine:
        assert engine.abort("job-1") is False
        task = asyncio.create_task(engine.agenerate(request(prompt, max_tokens=100, **GREEDY, request_id="job-1")))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        assert engine.abort("job-1") is True
        assert engine.abort("job-1") is False
        counter.go_on.set()
        [answer] = await asyncio.wait_for(task, 30.0)
    assert answer.finish_reason == "abort"
    assert 5 <= len(answer.token_ids) < 100
    assert list(answer.token_ids) == greedy_oracle(model, prompt, len(answer.token_ids))


# -- failures and the end ----------------------------------------------------------------------------------------------


async def test_a_failed_step_fails_its_requests_with_the_cause_and_the_engine_goes_on() -> None:
    model = tiny_causal_lm()
    counter = StepCounter(copy.deepcopy(model))
    [prompt] = prompts(5)
    with engine_of(counter.model) as engine:
        counter.fail_with = MemoryError("no room for the KV cache")
        with pytest.raises(EngineError, match="MemoryError: no room for the KV cache") as caught:
            await asyncio.wait_for(engine.agenerate(request(prompt, n=2, max_tokens=5, ignore_eos=True)), 30.0)
        assert isinstance(caught.value.__cause__, MemoryError)
        counter.fail_with = None
        await asyncio.to_thread(check_greedy, engine, model, prompt, 5)
        assert engine.stats().failed == 1


async def test_an_engine_that_fails_every_step_is_given_up_and_says_why() -> None:
    counter = StepCounter(tiny_causal_lm())
    counter.fail_with = RuntimeError("device lost")
    with engine_of(counter.model) as engine:
        for _ in range(3):
            with pytest.raises(EngineError, match="device lost"):
                await asyncio.wait_for(engine.agenerate(request((1,), max_tokens=5, ignore_eos=True)), 30.0)
        await asyncio.to_thread(engine._thread.join, 10.0)
        with pytest.raises(EngineStoppedError, match="gave up after 3 failed steps: device lost"):
            await engine.agenerate(request((1,)))
        with pytest.raises(EngineStoppedError, match="device lost"):
            engine.compute_logprobs([1, 2])
        with pytest.raises(EngineStoppedError, match="device lost"):
            engine.astream(request((1,)))


async def test_weights_with_nan_fail_the_request_and_good_ones_repair_the_engine() -> None:
    good = tiny_causal_lm(seed=6)
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    [prompt] = prompts(7)
    with engine_of(tiny_causal_lm()) as engine:
        engine.update_weights_from_tensor(named(bad), policy_version=2)
        with pytest.raises(EngineError, match="policy version 2 hold NaN or infinity"):
            await asyncio.wait_for(engine.agenerate(request(prompt, n=3, max_tokens=4)), 30.0)
        engine.update_weights_from_tensor(named(good), policy_version=3)
        await asyncio.to_thread(check_greedy, engine, good, prompt, 6)


@pytest.mark.parametrize("paused", [False, True])
async def test_close_fails_what_runs_and_what_waits_and_ends_the_thread(paused: bool) -> None:
    gate = RequestGate()
    engine = TransformersEngine(tiny_causal_lm(), None, gate=gate, max_running=1)
    if paused:
        gate.pause(timeout=10.0)
    tasks = [asyncio.create_task(engine.agenerate(request((1, 2), max_tokens=500, ignore_eos=True))) for _ in range(3)]
    await asyncio.to_thread(eventually, lambda: engine.stats().requests == 3, "the requests to arrive")
    await asyncio.to_thread(engine.close, 20.0)
    engine.close()  # idempotent
    for task in tasks:
        with pytest.raises(EngineStoppedError, match="the engine was closed"):
            await asyncio.wait_for(task, 10.0)
    assert not engine._thread.is_alive()
    with pytest.raises(EngineStoppedError, match="closed"):
        await engine.agenerate(request((1,)))
    assert engine.stats().failed == 3


def test_a_busy_engine_lets_callers_in_at_every_token_boundary() -> None:
    model = tiny_causal_lm()
    [prompt, *rest] = prompts(4, *[8] * 10)
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(one, engine, prompt, max_tokens=500, ignore_eos=True)
        values = [engine.compute_logprobs(tokens) for tokens in rest]
        busy.result(60.0)
    for tokens, value in zip(rest, values, strict=True):
        assert value == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)


def test_an_engine_nobody_closed_does_not_disturb_the_end_of_the_process() -> None:
    script = """
import sys
from support.engines import request, tiny_causal_lm
from support.tiny_model import build_tiny_tokenizer
from atropos_verl.engine.embedded import TransformersEngine
engine = TransformersEngine(tiny_causal_lm(), build_tiny_tokenizer())
engine._submit(request((1, 2), n=8, max_tokens=500, ignore_eos=True))
print("main ends")
"""
    paths = [str(Path(__file__).parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "main ends\n"), done.stderr
