"""What a trainer that cannot be built leaves behind: nothing."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atropos_verl.assets import demo_model_path
from atropos_verl.backends.local import trainer
from atropos_verl.backends.local.trainer import held_interrupts
from atropos_verl.config.schema import RunConfig
from atropos_verl.storage import locked


def test_a_trainer_whose_sample_settings_fail_closes_its_parts_and_frees_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[str] = []
    stack = SimpleNamespace(engine=SimpleNamespace(vocab_size=9), close=lambda: closed.append("stack"))

    def sample_settings(*_: Any) -> Any:
        raise ValueError("no such function")

    monkeypatch.setattr(trainer, "LocalStack", lambda *_: stack)
    monkeypatch.setattr(trainer, "sample_settings", sample_settings)
    api = {"api_url": "http://127.0.0.1:9"}
    config = RunConfig.from_mapping(
        {"run_dir": str(tmp_path), "atropos": api, "model": {"path": str(demo_model_path())}}
    )
    with pytest.raises(ValueError, match="no such function") as caught:
        trainer.AtroposTrainer(config)
    with locked(tmp_path / "lock", "another run"):  # while the traceback still holds the trainer
        assert caught.tb is not None
    assert closed == ["stack"]


def test_an_interrupt_that_is_held_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Symptom: Ctrl-C in a step of a large model had no visible effect for half a minute."""
    with held_interrupts(deliver=False):
        signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err.startswith("stopping: the trainer ends its step and writes its checkpoint")
