"""metrics.jsonl and summary.json, read back with the standard library."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from atropos_verl.training.metrics_log import MetricsLog, write_summary
from atropos_verl.types import StepReport


def report(step: int, loss: float = 0.25, **metrics: float | int | None) -> StepReport:
    return StepReport(step=step, policy_version=step + 100, loss=loss, metrics=metrics)


def test_one_object_per_step_at_top_level(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append(StepReport(step=1, policy_version=2, loss=0.1, metrics={"reward/mean": 0.5, "data/groups": 8}))
    log.append(StepReport(step=2, policy_version=3, loss=-0.2, metrics={"reward/mean": None}))
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "policy_version": 2, "loss": 0.1, "reward/mean": 0.5, "data/groups": 8},
        {"step": 2, "policy_version": 3, "loss": -0.2, "reward/mean": None},
    ]


def test_what_is_not_finite_is_null_and_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.WARNING):
        log.append(report(7, loss=math.nan, a=math.inf, b=1.5, c=np.float32("nan"), d=np.int64(3)))
    assert json.loads(log.path.read_text()) == {
        "step": 7, "policy_version": 107, "loss": None, "a": None, "b": 1.5, "c": None, "d": 3,
    }  # fmt: skip
    assert caplog.messages == [f"step 7: a = inf, c = nan, loss = nan; written as null to {log.path}"]


def test_a_metric_may_not_take_the_name_of_a_field(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metric 'loss' has the name of a field"):
        log.append(StepReport(step=1, policy_version=1, loss=0.0, metrics={"loss": 1.0}))
    assert not log.path.exists()


def test_resuming_removes_later_steps_and_the_line_cut_short(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        log.append(report(step))
    before = log.path.read_text().splitlines()
    with log.path.open("a") as file:
        file.write('{"step": 2, "policy_ver')
    log.truncate_after(2)
    assert log.path.read_text() == f"{before[0]}\n{before[1]}\n"
    log.append(report(3, loss=9.0))
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [0.25, 0.25, 9.0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.truncate_after(0)
    assert log.path.read_text() == ""


def test_a_file_without_later_steps_is_not_touched(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(5)
    assert not log.path.exists()
    log.append(report(1))
    inode = log.path.stat().st_ino
    log.truncate_after(1)
    assert log.path.stat().st_ino == inode


def test_summary_is_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(
        path, {"rewards": [0.5, math.nan], "run_dir": tmp_path, "deep": {"x": (1, -math.inf)}, "n": np.int64(4)}
    )
    assert json.loads(path.read_text()) == {
        "rewards": [0.5, None], "run_dir": str(tmp_path), "deep": {"x": [1, None]}, "n": 4,
    }  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 1})
    with pytest.raises(TypeError, match=r"object <object object at .* cannot be written as JSON"):
        write_summary(path, {"steps": object()})
    assert json.loads(path.read_text()) == {"steps": 1}
    with pytest.raises(FileNotFoundError):
        write_summary(tmp_path / "gone" / "summary.json", {})


def test_rewards_of_a_run_are_those_of_every_process_of_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rewards() == []
    for step, reward in ((1, 0.25), (2, None), (3, 1.0)):
        log.append(report(step, **{"reward/mean": reward}))
    assert MetricsLog(log.path).rewards() == [0.25, 1.0]
