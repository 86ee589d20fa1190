"""The test suite's own watch over a run: what the run did last is seen, however the two fall together."""

import sys
from pathlib import Path

import pytest
from support.runs import TrainingRun


def _ends_at_once(tmp_path: Path) -> TrainingRun:
    run = TrainingRun([], run_dir=tmp_path / "run")
    run.command = [sys.executable, "-c", "print('last words')"]
    return run


def test_a_run_that_ends_just_after_the_look_is_looked_at_once_more(tmp_path: Path) -> None:
    with _ends_at_once(tmp_path) as run:
        looks: list[int | None] = []

        def ended() -> bool:
            looks.append(run.popen.poll())
            if looks[-1] is None:
                run.popen.wait(timeout=60.0)  # it ends between this look and what follows it
            return looks[-1] is not None

        run.wait_until(ended, "the end of the run", 60.0)
        assert looks == [None, 0]


def test_a_run_that_ended_without_it_fails_with_what_it_said(tmp_path: Path) -> None:
    with _ends_at_once(tmp_path) as run:
        run.popen.wait(timeout=60.0)
        with pytest.raises(AssertionError, match=r"ended with code 0 before a step(?s:.)*last words"):
            run.wait_until(lambda: False, "a step", 60.0)


def test_a_run_that_takes_too_long_fails(tmp_path: Path) -> None:
    run = TrainingRun([], run_dir=tmp_path / "run")
    run.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with run, pytest.raises(AssertionError, match=r"not within 0\.2 s: a step"):
        run.wait_until(lambda: False, "a step", 0.2)
    assert run.popen.poll() is not None, "leaving the block ends it"
