"""What a GPU computes, against float64 on the CPU, transformers, or the same run again. Alone in a process:
``VERL_PLATFORM=nvidia pytest tests/gpu``."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import Lab, assert_same, batches, state_of
from support.tiny_model import build_tiny_model, build_tiny_tokenizer

from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.training.lm_head import linear_token_figures, linear_token_logprobs
from atropos_verl.types import GenerationRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(os.environ.get("VERL_PLATFORM") == "cpu", reason="VERL_PLATFORM=nvidia pytest tests/gpu"),
]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the norm. TF32 is off, which is torch's default."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), num_attention_heads=4, num_key_value_heads=2)


def _model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, attn_implementation="sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [None, 40 * 1000 * 4])
def test_logprobs_and_gradients_of_the_head(dtype: torch.dtype, keep: int | None) -> None:
    """``keep``: rows beyond it are computed again in the backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 64, generator=generator).to(dtype)
    weight = (torch.randn(20_000, 64, generator=generator) * 0.1).to(dtype)
    labels = torch.randint(0, 20_000, (100,), generator=generator)
    temperature = torch.rand(100, generator=generator) + 0.5
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = (exact[0] @ exact[1].t()) / temperature[:, None].double()
    expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    expected_gradients = torch.autograd.grad(expected.cos().sum(), exact)
    leaves = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    found = linear_token_logprobs(*leaves, labels.cuda(), temperature.cuda(), keep_bytes=keep)
    gradients = torch.autograd.grad(found.cos().sum(), leaves)
    figures = linear_token_figures(*(leaf.detach() for leaf in leaves), labels.cuda(), temperature.cuda())
    pairs = [(found, expected), (figures[:, 0], expected), *zip(gradients, expected_gradients, strict=True)]
    for value, reference in pairs:
        assert float((value.cpu().double() - reference).norm() / reference.norm()) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True])
def test_a_packed_row_gives_the_logits_of_separate_sequences(model_path: Path, dtype: torch.dtype, share: bool) -> None:
    from atropos_verl import verl_plugin

    verl_plugin.activate("cuda")
    from atropos_verl.verl_plugin import engines

    model = _model(model_path, dtype)
    assert engines.install_packed_attention(model)
    assert engines.packs_exactly(model.cuda(), torch.device("cuda"), share=share)


def test_the_engine_generates_what_transformers_does_and_gives_its_memory_back(model_path: Path) -> None:
    reference = _model(model_path, torch.float32).cuda()
    prompts = [[5, 6, 7, 8, 9], [10, 11], list(range(20, 80))]
    with TransformersEngine(_model(model_path, torch.float32), build_tiny_tokenizer(), device="cuda") as engine:
        settings = {"n": 2, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        asked = [GenerationRequest(prompt_token_ids=tuple(ids), **settings) for ids in prompts]
        found = engine.generate(asked)
        for ids, group in zip(prompts, found, strict=True):
            given = torch.tensor([ids], device="cuda")
            expected = reference.generate(given, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(ids) :]
            assert [list(one.token_ids) for one in group] == [expected.tolist()] * 2
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        held = engine.stats()
        engine.release_memory_occupation()
        assert torch.cuda.memory_allocated() <= before - held.kv_bytes - held.weight_bytes
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor(list(reference.named_parameters(remove_duplicate=False)), policy_version=3)
        for again, group in zip(engine.generate(asked), found, strict=True):
            assert [one.token_ids for one in again] == [one.token_ids for one in group]


@pytest.mark.parametrize("mode", ["sync", "overlap"])
def test_two_runs_on_the_same_batches_are_equal_and_their_canaries_pass(lab: Lab, mode: str) -> None:
    model = {"path": str(lab.model_path), "compute_dtype": "bf16"}
    settings: dict[str, Any] = {"mode": mode, "model": model, "trainer": {"device": "cuda"}}
    bodies, states = batches(3, 1), []
    for name in ("one", "other"):
        with lab.trainer(name, bodies, 3, **settings) as trainer:
            trainer.fit()
            sync = trainer.sharding_manager.last_sync
            assert sync is not None and sync.canary_max_abs_logprob_diff is not None
            assert sync.canary_max_abs_logprob_diff <= trainer.config.canary_threshold
            states.append(state_of(trainer))
    assert_same(states[0], states[1])
    assert all(np.isfinite(tensor.float().cpu().numpy()).all() for tensor in states[0]["weights"].values())
