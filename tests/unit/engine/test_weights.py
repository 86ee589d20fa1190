"""New weights in a running engine: pauses, swaps in mid-generation, released memory, and weights that do not fit."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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

from atropos_verl.engine import weights
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
