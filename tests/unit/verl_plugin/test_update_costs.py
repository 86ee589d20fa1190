"""What makes an update cheaper changes no gradient."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.samples import branching_samples
from support.tiny_model import build_tiny_tokenizer, kept_by_graph

from atropos_verl import verl_plugin
from atropos_verl.config.schema import RunConfig

verl_plugin.activate("cpu")

from atropos_verl.backends.local.worker import PolicyWorker  # noqa: E402 - verl picks its platform at import
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
    silu = 2 * 34 * 48 * model.dtype.itemsize
    assert whole - less >= silu if changed else less == whole
    for parameter, gradient in exact.items():
        if dtype == "float32":
            torch.testing.assert_close(after[parameter].double(), gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max())
        else:
            assert torch.equal(after[parameter], before[parameter])


def test_a_forward_that_a_kernel_has_put_in_its_place_stays() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    mlp = model.model.layers[0].mlp
    mlp.forward = own = lambda x: x
    keep_less(model)
    assert mlp.forward is own


@pytest.mark.parametrize("budget", [40, 4096])
def test_a_tied_head_gets_the_gradient_of_the_embedding_too(tmp_path: Path, budget: int) -> None:
    """Also of a micro-batch without a trained token. AdamW's one kernel computes what the loop does."""
    build_tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": 258, "tie_word_embeddings": True})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    samples = branching_samples(3)[:6]
    untrained = np.zeros_like(samples[2].loss_mask)
    samples[2] = replace(samples[2], loss_mask=untrained, advantages=np.zeros(len(untrained)))

    def train(plain: bool) -> tuple[list[float], dict[str, torch.Tensor], Any]:
        trainer = {"device": "cpu", "max_token_len_per_gpu": budget}
        worker = PolicyWorker(RunConfig.from_mapping({"trainer": trainer, "optim": {"lr": 0.01}}), tmp_path)
        engine: Any = worker._worker.engine
        if plain:
            engine.module.get_input_embeddings().sparse = False
            engine.optimizer.param_groups[0]["fused"] = False
        norms = [worker.train(samples)["grad_norm"] for _ in range(2)]
        return norms, {name: tensor.clone() for name, tensor in worker.named_tensors()}, engine

    (norms, weights, engine), (plain_norms, plain, _) = train(False), train(True)
    assert engine.module.get_input_embeddings().sparse
    assert engine.optimizer.param_groups[0]["fused"]
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
