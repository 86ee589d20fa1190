"""What a trainer is built from, threads of engine and trainer, the garbage collector during imports; and what a trainer
that cannot be built leaves behind: nothing."""

import gc
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from atropos_verl.assets import demo_model_path
from atropos_verl.backends.local import trainer as trainer_module
from atropos_verl.backends.local.run import paused_collection
from atropos_verl.backends.local.trainer import AtroposTrainer, share_cores
from atropos_verl.backends.local.worker import held_interrupts
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.runner import WORTH_SEVERAL_THREADS, engine_threads, multiply_adds_per_layer
from atropos_verl.storage import locked


def _model(hidden: int, layers: int = 2, **settings: Any) -> Any:
    defaults = {"intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
    return Qwen2Config(**{**defaults, "hidden_size": hidden, "num_hidden_layers": layers, **settings})


LARGE, SMALL = _model(1024), _model(128)


@pytest.mark.parametrize(
    ("model", "settings", "device", "omp", "cores", "expected"),
    [
        # Both sides compute at once: they share the cores.
        (LARGE, {}, "cpu", None, 8, (None, None)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 8, (4, 4)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 2, (1, 1)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 1, (1, 1)),
        (LARGE, {"mode": "overlap"}, "cpu", None, 3, (1, 2)),
        (LARGE, {"mode": "overlap"}, "cuda", None, 8, (None, None)),
        (LARGE, {"mode": "overlap"}, "cpu", "1", 8, (None, None)),
        (LARGE, {"mode": "overlap", "inference": {"num_threads": 6}}, "cpu", None, 8, (6, 2)),
        (LARGE, {"mode": "overlap", "trainer": {"num_threads": 7}}, "cpu", None, 8, (4, 7)),
        (LARGE, {"inference": {"num_threads": 6}}, "cpu", None, 8, (6, None)),
        # The engine of a small model gets one thread.
        (SMALL, {}, "cpu", None, 8, (1, None)),
        (SMALL, {"mode": "overlap"}, "cpu", None, 8, (1, 7)),
        (SMALL, {"inference": {"num_threads": 3}}, "cpu", None, 8, (3, None)),
        (SMALL, {"inference": {"max_running": 1024}}, "cpu", None, 8, (None, None)),  # enough sequences, enough work
        (SMALL, {}, "cuda", None, 8, (None, None)),
        (SMALL, {}, "cpu", "2", 8, (None, None)),
    ],
)
def test_threads_of_engine_and_trainer(
    monkeypatch: pytest.MonkeyPatch, model: Any, settings: Any, device: str, omp: str | None, cores: int, expected: Any
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert share_cores(RunConfig.from_mapping(settings), device, model, cores) == expected


def test_work_is_counted_from_the_matrices_of_a_real_model_also_under_other_names_of_its_sizes() -> None:
    for config in (SMALL, _model(96, layers=3, vocab_size=1000), LlamaConfig(**SMALL.to_dict() | {"head_dim": 16})):
        model = AutoModelForCausalLM.from_config(config)
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert multiply_adds_per_layer(config, 8) == 8 * linear // config.num_hidden_layers
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    assert multiply_adds_per_layer(gpt2, 1) == (2 * (2 * 64 * 16 * 8 + 3 * 64 * 256) + 64 * 100) // 2
    experts = MixtralConfig(**SMALL.to_dict() | {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert multiply_adds_per_layer(experts, 1) == multiply_adds_per_layer(SMALL, 1) + 3 * 128 * 384


def test_the_threshold_divides_one_thread_from_the_default() -> None:
    rows = -(-WORTH_SEVERAL_THREADS // multiply_adds_per_layer(SMALL, 1))
    assert engine_threads(SMALL, rows, 8) == 8
    assert engine_threads(SMALL, rows - 1, 8) == 1
    assert engine_threads(SMALL, rows, None) is None


@pytest.fixture
def _collector_as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("_collector_as_before")
def test_nothing_is_collected_during_imports_and_nothing_of_them_later() -> None:
    before = gc.get_freeze_count()
    with paused_collection():
        with paused_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the inner block is not the one that ends it
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    with pytest.raises(ImportError), paused_collection():
        raise ImportError("no such library")
    assert gc.isenabled(), "also after an import that failed"
    gc.unfreeze()
    gc.disable()  # by the user: it stays off
    with paused_collection():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_engine_takes_the_tokenizer_of_the_settings_and_code_of_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model directory with code of its own, and without a tokenizer."""
    model = tmp_path / "model"
    shutil.copytree(demo_model_path(), model, ignore=shutil.ignore_patterns("token*", "*.jinja", "special*"))
    bases = "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
    own = 'class OwnConfig(Qwen2Config):\n    model_type = "own"\n\n\n'
    code = f"{bases}{own}class OwnForCausalLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    (model / "own_model.py").write_text(code)
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "own"}
    settings["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(trainer_module, "import_verl", lambda config: "cpu")
    monkeypatch.setattr(trainer_module, "PolicyWorker", Mock())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own_settings = {"path": str(model), "tokenizer_path": str(demo_model_path()), "trust_remote_code": True}
    settings = {"model": own_settings, "sync": {"canary": False}, "atropos": {"api_url": "http://127.0.0.1:9"}}
    with AtroposTrainer(RunConfig.from_mapping(settings | {"run_dir": str(tmp_path / "run")})) as trainer:
        assert trainer.engine.tokenizer is trainer.tokenizer
        assert type(trainer.engine.model).__name__ == "OwnForCausalLM"


def test_a_trainer_whose_sample_settings_fail_closes_its_parts_and_frees_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[str] = []

    def build(self: Any, held: ExitStack, _: Any) -> None:
        self.engine = SimpleNamespace(vocab_size=9)
        held.callback(closed.append, "parts")

    def sample_settings(*_: Any) -> Any:
        raise ValueError("no such function")

    monkeypatch.setattr(AtroposTrainer, "_build", build)
    monkeypatch.setattr(trainer_module, "sample_settings", sample_settings)
    api = {"api_url": "http://127.0.0.1:9"}
    config = RunConfig.from_mapping(
        {"run_dir": str(tmp_path), "atropos": api, "model": {"path": str(demo_model_path())}}
    )
    with pytest.raises(ValueError, match="no such function") as caught:
        AtroposTrainer(config)
    with locked(tmp_path / "lock", "another run"):  # while the traceback still holds the trainer
        assert caught.tb is not None
    assert closed == ["parts"]


def test_an_interrupt_that_is_held_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Symptom: Ctrl-C in a step of a large model had no visible effect for half a minute."""
    with held_interrupts(deliver=False):
        signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err.startswith("stopping: the trainer ends its step and writes its checkpoint")
