"""The engine's attention and cache on several architectures, and grouped attention against float64 by hand."""

import copy
from typing import Any

import pytest
import torch
from support.engines import GREEDY, TINY, check_logprobs, engine_of, greedy_oracle, prompts, request

from atropos_verl.engine.kv_cache import SLOT_ATTENTION, slot_attention


@pytest.mark.parametrize("shared_mask", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_grouped_attention_equals_the_formula_in_float64(queries: int, shared_mask: bool) -> None:
    """softmax(q k^T * scale + mask) v, query head h reading key head h // (heads per group)."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, kv_heads, length, dim = 3, 6, 2, 11, 4

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = (
        normal(rows, heads, queries, dim),
        normal(rows, kv_heads, length, dim),
        normal(rows, kv_heads, length, 5),
    )
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
def test_greedy_generation_on_other_architectures(family: str, extra: dict[str, Any], attention: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(TINY | {"head_dim": 8, "max_position_embeddings": 128} | extra))
        model = AutoModelForCausalLM.from_config(config).eval()
    given = prompts(1, 9, 30)
    with engine_of(copy.deepcopy(model), max_running=2) as engine:
        assert engine.model.config._attn_implementation == attention
        answers = engine.generate([request(p, max_tokens=10, **GREEDY) for p in given])
    for prompt, [answer] in zip(given, answers, strict=True):
        assert list(answer.token_ids) == greedy_oracle(model, prompt, 10)
        check_logprobs(model, prompt, answer)
