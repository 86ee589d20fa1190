"""Predictions against recorded runs of the demo: calibrated on one, held to 5 points of idle share on the others.

``recorded/`` is what ``benchmarks/bench_simulator.py --record`` writes. Of a predicted run, only the seconds of
training and weight sync go into its prediction.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from simulate.arrivals import Arrival, read_arrivals
from simulate.calibrate import calibrate
from simulate.recording import read_recording

from atropos_verl.cli import main
from atropos_verl.errors import ConfigError

RECORDED = Path(__file__).parent / "recorded"


def latency(name: str) -> str:
    """Seconds of scoring a group."""
    words: list[str] = json.loads((RECORDED / name / "config.json").read_text())["env"]["args"]
    return words[words.index("--env.latency") + 1]


def predicted(name: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    words = ["--replay", str(RECORDED / name), "--generation-from", str(RECORDED / "calibration")]
    words += ["--latency", latency(name), "--generation-latency", latency("calibration")]
    words += ["--latency-spread", "0", "--environments", "1", "--workers", "256", "--mode", name.split("_")[0]]
    assert main(["simulate", *words, "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", ["sync", "overlap_short", "overlap_long"])
@pytest.mark.parametrize("more", [["--seeds", "20"], ["--steps", "300", "--seeds", "3"]], ids=["same-steps", "steady"])
def test_the_idle_share_of_a_recorded_run_is_predicted(
    name: str, more: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicted(name, capsys, *more)
    run, measured = found["runs"][0], found["recorded"]
    assert abs(run["trainer_idle_share"] - measured["trainer_idle_share"]) <= 0.05
    assert run["groups_per_second"] == pytest.approx(measured["groups_per_second"], rel=0.1)


def test_how_stale_the_groups_of_a_recorded_run_were_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sync", "overlap_short", "overlap_long"):
        found = predicted(name, capsys, "--seeds", "20")
        mean, measured = (
            sum(int(age) * count for age, count in staleness.items()) / sum(staleness.values())
            for staleness in (found["runs"][0]["staleness"], found["recorded"]["staleness"])
        )
        assert mean == pytest.approx(measured, abs=0.5), name


def test_seeds_give_a_mean_and_every_single_figure(capsys: pytest.CaptureFixture[str]) -> None:
    run = predicted("sync", capsys, "--seeds", "5")["runs"][0]
    shares = run["trainer_idle_share_by_seed"]
    assert len(shares) == 5
    assert run["trainer_idle_share"] == pytest.approx(sum(shares) / 5, abs=1e-3)
    alone = predicted("sync", capsys, "--seeds", "1", "--seed", "3")["runs"][0]
    assert alone["trainer_idle_share"] == pytest.approx(shares[3], abs=1e-4)


def _sync_run(directory: Path, late: Sequence[int] = ()) -> Path:
    """8 steps of 4 groups: 1.5 s of generation, 3 s of latency, one posted every 10 ms; the last of step ``late`` comes
    4.5 s after the others. The trainer asks for 5 s, or 9.5 s, and needs another 0.1 s."""
    metrics, arrivals, now = [], [], 1000.0
    for step in range(1, 9):
        times = [now + 4.51 + 0.01 * k for k in range(4)]
        if step in late:
            times[-1] += 4.5
        waited = 9.5 if step in late else 5.0
        metrics.append(
            {"step": step, "data/groups": 4, "data/sequences": 16, "timing/rollout": waited + 0.1}
            | {"timing/wait": waited, "timing/train": 2.0, "timing/sync": 0.5, "timing/step": waited + 2.6}
        )
        arrivals.append({"step": step, "at": now + waited, "groups": [[at, 0, 4, 100] for at in times]})
        now += waited + 2.6
    (directory / "api").mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (directory / "api" / "arrivals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in arrivals))
    return directory


def test_generation_posts_and_double_counts_are_read_from_arrivals(tmp_path: Path) -> None:
    run = _sync_run(tmp_path, late=[5])
    found = calibrate(read_recording(run), read_arrivals(run, option="--x"), 3.0, 0.1)
    assert found.generation_seconds == pytest.approx(1.5, abs=1e-6)
    assert found.post_seconds == pytest.approx(0.01, abs=1e-6)
    assert found.take_seconds == pytest.approx(0.1, abs=1e-6)
    assert (found.late_batches, found.batches) == (1, 5)  # steps 4 to 8
    # 0.4 looks at a batch: the inverse of 1 - (1 - answer / post)^0.4 = 1 / 5
    assert 1 - (1 - found.answer_seconds / 0.01) ** 0.4 == pytest.approx(1 / 5)
    assert found.slots == 64


def test_only_a_sync_run_with_arrivals_can_be_calibrated_on(tmp_path: Path) -> None:
    run = _sync_run(tmp_path)
    recording = read_recording(run)
    with pytest.raises(ConfigError, match="1 steps have a record of arrivals"):
        calibrate(recording, read_arrivals(run, option="--x")[:4], 3.0, 0.1)
    (run / "config.json").write_text('{"mode": "overlap"}')
    with pytest.raises(ConfigError, match="mode=overlap"):
        calibrate(read_recording(run), read_arrivals(run, option="--x"), 3.0, 0.1)


def test_arrivals_are_read_from_a_run_a_data_directory_or_a_file_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    run = _sync_run(tmp_path)
    file = run / "api" / "arrivals.jsonl"
    whole = read_arrivals(run, option="--x")
    assert whole == read_arrivals(run / "api", option="--x") == read_arrivals(file, option="--x")
    group = Arrival(at=1004.51, environment=0, size=4, tokens=100)
    assert whole[0].groups[0] == group
    assert (whole[0].step, whole[0].at, len(whole)) == (1, 1005.0, 8)
    with file.open("a") as end:
        end.write('{"step": 9, "at": 12')
    assert read_arrivals(file, option="--x") == whole


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no record of arrivals"), ("[1]\n", "is not a record"), ("", "no batch was handed out")],
)
def test_a_run_without_arrivals_is_refused_with_the_reason(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "arrivals.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_arrivals(tmp_path, option="--generation-from")
    assert "--generation-from" in str(caught.value)
