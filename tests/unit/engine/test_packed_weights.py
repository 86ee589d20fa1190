"""Linear layers with packed weights: the same numbers, and always of the weights that are there."""

import copy
from collections.abc import Iterator

import pytest
import torch
from support.engines import check_greedy, check_logprobs, engine_of, named, one, prompts, tiny_causal_lm

from atropos_verl.engine import weights
from atropos_verl.engine.weights import PackedLinear, pack_linear_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.fixture(autouse=True)
def _pack_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(weights, "_WORTH_PACKING", 1)
    yield


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


def test_a_copy_is_packed_from_its_own_weight() -> None:
    layer = torch.nn.Linear(16, 16)
    pack_linear_layers(torch.nn.Sequential(layer))
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x)
        other = copy.deepcopy(layer)
        layer.weight.mul_(2.0)
        assert torch.allclose(other(x), before)
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(16, 16), atol=1e-5)


def test_other_layers_and_double_precision_stay_as_they_are() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Own(8, 8), torch.nn.Linear(8, 8, dtype=torch.float64), torch.nn.LayerNorm(8))
    assert pack_linear_layers(model) == []
    assert [type(layer) for layer in model] == [Own, torch.nn.Linear, torch.nn.LayerNorm]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_engine_generates_from_the_newest_weights(family: str) -> None:
    """Updated, staged and swapped, released and given again: no packed copy of older ones is used."""
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


def test_a_swap_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was staged and checked is packed already."""
    with engine_of(tiny_causal_lm()) as engine:
        engine.stage_weights_from_tensor(named(tiny_causal_lm(seed=1)))
        engine.compute_staged_logprobs([1, 2, 3])
        packed = [layer._packed for layer in engine._staged.weights._packed]  # type: ignore[union-attr]
        engine.swap_weights()
        one(engine, (1, 2, 3), max_tokens=2)
        used = [layer._packed for layer in engine._runner.weights._packed]
        assert all(now is then for now, then in zip(used, packed, strict=True))
