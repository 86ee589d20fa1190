"""What only an engine in a process of its own can do wrong: memory that is shared, a process that may die."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from support.engines import (
    engine_of,
    greedy_oracle,
    logprob_oracle,
    named,
    one,
    placed_engine,
    prompts,
    request,
    tiny_causal_lm,
)
from support.serving import eventually
from support.tiny_model import build_tiny_model

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.process_engine.engine import ProcessEngine
from atropos_verl.engine.process_engine.process import EngineProcess, anonymous_file
from atropos_verl.errors import EngineError, EngineStoppedError


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    with placed_engine("process", tiny_causal_lm(), num_threads=1) as engine:
        assert isinstance(engine, ProcessEngine)
        yield engine


def test_the_same_tokens_and_logprobs_as_in_a_thread_bit_for_bit(engine: ProcessEngine) -> None:
    """With seeds of their own, and with the engine's for those that have none."""
    wanted = [request(p, n=3, max_tokens=20, temperature=0.9, ignore_eos=True) for p in prompts(5, 9, 30)]
    wanted += [request(p, max_tokens=20, top_p=0.9, seed=i, prompt_logprobs=2) for i, p in enumerate(prompts(4, 8))]
    wanted += [request((1, 2), max_tokens=5, seed=seed) for seed in (-1, 2**64 + 17)]
    answers = []
    with engine_of(tiny_causal_lm(), num_threads=1) as in_thread, ThreadPoolExecutor(1) as pool:
        for placed in (in_thread, engine):
            before = placed.stats().waiting
            placed.gate.pause()
            running = pool.submit(placed.generate, wanted)
            eventually(lambda placed=placed, before=before: placed.stats().waiting == before + 13, "all to arrive")  # type: ignore[misc]
            placed.gate.resume()
            answers.append(running.result(30.0))
        assert answers[0] == answers[1]
        for temperature in (1.0, 0.7):
            tokens = list(wanted[0].prompt_token_ids)
            assert engine.compute_logprobs(tokens, temperature) == in_thread.compute_logprobs(tokens, temperature)


@pytest.mark.parametrize("how", ["swap", "update", "released"])
async def test_weights_changed_in_mid_generation(engine: ProcessEngine, how: str) -> None:
    """Each token is greedy, and its logprob right, under the version that it is recorded with."""
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [prompt] = prompts(12)
    engine.update_weights_from_tensor(named(old), policy_version=3)
    before = engine.stats()
    wanted = request(prompt, n=2, max_tokens=300, temperature=0.0, ignore_eos=True)
    answering = asyncio.create_task(engine.agenerate(wanted))
    await asyncio.to_thread(eventually, lambda: engine.stats().generated_tokens > before.generated_tokens + 6, "tokens")
    if how == "swap":
        assert engine.stage_weights_from_tensor(iter(named(new))) == sum(tensor.nbytes for _, tensor in named(new))
        assert engine.compute_staged_logprobs(prompt) == pytest.approx(logprob_oracle(new, prompt), abs=1e-5)
    await asyncio.to_thread(engine.gate.pause, 10.0)
    paused_at = engine.stats().generated_tokens
    await asyncio.sleep(0.05)
    assert engine.stats().generated_tokens == paused_at, "paused, nothing is generated"
    assert not answering.done()
    if how == "swap":
        engine.swap_weights(policy_version=4)
    elif how == "update":
        engine.update_weights_from_tensor(iter(named(new)), policy_version=4)
    else:
        engine.release_memory_occupation()
        assert (engine.stats().kv_bytes, engine.stats().weight_bytes) == (0, 0)
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor(named(new), policy_version=4)
    engine.gate.resume()
    for answer in await asyncio.wait_for(answering, 60.0):
        [(first, count), (last, rest)] = answer.policy_version_runs
        assert (first, last, count + rest) == (3, 4, 300)
        assert list(answer.token_ids[:count]) == greedy_oracle(old, prompt, count)
        few = min(rest, 20)
        context = prompt + answer.token_ids[:count]
        assert list(answer.token_ids[count : count + few]) == greedy_oracle(new, context, few)
        after = logprob_oracle(new, prompt + answer.token_ids)[len(prompt) - 1 + count :]
        assert list(answer.logprobs[count:]) == pytest.approx(after, abs=1e-4)
    assert engine.stats().failed == before.failed


async def test_abort_by_id_returns_what_there_is(engine: ProcessEngine) -> None:
    assert engine.abort("job-1") is False
    wanted = request((1, 2), n=2, max_tokens=500, ignore_eos=True, request_id="job-1")
    task = asyncio.create_task(engine.agenerate(wanted))
    await asyncio.to_thread(eventually, lambda: engine.stats().running == 2, "it to run")
    assert engine.abort("job-1") is True
    for answer in await asyncio.wait_for(task, 30.0):
        assert answer.finish_reason == "abort"
        assert 1 <= len(answer.token_ids) < 500


def test_both_buffers_are_used_in_turn_and_released_memory_is_given_back(engine: ProcessEngine) -> None:
    files = [int(word) for word in psutil.Process(engine.pid).cmdline()[-2:]]

    def resident() -> list[int]:
        return [Path(f"/proc/{engine.pid}/fd/{number}").stat().st_blocks * 512 for number in files]

    [tokens] = prompts(10)
    for version in range(4):
        new = tiny_causal_lm(seed=version)
        size = engine.stage_weights_from_tensor(named(new))
        engine.swap_weights(version)
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
    assert min(resident()) >= size
    engine.release_memory_occupation()
    assert resident() == [0, 0]
    with pytest.raises(EngineError, match="no usable weights"):
        engine.compute_logprobs(tokens)
    engine.resume_memory_occupation()
    engine.update_weights_from_tensor(named(new), 9)
    assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
    assert min(resident()) == 0 and max(resident()) >= size
    maps = Path(f"/proc/{engine.pid}/maps").read_text()
    assert "memfd:atropos-verl-weights" in maps and "/dev/shm" not in maps  # no name that could be left behind


def test_tied_weights_buffers_and_other_dtypes_have_their_places() -> None:
    from atropos_verl.engine.process_engine.shared_weights import SharedBuffer, SharedWeightStore, plan, store_over

    model = tiny_causal_lm()
    model.register_buffer("scale", torch.tensor([3, 1], dtype=torch.int64))
    model.register_buffer("none", torch.empty(0))
    model.model.norm.to(torch.bfloat16)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places, size = plan(model)
    files = [anonymous_file("test") for _ in range(2)]
    engines = SharedWeightStore(model, [SharedBuffer(file, places, size) for file in files])
    trainers = [store_over(SharedBuffer(file, places, size), places) for file in files]
    for file in files:
        os.close(file)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    new = {name: tensor + 1 for name, tensor in kept.items()}
    trainers[0].update(new)
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())
    spare = copy.deepcopy(model, dict(engines.spare_tensors()))
    assert spare.lm_head.weight is spare.model.embed_tokens.weight
    trainers[1].update(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in spare.state_dict().items())
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())


def test_log_records_of_the_engine_become_ours(engine: ProcessEngine, caplog: pytest.LogCaptureFixture) -> None:
    bad = tiny_causal_lm()
    with torch.no_grad():
        bad.model.norm.weight[0] = float("nan")
    engine.update_weights_from_tensor(named(bad), 11)
    with caplog.at_level(logging.INFO), pytest.raises(EngineError, match="policy version 11 hold NaN"):
        one(engine, (1, 2), max_tokens=2)
    eventually(lambda: "an engine step failed" in caplog.text, "the record")
    assert "Traceback" in caplog.text
    engine.update_weights_from_tensor(named(tiny_causal_lm()), 12)


def test_signals_of_a_terminal_are_the_trainers_business(engine: ProcessEngine) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)
    assert len(one(engine, (1, 2), max_tokens=3, ignore_eos=True).token_ids) == 3


async def test_a_killed_process_fails_what_waits_at_once_and_says_where_to_look(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    gate = RequestGate()
    engine = ProcessEngine(build_tiny_model(tmp_path / "model"), gate=gate, process=EngineProcess(log)).wait_ready()
    try:
        running = asyncio.create_task(engine.agenerate(request((1, 2), max_tokens=2000, ignore_eos=True)))
        stream = engine.astream(request((1, 2), max_tokens=2000, ignore_eos=True))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        for waiting in (running, anext_until_end(stream)):
            with pytest.raises(EngineStoppedError, match=rf"\(pid {engine.pid}\) was ended by SIGKILL.*{log}"):
                await asyncio.wait_for(waiting, 10.0)
        started = time.monotonic()
        gate.pause(60.0)  # nobody is left to wait for
        gate.resume()
        for use in (
            engine.check_alive,
            lambda: engine.stage_weights_from_tensor([]),
            lambda: engine.update_weights_from_tensor([]),
            lambda: engine.compute_logprobs([1, 2]),
            lambda: engine.astream(request((1,))),
        ):
            with pytest.raises(EngineStoppedError, match="SIGKILL"):
                use()
        engine.release_memory_occupation()  # what a trainer does on its way out; the memory is free
        assert time.monotonic() - started < 20.0
    finally:
        engine.close()
        engine.close()


async def anext_until_end(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize("paused", [False, True])
async def test_close_fails_what_waits_and_leaves_no_process(tmp_path: Path, paused: bool) -> None:
    engine = ProcessEngine(build_tiny_model(tmp_path / "model")).wait_ready()
    process = psutil.Process(engine.pid)
    if paused:
        engine.gate.pause(10.0)
    tasks = [asyncio.create_task(engine.agenerate(request((1, 2), max_tokens=2000, ignore_eos=True))) for _ in range(3)]
    await asyncio.to_thread(eventually, lambda: engine.stats().requests == 3, "the requests to arrive")
    await asyncio.to_thread(engine.close)
    for task in tasks:
        with pytest.raises(EngineStoppedError, match="the engine was closed"):
            await asyncio.wait_for(task, 10.0)
    with pytest.raises(EngineStoppedError, match="closed"):
        await engine.agenerate(request((1,)))
    assert not process.is_running()


def test_what_cannot_be_loaded_is_said_as_in_a_thread(tmp_path: Path) -> None:
    sliding = tiny_causal_lm(use_sliding_window=True, sliding_window=64, max_window_layers=0)
    with (
        pytest.raises(EngineError, match=r"sliding window of 64 tokens.*max_context_len <= 64"),
        placed_engine("process", sliding),
    ):
        pytest.fail("a context beyond the window was accepted")
    with ProcessEngine(tmp_path / "nothing", process=EngineProcess(tmp_path / "log")) as engine:
        with pytest.raises(EngineError, match="nothing"):
            engine.wait_ready()
        with pytest.raises(EngineError):
            engine.compute_logprobs([1, 2])
        assert "Traceback" in (tmp_path / "log").read_text()


def test_it_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    """In the middle of start-up and of generation."""
    script = """
import sys, time
from atropos_verl.engine.protocol import GenerationRequest
from atropos_verl.engine.process_engine.engine import ProcessEngine
from atropos_verl.engine.process_engine.process import EngineProcess, anonymous_file
engine = ProcessEngine(sys.argv[1])
print(engine.pid, flush=True)
engine.wait_ready()
print("ready", flush=True)
engine.generate([GenerationRequest(prompt_token_ids=(1, 2), max_tokens=2000, n=8, ignore_eos=True)] * 50)
"""
    model = build_tiny_model(tmp_path / "model")
    for when in ("starting", "generating"):
        with subprocess.Popen([sys.executable, "-c", script, str(model)], stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            child = psutil.Process(int(owner.stdout.readline()))
            if when == "generating":
                assert owner.stdout.readline() == "ready\n"
            time.sleep(0.5)
            assert child.is_running()
            owner.kill()
            owner.wait(10.0)
            eventually(lambda child=child: not child.is_running(), "the engine's process to end", timeout=10.0)  # type: ignore[misc]
