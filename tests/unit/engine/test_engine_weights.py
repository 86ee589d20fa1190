"""New weights in a running engine: pauses, swaps in mid-generation, released memory, and weights that do not fit."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

from atropos_verl.engine import weights
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.engine.weights import PackedLinear, pack_linear_layers
from atropos_verl.errors import EngineError, WeightSyncError


@pytest.mark.parametrize("change", ["update", "release", "swap", "keep"])
def test_tokens_before_a_change_of_weights_are_the_old_policys_and_those_after_it_the_new_ones(change: str) -> None:
    """Each token is greedy, and its logprob right, under the version that it is recorded with."""
    old, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    given, size = prompts(5, 12, 30), sum(tensor.nbytes for _, tensor in named(new))
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
            if change == "release":
                engine.release_memory_occupation()
                assert (engine.stats().kv_bytes, engine.stats().weight_bytes) == (0, 0)
                engine.resume_memory_occupation()
            assert engine.update_weights_from_tensor(iter(named(new)), policy_version=4) == size
            assert not answering.done()
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)  # while paused
        gate.resume()
        answers = answering.result(60.0)
        assert (engine.policy_version, engine.stats().failed) == (4, 0)
        assert engine.stats().evictions == (0 if change == "keep" else 3)
    for prompt, [answer] in zip(given, answers, strict=True):
        [(before, at), (after, rest)] = answer.policy_version_runs
        assert (before, after, at + rest, len(answer.logprobs)) == (3, 4, 20, 20)
        assert at >= 8  # one token from the prefill, one from each decode step
        assert list(answer.token_ids[:at]) == greedy_oracle(old, prompt, at)
        if change != "keep":
            assert list(answer.token_ids[at:]) == greedy_oracle(new, prompt + answer.token_ids[:at], rest)
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
        full = engine.stats().weight_bytes
        engine.release_memory_occupation()
        engine.release_memory_occupation()  # idempotent
        assert engine.stats().weight_bytes == 0
        waiting = pool.submit(one, engine, prompt, max_tokens=5, **GREEDY)
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
    assert answer.policy_versions == (8, 8)


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
    with engine_of(tiny_causal_lm(family=family).to(torch.bfloat16)) as engine:
        engine.update_weights_from_tensor(state)  # float32 values are cast
        rounded = copy.deepcopy(new).to(torch.bfloat16)
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(rounded, tokens), abs=0.05)


@pytest.fixture(scope="module")
def refusing() -> Iterator[TransformersEngine]:
    with engine_of(tiny_causal_lm()) as engine:
        yield engine


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
def test_wrong_weights_are_refused_by_name_and_leave_the_version(
    refusing: TransformersEngine, how: str, message: str
) -> None:
    model, new = tiny_causal_lm(), tiny_causal_lm(seed=9)
    state = named(new)
    assert state[3][0] == "model.layers.0.self_attn.k_proj.weight"
    [prompt] = prompts(5)
    engine = refusing
    engine.update_weights_from_tensor(named(model), policy_version=4)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights_from_tensor(_break(state, how), policy_version=5)
        assert engine.policy_version == 4  # and the mixture is never used
        assert engine.weights_ready == (how == "nothing")
        waiting = pool.submit(one, engine, prompt, max_tokens=4, **GREEDY)
        engine.update_weights_from_tensor(iter(state), policy_version=6)
        answer = waiting.result(30.0)
        if how != "nothing":
            assert list(answer.token_ids) == greedy_oracle(new, prompt, 4)
        assert engine.policy_version == 6


@pytest.fixture
def _everything_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(weights, "_WORTH_PACKING", 1)


PACKED = pytest.mark.usefixtures("_everything_packed")


# -- a second buffer: filled and checked while the engine generates, swapped at a token boundary ---------------------


@PACKED
def test_swapping_moves_storage_and_copies_and_packs_nothing() -> None:
    model, new = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    with engine_of(model) as engine:
        engine.stage_weights_from_tensor(named(new))
        engine.compute_staged_logprobs([1, 2, 3])
        assert engine._staged is not None
        stores = engine._runner.weights, engine._staged.weights
        before = [[tensor.data_ptr() for tensor in store._unique.values()] for store in stores]
        packed = [layer._packed for layer in engine._staged.weights._packed]
        engine.swap_weights()
        one(engine, (1, 2, 3), max_tokens=2)
        assert [[tensor.data_ptr() for tensor in store._unique.values()] for store in stores] == before[::-1]
        used = [layer._packed for layer in engine._runner.weights._packed]
        assert all(now is then for now, then in zip(used, packed, strict=True))


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
        assert engine.policy_version == -1
        # what generates is untouched by failures
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(model, tokens), abs=1e-5)

        engine.stage_weights_from_tensor(named(new))
        engine.swap_weights(policy_version=1)
        with pytest.raises(WeightSyncError, match="swapped in already"):
            engine.swap_weights(policy_version=2)
        assert engine.policy_version == 1
        assert engine.compute_logprobs(tokens) == pytest.approx(logprob_oracle(new, tokens), abs=1e-5)


# -- packed weights: the same numbers, always of the weights that are there -------------------------------------------


@PACKED
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (300, 33)])
def test_products_equal_float64(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(33, 20, bias=bias)
    assert pack_linear_layers(torch.nn.Sequential(layer)) == [layer]
    x = torch.randn(shape)
    with torch.no_grad():
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
        assert torch.allclose(layer(x).double(), exact, atol=1e-5)
        half = copy.deepcopy(layer).bfloat16()
        plain = torch.nn.functional.linear(x.bfloat16(), half.weight, half.bias)
        assert torch.allclose(half(x.bfloat16()).float(), plain.float(), atol=0.02)  # one unit in the last place


@PACKED
def test_a_copy_is_packed_from_its_own_weight() -> None:
    layer = torch.nn.Linear(16, 16)
    others = [type("Own", (torch.nn.Linear,), {})(8, 8), torch.nn.Linear(8, 8, dtype=torch.float64)]
    assert pack_linear_layers(torch.nn.Sequential(layer, *others)) == [layer]
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x)
        other = copy.deepcopy(layer)
        layer.weight.mul_(2.0)
        assert torch.allclose(other(x), before)
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(16, 16), atol=1e-5)


@PACKED
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_engine_generates_from_the_newest_weights(family: str) -> None:
    """Updated, staged and swapped, released and given again: no packed copy, and no stored prefix, of older ones is
    used."""
    models = [tiny_causal_lm(seed=seed, family=family) for seed in range(5)]
    [prompt] = prompts(40)
    with engine_of(copy.deepcopy(models[0])) as engine:
        assert any(isinstance(layer, PackedLinear) for layer in engine.model.modules())
        check_greedy(engine, models[0], prompt, 6)
        engine.update_weights_from_tensor(named(models[1]))
        check_greedy(engine, models[1], prompt, 6)
        for model in models[2:4]:
            engine.stage_weights_from_tensor(named(model))
            check_logprobs(models[1] if model is models[2] else models[2], prompt, one(engine, prompt, max_tokens=3))
            engine.swap_weights()
            check_greedy(engine, model, prompt, 6)
        held = engine.stats().weight_bytes
        engine.release_memory_occupation()
        assert engine.stats().weight_bytes == 0
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor(named(models[4]))
        check_greedy(engine, models[4], prompt, 6)
        assert engine.stats().weight_bytes == held
