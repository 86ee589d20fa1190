"""What the engine holds, weights and keys: changed in mid-generation, released, refused, packed, found again."""

import asyncio
import copy
import itertools
from collections.abc import Callable, Iterator
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
    logprob_oracle,
    named,
    one,
    prompts,
    request,
    tiny_causal_lm,
)
from support.serving import eventually
from transformers import AutoConfig, AutoModelForCausalLM

from atropos_verl.engine import kv_cache, weights
from atropos_verl.engine.kv_cache import BLOCK, SLOT_ATTENTION, WORTH_STORING, PrefixIndex, slot_attention
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.engine.weights import pack_linear_layers
from atropos_verl.errors import EngineError, WeightSyncError

State = list[tuple[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_WORTH_PACKING", 1)


@pytest.mark.parametrize(
    ("change", "family"), [("update", "llama"), ("release", "qwen2"), ("swap", "llama"), ("keep", "qwen2")]
)
def test_tokens_before_a_change_of_weights_are_the_old_policys_and_those_after_it_the_new_ones(
    change: str, family: str
) -> None:
    """Each token is greedy, and its logprob right, under the version that it is recorded with: no packed copy of older
    weights, and nothing stored of them, is used."""
    old, new = (tiny_causal_lm(seed=seed, family=family) for seed in (1, 2))
    given, size = prompts(5, 12, 40), sum(tensor.nbytes for _, tensor in named(new))
    model, gate, tokens = copy.deepcopy(old), RequestGate(), given[1] + (9, 8)
    gate.pause(timeout=10.0)
    with engine_of(model, gate=gate, keep_kv=change == "keep") as engine, ThreadPoolExecutor(1) as pool:
        engine.update_weights_from_tensor(named(old), policy_version=3)
        if change in ("swap", "keep"):
            engine.stage_weights_from_tensor(named(old))
        counter = StepCounter(model, hold_at=7)  # the eighth decode step is held
        answering = pool.submit(engine.generate, [request(p, max_tokens=20, **GREEDY) for p in given])
        eventually(lambda: engine.stats().waiting == 3, "the requests to arrive, so that they start together")
        gate.resume()
        assert counter.held.wait(10.0)
        if change in ("swap", "keep"):
            # In the middle of a decode step: the idle buffer can be filled and looked at, the serving one is untouched.
            assert engine.stage_weights_from_tensor(iter(named(new))) == size
            assert engine.compute_staged_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
            assert engine.policy_version == 3
            counter.go_on_once_shut(engine._boundary)
            engine.swap_weights(policy_version=4)
        else:
            counter.go_on_once_shut(gate)
            gate.pause(timeout=10.0)
            held = engine.stats().weight_bytes
            if change == "release":
                engine.release_memory_occupation()
                assert (engine.stats().kv_bytes, engine.stats().weight_bytes) == (0, 0)
                engine.resume_memory_occupation()
            assert engine.update_weights_from_tensor(iter(named(new)), policy_version=4) == size
            assert not answering.done()
            assert engine.stats().weight_bytes == held
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)  # while paused
        gate.resume()
        answers = answering.result(60.0)
        assert (engine.policy_version, engine.stats().failed) == (4, 0)
        assert engine.stats().evictions == (0 if change == "keep" else 3)
    for prompt, [answer] in zip(given, answers, strict=True):
        [(before, at), (after, rest)] = answer.policy_version_runs
        assert (before, after, at + rest, len(answer.logprobs)) == (3, 4, 20, 20)
        assert at >= 8  # one token from the prefill, one from each decode step
        assert answer.token_ids[:at] == greedy_oracle(old, prompt, at)
        if change != "keep":
            assert answer.token_ids[at:] == greedy_oracle(new, prompt + answer.token_ids[:at], rest)
            expected = logprob_oracle(new, prompt + answer.token_ids)[len(prompt) - 1 + at :]
            assert list(answer.logprobs[at:]) == pytest.approx(expected, abs=1e-4)


def test_released_weights_are_not_used_until_new_ones_are_in() -> None:
    model = tiny_causal_lm(seed=5)
    [prompt] = prompts(6)
    with engine_of(copy.deepcopy(model), release_weights=False) as engine:
        one(engine, prompt, max_tokens=2)
        engine.release_memory_occupation()
        assert (engine.stats().kv_bytes, engine.weights_ready) == (0, True)
        check_greedy(engine, model, prompt, 5)
    with engine_of(tiny_causal_lm()) as engine, ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # idempotent
            engine.release_memory_occupation()
        waiting = pool.submit(one, engine, prompt, max_tokens=5, **GREEDY)
        eventually(lambda: engine.stats().waiting == 1, "the request to wait")
        with pytest.raises(WeightSyncError, match="resume_memory_occupation"):
            engine.update_weights_from_tensor(named(model))
        for _ in range(2):
            engine.resume_memory_occupation()
        with pytest.raises(EngineError, match="no usable weights"):
            engine.compute_logprobs(prompt)
        late = r"0 of 1 requests were done after 0.05 s \(gate open, weights not ready"
        with pytest.raises(TimeoutError, match=late):
            engine.generate([request(prompt)], timeout=0.05)
        assert not waiting.done()
        engine.update_weights_from_tensor(named(model), policy_version=8)
        answer = waiting.result(30.0)
    assert (answer.token_ids, answer.policy_versions) == (greedy_oracle(model, prompt, 5), (8, 8))


@pytest.mark.parametrize(
    ("family", "left_out"),  # tied and untied embeddings
    [("llama", ""), ("qwen2", ""), ("qwen2", "lm_head.weight"), ("qwen2", "model.embed_tokens.weight")],
)
def test_new_weights_under_every_name_they_may_come_with(family: str, left_out: str) -> None:
    new = tiny_causal_lm(seed=3, family=family)
    [tokens] = prompts(12)
    state = {name: tensor for name, tensor in new.state_dict().items() if name != left_out}
    with engine_of(tiny_causal_lm(family=family)) as engine:
        for version, form in enumerate((state, list(state.items()), iter(state.items()))):
            assert engine.policy_version == version - 1
            engine.update_weights_from_tensor(form)  # type: ignore[arg-type]
            assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
    with engine_of(tiny_causal_lm(family=family).to(torch.bfloat16)) as engine:
        engine.update_weights_from_tensor(state)  # type: ignore[arg-type]  # float32 values are cast
        rounded = copy.deepcopy(new).to(torch.bfloat16)
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(rounded, tokens), abs=0.05)


K_PROJ = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda s: [*s[:3], (K_PROJ + "_x", s[3][1]), *s[4:]], f"no tensor '{K_PROJ}_x'; did you mean '{K_PROJ}'"),
        (
            lambda s: [*s[:3], (K_PROJ, s[3][1].flatten()[1:])],
            rf"'{K_PROJ}' has shape \(511,\), the engine's model \(16, 32",
        ),
        (lambda s: [*s[:3], *s[4:]], f"1 of 26 tensors are missing, first '{K_PROJ}'"),
        (lambda s: [*s, s[3]], f"'{K_PROJ}' was given twice"),
        (lambda s: [], "26 of 26 tensors are missing, first 'model.embed_tokens.weight'"),
    ],
)
def test_wrong_weights_are_refused_by_name_and_a_mixture_is_never_used(
    broken: Callable[[State], State], message: str
) -> None:
    new = tiny_causal_lm(seed=9)
    [prompt] = prompts(5)
    given = broken(named(new))
    with engine_of(tiny_causal_lm()) as engine, ThreadPoolExecutor(1) as pool:
        engine.update_weights_from_tensor(named(tiny_causal_lm()), policy_version=4)
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights_from_tensor(given, policy_version=5)
        assert (engine.policy_version, engine.weights_ready) == (4, not given)
        waiting = pool.submit(one, engine, prompt, max_tokens=4, **GREEDY)
        engine.update_weights_from_tensor(named(new), policy_version=6)
        answer = waiting.result(30.0)
        if given:
            assert answer.token_ids == greedy_oracle(new, prompt, 4)
        assert engine.policy_version == 6


def test_only_complete_staged_weights_are_swapped_in_and_only_once() -> None:
    model, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    [tokens] = prompts(12)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield named(new)[0]
        raise OSError("the source is gone")

    with engine_of(copy.deepcopy(model)) as engine:
        for staged in (False, True):
            if staged:
                with pytest.raises(OSError, match="gone"):
                    engine.stage_weights_from_tensor(broken())
            with pytest.raises(WeightSyncError, match="no complete weights are staged"):
                engine.swap_weights(policy_version=1)
            with pytest.raises(EngineError, match="no complete weights are staged"):
                engine.compute_staged_logprobs([1, 2])
        with pytest.raises(WeightSyncError, match="tensors are missing"):
            engine.stage_weights_from_tensor(named(new)[1:])
        # what generates is untouched by failures
        assert engine.policy_version == -1
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)
        engine.stage_weights_from_tensor(named(new))
        assert engine._staged is not None
        engine.compute_staged_logprobs([1, 2, 3])  # which packs it
        stores = engine._runner.weights, engine._staged.weights
        before = [[tensor.data_ptr() for tensor in store._unique.values()] for store in stores]
        packed = [layer._packed for layer in stores[1]._packed]
        engine.swap_weights(policy_version=1)
        with pytest.raises(WeightSyncError, match="swapped in already"):
            engine.swap_weights(policy_version=2)
        assert engine.policy_version == 1
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)
        # Storage was moved; nothing was copied, or packed again.
        assert [[tensor.data_ptr() for tensor in store._unique.values()] for store in stores] == before[::-1]
        assert all(layer._packed is then for layer, then in zip(stores[0]._packed, packed, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (300, 33)])
def test_products_of_packed_weights_equal_float64_also_after_a_change_and_in_a_copy(
    bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(33, 20, bias=bias)
    others = [type("Own", (torch.nn.Linear,), {})(8, 8), torch.nn.Linear(8, 8, dtype=torch.float64)]
    packed = pack_linear_layers(torch.nn.Sequential(layer, *others))
    assert packed == [layer] * torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    x = torch.randn(shape)

    def check(layer: torch.nn.Linear) -> None:
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
        assert torch.allclose(layer(x).double(), exact, atol=1e-5)

    with torch.no_grad():
        check(layer)
        other, half = copy.deepcopy(layer), copy.deepcopy(layer).bfloat16()
        layer.weight.mul_(2.0)
        check(layer)
        check(other)
        plain = torch.nn.functional.linear(x.bfloat16(), half.weight, half.bias)
        assert torch.allclose(half(x.bfloat16()).float(), plain.float(), atol=0.02)  # one unit in the last place
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.reshape(-1, 33).sum(0).expand(20, 33), atol=1e-4)


@pytest.mark.parametrize("shared_mask", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_grouped_attention_equals_the_formula_in_float64(queries: int, shared_mask: bool) -> None:
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
    k, v = (tensor.double().repeat_interleave(3, dim=1) for tensor in (key, value))
    scores = query.double() @ k.transpose(2, 3) * 0.3 + mask.double()
    assert torch.allclose(got.double(), (torch.softmax(scores, -1) @ v).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "extra", "attention"),
    [
        ("qwen2", {"tie_word_embeddings": True}, SLOT_ATTENTION),
        ("llama", {}, SLOT_ATTENTION),
        ("qwen3", {}, SLOT_ATTENTION),
        ("gemma2", {"sliding_window": 128}, SLOT_ATTENTION),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, SLOT_ATTENTION),
        ("mixtral", {"num_local_experts": 4}, SLOT_ATTENTION),
        ("gpt_oss", {"sliding_window": 128, "num_local_experts": 4}, "eager"),  # attention sinks
    ],
)
def test_tokens_and_logprobs_equal_plain_forwards_afresh_and_from_stored_prefixes(
    family: str, extra: dict[str, Any], attention: str
) -> None:
    """Ragged conversations, more than slots, with a common beginning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(TINY | {"head_dim": 8, "max_position_embeddings": 128} | extra))
        model = AutoModelForCausalLM.from_config(config).eval()
    system, *ends = prompts(40, 3, 20, 1)
    contexts = [system[:1], system[:33], *(system + end for end in ends)]
    with engine_of(copy.deepcopy(model), max_running=2) as engine:
        assert engine.model.config._attn_implementation == attention
        for round_ in range(3):
            answers = engine.generate(
                [request(context, max_tokens=6 + i, **GREEDY) for i, context in enumerate(contexts)]
            )
            for steps, context, [answer] in zip(itertools.count(6), contexts, answers, strict=False):
                assert answer.token_ids == greedy_oracle(model, context, steps)
                check_logprobs(model, context, answer)
            more = prompts(9, 2, 3, 1, 4, seed=round_)
            contexts = [c + a.token_ids + m for c, [a], m in zip(contexts, answers, more, strict=True)]
        assert engine.stats().prompt_tokens <= len({c[:end] for c in contexts for end in range(1, len(c) + 1)})


# -- the index of prefixes ---------------------------------------------------------------------------------------------

_CONTEXT = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12).map(
    lambda bits: tuple(bit for bit in bits for _ in range(WORTH_STORING // 4))
)


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
    first, second, third = ((value,) * 64 for value in (1, 2, 3))
    index.add(first, 0, capacity=40)
    index.add(second, 0, capacity=40)
    index.find((*first, 0))
    index.add(third, 0, capacity=40)  # 16 blocks, of which 8 are free
    assert len(index.find((*first, 0))) == 16
    assert len(index.find((*second, 0))) == 8


def test_what_is_kept_over_a_change_of_weights_outlives_one() -> None:
    index, context = PrefixIndex(), (1,) * 64
    index.add(context, 0, capacity=32)
    index.age()
    assert len(index.find((*context, 0))) == 16
    index.add(context + (2,) * 32, 0, capacity=32)  # computed on top of it
    index.age()
    assert index.find((*context, 0)) == []
    assert index.add(context, 0, capacity=32) == (0, [])  # in a slot for two changes
    assert index.add(context, 1, capacity=32)[1] != []


# -- in the engine -----------------------------------------------------------------------------------------------------


def test_where_nothing_is_shared_one_sequence_in_eight_is_stored_until_one_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "UNUSED", 16)
    with engine_of(tiny_causal_lm()) as engine:
        kept = [  # too short to be stored before they leave their slot
            context + one(engine, context, max_tokens=20, ignore_eos=True).token_ids for context in prompts(*[20] * 32)
        ]
        find = engine._runner.cache.prefixes.find
        found = [bool(find(context)) for context in kept[-16:]]
        assert sum(found) == 2
        one(engine, kept[-16 + found.index(True)], max_tokens=1)  # from now on all are stored again
        [context] = prompts(20)
        assert find(context + one(engine, context, max_tokens=20, ignore_eos=True).token_ids)


async def test_what_a_request_computed_is_used_while_it_runs_and_after_it_was_aborted() -> None:
    model = tiny_causal_lm()
    [prompt] = prompts(101)
    counter = StepCounter(copy.deepcopy(model), hold_at=20)
    with engine_of(counter.model) as engine:
        long = request(prompt, max_tokens=300, ignore_eos=True, request_id="first")
        first = asyncio.create_task(engine.agenerate(long))
        assert await asyncio.to_thread(counter.held.wait, 10.0)
        second = asyncio.create_task(engine.agenerate(request(prompt, max_tokens=6, ignore_eos=True)))
        await asyncio.to_thread(eventually, lambda: engine.stats().waiting == 1, "the second to wait")
        counter.go_on.set()  # the first is still in its slot
        answers = await second
        engine.abort("first")
        [part] = await first
        answers += await engine.agenerate(request(prompt, n=3, max_tokens=6, ignore_eos=True))
        stats = engine.stats()
        assert (stats.prompt_tokens, stats.reused_tokens) == (101 + 2, 200)
        context = prompt + part.token_ids
        await asyncio.to_thread(check_greedy, engine, model, context, 5)
        assert engine.stats().reused_tokens == 200 + (len(context) - 1) // BLOCK * BLOCK
    for answer in (*answers, part):
        check_logprobs(model, prompt, answer)


def test_a_beginning_that_several_newcomers_share_is_computed_once() -> None:
    model = tiny_causal_lm()
    system, *ends = prompts(100, *[5] * 6)
    asked = [system + end for end in (*ends, ends[0])]
    with engine_of(copy.deepcopy(model)) as engine, ThreadPoolExecutor(1) as pool:
        engine.gate.pause(timeout=10.0)
        asking = pool.submit(engine.generate, [request(prompt, max_tokens=4, **GREEDY) for prompt in asked])
        eventually(lambda: engine.stats().waiting == 7, "all to wait")
        engine.gate.resume()
        assert [answer.token_ids for [answer] in asking.result(60.0)] == [greedy_oracle(model, p, 4) for p in asked]
        assert (engine.stats().prompt_tokens, engine.stats().reused_tokens) == (105 + 5 * 5, 5 * 100)


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


def test_a_store_that_is_too_small_drops_and_never_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_STORE_BYTES", 0)  # as many positions as the slots
    model = tiny_causal_lm()
    given = prompts(*[40 + 7 * i for i in range(8)])
    with engine_of(copy.deepcopy(model), max_running=2) as engine:
        for prompt in sorted(given * 2) * 3:
            check_logprobs(model, prompt, one(engine, prompt, max_tokens=5, ignore_eos=True))
        assert 0 < engine.stats().reused_tokens < 4 * sum(map(len, given))
