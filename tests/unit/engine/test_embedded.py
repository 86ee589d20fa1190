"""The embedded engine: its answers against plain forward passes; slots and queue, aborts, failures, the end."""

import asyncio
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine import embedded, runner, scheduler
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import GenerationEngine, RequestGate
from atropos_verl.engine.requests import EngineLimits, RunningSequence, StopStrings, Ticket
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.scheduler import ContinuousBatch
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError

TOKENIZER = build_tiny_tokenizer()


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild collects garbage, which takes half a second each time beside everything that tests have imported."""
    monkeypatch.setattr(embedded, "gc", SimpleNamespace(collect=lambda: None))


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_logprobs_are_of_the_sampling_temperature_over_the_full_vocabulary(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """bfloat16: 8 bits of mantissa, logits of about 5."""
    model = tiny_causal_lm().to(dtype)
    *ragged, long = prompts(4, 21, 40, 100)
    with engine_of(copy.deepcopy(model)) as engine:
        for settings in ({"temperature": 0.7}, {"temperature": 1.6, "top_p": 0.5}, {"top_k": 3, "min_p": 0.2}):
            answers = engine.generate([request(p, max_tokens=12, ignore_eos=True, seed=3, **settings) for p in ragged])
            for prompt, [answer] in zip(ragged, answers, strict=True):
                check_logprobs(model, prompt, answer, settings.get("temperature", 1.0), tolerance)
        assert engine.compute_logprobs(long[:1]) == []
        for _ in range(2):
            assert engine.compute_logprobs(long) == pytest.approx(logprob_oracle(model, long), abs=tolerance)
            monkeypatch.setattr(runner, "_LOGITS_BYTES", 4 * 259 * 17)  # chunks of 17 positions


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_thirty_others_in_fewer_slots() -> None:
    [prompt, *others] = prompts(11, *range(3, 33))
    wanted = request(prompt, n=11, max_tokens=25, temperature=0.9, top_p=0.95, seed=44, ignore_eos=True)
    kinds: tuple[Any, ...] = ({"temperature": 1.7}, GREEDY, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.1})
    noise = [request(p, max_tokens=5 + i, **{"ignore_eos": True, **kinds[i % 5]}) for i, p in enumerate(others)]
    unseeded: list[Any] = []
    for seed in (7, 7, 8):  # requests without a seed have the engine's
        with engine_of(tiny_causal_lm(), seed=seed) as wide:
            [alone] = wide.generate([wanted])
            assert wide.stats().prompt_tokens == 11  # computed once for all
            [other_seed] = wide.generate([replace(wanted, seed=43)])
            unseeded.append([one(wide, list(prompt), max_tokens=16, ignore_eos=True).token_ids for _ in range(2)])  # type: ignore[arg-type]
    with engine_of(tiny_causal_lm(), max_running=3) as narrow:
        crowded = narrow.generate([*noise[:15], wanted, *noise[15:]])[15]
    assert [g.token_ids for g in alone] == [g.token_ids for g in crowded]
    for a, b in zip(alone, crowded, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({g.token_ids for g in (*alone, *other_seed)}) == 22  # completions of one request differ
    assert unseeded[0] == unseeded[1] != unseeded[2] and unseeded[0][0] != unseeded[0][1]


def test_a_completion_ends_with_what_stops_it() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(8)
    tokens = greedy_oracle(model, prompt, 20)
    letter = next(token for token in tokens if token < 94)  # of printable ASCII
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, tokens[9]]
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({"temperature": 0.0}, tokens[9]),
        (GREEDY | {"max_tokens": 20}, None),
        (GREEDY | {"max_tokens": 500}, None),  # of a context of 28
        (GREEDY, None),
        (GREEDY | {"stop_token_ids": (tokens[3],)}, tokens[3]),
        (GREEDY | {"stop": (TOKENIZER.decode([letter]),)}, letter),
    ]
    with engine_of(model, max_context_len=28) as engine:
        assert isinstance(engine, GenerationEngine)
        for settings, last in cases:
            answer = one(engine, prompt, **settings)
            expected = (tokens, "length") if last is None else (tokens[: tokens.index(last) + 1], "stop")
            assert (answer.token_ids, answer.finish_reason) == expected


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("Answer: 42\nUser: more", ("\nUser:",), "Answer: 42\nUser:"),  # over six tokens
        ("one two three", ("x", "two "), "one two "),  # ends in whitespace
        ("caf\u00e9 \u20ac5 end", ("\u20ac",), "caf\u00e9 \u20ac"),  # the last of three bytes completes it
        ("a\U0001f600b", ("\U0001f600b",), "a\U0001f600b"),
        ("aaaaaaab", ("aaab",), "aaaaaaab"),
        ("stop", ("stop",), "stop"),
    ],
)
def test_stop_strings_are_found_across_token_borders(text: str, stop: tuple[str, ...], kept: str) -> None:
    limits = EngineLimits(max_context_len=99, vocab_size=259, eos_token_ids=frozenset())
    asked = request((TOKENIZER.encode("0")[0],), stop=(*stop, "0" + text[0]))  # the prompt is no place for one
    [sequence] = Ticket(asked, limits, StopStrings(TOKENIZER, asked.stop, {})).sequences
    assert any(sequence.push(token, -1.0, 0, {}) for token in TOKENIZER.encode(text + "....."))
    assert (TOKENIZER.decode(sequence.tokens), sequence.finish_reason) == (kept, "stop")
    assert len(sequence.tokens) == len(sequence.logprobs) == len(kept.encode())


def test_prompt_logprobs_hold_the_token_and_the_best_alternatives() -> None:
    """Of the whole prompt, also where its beginning is stored."""
    model = tiny_causal_lm()
    [prompt] = prompts(40)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    with engine_of(copy.deepcopy(model)) as engine:
        for k in (0, 3):
            found = one(engine, prompt, max_tokens=1, temperature=0.0, prompt_logprobs=k).prompt_logprobs
            assert found is not None and found[0] is None
            for row, entry, own in zip(logp[:-1], found[1:], prompt[1:], strict=True):
                wanted = {own, *row.topk(k).indices.tolist()}
                assert entry == pytest.approx({token: float(row[token]) for token in wanted}, abs=1e-4)
        assert one(engine, prompt, max_tokens=1).prompt_logprobs is None
        assert engine.stats().reused_tokens == 2 * 36


@pytest.fixture(scope="module")
def narrow() -> Iterator[TransformersEngine]:
    with engine_of(tiny_causal_lm(), max_context_len=32) as engine:
        yield engine


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"prompt_token_ids": ()}, "prompt_token_ids", "is empty"),
        ({"prompt_token_ids": (1,) * 32}, "prompt_token_ids", "has 32 tokens; the context holds 32"),
        ({"prompt_token_ids": (5, 259)}, "prompt_token_ids", r"\[1\] is 259, outside the vocabulary \[0, 259\)"),
        ({"prompt_token_ids": (-1,)}, "prompt_token_ids", r"\[0\] is -1"),
        ({"n": 0}, "n", "n must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, not 0"),
        ({"temperature": float("nan")}, "temperature", "not nan"),
        ({"top_p": 0.0}, "top_p", r"in \(0, 1\], not 0.0"),
        ({"top_k": -2}, "top_k", "not -2"),
        ({"min_p": 1.1}, "min_p", "not 1.1"),
        ({"stop": ("ok", "")}, "stop", "without empty strings"),
        ({"stop": "User:"}, "stop", "a tuple of strings.* not 'User:'"),
        ({"prompt_logprobs": 260}, "prompt_logprobs", "not 260"),
    ],
)
async def test_bad_requests_name_the_parameter_the_value_and_the_limit(
    narrow: TransformersEngine, settings: dict[str, Any], param: str, message: str
) -> None:
    started, bad = narrow.stats().requests, replace(request((1, 2)), **settings)
    with pytest.raises(GenerationRequestError, match=message) as caught:
        narrow.astream(bad)
    assert caught.value.param == param
    with pytest.raises(GenerationRequestError, match=message):
        await asyncio.wait_for(narrow.agenerate(bad), 10)
    with pytest.raises(GenerationRequestError, match=message):
        narrow.generate([request((1, 2)), bad])
    assert narrow.stats().requests == started  # nothing of a list with one bad request was started


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 300], r"\[1\] is 300"), ([1] * 33, "has 33 tokens; the context holds 32"), ([], "token_ids is empty")],
)
def test_tokens_without_logprobs_are_refused(narrow: TransformersEngine, tokens: list[int], message: str) -> None:
    with pytest.raises(GenerationRequestError, match=message):
        narrow.compute_logprobs(tokens)


def test_architectures_it_cannot_run_exactly_are_refused() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    model = tiny_causal_lm(**sliding)
    with pytest.raises(EngineError, match=r"sliding window of 64 tokens.*max_context_len <= 64 \(it is 512\)"):
        engine_of(model)
    with engine_of(copy.deepcopy(model), max_context_len=64) as engine:  # within the window it is exact
        check_greedy(engine, model, prompts(30)[0], 30)
    for setting, value in (("max_running", 0), ("max_context_len", 1)):
        with pytest.raises(EngineError, match=f"{setting} is {value}"):
            engine_of(tiny_causal_lm(), **{setting: value})


# -- slots and queue ---------------------------------------------------------------------------------------------------


def test_more_sequences_than_slots_are_served_in_order_of_arrival() -> None:
    finished: list[int] = []
    counter = StepCounter(tiny_causal_lm(), hold_at=0)
    with engine_of(counter.model, max_running=2) as engine:
        tickets = [engine._submit(request(prompt, max_tokens=6, **GREEDY)) for prompt in prompts(*range(4, 14))]
        for index, ticket in enumerate(tickets):
            ticket.future.add_done_callback(lambda _, index=index: finished.append(index))
        assert counter.held.wait(10.0)
        assert engine.stats().running + engine.stats().waiting == 10
        assert engine.stats().running <= 2
        counter.go_on.set()
        tickets[-1].future.result(30.0)
    assert finished == list(range(10))  # equal lengths: first come, first done


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
        assert answer.token_ids == greedy_oracle(model, prompt, count)


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
        elif how == "stream closed":
            await task
            await stream.aclose()
        else:
            assert [engine.abort("job-1"), engine.abort("job-1")] == [True, False]
        counter.go_on.set()
        [answer] = await asyncio.wait_for(waiting, 30.0)
        stats = engine.stats()
        for part in await task if how == "aborted" else ():
            assert part.finish_reason == "abort" and 4 <= len(part.token_ids) < 50  # it returns what there is
            assert part.token_ids == greedy_oracle(model, long, len(part.token_ids))
    assert answer.token_ids == greedy_oracle(model, short, 6)
    assert (stats.aborted, stats.finished, stats.requests, stats.running, stats.waiting) == (1, 1, 2, 0, 0)
    assert counter.steps < 50  # the 400 tokens were not generated


async def test_any_number_of_waiting_requests_is_cancelled_while_paused() -> None:
    """Also before the first forward, when there is nothing to store from."""
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
    """Every request goes on from its tokens: the same ones, with the logprobs and versions of the weights; and a stream
    has each of them once."""
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
        *undisturbed, streamed = await asyncio.to_thread(engine.generate, wanted)
    assert [[g.token_ids for g in a] for a in answers] == [[g.token_ids for g in a] for a in undisturbed]
    for index, generation in enumerate(streamed):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.token_ids for delta in mine] == [(token,) for token in generation.token_ids]
        assert [delta.logprobs[0] for delta in mine] == pytest.approx(list(generation.logprobs), abs=1e-5)
        assert [delta.finish_reason for delta in mine] == [None] * 14 + ["length"]
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
        for ticket in [engine._submit(request((1, i), max_tokens=5)) for i in range(8)]:
            with pytest.raises(EngineStoppedError, match=why):
                await asyncio.wait_for(asyncio.wrap_future(ticket.future), 60.0)
        await asyncio.to_thread(engine._thread.join, 10.0)
        for call in (engine.astream, engine._submit, lambda asked: engine.compute_logprobs([1, 2])):
            with pytest.raises(EngineStoppedError, match=why):
                call(request((1,)))


@pytest.mark.parametrize("attended", [True, False])
def test_weights_that_a_failure_damaged_are_never_sampled_from(attended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, new, damaged = (tiny_causal_lm(seed=seed) for seed in (1, 2, 1))
    [prompt] = prompts(8)
    spoil = lambda call, _: call == 4 and damaged.lm_head.weight.data[:, 0].add_(1.0) is not None  # noqa: E731
    fail(monkeypatch, ModelRunner, "decode", RuntimeError("a kernel wrote where it should not"), spoil)
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
        assert answer.token_ids[:4] == greedy_oracle(model, prompt, 4)
        assert answer.token_ids[4:] == greedy_oracle(new, prompt + answer.token_ids[:4], 16)


async def test_weights_with_nan_fail_the_request_and_good_ones_repair_the_engine() -> None:
    good = tiny_causal_lm(seed=6)
    bad = copy.deepcopy(good)
    bad.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    [prompt] = prompts(7)
    with engine_of(tiny_causal_lm()) as engine:
        engine.update_weights_from_tensor(named(bad), policy_version=2)
        with pytest.raises(EngineError, match="policy version 2 hold NaN or infinity"):
            await asyncio.wait_for(engine.agenerate(request(prompt, n=3, max_tokens=4)), 30.0)
        engine.update_weights_from_tensor(named(good), policy_version=3)
        await asyncio.to_thread(check_greedy, engine, good, prompt, 6)


def test_a_busy_engine_lets_callers_of_any_thread_in_at_every_token_boundary() -> None:
    model = tiny_causal_lm()
    [prompt, *rest] = prompts(4, *[8] * 10)
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(4) as pool:
        busy = pool.submit(one, engine, prompt, max_tokens=500, ignore_eos=True)
        loops = [pool.submit(asyncio.run, engine.agenerate(request(t, max_tokens=7, **GREEDY))) for t in rest]
        values = [engine.compute_logprobs(tokens) for tokens in rest]
        assert len(busy.result(60.0).token_ids) == 500
        assert [loop.result(60.0)[0].token_ids for loop in loops] == [greedy_oracle(model, t, 7) for t in rest]
    for tokens, found in zip(rest, values, strict=True):
        assert found == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)


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
        assert [answer.token_ids for [answer] in answers[7:]] == [greedy_oracle(model, good, 9) for good in goods]
        for _ in range(2):  # nor do those that come one after the other
            with pytest.raises(EngineError, match="while generating: RuntimeError: this prompt is too much"):
                await asyncio.wait_for(engine.agenerate(request((9, 9), max_tokens=5)), 60.0)
        await asyncio.to_thread(check_greedy, engine, model, goods[1], 6)
        assert engine.stats().failed == 9


@pytest.mark.parametrize("paused", [False, True])
async def test_close_fails_what_runs_and_what_waits_and_ends_the_thread(paused: bool) -> None:
    engine = TransformersEngine(tiny_causal_lm(), None, max_running=1)
    if paused:
        engine.gate.pause(timeout=10.0)
    tasks = [asyncio.create_task(engine.agenerate(request((1, 2), max_tokens=500, ignore_eos=True))) for _ in range(3)]
    await asyncio.to_thread(eventually, lambda: engine.stats().requests == 3, "the requests to arrive")
    await asyncio.to_thread(engine.close, 20.0)
    engine.close()  # idempotent
    for task in (*tasks, engine.agenerate(request((1,)))):
        with pytest.raises(EngineStoppedError, match="the engine was closed"):
            await asyncio.wait_for(task, 10.0)
    assert not engine._thread.is_alive()
    assert engine.stats().failed == 3


def test_an_engine_nobody_closed_does_not_disturb_the_end_of_the_process() -> None:
    script = """
from support.engines import engine_of, request, tiny_causal_lm
engine = engine_of(tiny_causal_lm())
engine._submit(request((1, 2), n=8, max_tokens=500, ignore_eos=True))
print("main ends")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "main ends\n"), done.stderr
