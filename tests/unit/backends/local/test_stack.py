"""Threads of engine and trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from atropos_verl.backends.local.stack import share_cores
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.runner import WORTH_SEVERAL_THREADS, engine_threads, multiply_adds_per_layer


def _model(hidden: int, layers: int = 2, **settings: Any) -> Any:
    defaults = {"intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
    return Qwen2Config(**{**defaults, "hidden_size": hidden, "num_hidden_layers": layers, **settings})


LARGE, SMALL = _model(1024), _model(128)


@pytest.mark.parametrize(
    ("settings", "device", "omp", "cores", "expected"),
    [
        ({}, "cpu", None, 8, (None, None)),
        ({"mode": "overlap"}, "cpu", None, 8, (4, 4)),
        ({"mode": "overlap"}, "cpu", None, 2, (1, 1)),
        ({"mode": "overlap"}, "cpu", None, 1, (1, 1)),
        ({"mode": "overlap"}, "cpu", None, 3, (1, 2)),
        ({"mode": "overlap"}, "cuda", None, 8, (None, None)),
        ({"mode": "overlap"}, "cpu", "1", 8, (None, None)),
        ({"mode": "overlap", "inference": {"num_threads": 6}}, "cpu", None, 8, (6, 2)),
        ({"mode": "overlap", "trainer": {"num_threads": 7}}, "cpu", None, 8, (4, 7)),
        ({"inference": {"num_threads": 6}}, "cpu", None, 8, (6, None)),
    ],
)
def test_cores_are_shared_when_both_sides_compute_at_once(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    device: str,
    omp: str | None,
    cores: int,
    expected: tuple[int | None, int | None],
) -> None:
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert share_cores(RunConfig.from_mapping(settings), device, LARGE, cores) == expected


@pytest.mark.parametrize(
    ("settings", "device", "omp", "expected"),
    [
        ({}, "cpu", None, (1, None)),
        ({"mode": "overlap"}, "cpu", None, (1, 7)),
        ({"inference": {"num_threads": 3}}, "cpu", None, (3, None)),
        ({"inference": {"max_running": 1024}}, "cpu", None, (None, None)),  # enough sequences make enough work
        ({}, "cuda", None, (None, None)),
        ({}, "cpu", "2", (None, None)),
    ],
)
def test_the_engine_of_a_small_model_gets_one_thread(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    device: str,
    omp: str | None,
    expected: tuple[int | None, int | None],
) -> None:
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert share_cores(RunConfig.from_mapping(settings), device, SMALL, 8) == expected


def test_work_is_counted_from_the_matrices_of_a_real_model() -> None:
    for config in (SMALL, _model(96, layers=3, vocab_size=1000), LlamaConfig(**SMALL.to_dict() | {"head_dim": 16})):
        model = AutoModelForCausalLM.from_config(config)
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert multiply_adds_per_layer(config, 8) == 8 * linear // config.num_hidden_layers


def test_other_names_of_the_same_sizes() -> None:
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    assert multiply_adds_per_layer(gpt2, 1) == (2 * (2 * 64 * 16 * 8 + 3 * 64 * 256) + 64 * 100) // 2
    experts = MixtralConfig(**SMALL.to_dict() | {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert multiply_adds_per_layer(experts, 1) == multiply_adds_per_layer(SMALL, 1) + 3 * 128 * 384


def test_the_threshold_divides_one_thread_from_the_default() -> None:
    rows = -(-WORTH_SEVERAL_THREADS // multiply_adds_per_layer(SMALL, 1))
    assert engine_threads(SMALL, rows, 8) == 8
    assert engine_threads(SMALL, rows - 1, 8) == 1
    assert engine_threads(SMALL, rows, None) is None
