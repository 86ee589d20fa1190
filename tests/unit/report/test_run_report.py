"""``atropos-verl report``: run directories written here, what is shown of them read back by value."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from atropos_verl.cli import main
from atropos_verl.errors import ConfigError
from atropos_verl.report.run_report import load_run


def step(number: int, reward: float | None, **metrics: Any) -> dict[str, Any]:
    figures = {"timing/step": 2.0, "data/groups": 3, "data/trained_tokens": 1000, "data/quarantined": 1}
    return {"step": number, "policy_version": number, "loss": -0.5, "reward/mean": reward, **figures, **metrics}


def make_run(root: Path, rewards: list[float | None], *, summary: dict[str, Any] | None = None) -> Path:
    root.mkdir(parents=True)
    lines = [json.dumps(step(number, reward)) for number, reward in enumerate(rewards, 1)]
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if summary is not None:
        (root / "summary.json").write_text(json.dumps(summary))
    return root


def test_of_a_run_that_goes_on_the_figures_so_far_are_summed_from_its_steps(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", [0.0, 0.2, 0.4, None, 0.6, 0.8, 1.0])
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # being written while we look
    data = load_run(root)
    assert not data.is_finished
    assert [line["step"] for line in data.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert data.summary["reward_first"] == pytest.approx((0.0 + 0.2 + 0.4) / 3)  # half of six, as in summary.json
    assert data.summary["reward_last"] == pytest.approx((0.6 + 0.8 + 1.0) / 3)
    assert (data.summary["tokens_trained"], data.summary["seconds"]) == (7000, 14.0)
    assert data.series("reward/mean") == [(1, 0.0), (2, 0.2), (3, 0.4), (5, 0.6), (6, 0.8), (7, 1.0)]


def test_a_summary_of_fewer_steps_is_that_of_the_run_before_the_resume(tmp_path: Path) -> None:
    finished = load_run(make_run(tmp_path / "a", [0.1, 0.2], summary={"steps": 2, "tokens_trained": 77}))
    resumed = load_run(make_run(tmp_path / "b", [0.1, 0.2, 0.3], summary={"steps": 2, "tokens_trained": 77}))
    assert finished.is_finished and finished.summary["tokens_trained"] == 77
    assert not resumed.is_finished and resumed.summary["tokens_trained"] == 3000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", "", "run: no step is done yet"),
        ("metrics.jsonl", "junk\n" + json.dumps(step(1, 0.5)) + "\n", "metrics.jsonl:1 is no step: 'junk'"),
        ("metrics.jsonl", "[1]\n" + json.dumps(step(1, 0.5)) + "\n", r"metrics.jsonl:1 is no step: '\[1\]'"),
        ("summary.json", "{", "cannot read .*summary.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    root = make_run(tmp_path / "run", [0.5])
    (root / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_run(root)


def test_a_directory_without_a_run_is_exit_code_2_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"cannot read {tmp_path}/metrics.jsonl (No such file or directory); is {tmp_path} the run directory of a run?\n"
    )
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no step is done yet\n"


def test_scores_stand_at_the_step_they_are_of(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", [0.25, 0.5, 0.75])
    path = root / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2] |= {"held_out/score": 0.625, "held_out/step": 2}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_run(root)
    assert data.series("held_out/score") == [(2, 0.625)]
    assert data.summary["held_out_steps"] == {2: 0.625}


def test_runs_are_told_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"steps": 2, "held_out_before": 0.25, "held_out_after": 0.75}
    one, two = make_run(tmp_path / "x", [0.1, 0.2], summary=summary), make_run(tmp_path / "y", [0.3, 0.9])
    assert main(["report", str(one)]) == 0
    shown = capsys.readouterr().out
    assert f"{one} (finished)" in shown and "0.250 → 0.750" in shown and re.search(r"step +2\.00 +2\.00 +4\.0s", shown)
    assert main(["report", str(one), str(two)]) == 0
    shown = capsys.readouterr().out
    assert f"{one} (finished)" in shown and f"{two} (not finished: figures so far)" in shown and "0.900" in shown
