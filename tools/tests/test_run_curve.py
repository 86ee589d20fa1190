"""The curve of a run as a file that a browser shows."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from run_curve import curve, ticks


def test_reward_and_held_out_scores_are_in_the_drawing(tmp_path: Path) -> None:
    lines = [{"step": step, "policy_version": step, "loss": 0.1, "reward/mean": step / 4} for step in (1, 2, 3)]
    lines[2] |= {"held_out/score": 0.5, "held_out/step": 2}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "held_out_before": 0.25, "held_out_after": 1.0}))
    root = ElementTree.fromstring(curve(tmp_path))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert [len(line.attrib["points"].split()) for line in root.iter(f"{space}polyline")] == [3, 3]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.23, 0.97, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.5, 0.0, [-0.5, -0.4, -0.3, -0.2, -0.1, 0]),
        (4, 4, [3.9, 4, 4.1]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
