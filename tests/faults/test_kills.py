"""A run whose parts are killed, one after another, in one run directory: each run resumes what the one before left.

Real processes all the way, with and without an overlapped trainer. Each test also works alone; run in order, each start
is the proof that the run before left a directory that can be resumed.
"""

import contextlib
import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import SMALL, TrainingRun, checkpointed_step, journalled, metrics_of, summary_of

pytestmark = pytest.mark.slow

WORDS = ("advantage_normalization=global", "off_policy.max_staleness=null", "save_freq=5", *SMALL)

METRIC_KEYS = {
    *("step", "policy_version", "loss", "reward/mean"),
    *("data/groups", "data/quarantined", "data/dropped_overlong"),
    *("sync/seconds", "sync/canary_max_abs_logprob_diff"),
    *("timing/rollout", "timing/train", "timing/sync", "timing/wait"),
    *("perf/trained_tokens_per_second", "perf/peak_rss_bytes"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills") / "run"


@contextlib.contextmanager
def started(run_dir: Path, mode: str) -> Iterator[TrainingRun]:
    """A run that has resumed what was there, and trained three steps more."""
    before, pending = checkpointed_step(run_dir), len(journalled(run_dir))
    with TrainingRun(["steps=100000", f"mode={mode}", *WORDS], run_dir=run_dir) as run:
        run.wait_for_step(before + 3)
        if before:
            resumed = rf"resumed from \S+/global_step_{before} at step {before}, policy version {before}"
            assert re.search(resumed, run.stdout)
        if pending:
            assert f"{pending} batches fetched before the interruption are trained first" in run.stdout
        assert run.processes_seen >= 5, "trainer, API, environment and their two orphan reapers"
        yield run


def test_a_killed_service_is_restarted_and_a_killed_trainer_leaves_what_it_fetched(run_dir: Path) -> None:
    with started(run_dir, "sync") as run:
        for service in ("environment", "trajectory_api"):
            run.process_of(service).kill()
            run.wait_for_output(f"{service} was killed by SIGKILL (by hand, or by the kernel for want of memory: see")
            run.wait_for_output("; restarting it in ")
            run.wait_for_more(3)
        run.popen.kill()
        run.must_end(-signal.SIGKILL)
    # What was trained since the last checkpoint lies in the journal, and what was taken ahead.
    since = metrics_of(run_dir)[-1]["step"] - checkpointed_step(run_dir)
    assert len(journalled(run_dir)) >= since


def test_an_environment_that_cannot_start_twice_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "my_env.py"
    script.write_text("raise ImportError('no fancy_dependency here')\n")
    with TrainingRun([f"env.script={script}", "supervise.backoff=0.1"], run_dir=tmp_path / "run") as run:
        run.must_end(1)
        assert run.stdout.count("environment exited with code 1; restarting it in ") == 1
        assert "environment exited with code 1 (2 deaths) and is given up; no environment is left" in run.stderr
        assert run.stderr.rstrip().endswith("ImportError: no fancy_dependency here")
    assert checkpointed_step(tmp_path / "run") == 0


@pytest.mark.parametrize(("how", "mode"), [("kill", "sync"), ("Ctrl-C", "overlap")])
def test_it_is_told_to_stop(how: str, mode: str, run_dir: Path) -> None:
    before = checkpointed_step(run_dir)
    with started(run_dir, mode) as run:
        if how == "kill":
            run.popen.send_signal(signal.SIGTERM)
        else:
            run.ctrl_c()
        run.must_end(130)
        assert "\ninterrupted\n" in run.stderr
        assert "Traceback" not in run.stderr
    step = metrics_of(run_dir)[-1]["step"]
    assert checkpointed_step(run_dir) == step >= before + 3
    if step % 5:  # otherwise it was saved in passing
        note = f"(steps up to {step} are saved in {run_dir}/checkpoints/global_step_{step}; the same command with "
        assert note + f"run_dir={run_dir} resume=auto goes on)" in run.stderr
    # Batches that are on disk and not trained on: what the trainer had taken ahead, never more.
    assert len(journalled(run_dir)) <= 2


def test_it_goes_on_to_the_end(run_dir: Path) -> None:
    before = checkpointed_step(run_dir)
    last = before + 3
    with TrainingRun([f"steps={last}", *WORDS], run_dir=run_dir) as run:
        run.must_end(0)
        assert run.stderr == ""
        assert "training finished" in run.stdout
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, last + 1)), "each step once, whatever was killed"
    assert [line["policy_version"] for line in lines] == list(range(1, last + 1))
    for line in lines:
        assert line.keys() >= METRIC_KEYS
        assert all(math.isfinite(line[key]) for key in METRIC_KEYS), line
        assert line["sync/canary_max_abs_logprob_diff"] < 1e-3
        assert line["data/unmatched_span_rate"] == 0.0, "also of groups that were generated before a kill"
    groups = [line["data/groups"] for line in lines]
    # After 5 s without an environment, the API gives out what there is.
    assert sum(count != 4 for count in groups) <= 1, "a killed environment was long in coming back"
    trained = sum(line["data/trained_tokens"] for line in lines)
    state = json.loads((run_dir / "checkpoints" / f"global_step_{last}" / "atropos.json").read_text())
    assert state["moments"]["count"] == trained, "running statistics went on across every resume"
    summary = summary_of(run_dir)
    assert (summary["steps"], summary["policy_version"], summary["weights_synced"]) == (last, last, last - before + 1)
    assert summary["rewards"] == [line["reward/mean"] for line in lines], "of every run"
    assert (summary["groups_used"], summary["sequences_trained"]) == (sum(groups), 4 * sum(groups))
    assert summary["tokens_trained"] == trained
    for name in ("trainer", "trajectory_api", "environment"):
        assert (run_dir / "logs" / f"{name}.log").stat().st_size > 0, name
