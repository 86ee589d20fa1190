"""The embedded engine over time: slots and queue, pauses, new weights, released memory, aborts, failures, the end."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.engines import engine_of, greedy_oracle, logprob_oracle, one, prompts, request, tiny_causal_lm
from support.serving import eventually

from atropos_verl.errors import EngineError, EngineStoppedError, WeightSyncError
from atropos_verl.inference.gate import RequestGate
from atropos_verl.inference.transformers_engine import TransformersEngine


class StepCounter:
    """Counts decode steps of a model and can hold it before one: the tests' handle on "mid-generation"."""

    def __init__(self, model: Any) -> None:
        self._forward = model.forward
        self.steps = 0
        self.hold_at: int | None = None
        self.held = threading.Event()
        self.go_on = threading.Event()
        self.fail_with: Exception | None = None
        model.forward = self._counted

    def _counted(self, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            if self.steps == self.hold_at:
                self.held.set()
                assert self.go_on.wait(30.0)
            self.steps += 1
            if self.fail_with is not None:
                raise self.fail_with
        return self._forward(**kwargs)


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


# -- slots and queue ---------------------------------------------------------------------------------------------------


def test_more_sequences_than_slots_are_served_in_order_of_arrival() -> None:
    model = tiny_causal_lm()
    lengths = [4 + i for i in range(10)]
    given = prompts(*lengths)
    finished: list[int] = []
    counter = StepCounter(engine_model := copy.deepcopy(model))
    counter.hold_at = 0
    with engine_of(engine_model, max_running=2) as engine:
        tickets = []
        for index, prompt in enumerate(given):
            ticket = engine._loop.submit(request(prompt, max_tokens=6, temperature=0.0, ignore_eos=True))
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


def test_one_request_with_more_completions_than_slots() -> None:
    [prompt] = prompts(7)
    wanted = request(prompt, n=11, max_tokens=8, seed=1, ignore_eos=True)
    with engine_of(tiny_causal_lm(), max_running=3) as narrow, engine_of(tiny_causal_lm(), max_running=64) as wide:
        [few_slots], [many_slots] = narrow.generate([wanted]), wide.generate([wanted])
    assert [g.token_ids for g in few_slots] == [g.token_ids for g in many_slots]
    assert len({g.token_ids for g in few_slots}) == 11


def test_sequences_that_join_and_leave_do_not_disturb_the_others() -> None:
    """Lengths from 1 to 60 through 5 slots: every compaction and every growth of the cache is crossed."""
    model = tiny_causal_lm()
    given = prompts(*[1 + (17 * i) % 140 for i in range(24)])
    steps = [1 + (23 * i) % 60 for i in range(24)]
    with engine_of(copy.deepcopy(model), max_running=5, max_prefill_tokens=200) as engine:
        answers = engine.generate(
            [request(p, max_tokens=k, temperature=0.0, ignore_eos=True) for p, k in zip(given, steps, strict=True)]
        )
        assert (engine.stats().finished, engine.stats().generated_tokens) == (24, sum(steps))
    for prompt, count, [answer] in zip(given, steps, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, count)


def test_many_threads_and_event_loops_at_once() -> None:
    model = tiny_causal_lm()
    given = prompts(*range(2, 18))
    with engine_of(copy.deepcopy(model), max_running=6) as engine:

        def from_own_loop(prompt: tuple[int, ...]) -> tuple[int, ...]:
            async def client() -> tuple[int, ...]:
                [answer] = await engine.agenerate(request(prompt, max_tokens=7, temperature=0.0, ignore_eos=True))
                return answer.token_ids

            return asyncio.run(client())

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(from_own_loop, given, timeout=60.0))
    assert [list(a) for a in answers] == [greedy_oracle(model, p, 7) for p in given]


# -- pauses and new weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", [False, True])
def test_weights_swapped_in_mid_generation(release: bool) -> None:
    """Tokens before the swap are the old policy's, tokens after it the new one's given those before."""
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    given = prompts(5, 12, 30)
    counter = StepCounter(engine_model := copy.deepcopy(old))
    counter.hold_at = 7  # the eighth decode step is held
    gate = RequestGate()
    gate.pause(timeout=10.0)
    with engine_of(engine_model, gate=gate) as engine, ThreadPoolExecutor(1) as pool:
        engine.update_weights_from_tensor(named(old), policy_version=3)
        wanted = [request(p, max_tokens=20, temperature=0.0, ignore_eos=True) for p in given]
        answering = pool.submit(engine.generate, wanted)
        eventually(lambda: engine.stats().waiting == 3, "the requests to arrive, so that they start together")
        gate.resume()
        assert counter.held.wait(10.0)
        threading.Timer(0.05, counter.go_on.set).start()
        gate.pause(timeout=10.0)
        before = counter.steps
        swapped_at = before + 1  # one token from the prefill, one from each decode step
        assert swapped_at >= 9
        if release:
            engine.release_memory_occupation()
            assert (engine.stats().kv_bytes, engine.stats().weight_bytes) == (0, 0)
            engine.resume_memory_occupation()
        assert engine.update_weights_from_tensor(iter(named(new)), policy_version=4) == sum(
            tensor.nbytes for _, tensor in named(new)
        )
        tokens = given[1] + (9, 8)
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)  # while paused
        assert counter.steps == before
        assert not answering.done()
        gate.resume()
        answers = answering.result(60.0)
        assert engine.policy_version == 4
        assert engine.stats().evictions == 3
        assert engine.stats().failed == 0
    for prompt, [answer] in zip(given, answers, strict=True):
        assert list(answer.token_ids[:swapped_at]) == greedy_oracle(old, prompt, swapped_at)
        assert list(answer.token_ids[swapped_at:]) == greedy_oracle(
            new, prompt + answer.token_ids[:swapped_at], 20 - swapped_at
        )
        assert (answer.policy_version_first, answer.policy_version_last) == (3, 4)
        assert len(answer.logprobs) == 20
        after = logprob_oracle(new, prompt + answer.token_ids)[len(prompt) - 1 + swapped_at :]
        assert list(answer.logprobs[swapped_at:]) == pytest.approx(after, abs=1e-4)


def test_a_seeded_request_survives_an_eviction_with_the_same_tokens() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(10)
    wanted = request(prompt, n=2, max_tokens=20, temperature=1.1, seed=9, ignore_eos=True)
    counter = StepCounter(engine_model := copy.deepcopy(model))
    with engine_of(engine_model) as engine, ThreadPoolExecutor(1) as pool:
        [undisturbed] = engine.generate([wanted])
        counter.hold_at = counter.steps + 6
        running = pool.submit(engine.generate, [wanted])
        assert counter.held.wait(10.0)
        threading.Timer(0.05, counter.go_on.set).start()
        engine.update_weights_from_tensor(named(model))  # the same weights; the gate was not even paused
        [disturbed] = running.result(30.0)
        assert engine.stats().evictions == 2
    assert [g.token_ids for g in disturbed] == [g.token_ids for g in undisturbed]
    assert [g.policy_version_first for g in disturbed] == [-1, -1]
    assert [g.policy_version_last for g in disturbed] == [0, 0]


def test_requests_that_arrive_while_paused_wait_and_are_served() -> None:
    model = tiny_causal_lm()
    gate = RequestGate()
    given = prompts(3, 6, 9)
    with engine_of(copy.deepcopy(model), gate=gate) as engine, ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            gate.pause(timeout=10.0)
            waiting = [pool.submit(one, engine, p, max_tokens=5, temperature=0.0, ignore_eos=True) for p in given]
            eventually(lambda: engine.stats().waiting == 3, "three sequences to wait")
            assert engine.stats().running == 0
            gate.resume()
            answers = [future.result(30.0) for future in waiting]
            assert [list(a.token_ids) for a in answers] == [greedy_oracle(model, p, 5) for p in given]
        assert engine.stats().failed == 0


def test_released_weights_are_not_used_until_new_ones_are_in() -> None:
    model = tiny_causal_lm(seed=5)
    [prompt] = prompts(6)
    with engine_of(tiny_causal_lm()) as engine, ThreadPoolExecutor(1) as pool:
        full = engine.stats().weight_bytes
        engine.release_memory_occupation()
        engine.release_memory_occupation()  # idempotent
        assert engine.stats().weight_bytes == 0
        waiting = pool.submit(one, engine, prompt, max_tokens=5, temperature=0.0, ignore_eos=True)
        eventually(lambda: engine.stats().waiting == 1, "the request to wait")
        with pytest.raises(WeightSyncError, match="resume_memory_occupation"):
            engine.update_weights_from_tensor(named(model))
        engine.resume_memory_occupation()
        engine.resume_memory_occupation()
        assert engine.stats().weight_bytes == full
        with pytest.raises(EngineError, match="no usable weights"):
            engine.compute_logprobs(prompt)
        with pytest.raises(
            TimeoutError, match=r"0 of 1 requests were done after 0.05 s \(gate open, weights not ready"
        ):
            engine.generate([request(prompt)], timeout=0.05)
        assert not waiting.done()
        engine.update_weights_from_tensor(named(model), policy_version=8)
        answer = waiting.result(30.0)
    assert list(answer.token_ids) == greedy_oracle(model, prompt, 5)
    assert (answer.policy_version_first, answer.policy_version_last) == (8, 8)


def test_release_can_keep_the_weights() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(6)
    with engine_of(copy.deepcopy(model), release_weights=False) as engine:
        one(engine, prompt, max_tokens=2)
        assert engine.stats().kv_bytes > 0
        engine.release_memory_occupation()
        assert engine.stats().kv_bytes == 0
        assert engine.weights_ready
        engine.resume_memory_occupation()
        again = one(engine, prompt, max_tokens=5, temperature=0.0, ignore_eos=True)
    assert list(again.token_ids) == greedy_oracle(model, prompt, 5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied and untied embeddings
def test_new_weights_under_every_name_they_may_come_with(family: str) -> None:
    new = tiny_causal_lm(seed=3, family=family)
    [tokens] = prompts(12)
    expected = logprob_oracle(new, tokens)
    state = {name: tensor.detach().clone() for name, tensor in new.state_dict().items()}
    assert "lm_head.weight" in state
    variants: list[Any] = [state, list(state.items()), iter(state.items())]
    if family == "qwen2":
        variants += [
            [(name, tensor) for name, tensor in state.items() if name != "lm_head.weight"],
            [(name, tensor) for name, tensor in state.items() if name != "model.embed_tokens.weight"],
        ]
    for variant in variants:
        with engine_of(tiny_causal_lm(family=family)) as engine:
            assert engine.policy_version == -1
            engine.update_weights_from_tensor(variant)
            assert engine.policy_version == 0
            assert engine.compute_logprobs(tokens) == pytest.approx(expected, abs=1e-5)
    with engine_of(tiny_causal_lm(family=family), dtype=torch.bfloat16) as engine:
        engine.update_weights_from_tensor(state)  # float32 values are cast
        rounded = copy.deepcopy(new).to(torch.bfloat16)
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(rounded, tokens), abs=0.05)


def _break(state: list[tuple[str, torch.Tensor]], how: str) -> list[tuple[str, torch.Tensor]]:
    name, tensor = state[3]
    return {
        "unknown": [*state[:3], (name + "_x", tensor), *state[4:]],
        "shape": [*state[:3], (name, tensor.reshape(-1)[:-1]), *state[4:]],
        "missing": [*state[:3], *state[4:]],
        "twice": [*state, state[3]],
        "nothing": [],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown", r"no tensor 'model.layers.0.self_attn.k_proj.weight_x'; did you mean '[^']*k_proj.weight'"),
        ("shape", r"'model.layers.0.self_attn.k_proj.weight' has shape \(511,\), the engine's model \(16, 32\)"),
        ("missing", r"1 of 26 tensors are missing, first 'model.layers.0.self_attn.k_proj.weight'"),
        ("twice", r"'model.layers.0.self_attn.k_proj.weight' was given twice"),
        ("nothing", r"26 of 26 tensors are missing, first 'model.embed_tokens.weight'"),
    ],
)
def test_wrong_weights_are_refused_by_name_and_leave_the_version(how: str, message: str) -> None:
    model, new = tiny_causal_lm(), tiny_causal_lm(seed=9)
    state = named(new)
    assert state[3][0] == "model.layers.0.self_attn.k_proj.weight"
    [prompt] = prompts(5)
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(1) as pool:
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights_from_tensor(_break(state, how), policy_version=5)
        # A list is checked before anything is copied: the old weights still serve.
        assert engine.policy_version == -1
        assert list(one(engine, prompt, max_tokens=4, temperature=0.0, ignore_eos=True).token_ids) == greedy_oracle(
            model, prompt, 4
        )
        # An iterator may fail half-way: the mixture is never used.
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights_from_tensor(iter(_break(state, how)), policy_version=5)
        assert engine.policy_version == -1
        assert engine.weights_ready == (how == "nothing")
        waiting = pool.submit(one, engine, prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        engine.update_weights_from_tensor(iter(state), policy_version=6)
        answer = waiting.result(30.0)
        if how != "nothing":
            assert list(answer.token_ids) == greedy_oracle(new, prompt, 4)
        assert engine.policy_version == 6


def test_a_source_that_breaks_half_way_is_not_served() -> None:
    def source() -> Iterator[tuple[str, torch.Tensor]]:
        yield from named(tiny_causal_lm(seed=4))[:5]
        raise ConnectionResetError("trainer went away")

    with engine_of(tiny_causal_lm()) as engine:
        with pytest.raises(ConnectionResetError):
            engine.update_weights_from_tensor(source())
        assert not engine.weights_ready
        assert engine.policy_version == -1


# -- aborts ------------------------------------------------------------------------------------------------------------


async def test_cancelling_the_task_frees_the_slots() -> None:
    model = tiny_causal_lm()
    counter = StepCounter(engine_model := copy.deepcopy(model))
    counter.hold_at = 3
    [long, short] = prompts(5, 9)
    with engine_of(engine_model, max_running=4) as engine:
        task = asyncio.create_task(engine.agenerate(request(long, n=4, max_tokens=400, ignore_eos=True)))
        waiting = asyncio.create_task(engine.agenerate(request(short, max_tokens=6, temperature=0.0, ignore_eos=True)))
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
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(eventually, lambda: engine.stats().running == 0, "the slots to be freed")
        assert len(seen) == 6
        assert engine.stats().aborted == 1
        assert engine.stats().generated_tokens < 2 * 480


async def test_abort_by_id_returns_what_there_is() -> None:
    model = tiny_causal_lm()
    counter = StepCounter(engine_model := copy.deepcopy(model))
    counter.hold_at = 4
    [prompt] = prompts(5)
    with engine_of(engine_model) as engine:
        assert engine.abort("job-1") is False
        task = asyncio.create_task(
            engine.agenerate(request(prompt, max_tokens=100, temperature=0.0, ignore_eos=True, request_id="job-1"))
        )
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
    counter = StepCounter(engine_model := copy.deepcopy(model))
    [prompt] = prompts(5)
    with engine_of(engine_model) as engine:
        counter.fail_with = MemoryError("no room for the KV cache")
        with pytest.raises(EngineError, match="MemoryError: no room for the KV cache") as caught:
            await asyncio.wait_for(engine.agenerate(request(prompt, n=2, max_tokens=5, ignore_eos=True)), 30.0)
        assert isinstance(caught.value.__cause__, MemoryError)
        counter.fail_with = None
        [answer] = await asyncio.wait_for(
            engine.agenerate(request(prompt, max_tokens=5, temperature=0.0, ignore_eos=True)), 30.0
        )
        assert engine.stats().failed == 1
    assert list(answer.token_ids) == greedy_oracle(model, prompt, 5)


async def test_an_engine_that_fails_every_step_is_given_up_and_says_why() -> None:
    counter = StepCounter(model := tiny_causal_lm())
    counter.fail_with = RuntimeError("device lost")
    with engine_of(model) as engine:
        for _ in range(3):
            with pytest.raises(EngineError, match="device lost"):
                await asyncio.wait_for(engine.agenerate(request((1,), max_tokens=5, ignore_eos=True)), 30.0)
        await asyncio.to_thread(engine._loop._thread.join, 10.0)
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
        [answer] = await engine.agenerate(request(prompt, max_tokens=6, temperature=0.0, ignore_eos=True))
    assert list(answer.token_ids) == greedy_oracle(good, prompt, 6)


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
    assert not engine._loop._thread.is_alive()
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


def test_from_pretrained_loads_what_was_saved(tmp_path: Any) -> None:
    from support.tiny_model import build_tiny_model
    from transformers import AutoModelForCausalLM

    path = build_tiny_model(tmp_path / "model", hidden=32)
    reference = AutoModelForCausalLM.from_pretrained(str(path))
    [prompt] = prompts(6)
    with TransformersEngine.from_pretrained(path, max_context_len=40, num_threads=1, max_running=2) as engine:
        answer = one(engine, prompt, max_tokens=6, temperature=0.0, ignore_eos=True)
        assert engine.max_context_len == 40
    assert list(answer.token_ids) == greedy_oracle(reference, prompt, 6)
