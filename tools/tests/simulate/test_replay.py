"""Recorded arrivals once more: by hand on a small run, and a recorded one, which must give its own figures again."""

import json
from pathlib import Path
from typing import Any

import pytest

from atropos_verl.cli import main

RECORDED = Path(__file__).parent / "recorded"


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["simulate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """8 overlapped steps of 2 groups of 4 sequences, one group every 5 s; training takes 3 s, a sync 1 s, so the
    trainer waits 6 of 10 s. The first group of a batch began a version before the second one: 1 and 0 behind."""
    metrics, arrivals = [], []
    for step in range(1, 9):
        at = [5000.0 + 10 * step - 5, 5000.0 + 10 * step]  # the trainer began at 5000 s, and has a batch every 10 s
        arrivals.append({"step": step, "at": at[1], "groups": [[time, 0, 4, 400] for time in at]})
        rollout = 10.0 if step == 1 else 6.0
        ages = {"0": 2} if step == 1 else {"1": 1, "0": 1}
        metrics.append(
            {"step": step, "data/groups": 2, "data/sequences": 8, "timing/rollout": rollout, "timing/train": 3.0}
            | {"timing/sync": 1.0, "timing/step": rollout + 4.0}
            | {f"off_policy/groups_at_staleness/{age}": count for age, count in ages.items()}
        )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (tmp_path / "arrivals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in arrivals))
    settings = {"mode": "overlap", "batch_retry_delay": 0.01, "batch_retry_attempts": 1, "batch_max_wait_time": 12.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_run_under_its_own_settings_gives_its_own_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(capsys, "--arrivals", str(run), "--mode", "overlap")
    outcome = found["runs"][0]
    assert outcome["steps"] == 5  # 8, less the first three
    assert outcome["trainer_idle_share"] == pytest.approx(found["recorded"]["trainer_idle_share"], abs=0.005)
    assert outcome["groups_per_second"] == pytest.approx(0.2, rel=0.01)
    assert outcome["staleness"] == found["recorded"]["staleness"] == {"0": 5, "1": 5}
    assert outcome["held_back_share"] == 0.0
    assert outcome["generation_idle_share"] is None


def test_other_batch_sizes_and_bounds_change_what_follows_from_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One group a step: half the tokens, so half the training, and a batch every 5 s. (1.5 + 1) s of 5 are worked.
    small = simulated(capsys, "--arrivals", str(run), "--mode", "overlap", "--batch-size", "4")["runs"][0]
    assert small["steps"] == 13
    assert small["step_seconds"] == pytest.approx(5.0, rel=0.01)
    assert small["trainer_idle_share"] == pytest.approx(0.5, abs=0.01)
    # Two batches at a time: 6 + 1 s of work every 20 s.
    large = simulated(capsys, "--arrivals", str(run), "--mode", "overlap", "--batch-size", "16", "--skip", "1")
    assert large["runs"][0]["step_seconds"] == pytest.approx(20.0, rel=0.01)
    assert large["runs"][0]["trainer_idle_share"] == pytest.approx(13 / 20, abs=0.01)
    # No group may be behind: half of each batch is dropped.
    fresh = simulated(capsys, "--arrivals", str(run), "--mode", "overlap", "--max-staleness", "0")["runs"][0]
    assert fresh["staleness"] == {"0": 5}
    assert fresh["dropped_stale_groups"] == 5


def test_a_recorded_cpu_run_gives_its_own_figures_again(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(capsys, "--arrivals", str(RECORDED / "overlap_long"), "--mode", "overlap")
    outcome, measured = found["runs"][0], found["recorded"]
    assert outcome["trainer_idle_share"] == pytest.approx(measured["trainer_idle_share"], abs=0.02)
    assert outcome["groups_per_second"] == pytest.approx(measured["groups_per_second"], rel=0.02)
    ages = set(outcome["staleness"]) | set(measured["staleness"])
    off = sum(abs(outcome["staleness"].get(age, 0) - measured["staleness"].get(age, 0)) for age in ages) / 2
    assert off <= 0.05 * sum(measured["staleness"].values())


def test_the_table_leaves_out_what_arrivals_do_not_tell(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--arrivals", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "environments held back" in printed
    assert "generation idle" not in printed
    assert "5 and 5 steps" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", "64"], "enough for 1 steps of 64"),
        (["--replay", "elsewhere"], "--replay"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(
    words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--arrivals", str(run), *words]) == 2
    assert said in capsys.readouterr().err


def test_arrivals_of_another_run_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"step": 5, "at": 1.0, "groups": [[0.5, 0, 4, 400]]})
    (run / "arrivals.jsonl").write_text(text + "\n")
    assert main(["simulate", "--arrivals", str(run)]) == 2
    assert "of another run" in capsys.readouterr().err
