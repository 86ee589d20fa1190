"""The embedded engine over time: slots and queue, aborts, failures, the end."""

import asyncio
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engines import (
    GREEDY,
    StepCounter,
    check_greedy,
    check_logprobs,
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

from atropos_verl.engine import embedded, scheduler
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.engine.requests import RunningSequence
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.scheduler import ContinuousBatch
from atropos_verl.errors import EngineError, EngineStoppedError


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild collects garbage, which takes half a second each time beside everything that tests have imported."""
    monkeypatch.setattr(embedded, "gc", SimpleNamespace(collect=lambda: None))


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


@pytest.mark.parametrize("prompts_each", [1, 1024])
@pytest.mark.parametrize("length", [4, 400])
def test_six_large_requests_do_not_let_a_small_one_wait(prompts_each: int, length: int) -> None:
    """1024 sequences each, as completions or as prompts; a round is one token for everyone."""
    counter = StepCounter(tiny_causal_lm(num_hidden_layers=1), hold_at=3)
    n = 1024 // prompts_each
    with engine_of(counter.model, max_running=16) as engine:
        for _ in range(6):
            for place in range(0, 1024, n):
                engine._submit(request((1, 2), n=n, max_tokens=length, ignore_eos=True, place=place, asked=1024))
        assert counter.held.wait(30.0)
        small = engine._submit(request((3, 4), n=2, max_tokens=4, ignore_eos=True))
        began = counter.steps
        counter.go_on.set()
        assert [len(g.token_ids) for g in small.future.result(60.0)] == [4, 4]
        # of six requests at most one turn each is before it: 6 x 16 / 16 generations of ``length`` tokens, or 32 rounds
        assert counter.steps - began <= min(8 * length, 32) + 32 + 4


def test_sequences_that_join_and_leave_do_not_disturb_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths from 1 to 60 through 5 slots: every compaction and every growth of the cache is crossed."""
    monkeypatch.setattr(embedded, "_PREFILL_TOKENS", 200)
    model = tiny_causal_lm()
    given = prompts(*[1 + (17 * i) % 140 for i in range(24)])
    steps = [1 + (23 * i) % 60 for i in range(24)]
    with engine_of(copy.deepcopy(model), max_running=5) as engine:
        answers = engine.generate([request(p, max_tokens=k, **GREEDY) for p, k in zip(given, steps, strict=True)])
        assert (engine.stats().finished, engine.stats().generated_tokens) == (24, sum(steps))
    for prompt, count, [answer] in zip(given, steps, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, count)


# -- aborts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "stream closed", "aborted"])
async def test_a_request_that_its_caller_ends_frees_its_slots(how: str) -> None:
    model = tiny_causal_lm()
    counter = StepCounter(copy.deepcopy(model), hold_at=3)
    [long, short] = prompts(5, 9)
    with engine_of(counter.model, max_running=4) as engine:
        assert engine.abort("job-1") is False
        asked = request(long, n=4, max_tokens=400, **GREEDY, request_id="job-1")
        stream = engine.astream(asked)
        task: Any = asyncio.ensure_future(anext(stream) if how == "stream closed" else engine.agenerate(asked))
        waiting = asyncio.create_task(engine.agenerate(request(short, max_tokens=6, **GREEDY)))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        assert (engine.stats().running, engine.stats().waiting) == (4, 1)
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "stream closed":
            await task
            await stream.aclose()
        else:
            assert engine.abort("job-1") is True
            assert engine.abort("job-1") is False
        counter.go_on.set()
        [answer] = await asyncio.wait_for(waiting, 30.0)
        stats = engine.stats()
        for part in await task if how == "aborted" else ():
            assert part.finish_reason == "abort" and 4 <= len(part.token_ids) < 50  # it returns what there is
            assert list(part.token_ids) == greedy_oracle(model, long, len(part.token_ids))
    assert list(answer.token_ids) == greedy_oracle(model, short, 6)
    assert (stats.aborted, stats.finished, stats.requests, stats.running, stats.waiting) == (1, 1, 2, 0, 0)
    assert counter.steps < 50  # the 400 tokens were not generated


async def test_any_number_of_waiting_requests_is_cancelled_while_paused() -> None:
    """Also before the first forward, and after memory was released, when there is nothing to store from."""
    gate = RequestGate()
    with engine_of(tiny_causal_lm(), gate=gate) as engine:
        gate.pause(timeout=10.0)
        for number in range(1, embedded._MAX_FAILED_STEPS + 1):
            task = asyncio.create_task(engine.agenerate(request((1, 2), n=3, max_tokens=4)))
            await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 3, "the request to wait")
            task.cancel()
            await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 0, "its sequences to leave")
            assert engine.stats().aborted == number
        assert not gate.is_open
        gate.resume()
        assert len(await engine.agenerate(request((1, 2), n=3, max_tokens=4))) == 3
        assert engine.stats().rebuilds == 0


# -- failures and the end ----------------------------------------------------------------------------------------------


def fail(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, when: Callable[[int, Any], bool]
) -> None:
    """The calls of ``owner.name`` for which ``when(number from 1, arguments)`` holds raise ``error``."""
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **settings: Any) -> Any:
        if when(next(calls), arguments):
            raise error
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (ModelRunner, "prefill", MemoryError("no room for the KV cache")),
        (ModelRunner, "decode", RuntimeError("a kernel failed")),
        (ModelRunner, "decode", SystemExit(1)),
        (scheduler, "sample", RuntimeError("a kernel failed")),
        (RunningSequence, "push", RuntimeError("in the middle of a batch")),
        (ContinuousBatch, "remove", MemoryError()),
    ],
)
async def test_failed_steps_cost_no_request_and_no_token(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException
) -> None:
    """Every request goes on from its tokens: the same ones, with the logprobs and versions of the weights."""
    model = tiny_causal_lm()
    given = prompts(5, 9, 30, 12)
    fail(monkeypatch, owner, name, error, lambda call, _: call in (2, 5, 6, 30))
    with engine_of(copy.deepcopy(model), max_running=6) as engine:
        engine.update_weights_from_tensor(named(model), policy_version=3)
        wanted = [request(p, n=2, max_tokens=6 + 3 * i, ignore_eos=True, seed=i) for i, p in enumerate(given)]
        whole = [asyncio.create_task(engine.agenerate(r)) for r in wanted[:3]]
        deltas = [delta async for delta in engine.astream(wanted[3])]
        answers = [await asyncio.wait_for(task, 60.0) for task in whole]
        stats = engine.stats()
        monkeypatch.undo()
        undisturbed = await asyncio.to_thread(engine.generate, wanted)
    streamed = [tuple(t for d in deltas if d.index == i for t in d.token_ids) for i in (0, 1)]
    assert [[g.token_ids for g in a] for a in answers] == [[g.token_ids for g in a] for a in undisturbed[:3]]
    assert streamed == [g.token_ids for g in undisturbed[3]]
    for prompt, answer in zip(given, answers, strict=False):
        for generation in answer:
            check_logprobs(model, prompt, generation)
            assert generation.policy_version_runs == ((3, len(generation.token_ids)),)
    assert stats.rebuilds >= 1
    assert (stats.failed, stats.finished, stats.running, stats.waiting) == (0, 4, 0, 0)


async def test_an_engine_for_which_a_known_request_fails_too_is_given_up_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights are whole, so that their logprobs show nothing."""
    fail(monkeypatch, scheduler, "sample", RuntimeError("device lost"), lambda *_: True)
    why = "gave up after 10 failed steps: RuntimeError: device lost"
    with engine_of(tiny_causal_lm()) as engine:
        tickets = [engine._submit(request((1, i), max_tokens=5)) for i in range(8)]
        for ticket in tickets:
            with pytest.raises(EngineStoppedError, match=why):
                await asyncio.wait_for(asyncio.wrap_future(ticket.future), 60.0)
        await asyncio.to_thread(engine._thread.join, 10.0)
        for call in (engine.astream, engine._submit, lambda asked: engine.compute_logprobs([1, 2])):
            with pytest.raises(EngineStoppedError, match=why):
                call(request((1,)))


@pytest.mark.parametrize("attended", [True, False])
def test_weights_that_a_failure_damaged_are_never_sampled_from(attended: bool) -> None:
    model, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [prompt] = prompts(8)
    counter = StepCounter(damaged := copy.deepcopy(model))
    counter.fail_with = RuntimeError("a kernel wrote where it should not")
    counter.fails = lambda step: step == 4 and damaged.lm_head.weight.data[:, 0].add_(1.0) is not None
    with engine_of(damaged) as engine, ThreadPoolExecutor(1) as pool:
        engine.update_weights_from_tensor(named(model), policy_version=3)
        if attended:
            engine.attend = lambda: None
        answering = pool.submit(one, engine, prompt, max_tokens=20, **GREEDY)
        if not attended:
            with pytest.raises(EngineStoppedError, match="its weights of version 3 are damaged: they give other"):
                answering.result(30.0)
            return
        eventually(lambda: not engine.weights_ready, "the damage to be found")
        engine.update_weights_from_tensor(named(new), policy_version=4)
        answer = answering.result(30.0)
        assert answer.policy_version_runs == ((3, 4), (4, 16))
        assert list(answer.token_ids[:4]) == greedy_oracle(model, prompt, 4)
        assert list(answer.token_ids[4:]) == greedy_oracle(new, prompt + answer.token_ids[:4], 16)
        check_greedy(engine, new, prompt, 6)


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


def test_a_busy_engine_lets_callers_of_any_thread_in_at_every_token_boundary() -> None:
    model = tiny_causal_lm()
    [prompt, *rest] = prompts(4, *[8] * 10)
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(4) as pool:
        busy = pool.submit(one, engine, prompt, max_tokens=500, ignore_eos=True)
        own_loops = [pool.submit(asyncio.run, engine.agenerate(request(t, max_tokens=7, **GREEDY))) for t in rest]
        values = [engine.compute_logprobs(tokens) for tokens in rest]
        busy.result(60.0)
        for tokens, asked in zip(rest, own_loops, strict=True):
            assert list(asked.result(60.0)[0].token_ids) == greedy_oracle(model, tokens, 7)
    for tokens, value in zip(rest, values, strict=True):
        assert value == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)


async def test_many_bad_requests_in_a_row_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm()
    error = RuntimeError("this prompt is too much")
    fail(monkeypatch, ModelRunner, "prefill", error, lambda _, given: any(prompt[0] == 9 for prompt in given[1]))
    goods = [(1, *prompt) for prompt in prompts(5, 8, 11)]
    with engine_of(copy.deepcopy(model)) as engine:
        asked = [engine.agenerate(request((9, i), max_tokens=5)) for i in range(7)]
        asked += [engine.agenerate(request(good, max_tokens=9, **GREEDY)) for good in goods]
        answers: list[Any] = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 120.0)
        assert all(type(answer) is EngineError and answer.__cause__ is error for answer in answers[:7])
        for good, [answer] in zip(goods, answers[7:], strict=True):
            assert list(answer.token_ids) == greedy_oracle(model, good, 9)
        for _ in range(2):  # nor do those that come one after the other
            with pytest.raises(EngineError, match="while generating: RuntimeError: this prompt is too much"):
                await asyncio.wait_for(engine.agenerate(request((9, 9), max_tokens=5)), 60.0)
        await asyncio.to_thread(check_greedy, engine, model, goods[1], 6)
        assert engine.stats().failed == 9


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
