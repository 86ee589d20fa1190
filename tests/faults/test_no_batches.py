"""Environments from which no batch ever comes: the first line that the user is shown names the cause.

Real commands all the way; ``support.failing_env`` makes the faults.
"""

import signal
from pathlib import Path

import psutil
import pytest
import yaml
from support.runs import REPOSITORY, SMALL, LaunchRun, TrainingRun

pytestmark = pytest.mark.slow

FAILING = REPOSITORY / "tests" / "support" / "failing_env.py"
WORDS = (*SMALL, "steps=1", "save_freq=-1", "supervise.stall_after=8")
CAUSES = {
    "raises": "the environment fails in its own code: Error in collect_trajectories: 'answer_key' (",
    "asks_wrongly": "the gateway refuses every request of the environment: ",
    "long": "the prompts of the environment are too long: the gateway refuses every request: ",
    "sends_wrongly": "the trajectory API refuses every group of the environment: ",
    "same": "the environment drops every group, since all scores of a group are equal (",
    "wrong_key": "the gateway refuses every request of the environment: ",
    "wrong_address": "the environment does not reach the gateway: its arguments send it to http://127.0.0.1:9/v1",
    "proxy": "the environment does not reach the gateway: the proxy http_proxy=http://127.0.0.1:9 stands between",
}
REASONS = {
    "asks_wrongly": "best_of: not supported (7)",
    "long": "maximum context length is 64 tokens",
    "sends_wrongly": "masks[0]: ",
    "wrong_key": "leave --openai.api_key out of the environment's arguments",
}
EXTRA = {
    "wrong_key": ["env.args=[--openai.api_key,not-the-key]"],
    "wrong_address": ["env.args=[--openai.base_url,'http://127.0.0.1:9/v1']"],
    "proxy": ["env.env={FAULT: proxy, http_proxy: 'http://127.0.0.1:9', no_proxy: x, NO_PROXY: x}"],
}


@pytest.mark.parametrize("fault", CAUSES)
def test_the_first_line_names_the_cause(fault: str, tmp_path: Path) -> None:
    words = [*WORDS, f"env.script={FAILING}", *EXTRA.get(fault, [f"env.env.FAULT={fault}"])]
    with TrainingRun(words, run_dir=tmp_path / "run") as run:
        run.wait_for_output(f" s: {CAUSES[fault]}")
        said = run.stdout[run.stdout.index(f" s: {CAUSES[fault]}") :]
        assert REASONS.get(fault, "what to change: ") in said
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
                commands.update(Path(f"/proc/{process.pid}/cmdline").read_text().split("\0"))
            return f" s: {CAUSES['same']}" in run.stdout

        run.wait_until(look, "the diagnosis")
        private = yaml.safe_load((tmp_path / "run" / "launch" / "environment.yaml").read_text())
        run.must_end(1)
        assert f" s: {CAUSES['same']}" in run.stderr.strip().splitlines()[0]
        assert "Ensure that" not in run.stderr
        token = private["env"]["rollout_server_url"].split("@")[0].removeprefix("http://run:")
        assert "serve-api" in commands
        for secret in (token, private["openai"][0]["api_key"]):
            assert len(secret) == 48
            assert not [word for word in commands if secret in word]
            assert secret not in run.stdout + run.stderr
            shown = [
                path
                for path in (tmp_path / "run").rglob("*")
                if path.is_file() and secret.encode() in path.read_bytes()
            ]
            assert {path.name for path in shown} == {"environment.yaml"}
            assert {oct(path.stat().st_mode & 0o777) for path in shown} == {"0o600"}
        log = (tmp_path / "run" / "logs" / "environment.log").read_text()
        assert "rollout_server_url='http://run:***" in log, "blotted out, not left unprinted"


def test_a_launch_names_the_cause_too(tmp_path: Path) -> None:
    words = [*WORDS, f"environments={{failing: {{script: {FAILING}, env: {{FAULT: sends_wrongly}}}}}}"]
    with LaunchRun(words, run_dir=tmp_path / "run") as run:
        run.wait_for_output(" s: the trajectory API refuses every group of environment failing: ")
        run.popen.send_signal(signal.SIGTERM)
        run.must_end(130)


def test_a_proxy_of_the_shell_is_kept_from_the_parts_of_a_run(tmp_path: Path) -> None:
    """By their chat client, which would ask it for 127.0.0.1."""
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    words = [*WORDS, f"env.script={FAILING}", "env.env.FAULT=", "env.env.CHAT=1"]
    with TrainingRun(words, run_dir=tmp_path / "run", env=proxy) as run:
        run.must_end(0)


@pytest.mark.parametrize("host", ["::1", "0.0.0.0"])
def test_the_environment_is_sent_where_the_gateway_listens(host: str, tmp_path: Path) -> None:
    with TrainingRun([*WORDS, f"gateway.host={host}"], run_dir=tmp_path / "run") as run:
        run.must_end(0)


def test_a_relative_path_is_meant_from_the_environments_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("x")
    words = [*WORDS, f"env.script={FAILING}", f"env.cwd={tmp_path}", "env.env={READS: data/words.txt}"]
    with TrainingRun(words, run_dir=tmp_path / "run") as run:
        run.must_end(0)
    assert (tmp_path / "run" / "summary.json").exists()
