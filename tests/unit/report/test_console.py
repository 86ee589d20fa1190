"""The text that a run shows: captured from real rich consoles, compared with lines written by hand."""

import contextlib
import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from atropos_verl.report.console import ProgressReporter, count, decimal, duration, log_to_file, seconds, sparkline
from atropos_verl.types import StepReport

SUMMARY = {
    "reward_first": 0.40625,
    "reward_last": 0.861,
    "reward_window": 5,
    "rewards": [0.0, 0.5, 1.0],
    "held_out_before": 0.43,
    "held_out_after": 0.851,
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


def report(step: int, reward: float | None = 0.4118, seconds: float = 1.5) -> StepReport:
    metrics: dict[str, float | int | None] = {
        "reward/mean": reward,
        "perf/trained_tokens_per_second": 1234.4,
        "timing/rollout": 0.52,
        "timing/train": 12.34,
        "timing/sync": 0.021,
        "timing/wait": 0.1,
        "timing/step": seconds,
    }
    return StepReport(step=step, policy_version=step, loss=-0.01234, metrics=metrics)


def piped(**arguments: object) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80, **arguments), out  # type: ignore[arg-type]


def test_plain_lines_when_not_a_terminal() -> None:
    console, out = piped()
    with ProgressReporter(60, console) as progress:
        progress.phase("starting the trajectory API")
        progress.note("environments are to use [http://127.0.0.1:9004/v1] :smile:")
        progress.phase("rollout: waiting for a batch")
        progress.step(report(1))
        progress.phase("rollout: waiting for a batch")
        progress.step(report(2, reward=None, seconds=2.5))
    assert out.getvalue() == (
        "starting the trajectory API ...\n"
        "environments are to use [http://127.0.0.1:9004/v1] :smile:\n"
        "rollout: waiting for a batch ...\n"
        # 59 steps of 1.5 s are 88.5 s
        "step 1/60  reward 0.412  loss -0.0123  1,234 tok/s  rollout 0.52s  train 12.34s  sync 0.02s  wait 0.10s  "
        "stale -  weights v1  eta 1m 28s\n"
        # 58 steps of the median of 1.5 and 2.5, which is 2 s, are 116 s
        "step 2/60  reward -  loss -0.0123  1,234 tok/s  rollout 0.52s  train 12.34s  sync 0.02s  wait 0.10s  "
        "stale -  weights v2  eta 1m 56s\n"
    )


def test_plain_summary(tmp_path: Path) -> None:
    run = tmp_path / ("a-long-directory-name-" * 5)
    (run / "logs").mkdir(parents=True)
    (run / "quarantine").mkdir()
    (run / "metrics.jsonl").touch()
    console, out = piped()
    ProgressReporter(60, console).summary({**SUMMARY, "run_dir": str(run)})
    assert out.getvalue() == textwrap.dedent(f"""\
        training finished
          reward      0.406 → 0.861  (means of the first and last 5 steps)
                      ▁▅█
          held-out    0.430 → 0.851
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


def test_summary_of_a_run_without_rewards_says_what_there_is() -> None:
    console, out = piped()
    scores = {"held_out_before": 0.5, "held_out_steps": {"10": 0.75, "15": None}}
    ProgressReporter(3, console).summary({"steps": 3, "rewards": [], "steps_without_data": 2, **scores})
    assert out.getvalue() == (
        "training finished\n  held-out    0.500 → -\n              ▄  at 1 step, best 0.750 at step 10\n"
        "  steps       3\n  no data     steps 2\n"
    )


def test_the_score_after_training_may_be_the_best() -> None:
    console, out = piped()
    scores = {"held_out_after": 0.75, "held_out_steps": {3: 0.5}}
    ProgressReporter(6, console).summary({"steps": 6, "rewards": [], **scores})
    assert "at 1 step, best 0.750 at step 6" in out.getvalue()


def test_an_encoding_without_blocks_gets_ascii() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as file:
        progress = ProgressReporter(60, Console(file=file, width=80))
        progress.note("größer")
        progress.summary({"reward_first": 0.1, "reward_last": 0.2, "rewards": [0.1, 0.2]})
        written = raw.getvalue()
    assert written == (b"gr\\xf6\\xdfer\ntraining finished\n  reward      0.100 -> 0.200\n              _@\n")


RUN = """
    import sys
    from atropos_verl.report.console import ProgressReporter
    from atropos_verl.types import StepReport

    with ProgressReporter(12) as progress:
        progress.phase("loading the policy")
        print("printed by someone else")
        for step in range(1, 13):
            progress.phase("rollout: waiting for a batch")
            metrics = {"reward/mean": step / 12, "timing/step": 1.0, "timing/train": 0.5}
            progress.step(StepReport(step=step, policy_version=step + 100, loss=0.5, metrics=metrics))
        if "fail" in sys.argv:
            raise SystemExit("the API died")
        progress.summary({"steps": 12})
"""


def run_in_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """Everything that the run writes to a pseudo terminal of ``columns`` columns."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "24", **environment}
    command = [sys.executable, "-c", textwrap.dedent(RUN), *arguments]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env) as process:
        os.close(follower)
        text = b""
        with contextlib.suppress(OSError):  # Linux's end of file on a terminal
            while piece := os.read(leader, 65536):
                text += piece
        os.close(leader)
        process.wait(timeout=20)
    return text.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def at_80_columns() -> str:
    return run_in_terminal(80)


def last_frame(text: str) -> list[str]:
    """Takes what remains on the screen: the text after the last clearing of a line, without escapes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.rsplit("\x1b[2K", 1)[1]).splitlines()


def test_live_table_in_80_columns(at_80_columns: str) -> None:
    assert "printed by someone else\n" in at_80_columns
    frame = last_frame(at_80_columns)
    assert " ".join(frame[0].split()) == "step reward loss tok/s rollout train sync wait stale weights"
    assert frame[1].split() == ["5/12", "0.417", "0.5000", "-", "-", "0.50", "-", "-", "-", "105"]
    assert frame[8].split() == ["12/12", "1.000", "0.5000", "-", "-", "0.50", "-", "-", "-", "112"]
    assert frame[9] == "reward ▁▂▂▃▄▄▅▅▆▇▇█ 1.000"
    assert frame[10].endswith(" 12/12  eta 0.0s")
    assert "rollout: waiting for a batch" in frame[11]
    assert frame[12:] == ["training finished", "  steps       12"]
    assert max(len(line) for line in frame) <= 80


def test_on_a_narrow_terminal_an_error_leaves_the_table_and_the_cursor(at_80_columns: str) -> None:
    text = run_in_terminal(44, "fail", NO_COLOR="1")
    frame = last_frame(text)
    assert max(len(line) for line in frame) <= 44 and "the API died" in frame[-1]
    assert text.rindex("\x1b[?25h") < text.index("the API died")
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[9[0-9]m", at_80_columns)
    assert not re.search(r"\x1b\[([0-9]+;)*(3[0-9]|4[0-9]|9[0-9])m", text)


def test_dumb_terminal_gets_plain_lines() -> None:
    text = run_in_terminal(80, TERM="dumb")
    assert "\x1b" not in text
    assert text.startswith(
        "loading the policy ...\nprinted by someone else\nrollout: waiting for a batch ...\nstep 1/12  "
    )
    assert text.endswith("training finished\n  steps       12\n")


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
    said = (tmp_path / "log").read_text()
    assert ("cannot be written any more" in said) == (how != "closed")


def test_the_live_table_has_a_curve_of_the_held_out_score() -> None:
    console, out = piped(force_terminal=True)
    with ProgressReporter(60, console) as progress:
        first = report(1)
        progress.step(replace(first, metrics={**first.metrics, "held_out/score": 0.25, "held_out/step": 0}))
        progress.step(report(2))
    assert "held-out ▄ 0.250" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_step_did_not_learn_from_is_said(terminal: bool) -> None:
    console, out = piped(force_terminal=terminal, _environ={"TERM": "xterm"})
    with ProgressReporter(60, console) as progress:
        for step, (bad, advantage) in enumerate([(0, 0.5), (2, 0.5), (1, 0.0), (0, 0.0), (0, 0.5), (0, 0.0)], 1):
            figures = {"data/quarantined": bad, "advantage/mean_abs": advantage, "data/trained_tokens": 9}
            progress.step(replace(report(step), metrics={**report(step).metrics, **figures}))
    text = out.getvalue()
    told = [step for step in range(1, 7) if f"step {step}: every advantage is 0, so nothing is learnt" in text]
    assert told == [3, 6]
    if terminal:
        assert "3 groups quarantined" in text
    else:
        lines = [line for line in text.splitlines() if " eta " in line]
        nothing = "every advantage is 0"
        said = [re.sub(r".* weights v\d+ *|eta.*", "", line).strip() for line in lines]
        assert said == ["", "quarantined 2", f"quarantined 1  {nothing}", nothing, "", nothing]


def test_a_log_on_a_full_disk_drops_what_it_cannot_write(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "atropos_verl")  # is put back at the end
    log_to_file(Path("/dev/full"))
    handler = logging.getLogger().handlers[-1]
    try:
        logging.getLogger("atropos_verl").error("lost")
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        (decimal, [0.4118, -3.0, 0.0], "0.412 | -3.000 | 0.000"),
        (decimal, [1.234e-05, -123456.0, math.nan, -math.inf, None], "1.2e-05 | -1.2e+05 | nan | -inf | -"),
        (count, [0, 1234.4, 1_250_000, math.inf, None], "0 | 1,234 | 1,250,000 | - | -"),
        (seconds, [0.0, 0.414, 99.96, None], "0.00 | 0.41 | 99.96 | -"),
        (duration, [0.04, 4.24, 9.96, 59.4, 59.6, 65], "0.0s | 4.2s | 10s | 59s | 1m 00s | 1m 05s"),
        (duration, [3599.6, 11_220, 86_399, 187_200], "1h 00m | 3h 07m | 1d 00h | 2d 04h"),
        (duration, [math.nan, None], "- | -"),
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
    assert sparkline(values, width) == curve


def test_a_curve_in_ascii() -> None:
    assert sparkline([0.0, 0.5, 1.0], ascii_only=True) == "_+@"  # 0.5 * 7 = 3.5, which rounds to even: index 4
