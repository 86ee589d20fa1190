"""The text that a run shows: captured from real rich consoles, compared with lines written by hand."""

import contextlib
import io
import logging
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from atropos_verl.report import console
from atropos_verl.report.console import ProgressReporter
from atropos_verl.types import StepReport


def report(step: int, loss: float = -0.01234, **metrics: float | None) -> StepReport:
    return StepReport(step=step, policy_version=step + 100, loss=loss, metrics=metrics)


def screen_of(term: str = "", width: int = 80, **environment: str) -> tuple[Console, io.StringIO]:
    """``term``: of a terminal; "": it is none."""
    out = io.StringIO()
    environment["TERM"] = term
    return Console(file=out, width=width, force_terminal=bool(term), _environ=environment), out


@pytest.mark.parametrize("term", ["", "dumb"])
def test_plain_lines_when_not_a_terminal_or_a_dumb_one(term: str) -> None:
    metrics = {
        "perf/trained_tokens_per_second": 1234.4,
        "timing/rollout": 0.52,
        "timing/train": 12.34,
        "timing/sync": 0.021,
        "timing/wait": 0.1,
    }
    screen, out = screen_of(term)
    with ProgressReporter(60, screen) as progress:
        progress.phase("starting the trajectory API")
        progress.note("environments are to use [http://127.0.0.1:9004/v1] :smile:")
        progress.phase("rollout: waiting for a batch")
        progress.step(report(1, **metrics, **{"reward/mean": 0.4118, "timing/step": 1.5}))
        progress.phase("rollout: waiting for a batch")
        progress.step(report(2, **metrics, **{"reward/mean": None, "timing/step": 2.5}))
    assert out.getvalue() == (
        "starting the trajectory API ...\n"
        "environments are to use [http://127.0.0.1:9004/v1] :smile:\n"
        "rollout: waiting for a batch ...\n"
        # 59 steps of 1.5 s are 88.5 s
        "step 1/60  reward 0.412  loss -0.0123  1,234 tok/s  rollout 0.52s  train 12.34s  sync 0.02s  wait 0.10s  "
        "stale -  weights v101  eta 1m 28s\n"
        # 58 steps of the median of 1.5 and 2.5, which is 2 s, are 116 s
        "step 2/60  reward -  loss -0.0123  1,234 tok/s  rollout 0.52s  train 12.34s  sync 0.02s  wait 0.10s  "
        "stale -  weights v102  eta 1m 56s\n"
    )


def test_plain_summary(tmp_path: Path) -> None:
    run = tmp_path / ("a-long-directory-name-" * 5)
    (run / "logs").mkdir(parents=True)
    (run / "quarantine").mkdir()
    (run / "metrics.jsonl").touch()
    summary = {
        "reward_first": 0.40625,
        "reward_last": 0.861,
        "reward_window": 5,
        "rewards": [0.0, 0.5, 1.0],
        "held_out_before": 0.43,
        "held_out_after": 0.851,
        "held_out_steps": {3: 0.5},
        "steps": 60,
        "policy_version": 60,
        "weights_synced": 61,
        "groups_used": 480,
        "groups_dropped": 1,
        "groups_quarantined": 2,
        "sequences_trained": 3840,
        "sequences_dropped_overlong": 7,
        "tokens_trained": 123456,
        "steps_without_data": 0,
        "seconds": 125.4,
    }
    screen, out = screen_of()
    ProgressReporter(60, screen).summary({**summary, "run_dir": str(run)})
    assert out.getvalue() == textwrap.dedent(f"""\
        training finished
          reward      0.406 → 0.861  (means of the first and last 5 steps)
                      ▁▅█
          held-out    0.430 → 0.851
                      ▄  at 1 step, best 0.851 at step 60
          steps       60, policy version 60, weights synced 61
          groups      used 480, dropped 1, quarantined 2
          sequences   trained 3,840, dropped as overlong 7
          tokens      trained 123,456
          time        2m 05s
          run         {run}
          metrics     {run}/metrics.jsonl
          logs        {run}/logs
          quarantine  {run}/quarantine
        """)


def test_a_summary_says_what_there_is() -> None:
    scores = {"held_out_before": 0.5, "held_out_steps": {"10": 0.75, "15": None}}
    assert console.summary_rows({**scores, "rewards": [], "steps_without_data": 2}, ascii_only=False) == [
        ("held-out", "0.500 → -"),
        ("", "▄  at 1 step, best 0.750 at step 10"),
        ("no data", "steps 2"),
    ]


def test_an_encoding_without_blocks_gets_ascii() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as file:
        progress = ProgressReporter(60, Console(file=file, width=80))
        progress.note("größer")
        progress.summary({"reward_first": 0.1, "reward_last": 0.2, "rewards": [0.0, 0.5, 1.0]})
        # 0.5 * 7 = 3.5, which rounds to even: index 4
        assert raw.getvalue() == b"gr\\xf6\\xdfer\ntraining finished\n  reward      0.100 -> 0.200\n              _+@\n"


def on_a_terminal(width: int, **environment: str) -> tuple[str, list[str]]:
    """All that a run of 12 steps writes, and what remains on the screen when it fails."""
    screen, out = screen_of("xterm", width, **environment)
    with pytest.raises(SystemExit), ProgressReporter(12, screen) as progress:
        sys.stdout.write("printed by someone else\n")
        for step in range(1, 13):
            progress.phase("rollout: waiting for a batch")
            progress.step(report(step, 0.5, **{"reward/mean": step / 12, "timing/step": 1.0, "timing/train": 0.5}))
        raise SystemExit
    text = out.getvalue()
    return text, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.rsplit("\x1b[2K", 1)[1]).splitlines()


def test_live_table_in_80_columns() -> None:
    text, frame = on_a_terminal(80)
    assert "printed by someone else\n" in text
    assert [re.sub(" +", " ", frame[row]).strip() for row in (0, 1, 8)] == [
        "step reward loss tok/s rollout train sync wait stale weights",
        "5/12 0.417 0.5000 - - 0.50 - - - 105",
        "12/12 1.000 0.5000 - - 0.50 - - - 112",
    ]
    assert frame[9] == "reward ▁▂▂▃▄▄▅▅▆▇▇█ 1.000"
    assert frame[10].endswith(" 12/12  eta 0.0s")
    assert "rollout: waiting for a batch" in frame[11]
    assert max(map(len, frame)) <= 80
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[9[0-9]m", text), "coloured"


def test_an_error_leaves_the_table_and_the_cursor() -> None:
    text, frame = on_a_terminal(44, NO_COLOR="1")
    assert len(frame) == 12 and max(map(len, frame)) <= 44
    assert text.endswith("\x1b[?25h")
    assert not re.search(r"\x1b\[([0-9]+;)*(3[0-9]|4[0-9]|9[0-9])m", text)


_PRINTS = """
import logging, os, sys
from pathlib import Path
from atropos_verl.report.console import ProgressReporter, log_to_file, output_may_close
with output_may_close(), ProgressReporter(total_steps=2) as progress:
    log_to_file(Path(sys.argv[1]))
    for number in range(3):
        progress.note(f"note {number}")
        sys.stderr.write("an error\\n")
    os.open(sys.argv[1], os.O_RDONLY)
    assert os.fstat(1).st_rdev == os.stat("/dev/null").st_rdev, "nothing else has its number"
"""


@pytest.mark.parametrize("how", ["full", "its reader has gone", "closed"])
def test_an_output_that_cannot_be_written_ends_nothing(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", _PRINTS, str(tmp_path / "log")]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=full if how == "full" else subprocess.PIPE, stderr=subprocess.STDOUT)
    if process.stdout is not None:
        process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert ("cannot be written any more" in (tmp_path / "log").read_text()) == (how != "closed")


@pytest.mark.parametrize("term", ["", "xterm"])
def test_a_step_that_learnt_nothing_is_told_and_scores_are_a_curve(term: str) -> None:
    screen, out = screen_of(term)
    with ProgressReporter(60, screen) as progress:
        for step, (bad, advantage) in enumerate([(0, 0.5), (2, 0.5), (1, 0.0), (0, 0.0), (0, 0.5), (0, 0.0)], 1):
            metrics = {"data/quarantined": bad, "advantage/mean_abs": advantage, "data/trained_tokens": 9}
            progress.step(report(step, **metrics, **({"held_out/score": 0.25} if step == 1 else {})))
    text = out.getvalue()
    told = [step for step in range(1, 7) if f"step {step}: every advantage is 0, so nothing is learnt" in text]
    assert told == [3, 6]
    if term:
        assert "3 groups quarantined" in text and "held-out ▄ 0.250" in text
    else:
        lines = [line for line in text.splitlines() if " eta " in line]
        nothing = "every advantage is 0"
        said = [re.sub(r".* weights v\d+ *|eta.*", "", line).strip() for line in lines]
        assert said == ["", "quarantined 2", f"quarantined 1  {nothing}", nothing, "", nothing]


def test_a_log_on_a_full_disk_drops_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, ours = logging.getLogger(), logging.getLogger("atropos_verl")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    console.log_to_file(Path("/dev/full"))
    ours.error("lost")
    with contextlib.suppress(OSError):
        root.handlers[0].close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        (console.decimal, [0.4118, -3.0, 0.0], "0.412 | -3.000 | 0.000"),
        (console.decimal, [1.234e-05, -123456.0, math.nan, -math.inf, None], "1.2e-05 | -1.2e+05 | nan | -inf | -"),
        (console.count, [0, 1234.4, 1_250_000, math.inf, None], "0 | 1,234 | 1,250,000 | - | -"),
        (console.seconds, [0.0, 0.414, 99.96, None], "0.00 | 0.41 | 99.96 | -"),
        (console.duration, [0.04, 4.24, 9.96, 59.4, 59.6, 65], "0.0s | 4.2s | 10s | 59s | 1m 00s | 1m 05s"),
        (console.duration, [3599.6, 11_220, 86_399, 187_200], "1h 00m | 3h 07m | 1d 00h | 2d 04h"),
        (console.duration, [math.nan, None], "- | -"),
    ],
)
def test_numbers(function: Callable[[float | None], str], values: list[float | None], expected: str) -> None:
    assert " | ".join(map(function, values)) == expected


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 60, "▁▂▃▄▅▆▇█"),
        ([7, 0], 60, "█▁"),
        ([0.3, 0.3], 60, "▄▄"),
        ([0.0, None, math.nan, 1.0], 60, "▁  █"),
        ([], 60, ""),
        ([None], 60, ""),
        ([0, 2, 2, 4], 2, "▁█"),  # the means of the two buckets are 1 and 3
        # edges 0, 2, 4, 7, means 0, 7 and 3.5, which is block 3.5 and rounds to 4
        ([0, 0, 7, 7, 3, 3.5, 4], 3, "▁█▅"),
    ],
)
def test_a_curve(values: list[float | None], width: int, curve: str) -> None:
    assert console.sparkline(values, width) == curve
