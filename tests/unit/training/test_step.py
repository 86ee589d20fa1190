"""metrics.jsonl and summary.json, read back with the standard library; totals, idle share, held-out scores."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atropos_verl.training.step import (
    HeldOut,
    LoggedProgress,
    RunTotals,
    StepLog,
    is_best,
    outcome,
    reward_window,
    step_report,
    write_summary,
)
from atropos_verl.types import StepReport


def report(step: int, loss: float = 0.25, **metrics: float | int | None) -> StepReport:
    return StepReport(step=step, policy_version=step + 100, loss=loss, metrics=metrics)


def test_one_object_per_step_with_null_for_what_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog(tmp_path / "run", 0)
    log.append(report(1, **{"reward/mean": 0.5, "data/groups": 8}))
    log.append(report(2, loss=-0.2, **{"reward/mean": None}))
    log.append(report(3, loss=math.nan, a=math.inf, b=1.5, c=np.float32("nan"), d=np.int64(3)))
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "policy_version": 101, "loss": 0.25, "reward/mean": 0.5, "data/groups": 8},
        {"step": 2, "policy_version": 102, "loss": -0.2, "reward/mean": None},
        {"step": 3, "policy_version": 103, "loss": None, "a": None, "b": 1.5, "c": None, "d": 3},
    ]
    assert log.rewards == [0.5]
    assert caplog.messages == [f"step 3: a = inf, c = nan, loss = nan; written as null to {log.path}"]


def test_resuming_removes_later_steps_and_the_line_cut_short(tmp_path: Path) -> None:
    log = StepLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.append(report(step, **{"reward/mean": step / 4}))
    before = log.path.read_text().splitlines()
    with log.path.open("a") as file:
        file.write('{"step": 2, "policy_ver')
    log = StepLog(tmp_path, 2)
    inode = log.path.stat().st_ino
    assert StepLog(tmp_path, 2).path.stat().st_ino == inode, "a file without later steps is not touched"
    assert log.rewards == [0.25, 0.5], "those of every process of the run"
    assert log.path.read_text() == f"{before[0]}\n{before[1]}\n"
    log.append(report(3, loss=9.0))
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [0.25, 0.25, 9.0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert StepLog(tmp_path, 0).rewards == []
    assert log.path.read_text() == ""


def test_summary_is_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    content = {"deep": {"x": (1, -math.inf)}, "n": np.int64(4)}
    found = write_summary(tmp_path, content, held_out={"after": math.nan, "step_5": 0.5}, seconds=2.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "deep": {"x": [1, None]}, "n": 4, "held_out_before": None, "held_out_after": None,
        "held_out_steps": {"5": 0.5}, "seconds": 2.5, "run_dir": str(tmp_path),
    }  # fmt: skip
    assert found["run_dir"] == str(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([], (None, None, 1)),
        ([0.5], (0.5, 0.5, 1)),
        ([0.0, 1.0, 1.0, 2.0], (0.5, 1.5, 2)),
        ([float(n) for n in range(20)], (2.0, 17.0, 5)),
    ],
)
def test_the_first_and_the_last_steps_do_not_overlap(rewards: list[float], expected: tuple[float | None, ...]) -> None:
    names = ("reward_first", "reward_last", "reward_window")
    assert reward_window(rewards) == dict(zip(names, expected, strict=True))


def test_a_step_by_hand_and_the_totals_it_adds_to() -> None:
    counts = {"groups": 2, "sequences": 3, "quarantined": 1, "dropped_overlong": 1, "trained_tokens": 12}
    figures: dict[str, Any] = {"sync/seconds": None, "data/groups": 99}
    of = {"scores": [(3, 1.0), (None, 0.0)], "seconds": {"rollout": 1.0, "step": 6.0}, "figures": figures}
    found = step_report(4, 5, 0.25, counts=counts, **of)
    assert (found.step, found.policy_version, found.loss) == (4, 5, 0.25)
    assert found.metrics == {
        "reward/mean": 0.5, "reward/std": 0.5, "data/groups": 2, "data/sequences": 3, "data/quarantined": 1,
        "data/dropped_overlong": 1, "data/trained_tokens": 12, "timing/rollout": 1.0, "timing/step": 6.0,
        "perf/trained_tokens_per_second": 2.0, "env/3/sequences": 1, "env/3/reward": 1.0,
        "sync/seconds": None,
    }  # fmt: skip
    totals, again = RunTotals(), RunTotals()
    totals.count(counts)
    totals.count({**counts, "stale": 1, "trained_tokens": 0})
    assert (totals.groups_used, totals.groups_quarantined, totals.groups_stale) == (4, 2, 1)
    assert (totals.sequences_trained, totals.tokens_trained, totals.steps_without_data) == (3, 12, 1)
    again.load({**vars(totals), "a_counter_of_another_version": 1})
    assert again == totals
    assert outcome(4, 5, [1.0], totals, mode="sync")["groups_used"] == 4


def test_the_idle_share_weighs_steps_by_their_length_and_leaves_the_first_out(tmp_path: Path) -> None:
    log = StepLog(tmp_path, 0)
    shares = [log.idle_share]
    for waited, total in ((50.0, 51.0), (1.0, 2.0), (0.0, 6.0)):
        log.append(report(1, **{"timing/rollout": waited, "timing/step": total}))
        shares.append(log.idle_share)
    assert shares == [None, None, 1.0 / 2.0, 1.0 / 8.0]


def test_held_out_scores_of_what_was_started() -> None:
    metrics = {
        "before": {"mean_reward": 0.25, "other": 9},
        "step_5": {"mean_reward": 0.5, "words/score": 0.75},
        "after": {"text": "no number", "mean_reward": math.nan},
    }
    started: list[str] = []
    polls = [*[False] * 20, True, True]
    evaluations: Any = SimpleNamespace(
        start_evaluation=started.append,
        has_evaluation=started.__contains__,
        is_evaluating=lambda label: polls.pop(),
        finish_evaluation=metrics.__getitem__,
    )
    scores: dict[str, float | None] = {}
    held_out, attended = HeldOut(evaluations, LoggedProgress(), scores), list[int]()
    assert held_out.finish("before") == scores == {}
    assert all(held_out.start(label) for label in metrics)
    assert held_out.finish("before", lambda: attended.append(1)) == {"held_out/score": 0.25}
    assert attended, "who waits looks after the engine"
    assert held_out.finish("step_5") == {"held_out/score": 0.5, "held_out/words/score": 0.75}
    assert held_out.finish("after") == {"held_out/score": None}
    assert scores == {"before": 0.25, "step_5": 0.5, "after": None}
    for own, best in (({"before": 0.9}, True), ({"step_10": 0.4}, True), ({"step_10": 0.6}, False)):
        assert is_best(scores | own, "step_5") is best  # of the trained policies
    assert not is_best(scores, "after") and not is_best({}, "step_5")
    nobody = HeldOut(None, LoggedProgress(), {})
    assert not nobody.start("after")
    assert nobody.finish("after") == nobody.scores == {}
