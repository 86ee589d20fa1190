"""Keys and values in slots: attention over them, and what of earlier requests is used again.

Logprobs are those of a fresh prefill. Counts are of tokens: prefilled (``prompt_tokens``), found (``reused_tokens``).
"""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st
from support.engines import (
    GREEDY,
    TINY,
    StepCounter,
    check_greedy,
    check_logprobs,
    engine_of,
    greedy_oracle,
    named,
    one,
    prompts,
    request,
    tiny_causal_lm,
)
from support.serving import eventually

from atropos_verl.engine import kv_cache
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.kv_cache import BLOCK, SLOT_ATTENTION, WORTH_STORING, PrefixIndex, slot_attention


@pytest.mark.parametrize("shared_mask", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_grouped_attention_equals_the_formula_in_float64(queries: int, shared_mask: bool) -> None:
    """softmax(q k^T * scale + mask) v, query head h reading key head h // (heads per group)."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, kv_heads, length, dim = 3, 6, 2, 11, 4

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key = normal(rows, heads, queries, dim), normal(rows, kv_heads, length, dim)
    value = normal(rows, kv_heads, length, 5)
    mask = torch.zeros((rows, 1 if shared_mask else heads, queries, length))
    for row, real in enumerate((11, 4, 1)):
        mask[row, ..., real:] = float("-inf")
    if not shared_mask:
        mask[:, 3] += normal(rows, queries, length)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    got, _ = slot_attention(module, query, key, value, mask, scaling=0.3)
    assert got.shape == (rows, queries, heads, 5)
    for head in range(heads):
        k, v = key[:, head // 3].double(), value[:, head // 3].double()
        scores = query[:, head].double() @ k.transpose(1, 2) * 0.3 + mask[:, 0 if shared_mask else head].double()
        assert torch.allclose(got[:, :, head].double(), torch.softmax(scores, -1) @ v, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "extra", "attention"),
    [
        ("qwen3", {}, SLOT_ATTENTION),
        ("gemma2", {"sliding_window": 128}, SLOT_ATTENTION),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, SLOT_ATTENTION),
        ("mixtral", {"num_local_experts": 4}, SLOT_ATTENTION),
        ("gpt_oss", {"sliding_window": 128, "num_local_experts": 4}, "eager"),  # attention sinks: eager only
    ],
)
def test_other_architectures_generate_and_go_on_from_stored_prefixes(
    family: str, extra: dict[str, Any], attention: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(TINY | {"head_dim": 8, "max_position_embeddings": 128} | extra))
        model = AutoModelForCausalLM.from_config(config).eval()
    system, *ends = prompts(40, 3, 20, 1)
    wanted = [request(prompt, max_tokens=9, **GREEDY) for prompt in (system[:1], *(system + end for end in ends))]
    with engine_of(copy.deepcopy(model), max_running=2) as engine:
        assert engine.model.config._attn_implementation == attention
        fresh = engine.generate(wanted)
        reused = engine.stats().reused_tokens
        again = engine.generate(wanted)
        assert engine.stats().reused_tokens > reused
    for answers in (fresh, again):
        for asked, [answer] in zip(wanted, answers, strict=True):
            assert list(answer.token_ids) == greedy_oracle(model, asked.prompt_token_ids, 9)
            check_logprobs(model, asked.prompt_token_ids, answer)


# -- the index of prefixes ---------------------------------------------------------------------------------------------

_CONTEXT = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12).map(
    lambda bits: tuple(bit for bit in bits for _ in range(WORTH_STORING // 4))
)


def tokens(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Tokens of one value after another: (value, count)."""
    return tuple(value for value, count in parts for _ in range(count))


@given_any(st.lists(_CONTEXT, max_size=12), st.integers(WORTH_STORING // BLOCK, 60))
def test_what_is_found_is_what_was_stored(contexts: list[tuple[int, ...]], capacity: int) -> None:
    """Each block holds the tokens that it is found for, whatever was dropped; within the capacity all are found."""
    index, content = PrefixIndex(), dict[int, tuple[int, ...]]()
    for context in contexts:
        start, blocks = index.add(context, 0, capacity)
        for number, block in enumerate(blocks):
            content[block] = context[: start + (number + 1) * BLOCK]
        for other in contexts:
            found = index.find(other)
            assert [content[block] for block in found] == [other[: end * BLOCK] for end in range(1, len(found) + 1)]
        found = index.find((*context, 2))
        assert len(found) == (min(len(context) // BLOCK, capacity) if len(context) >= WORTH_STORING else 0)
    assert set(content) <= set(range(capacity))


def test_the_end_of_what_was_used_least_recently_is_dropped_first() -> None:
    index = PrefixIndex()
    first, second = tokens((1, 64)), tokens((2, 64))
    index.add(first, 0, capacity=40)
    index.add(second, 0, capacity=40)
    index.find((*first, 0))
    index.add(tokens((3, 64)), 0, capacity=40)  # 16 blocks, of which 8 are free
    assert len(index.find((*first, 0))) == 16
    assert len(index.find((*second, 0))) == 8


def test_what_is_kept_over_a_change_of_weights_outlives_one() -> None:
    index, context = PrefixIndex(), tokens((1, 64))
    index.add(context, 0, capacity=32)
    index.age()
    assert len(index.find((*context, 0))) == 16
    index.add(tokens((1, 64), (2, 32)), 0, capacity=32)  # computed on top of it
    index.age()
    assert index.find((*context, 0)) == []
    assert index.add(context, 0, capacity=32) == (0, [])  # in a slot for two changes
    assert index.add(context, 1, capacity=32)[1] != []


# -- in the engine -----------------------------------------------------------------------------------------------------


def counts(engine: TransformersEngine) -> tuple[int, int]:
    stats = engine.stats()
    return stats.prompt_tokens, stats.reused_tokens


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


def test_where_nothing_is_shared_one_sequence_in_eight_is_stored_until_one_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "UNUSED", 16)
    with engine_of(tiny_causal_lm()) as engine:
        kept = [  # too short to be stored before they leave their slot
            context + one(engine, context, max_tokens=20, ignore_eos=True).token_ids
            for context in prompts(*[20] * (kv_cache.UNUSED + 16))
        ]
        find = engine._runner.cache.prefixes.find
        found = [bool(find(context)) for context in kept[-16:]]
        assert sum(found) == 2
        one(engine, kept[-16 + found.index(True)], max_tokens=1)  # from now on all are stored again
        [context] = prompts(20)
        context += one(engine, context, max_tokens=20, ignore_eos=True).token_ids
        assert engine._runner.cache.prefixes.find(context)


def test_conversations_that_grow_side_by_side_equal_plain_forwards() -> None:
    """Ragged turns, more conversations than slots, a common beginning."""
    model = tiny_causal_lm()
    system, *first = prompts(40, *range(5, 17))
    contexts = [system + turn for turn in first]
    with engine_of(copy.deepcopy(model), max_running=5) as engine:
        for round_ in range(4):
            answers = engine.generate([request(c, max_tokens=3 + i, ignore_eos=True) for i, c in enumerate(contexts)])
            for context, [answer] in zip(contexts, answers, strict=True):
                check_logprobs(model, context, answer)
            more = prompts(*[3 + (5 * i) % 17 for i in range(len(contexts))], seed=round_)
            contexts = [c + a.token_ids + m for c, [a], m in zip(contexts, answers, more, strict=True)]
        prefilled, _ = counts(engine)
        unique = {c[:end] for c in contexts for end in range(1, len(c) + 1)}
        assert prefilled <= len(unique)


async def test_a_group_whose_requests_come_one_by_one_prefills_its_prompt_once() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(101)
    counter = StepCounter(copy.deepcopy(model), hold_at=1)
    with engine_of(counter.model) as engine:
        first = asyncio.create_task(engine.agenerate(request(prompt, max_tokens=12, ignore_eos=True)))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        others = [asyncio.create_task(engine.agenerate(request(prompt, max_tokens=6, ignore_eos=True)))]
        await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 1, "the second to wait")
        counter.go_on.set()  # the first is still in its slot
        answers = [await task for task in (first, *others)]
        answers.append(await engine.agenerate(request(prompt, n=3, max_tokens=6, ignore_eos=True)))
        assert counts(engine) == (101 + 2, 200)
    for group in answers:
        for answer in group:
            check_logprobs(model, prompt, answer)


def test_a_beginning_that_several_newcomers_share_is_computed_once() -> None:
    model = tiny_causal_lm()
    system, *ends = prompts(100, *[5] * 6)
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(1) as pool:
        engine.gate.pause(timeout=10.0)
        asking = pool.submit(engine.generate, [request(system + end, max_tokens=4, **GREEDY) for end in ends])
        eventually(lambda: engine.stats().waiting == 6, "all to wait")
        engine.gate.resume()
        answers = asking.result(60.0)
        assert counts(engine) == (105 + 5 * 5, 5 * 100)
    for end, [answer] in zip(ends, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, system + end, 4)


def test_kept_keys_and_values_outlive_one_swap_and_the_logprobs_are_those_sampled_from() -> None:
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [prompt] = prompts(65)
    with engine_of(copy.deepcopy(old), keep_kv=True) as engine:
        one(engine, prompt, max_tokens=1)
        for swap in range(1, 4):
            engine.stage_weights_from_tensor(named(new))
            engine.swap_weights()
            answer = one(engine, prompt, max_tokens=1, temperature=0.0)
            if swap == 1:
                assert engine.stats().reused_tokens == 64
                kept = old(torch.tensor([prompt[:64]]), use_cache=True).past_key_values
                with torch.no_grad():
                    logits = new(torch.tensor([prompt[64:]]), past_key_values=kept).logits[0, -1]
                assert answer.logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
            else:
                check_logprobs(new, prompt, answer)
        assert engine.stats().reused_tokens == 64 + 64  # of the old weights after one swap, of the new after another


async def test_what_an_aborted_request_computed_is_used() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(80)
    counter = StepCounter(copy.deepcopy(model), hold_at=20)
    with engine_of(counter.model) as engine:
        task = asyncio.create_task(engine.agenerate(request(prompt, max_tokens=300, **GREEDY, request_id="a")))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        engine.abort("a")
        counter.go_on.set()
        [part] = await asyncio.wait_for(task, 30.0)
        context = prompt + part.token_ids
        await asyncio.to_thread(check_greedy, engine, model, context, 5)
        assert engine.stats().reused_tokens == whole_blocks(len(context) - 1)


def test_a_store_that_is_too_small_drops_and_never_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_STORE_BYTES", 0)  # as many positions as the slots
    model = tiny_causal_lm()
    given = prompts(*[40 + 7 * i for i in range(8)])
    with engine_of(copy.deepcopy(model), max_running=2) as engine:
        for _ in range(3):
            for prompt in sorted(given * 2):
                check_logprobs(model, prompt, one(engine, prompt, max_tokens=5, ignore_eos=True))
        assert 0 < engine.stats().reused_tokens < 4 * sum(map(len, given))
