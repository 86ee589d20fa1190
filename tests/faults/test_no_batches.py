"""Environments from which no batch ever comes: the first line that the user is shown names the cause.

Real commands all the way; ``support.failing_env`` makes the faults.
"""

import contextlib
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from support.runs import REPOSITORY, SMALL, LaunchRun, TrainingRun
from support.trajectory_server import ServerProcess

pytestmark = pytest.mark.slow

FAILING = REPOSITORY / "tests" / "support" / "failing_env.py"
WORDS = (*SMALL, "steps=1", "save_freq=-1", "supervise.stall_after=8")
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
SAME = " s: the environment drops every group, since all scores of a group are equal ("


@pytest.mark.parametrize("fault", CAUSES)
def test_the_first_line_names_the_cause(fault: str, tmp_path: Path) -> None:
    """The last one is a launch's, whose environment has a name."""
    words = [*WORDS, f"env.script={FAILING}", f"env.env.FAULT={fault}"]
    made: TrainingRun = TrainingRun(words, run_dir=tmp_path / "run")
    if fault == "sends_wrongly":
        environment = f"environments={{failing: {{script: {FAILING}, env: {{FAULT: {fault}}}}}}}"
        made = LaunchRun([*WORDS, environment], run_dir=tmp_path / "run")
    cause, reason = CAUSES[fault]
    with made as run:
        run.wait_for_output(f" s: {cause}")
        first = run.stdout[run.stdout.index(f" s: {cause}") :].splitlines()[0]
        assert reason in first
        assert "Is an environment running" not in run.stdout
        run.popen.send_signal(signal.SIGTERM)
        run.must_end(130)


def test_the_final_error_begins_with_the_cause_and_no_secret_shows(tmp_path: Path) -> None:
    """Neither in the process list nor in a file that others could be shown."""
    words = [*WORDS, f"env.script={FAILING}", "env.env.FAULT=same", "env.startup_timeout=25"]
    commands: set[str] = set()
    with TrainingRun(words, run_dir=tmp_path / "run") as run:

        def look() -> bool:
            for process in psutil.Process(run.popen.pid).children(recursive=True):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    commands.update(Path(f"/proc/{process.pid}/cmdline").read_text().split("\0"))
            return SAME in run.stdout

        run.wait_until(look, "the diagnosis")
        private = yaml.safe_load((tmp_path / "run" / "launch" / "environment.yaml").read_text())
        run.must_end(1)
        assert SAME in run.stderr.strip().splitlines()[0]
        assert "Ensure that" not in run.stderr
        token = private["env"]["rollout_server_url"].split("@")[0].removeprefix("http://run:")
        assert "serve-api" in commands
        for secret in (token, private["openai"][0]["api_key"]):
            assert len(secret) >= 32
            assert not [word for word in commands if secret in word]
            assert secret not in run.stdout + run.stderr
            files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
            shown = [path for path in files if secret.encode() in path.read_bytes()]
            assert {path.name for path in shown} == {"environment.yaml"}
            assert {oct(path.stat().st_mode & 0o777) for path in shown} == {"0o600"}
        log = (tmp_path / "run" / "logs" / "environment.log").read_text()
        assert "rollout_server_url='http://run:***" in log, "blotted out, not left unprinted"


def test_a_run_whose_environments_are_elsewhere_is_diagnosed_too(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path) as api,
        TrainingRun([*WORDS, f"atropos.api_url={api.url}"], run_dir=tmp_path / "run") as run,
    ):
        run.wait_for_output(" s: nobody asks the gateway for completions")
        assert "are the environments elsewhere running, and can they reach it?" in run.stdout
        assert "  environments: none is registered" in run.stdout
        run.popen.send_signal(signal.SIGTERM)
        run.must_end(130)


def test_what_stood_in_the_way_of_environments_does_not_any_more(tmp_path: Path) -> None:
    """A proxy in the shell, which their chat client would ask for this machine; a gateway that does not listen on
    127.0.0.1; paths that are relative to a directory of the environment's own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("x")
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    words = [*WORDS, f"env.script={FAILING}", f"env.cwd={tmp_path}", "gateway.host=::1"]
    words.append("env.env={CHAT: 1, READS: data/words.txt}")
    with TrainingRun(words, run_dir=tmp_path / "run", env=proxy) as run:
        run.must_end(0)
