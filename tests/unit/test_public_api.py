"""The names and signatures that other code is written against."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import atropos_verl
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.types import SampleReport, SampleSettings, TrainingSample

EXPORTS = """AtroposAPIError AtroposClient AtroposShardingManager AtroposTrainer AtroposVerlError RunConfig SampleReport
SampleSettings ScoredGroup TrainingSample __version__ build_samples decode_batch"""


def test_the_root_exports_exactly_this_as_its_stub_says() -> None:
    assert set(atropos_verl.__all__) == set(dir(atropos_verl)) == set(EXPORTS.split())
    stub = ast.parse(Path(atropos_verl.__file__).with_suffix(".pyi").read_text())
    imports = {node.names[0].name: node.module for node in stub.body if isinstance(node, ast.ImportFrom)}
    assert {*imports, "__version__"} == set(atropos_verl.__all__)
    for name, module in imports.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(atropos_verl, name)
    with pytest.raises(AttributeError, match=r"atropos_verl.*no attribute 'AtroposTrainr'"):
        _ = atropos_verl.AtroposTrainr  # type: ignore[attr-defined]


def test_phases_of_the_trainer_and_the_engines_words_of_sglang() -> None:
    signatures = {
        atropos_verl.AtroposTrainer.from_config: "config reward_fn extra",
        atropos_verl.AtroposTrainer.rl_training_step: "self prompts",
        atropos_verl.AtroposTrainer.rollout_phase: "self prompts",
        atropos_verl.AtroposTrainer.compute_advantages_from_atropos: "self rollout_data",
        atropos_verl.AtroposTrainer.training_phase: "self rollout_data advantages",
        atropos_verl.AtroposTrainer.compute_advantage_weighted_sft_loss: "self input_ids advantages loss_mask",
        TransformersEngine.update_weights_from_tensor: "self named_tensors policy_version",
        TransformersEngine.resume_memory_occupation: "self",
        TransformersEngine.release_memory_occupation: "self",
    }
    assert {method: " ".join(inspect.signature(method).parameters) for method in signatures} == signatures


def test_samples_their_settings_and_their_report() -> None:
    expected = {"vocab_size": None, "max_token_len": None, "estimator": "grpo", "normalization": "none"}
    expected |= {"clipping": None, "overlong": "drop", "on_bad_group": "quarantine", "default_temperature": 1.0}
    assert {name: getattr(SampleSettings(), name) for name in expected} == expected
    fields: dict[Any, str] = {
        TrainingSample: "token_ids loss_mask advantages rollout_logprobs temperature group_id policy_version",
        SampleReport: "samples quarantined dropped_overlong",
    }
    for kind, names in fields.items():
        assert {field.name for field in dataclasses.fields(kind)} >= set(names.split())
