"""What makes an update cheaper changes no gradient."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from support.samples import branching_samples
from support.tiny_model import build_tiny_tokenizer, kept_by_graph
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from atropos_verl import verl_plugin
from atropos_verl.config.schema import RunConfig

verl_plugin.activate("cpu")

from atropos_verl.backends.local.worker import PolicyWorker  # noqa: E402 - verl picks its platform at import
from atropos_verl.verl_plugin import engines  # noqa: E402
from atropos_verl.verl_plugin.engines import keep_less  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}


def _gradients(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """By parameter; and the bytes that the graph keeps, parameters left out."""
    with kept_by_graph(model) as kept:
        logprobs = model(torch.arange(34).reshape(2, 17)).logits.log_softmax(-1)
    logprobs[..., 3].sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize(
    ("name", "dtype", "of_layer", "at_end"),
    [
        ("Llama", "float32", 3, 1),
        ("Llama", "bfloat16", 3, 1),
        ("Qwen2", "float32", 3, 1),
        ("Qwen3", "float32", 5, 1),
        ("Gemma", "float32", 0, 0),
    ],
)
def test_gradients_equal_float64_and_less_is_kept(name: str, dtype: str, of_layer: int, at_end: int) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SMALL))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    exact, _ = _gradients(copy.deepcopy(model).double())
    model = model.to(getattr(torch, dtype))
    before, whole = _gradients(copy.deepcopy(model))
    keep_less(model)
    after, less = _gradients(model)
    changed = sum("forward" in vars(module) for module in model.modules())
    assert changed == 2 * of_layer + at_end  # an MLP and the norms
    between = 2 * 2 * 34 * 48 * model.dtype.itemsize  # silu of the gate, and its product, in two layers
    assert whole - less >= between if changed else less == whole
    for parameter, gradient in exact.items():
        if dtype == "float32":
            torch.testing.assert_close(after[parameter].double(), gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max())
        else:
            assert torch.equal(after[parameter], before[parameter])


@pytest.mark.parametrize("frozen", ["norm", "down_proj", "gate_proj"])
def test_a_frozen_weight_gets_no_gradient_and_the_others_keep_theirs(frozen: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(torch.arange(34).reshape(2, 17)).logits.log_softmax(-1)[..., 3].sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    before = gradients()
    keep_less(model)
    after = gradients()
    assert after.keys() == before.keys()
    assert not any(frozen in name for name in after)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_a_forward_that_a_kernel_has_put_in_its_place_stays() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    mlp, other = (layer.mlp for layer in model.model.layers)
    mlp.forward = own = lambda x: x
    other.down_proj.forward = torch.zeros_like
    keep_less(model)
    assert mlp.forward is own
    found = other(torch.ones(1, 2, 32))
    assert found.shape == (1, 2, 48)
    assert not found.any()


def _computes_with_its_own(engine: Any) -> bool:
    """Of every weight of a layer, while that layer computes."""
    layer, used = engine.module.model.layers[1], dict[str, int]()

    def look(*_: Any) -> None:
        used.update((name, weight.data_ptr()) for name, weight in layer.named_parameters())

    hook = layer.mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        engine.module(torch.arange(5)[None])
    hook.remove()
    own = {name: weight.to_local().data_ptr() for name, weight in layer.named_parameters()}
    assert len(own) == 9
    assert used.keys() == own.keys()
    return used == own


@pytest.mark.parametrize("budget", [40, 4096])
def test_a_tied_head_gets_the_gradient_of_the_embedding_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Also of a micro-batch without a trained token. AdamW's one kernel computes what the loop does, and one rank
    computes with its own weights what FSDP2 computes with copies."""
    build_tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": 258, "tie_word_embeddings": True})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    samples = branching_samples(3)[:6]
    untrained = np.zeros_like(samples[2].loss_mask)
    samples[2] = replace(samples[2], loss_mask=untrained, advantages=np.zeros(len(untrained)))
    summed = Mock(side_effect=_fsdp_param_group.foreach_reduce)
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", summed)

    def train(plain: bool) -> tuple[list[float], dict[str, torch.Tensor], Any]:
        if plain:
            monkeypatch.setattr(engines, "without_copies", lambda model: None)
        trainer = {"device": "cpu", "max_token_len_per_gpu": budget}
        worker = PolicyWorker(RunConfig.from_mapping({"trainer": trainer, "optim": {"lr": 0.01}}), tmp_path)
        engine: Any = worker._worker.engine
        if plain:
            engine.module.get_input_embeddings().sparse = False
            engine.optimizer.param_groups[0]["fused"] = False
        norms = [worker.train(samples)["grad_norm"] for _ in range(2)]
        return norms, {name: tensor.clone() for name, tensor in worker.named_tensors()}, engine

    norms, weights, engine = train(False)
    assert not summed.called, "a gradient is the weight's as it is"
    plain_norms, plain, copying = train(True)
    assert summed.called
    assert [_computes_with_its_own(each) for each in (engine, copying)] == [True, False]
    assert engine.module.get_input_embeddings().sparse
    assert engine.optimizer.param_groups[0]["fused"]
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
