"""A whole run with a teacher of its own: the student's distributions come near the teacher's."""

from pathlib import Path

import pytest
import torch
from support.runs import SMALL, TrainingRun, metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_verl.assets import demo_model_path

pytestmark = pytest.mark.slow


def test_a_student_comes_near_the_teacher_of_its_run(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += (parameter.std() * torch.randn(parameter.shape, generator=generator)).nan_to_num()
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path / "teacher")
    words = ["steps=4", f"distill.teacher={tmp_path / 'teacher'}", "distill.alone=true", "loss.ppo_epochs=4"]
    with TrainingRun([*words, *SMALL, "save_freq=-1"], run_dir=tmp_path / "run") as run:
        run.must_end(0)
    lines = metrics_of(tmp_path / "run")
    assert [line["distill/known"] for line in lines] == [1.0] * 4
    kl = [line["distill/kl"] for line in lines]
    assert kl[0] > 0.1
    assert kl[-1] < kl[0] / 2
