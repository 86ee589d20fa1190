"""``atropos-verl report``: run directories written here, what is shown of them read back by value."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from atropos_verl.cli import main
from atropos_verl.errors import ConfigError
from atropos_verl.report.run_report import line_chart, load_run, render_page, ticks


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
    assert (data.summary["groups_used"], data.summary["tokens_trained"]) == (21, 7000)
    assert data.summary["seconds"] == 14.0
    assert data.series("reward/mean") == [(1, 0.0), (2, 0.2), (3, 0.4), (5, 0.6), (6, 0.8), (7, 1.0)]


@pytest.mark.parametrize(("place", "key"), [(".", "eval/mean_reward"), ("words", "eval/percent_correct")])
def test_a_held_out_score_of_a_run_that_goes_on_is_what_its_summary_will_have(
    tmp_path: Path, place: str, key: str
) -> None:
    """A launch has a directory for each environment, and environments name the figure differently."""
    root = make_run(tmp_path / "run", [0.5])
    directory = root / "eval" / "before" / place
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps({"results": {"all": {"count": 7, key: 0.25}}}))
    (directory / "samples.jsonl").write_text('{"answer": "x"}\n')
    data = load_run(root)
    assert (data.summary["held_out_before"], data.samples) == (0.25, {"before": [{"answer": "x"}]})


def test_a_summary_of_fewer_steps_is_that_of_the_run_before_the_resume(tmp_path: Path) -> None:
    finished = load_run(make_run(tmp_path / "a", [0.1, 0.2], summary={"steps": 2, "tokens_trained": 77}))
    resumed = load_run(make_run(tmp_path / "b", [0.1, 0.2, 0.3], summary={"steps": 2, "tokens_trained": 77}))
    assert finished.is_finished and finished.summary["tokens_trained"] == 77
    assert not resumed.is_finished and resumed.summary["tokens_trained"] == 3000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", "", "holds no step yet"),
        ("metrics.jsonl", "junk\n" + json.dumps(step(1, 0.5)) + "\n", "metrics.jsonl:1 is not JSON: 'junk'"),
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


def test_the_page_shows_every_metric_and_escapes_what_models_wrote(tmp_path: Path) -> None:
    summary = {"steps": 2, "held_out_before": 0.25, "held_out_after": 0.75}
    root = make_run(tmp_path / "run", [0.25, 0.5], summary=summary)
    (root / "eval" / "after").mkdir(parents=True)
    (root / "eval" / "after" / "samples.jsonl").write_text(json.dumps({"answer": "<script>alert(1)</script>"}) + "\n")
    (root / "quarantine").mkdir()
    (root / "quarantine" / "g1.json").write_text(
        json.dumps({"reason": "scores[0] is NaN", "group_id": "g1", "raw": "x"})
    )
    page = render_page([load_run(root)])
    assert "0.250 → 0.750" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page
    assert "scores[0] is NaN" in page
    assert "<h3>reward</h3>" in page and "<h3>data/trained_tokens</h3>" in page


def test_scores_stand_at_the_step_they_are_of(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", [0.25, 0.5, 0.75])
    path = root / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2] |= {"held_out/score": 0.625, "held_out/step": 2}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_run(root)
    assert data.series("held_out/score") == [(2, 0.625)]
    assert data.summary["held_out_steps"] == {2: 0.625}
    page = render_page([data])
    assert "<h3>held-out score</h3>" in page and "held_out/step" not in page.split("<script")[0]


def test_several_runs_share_each_chart_under_distinct_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "x" / "run", [0.1, 0.2]), make_run(tmp_path / "y" / "run", [0.3, 0.9])
    target = tmp_path / "page.html"
    assert main(["report", str(one), str(two), "--html", str(target)]) == 0
    assert re.search(r"0\.300 +0\.900", capsys.readouterr().out), "the window of two steps is one step"
    reward = target.read_text().split("<h3>reward</h3>")[1].split("</div></div>")[0]
    assert reward.count("<polyline") == 2
    assert re.findall(r"</i>([^<]*)<", reward) == [str(one), str(two)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.23, 0.97, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 5.0, [0, 1, 2, 3, 4, 5]),
        (-0.5, 0.0, [-0.5, -0.4, -0.3, -0.2, -0.1, 0]),
        (1e-7, 9e-7, [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]),
        (0, 0, [0, 1]),
        (4, 4, [3.6, 4, 4.4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert len(found) == len(expected)
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_curve_lies_where_its_values_say() -> None:
    svg = ElementTree.fromstring(line_chart({"a": [(1, 0.0), (2, 1.0), (3, 0.5)]}))
    points = [tuple(map(float, pair.split(","))) for pair in svg.find("polyline").get("points").split()]
    (left, bottom), (middle, top), (right, half) = points
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((top + bottom) / 2, abs=0.1)
    assert bottom > top  # SVG's y grows downward
    labels = {text.text: float(text.get("y")) - 4 for text in svg.findall("text")}
    assert labels["0"] == pytest.approx(bottom, abs=0.1) and labels["1"] == pytest.approx(top, abs=0.1)


def test_a_long_run_has_few_points_and_nothing_to_draw_is_no_chart() -> None:
    svg = ElementTree.fromstring(line_chart({"a": [(i, float(i)) for i in range(100_000)]}))
    assert len(svg.find("polyline").get("points").split()) == 1000
    assert line_chart({"a": [], "b": []}) == ""
