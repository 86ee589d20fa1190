"""Training commands with killed parts, directories in use, moved or damaged, and environments that send nothing."""

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import runs
from support.runs import SMALL, LaunchRun, TrainingRun, checkpointed_step, journalled, metrics_of
from support.trajectory_server import ServerProcess

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


def stop(run: TrainingRun) -> None:
    run.popen.send_signal(signal.SIGTERM)
    run.must_end(130)


def test_a_killed_service_is_restarted_and_a_killed_trainer_leaves_its_batches(run_dir: Path) -> None:
    with started(run_dir, "sync") as run:
        for service in ("environment", "trajectory_api"):
            run.send(service, signal.SIGKILL)
            run.wait_for_output(f"{service} was killed by SIGKILL (by hand, or by the kernel for want of memory: see")
            run.wait_for_output("; restarting it in ")
            run.wait_for_more(3)
        run.popen.kill()
        run.must_end(-signal.SIGKILL)
    # What was trained since the last checkpoint lies in the journal, and what was taken ahead.
    assert len(journalled(run_dir)) >= metrics_of(run_dir)[-1]["step"] - checkpointed_step(run_dir)


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
        run.popen.send_signal(signal.SIGTERM) if how == "kill" else run.ctrl_c()
        run.must_end(130)
        assert "\ninterrupted\n" in run.stderr
        assert "Traceback" not in run.stderr
    step = metrics_of(run_dir)[-1]["step"]
    again = f"(the same command with run_dir={run_dir} resume=auto goes on from step {step})"
    assert run.stderr.splitlines()[-1] == again
    assert checkpointed_step(run_dir) == step >= before + 3
    if step % 5:  # otherwise it was saved in passing
        assert f"(steps up to {step} are saved in {run_dir}/checkpoints/global_step_{step})" in run.stderr
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
    numbers = [(line["step"], line["policy_version"]) for line in lines]
    assert numbers == [(n, n) for n in range(1, last + 1)], "each step once, whatever was killed"
    for line in lines:
        assert all(math.isfinite(line[key]) for key in METRIC_KEYS), line
        assert line["sync/canary_max_abs_logprob_diff"] < 1e-3
        assert line["data/unmatched_span_rate"] == 0.0, "also of groups that were generated before a kill"
    groups = [line["data/groups"] for line in lines]
    # After 5 s without an environment, the API gives out what there is.
    assert sum(count != 4 for count in groups) <= 1, "a killed environment was long in coming back"
    trained = sum(line["data/trained_tokens"] for line in lines)
    state = json.loads((run_dir / "checkpoints" / f"global_step_{last}" / "atropos.json").read_text())
    assert state["moments"]["count"] == trained, "running statistics went on across every resume"
    summary = runs.summary_of(run_dir)
    assert summary["rewards"] == [line["reward/mean"] for line in lines], "of every run"
    expected = {"steps": last, "policy_version": last, "weights_synced": last - before + 1, "tokens_trained": trained}
    expected |= {"groups_used": sum(groups), "sequences_trained": 4 * sum(groups)}
    assert {key: summary[key] for key in expected} == expected
    assert all(run.log(name) for name in ("trainer", "trajectory_api", "environment"))


def test_one_run_per_directory_and_a_refused_one_touches_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with ServerProcess(tmp_path, "--second-trainer", "share") as api:
        words = [f"atropos.api_url={api.url}", *SMALL]
        with TrainingRun([*words, "steps=7"], run_dir=run_dir) as run:
            run.wait_for_output("environments are to use the gateway at")
            files = [path for path in run_dir.rglob("*") if path.suffix in (".json", ".yaml")]
            # The run that goes on writes its state.
            before = {path: path.stat().st_mtime_ns for path in files if path.name != "state.json"}
            for script in (runs.MAIN, runs.LAUNCH):
                said = runs.refused(script, *words, "steps=9", f"run_dir={run_dir}")
                assert f"run_dir: {run_dir} is in use by a training run, pid {run.popen.pid} on " in said
                assert "end it, or choose another one" in said
            assert {path: path.stat().st_mtime_ns for path in before} == before
            run.popen.kill()
            run.must_end(-signal.SIGKILL)
        assert json.loads((run_dir / "config.json").read_text())["steps"] == 7
        with TrainingRun([*words, "steps=7"], run_dir=run_dir) as run:  # the lock died with its holder
            run.wait_for_output("environments are to use the gateway at")
            stop(run)
    assert (run_dir / "lock").read_text() == ""


def test_a_moved_run_with_a_damaged_checkpoint_goes_on(tmp_path: Path) -> None:
    """Its temporary directory and its home stay as they were, whatever ended its processes."""
    places = [tmp_path / "home", tmp_path / "temp"]
    for place in places:
        place.mkdir()
    env = {"HOME": str(places[0]), "TMPDIR": str(places[1]), "MPLCONFIGDIR": str(tmp_path / "fonts")}
    words = ["save_freq=2", *SMALL]
    first, moved, copy = (tmp_path / name for name in ("first", "moved", "copy"))
    with TrainingRun(["steps=4", *words], run_dir=first, env=env) as run:
        run.must_end(0)
    shard = first / "checkpoints" / "global_step_4" / "actor" / "optim_world_size_1_rank_0.pt"
    shard.write_bytes(shard.read_bytes()[:-1000])
    shutil.copytree(first, copy)
    shutil.move(first, moved)
    for run_dir in (moved, copy):
        with TrainingRun(["steps=1000", *words], run_dir=run_dir, env=env) as run:
            run.wait_for_step(5)
            assert f"{run_dir / shard.relative_to(first)} has " in run.stdout
            assert "were written; global_step_2 is used" in run.stdout
            assert "2 batches fetched before the interruption are trained first" in run.stdout
            run.popen.send_signal(signal.SIGHUP)
            run.must_end(130)
        step = checkpointed_step(run_dir)
        assert f"(steps up to {step} are saved in " in run.stderr or step % 2 == 0
        assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, step + 1))
        assert not (run_dir / "launch" / "tmp").exists()
    assert not [path for place in places for path in place.rglob("*")]


@pytest.mark.parametrize("how", ["its reader ends", "it was never open"])
def test_a_standard_output_that_is_closed_ends_nothing(tmp_path: Path, how: str) -> None:
    run = TrainingRun([*SMALL, "steps=2", "save_freq=-1"], run_dir=tmp_path / "run")
    closed = how == "it was never open"
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *run.command] if closed else run.command
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            if not closed:
                process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=200.0) == 0
        finally:
            process.kill()
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert ("cannot be written any more" in run.log("trainer")) != closed


FAILING = runs.REPOSITORY / "tests" / "support" / "failing_env.py"
ONE_STEP = (*SMALL, "steps=1", "save_freq=-1", "supervise.stall_after=8")
CAUSES = {
    "raises": ("the environment fails in its own code: Error in collect_trajectories: ", "'answer_key' ("),
    "asks_wrongly": (
        "the gateway refuses every request of the environment: ",
        "best_of: not supported by this server (7)",
    ),
    "long": (
        "the prompts of the environment are too long: the gateway refuses every request: ",
        "maximum context length is 64 tokens",
    ),
    "sends_wrongly": ("the trajectory API refuses every group of environment failing: ", "masks[0]: "),
}
"""Fault → how the first line goes on, and the reason in it."""


@pytest.mark.parametrize("fault", CAUSES)
def test_the_first_line_names_the_cause(fault: str, tmp_path: Path) -> None:
    kind, words = TrainingRun, [*ONE_STEP, f"env.script={FAILING}", f"env.env.FAULT={fault}"]
    if fault == "sends_wrongly":
        environment = f"environments={{failing: {{script: {FAILING}, env: {{FAULT: {fault}}}}}}}"
        kind, words = LaunchRun, [*ONE_STEP, environment]
    cause, reason = CAUSES[fault]
    with kind(words, run_dir=tmp_path / "run") as run:
        run.wait_for_output(f" s: {cause}")
        assert reason in run.stdout.split(f" s: {cause}")[1].splitlines()[0]
        assert "Is an environment running" not in run.stdout
        stop(run)


def test_the_final_error_names_the_cause_and_no_secret(tmp_path: Path) -> None:
    words = [*ONE_STEP, f"env.script={FAILING}", "env.env.FAULT=same", "env.startup_timeout=25"]
    cause = " s: the environment drops every group, since all scores of a group are equal ("
    shown: set[str] = set()
    with TrainingRun(words, run_dir=tmp_path / "run") as run:
        run.wait_until(lambda: shown.update(run.living()) or cause in run.stdout, "the diagnosis")
        private = yaml.safe_load((tmp_path / "run" / "launch" / "environment.yaml").read_text())
        run.must_end(1)
    assert cause in run.stderr.strip().splitlines()[0]
    assert "Ensure that" not in run.stderr
    assert any("serve-api" in command for command in shown)
    token = private["env"]["rollout_server_url"].split("@")[0].removeprefix("http://run:")
    for secret in (token, private["openai"][0]["api_key"]):
        assert len(secret) >= 32
        assert not [text for text in (*shown, run.stdout, run.stderr) if secret in text]
        files = [
            path for path in (tmp_path / "run").rglob("*") if path.is_file() and secret in path.read_text("latin-1")
        ]
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {"environment.yaml": "0o600"}
    assert "rollout_server_url='http://run:***" in run.log("environment"), "blotted out, not left unprinted"


def test_environments_elsewhere_are_diagnosed_too(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path) as api,
        TrainingRun([*ONE_STEP, f"atropos.api_url={api.url}"], run_dir=tmp_path / "run") as run,
    ):
        run.wait_for_output(" s: nobody asks the gateway for completions")
        assert "are the environments elsewhere running, and can they reach it?" in run.stdout
        assert "  environments: none is registered" in run.stdout
        stop(run)


def test_what_stood_in_the_way_does_not_any_more(tmp_path: Path) -> None:
    """A proxy in the shell, which their chat client would ask for this machine; a gateway that does not listen on
    127.0.0.1; paths that are relative to a directory of the environment's own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("x")
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    words = [*ONE_STEP, f"env.script={FAILING}", f"env.cwd={tmp_path}", "gateway.host=::1"]
    words.append("env.env={CHAT: 1, READS: data/words.txt}")
    with TrainingRun(words, run_dir=tmp_path / "run", env=proxy) as run:
        run.must_end(0)
