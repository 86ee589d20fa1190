"""The prediction of peak memory: counted by hand, and against what autograd really keeps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atropos_verl.cli import main
from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.launch.doctor import (
    _CODE,
    Plan,
    Shape,
    check_memory,
    longest_micro_batch,
    peak,
    plan_of,
    predict,
    shape_of,
)

GB = 10**9
SHAPE = Shape(
    layers=10,
    layer=GB // 10,
    rest=GB // 2,
    head=GB // 2,
    hidden=1000,
    vocabulary=50_000,
    kept_layer=4e4,
    kept_rest=1e4,
    kv=1e4,
    adapters=10_000,
)
"""1.5 billion parameters."""


def total(plan: Plan, phase: str, card: float = 0.0) -> float:
    return sum(predict(SHAPE, plan, card)[phase].values()) - _CODE


def test_a_full_update_counted_by_hand() -> None:
    plan = Plan(tokens=10_000, trained=0.5, compute=4, running=10, context=100)
    kept = 10_000 * (10 * 4e4 + 1e4)
    head = max(5_000 * 50_000 * 4, 4 * GB // 2)  # the logits, or the gradient of the weight
    assert total(plan, "forward and backward") == 4 * 4 * 1.5 * GB + kept + head
    assert total(plan, "optimiser step") == 5 * 4 * 1.5 * GB
    assert total(plan, "rollout") == (3 + 1) * 4 * 1.5 * GB + 2 * 1e4 * 10 * 100
    assert total(plan, "weight sync") == (3 + 1) * 4 * 1.5 * GB + 2 * GB


def test_ranks_checkpointing_lora_offload_and_a_replica() -> None:
    plan = Plan(ranks=4, tokens=1000, trained=0.1, engine_share=0.5)
    gathered = 2 * (0.5 + 0.2) * GB + 4 * 0.1 * GB
    head = 2 * 0.5 * GB
    assert total(plan, "forward and backward") == 4 * 4 * 1.5 * GB / 4 + 1000 * 4.1e5 + head + gathered
    assert total(plan, "rollout", 80e9) == 3 * 1.5 * GB + 40e9
    assert total(replace(plan, offload=True), "rollout", 80e9) == 40e9
    checkpointed = total(replace(plan, checkpointing=True), "forward and backward")
    assert total(plan, "forward and backward") - checkpointed == pytest.approx(1000 * (9 * 4e4 - 10 * 1000 * 2))
    adapters = 32 * 10_000 * 10
    lora = total(replace(plan, lora_rank=32), "optimiser step")
    assert lora == pytest.approx(4 * (1.5 * GB + 5 * adapters) / 4)


def test_what_does_not_fit_says_what_to_change_and_the_longest_micro_batch_that_fits() -> None:
    plan = Plan(tokens=100_000, trained=0.5, compute=2)
    phase = {found.name: found for found in check_memory(SHAPE, plan, 60e9, "a card")}
    assert phase["forward and backward"].status == "missing"
    assert phase["optimiser step"].status == "ok"
    longest = longest_micro_batch(SHAPE, plan, 60e9)
    assert phase["forward and backward"].todo == (
        f"one or more of: trainer.max_token_len_per_gpu={longest}; model.enable_gradient_checkpointing=true; "
        "more ranks, or a smaller model"
    )
    assert f"{longest} tokens" in phase["longest micro-batch"].found
    assert peak(predict(SHAPE, replace(plan, tokens=longest), 60e9)) <= 60e9
    assert peak(predict(SHAPE, replace(plan, tokens=longest + 1), 60e9)) > 60e9
    small = check_memory(SHAPE, plan, 20e9, "a card")
    assert "max_token_len_per_gpu" not in small[1].todo and small[-1].found == "none fits"


def test_the_plan_is_that_of_the_settings() -> None:
    values = {
        "mode": "overlap",
        "model": {"compute_dtype": "bf16", "enable_gradient_checkpointing": True},
        "data": {"max_prompt_length": 300},
        "max_response_length": 100,
        "trainer": {"device": "cpu", "max_token_len_per_gpu": 777},
    }
    plan = plan_of(RunConfig.from_mapping(values), LaunchConfig(), {})
    assert plan == Plan(
        tokens=777, trained=0.25, compute=2, checkpointing=True, on_cpu=True, overlap=True, running=64, context=400
    )
    verl = {
        "trainer": {"nnodes": 2, "n_gpus_per_node": 8},
        "data": {"max_prompt_length": 100, "max_response_length": 300},
        "actor_rollout_ref": {
            "model": {"lora_rank": 16},
            "actor": {"ppo_max_token_len_per_gpu": 4096, "fsdp_config": {"param_offload": True}},
            "rollout": {"gpu_memory_utilization": 0.6},
        },
    }
    plan = plan_of(RunConfig.from_mapping({}), LaunchConfig(), verl)
    assert plan == Plan(ranks=16, tokens=4096, trained=0.75, lora_rank=16, engine_share=0.6)


def test_a_model_is_measured_without_its_weights(model_path: Path) -> None:
    """Parameters, and what the backward keeps, are those of the real model."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = shape_of(model_path, 4)
    model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float32, attn_implementation="sdpa")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    from atropos_verl.verl_plugin.engines import install_packed_attention
    from atropos_verl.verl_plugin.prefix_forest import joined

    assert install_packed_attention(model)
    weights, kept = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids, positions = torch.ones(1, 512, dtype=torch.int64), torch.arange(512)[None]
        options = {"packed_row": joined([512]), "use_cache": False, "logits_to_keep": 1}
        output = model(input_ids=ids, position_ids=positions, **options)
    found = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    assert output.logits.shape[1] == 1
    assert 512 * (shape.layers * shape.kept_layer + shape.kept_rest) == pytest.approx(found, rel=0.01)


def test_the_doctor_shows_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["doctor", "--memory", "--gpu-memory", "24", "--json", f"run_dir={tmp_path}", "trainer.device=cuda"]
    main(words)
    findings = [found for found in json.loads(capsys.readouterr().out)["findings"] if found["section"] == "memory"]
    names = ["rollout", "forward and backward", "optimiser step", "weight sync", "longest micro-batch"]
    assert [found["name"] for found in findings] == names
    assert "GB of 24.0 (a card of that size)" in findings[0]["found"]


@pytest.mark.skipif(
    not os.environ.get("ATROPOS_VERL_MEMORY"), reason="ATROPOS_VERL_MEMORY=MODEL runs it (minutes, 6 GB)"
)
@pytest.mark.parametrize("options", ["", "--token-budget 1024", "--checkpointing", "--bf16"])
def test_the_prediction_is_within_15_percent_of_what_training_takes(options: str) -> None:
    script, model = Path(__file__).parents[3] / "benchmarks" / "bench_memory.py", os.environ["ATROPOS_VERL_MEMORY"]
    command = [sys.executable, str(script), "--steps", "2", "--model", model, *options.split()]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)["predicted"]
    assert 0.85 < found["training"]["predicted / measured"] < 1.15, found
