"""One launch with everything that has a key or a score: a protected API, a gateway with a key, held-out evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.launches import SMALL_LAUNCH, LaunchRun

TOKEN = "a-token-of-the-trajectory-api"


class Observed:
    """Observations of the processes while the run went on."""

    def __init__(self, run: LaunchRun) -> None:
        self.run = run
        self.commands: dict[int, str] = {}
        assert run.run_dir is not None
        self.run_dir = run.run_dir

    def look(self) -> bool:
        for process in self._processes():
            try:
                raw = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:  # gone meanwhile
                continue
            if raw:
                self.commands[process.pid] = raw.replace(b"\0", b" ").decode()
        return self.run.popen.poll() is not None

    def _processes(self) -> list[psutil.Process]:
        try:
            launcher = psutil.Process(self.run.popen.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:  # it has ended and was waited for
            return []

    def settings(self, name: str) -> Any:
        return yaml.safe_load((self.run_dir / "launch" / name).read_text())


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    run_dir = tmp_path_factory.mktemp("launch") / "run"
    broken = run_dir.parent / "no_evaluation.py"
    broken.write_text("import sys, time\nif 'evaluate' in sys.argv:\n    sys.exit(7)\ntime.sleep(1000)\n")
    words = [*SMALL_LAUNCH, "eval.before=true", "eval.after=true", "steps=3", "save_freq=2"]
    words += [f"environments.other={{script: {broken}, startup_timeout: 1000}}"]
    with LaunchRun(words, run_dir=run_dir, env={"ATROPOS_API_TOKEN": TOKEN}) as run:
        observed = Observed(run)
        run.wait_until(observed.look, "the end of the run", 150.0)
        run.assert_nothing_left()
        yield observed


def test_an_unmodified_environment_works_with_a_protected_api(observed: Observed) -> None:
    assert observed.run.popen.returncode == 0, observed.run.stdout + observed.run.stderr
    assert [line["step"] for line in observed.run.metrics()] == [1, 2, 3]


def test_no_key_shows_in_the_process_list(observed: Observed) -> None:
    gateway_key = observed.settings("trainer.yaml")["gateway"]["api_key"]
    assert len(gateway_key) >= 24
    seen = "\n".join(observed.commands.values())
    for program in (
        "launch_atropos_verl.py",
        "serve-api",
        "spell_backward.py serve",
        "evaluate",
        " train ",
        "orphan_reaper",
    ):
        assert program in seen
    assert gateway_key not in seen
    assert TOKEN not in seen


def test_files_with_keys_are_private(observed: Observed) -> None:
    names = ("trainer.yaml", "demo.yaml", "evaluations.json", "evaluate_before.demo.yaml")
    files = [observed.run_dir / "launch" / name for name in names]
    files += [observed.run_dir / "plan.json", *(observed.run_dir / "logs").glob("*.1.log")]
    assert len(files) >= 9
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o600" for path in files}
    assert observed.settings("demo.yaml")["env"]["rollout_server_url"].startswith(f"http://atropos:{TOKEN}@127.0.0.1:")


def test_the_policy_is_evaluated_before_and_after(observed: Observed) -> None:
    progress = json.loads((observed.run_dir / "eval" / "progress.json").read_text())
    assert progress["running"] is None
    summary = json.loads((observed.run_dir / "summary.json").read_text())
    for label in ("before", "after"):
        metrics = json.loads((observed.run_dir / "eval" / label / "demo" / "metrics.json").read_text())
        score = metrics["results"]["all"]["eval/mean_reward"]
        assert progress["scores"][label] == {"demo": pytest.approx(score), "other": None}
        assert summary[f"held_out_{label}"] == pytest.approx(score)
        assert f"held-out mean reward {label} training: demo {score:.3f}, other unknown" in observed.run.stdout
    before, after = summary["held_out_before"], summary["held_out_after"]
    assert f"held-out {before:.3f} → {after:.3f}" in observed.run.stdout
    assert 0.1 < before < 0.6, "the demo model before training, sampled: 0.29 is documented"
