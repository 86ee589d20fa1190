"""One launch with everything that has a key or a score: a protected API, a gateway with a key, held-out evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import SMALL, LaunchRun, summary_of

from atropos_verl.http_thread import environment_token

TOKEN = "a-token-of-the-trajectory-api"


class Observed:
    """A launch, and the command line of every process that it had."""

    def __init__(self, run: LaunchRun, run_dir: Path) -> None:
        self.run, self.run_dir = run, run_dir
        self.commands: set[str] = set()

    def look(self) -> bool:
        self.commands.update(self.run.living())
        return self.run.popen.poll() is not None

    def settings(self, name: str) -> Any:
        return yaml.safe_load((self.run_dir / "launch" / name).read_text())


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    run_dir = tmp_path_factory.mktemp("launch") / "run"
    broken = run_dir.parent / "no_evaluation.py"
    broken.write_text("import sys, time\nif 'evaluate' in sys.argv:\n    sys.exit(7)\ntime.sleep(1000)\n")
    words = [*SMALL, "eval.before=true", "eval.after=true", "eval.every=2", "steps=3", "save_freq=3"]
    words += [f"environments.other={{script: {broken}, startup_timeout: 1000}}"]
    with LaunchRun(words, run_dir=run_dir, env={"ATROPOS_API_TOKEN": TOKEN}) as run:
        observed = Observed(run, run_dir)
        run.wait_until(observed.look, "the end of the run")
        run.must_end(0)
        yield observed


def test_an_unmodified_environment_works_with_a_protected_api(observed: Observed) -> None:
    assert [line["step"] for line in observed.run.metrics()] == [1, 2, 3]


def test_no_key_shows_in_the_process_list(observed: Observed) -> None:
    gateway_key = observed.settings("trainer.yaml")["gateway"]["api_key"]
    assert len(gateway_key) >= 24
    seen = "\n".join(observed.commands)
    for program in ("launch_atropos_verl.py", "serve-api", "spell_backward.py serve", "evaluate", " train "):
        assert program in seen
    assert "orphan_reaper" in seen
    assert gateway_key not in seen
    assert TOKEN not in seen and environment_token(TOKEN) not in seen
    for path in [*(observed.run_dir / "logs").iterdir(), *(observed.run_dir / "eval").rglob("*.*")]:
        assert gateway_key.encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path
        assert environment_token(TOKEN).encode() not in path.read_bytes(), path


def test_files_with_keys_are_private(observed: Observed) -> None:
    names = ("trainer.yaml", "demo.yaml", "evaluations.json", "evaluate_before.demo.yaml")
    files = [observed.run_dir / "launch" / name for name in names]
    files += [observed.run_dir / "plan.json", *(observed.run_dir / "logs").glob("*.1.log")]
    assert len(files) >= 9
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o600" for path in files}
    url = observed.settings("demo.yaml")["env"]["rollout_server_url"]
    assert url.startswith(f"http://run:{environment_token(TOKEN)}@127.0.0.1:")


def test_the_policy_is_evaluated_before_between_steps_and_after(observed: Observed) -> None:
    progress = json.loads((observed.run_dir / "eval" / "progress.json").read_text())
    assert progress["running"] is None
    summary = summary_of(observed.run_dir)
    for label in ("before", "after"):
        metrics = json.loads((observed.run_dir / "eval" / label / "demo" / "metrics.json").read_text())
        score = metrics["results"]["all"]["eval/mean_reward"]
        assert progress["scores"][label] == {"demo": pytest.approx(score), "other": None}
        assert summary[f"held_out_{label}"] == pytest.approx(score)
        assert f"held-out mean reward {label} training: demo {score:.3f}, other unknown" in observed.run.stdout
    metrics = json.loads((observed.run_dir / "eval" / "step_2" / "demo" / "metrics.json").read_text())
    score = metrics["results"]["all"]["eval/mean_reward"]
    assert summary["held_out_steps"] == {"2": pytest.approx(score)}
    assert f"held-out mean reward at step 2: demo {score:.3f}, other unknown" in observed.run.stdout
    lines = [line for line in observed.run.metrics() if "held_out/step" in line]
    assert [(line["step"], line["held_out/step"]) for line in lines] == [(1, 0), (3, 2)]
    assert lines[1]["held_out/demo/score"] == lines[1]["held_out/score"] == pytest.approx(score)
    before, after = summary["held_out_before"], summary["held_out_after"]
    assert f"held-out {before:.3f} → {after:.3f}" in observed.run.stdout
    assert 0.1 < before < 0.6, "the demo model before training, sampled: 0.29 is documented"
