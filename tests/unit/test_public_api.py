"""The names and signatures that other code is written against."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import atropos_verl
from atropos_verl.types import SampleReport, SampleSettings, TrainingSample

EXPORTS = """AtroposAPIError AtroposClient AtroposShardingManager AtroposTrainer AtroposVerlError RunConfig SampleReport
SampleSettings ScoredGroup TrainingSample __version__ build_samples decode_batch"""


def test_the_root_exports_exactly_this_and_its_stub_says_where_each_lies() -> None:
    assert set(atropos_verl.__all__) == set(dir(atropos_verl)) == set(EXPORTS.split())
    stub = ast.parse(Path(atropos_verl.__file__).with_suffix(".pyi").read_text())
    imports = {node.names[0].name: node.module for node in stub.body if isinstance(node, ast.ImportFrom)}
    assert {*imports, "__version__"} == set(atropos_verl.__all__)
    for name, module in imports.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(atropos_verl, name)
    with pytest.raises(AttributeError, match=r"atropos_verl.*no attribute 'AtroposTrainr'"):
        _ = atropos_verl.AtroposTrainr  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("from_config", "config reward_fn extra"),
        ("rl_training_step", "prompts"),
        ("rollout_phase", "prompts"),
        ("compute_advantages_from_atropos", "rollout_data"),
        ("training_phase", "rollout_data advantages"),
        ("compute_advantage_weighted_sft_loss", "input_ids advantages loss_mask"),
    ],
)
def test_the_trainers_phases(name: str, parameters: str) -> None:
    found = inspect.signature(getattr(atropos_verl.AtroposTrainer, name)).parameters
    assert [parameter for parameter in found if parameter != "self"] == parameters.split()


def test_the_engine_speaks_sglangs_and_verls_words() -> None:
    from atropos_verl.engine.embedded import TransformersEngine

    for name, first in (
        ("update_weights_from_tensor", ["self", "named_tensors"]),
        ("resume_memory_occupation", ["self"]),
        ("release_memory_occupation", ["self"]),
    ):
        assert list(inspect.signature(getattr(TransformersEngine, name)).parameters)[: len(first)] == first
    assert callable(TransformersEngine.generate)


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


def test_decode_and_build_from_the_root() -> None:
    group = b'{"tokens": [[5, 6, 7], [5, 6, 8]], "masks": [[-100, -100, 7], [-100, -100, 8]], "scores": [1, 0]}'
    report = atropos_verl.build_samples(atropos_verl.decode_batch(b'{"batch": [' + group + b"]}"))
    # scores 1 and 0: mean 0.5, sample standard deviation 0.70711, so ±0.5 / (0.70711 + 1e-6)
    assert [sample.advantages.tolist() for sample in report.samples] == [
        [0.0, 0.0, pytest.approx(0.7071058, abs=1e-6)],
        [0.0, 0.0, pytest.approx(-0.7071058, abs=1e-6)],
    ]


def test_batches_come_and_become_samples_without_torch() -> None:
    code = (
        "import sys, atropos_verl, atropos_verl.training.batch_source\n"
        "atropos_verl.build_samples(atropos_verl.decode_batch(b'{\"batch\": []}'))\n"
        "found = [name for name in ('torch', 'verl', 'transformers', 'ray') if name in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
