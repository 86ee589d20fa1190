"""Two unmodified agents, on the SDKs of OpenAI (with a tool) and of Anthropic, trained in one launch; runners die."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun

from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

EXAMPLES = REPOSITORY / "examples" / "agents"
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchRun]:
    directory = tmp_path_factory.mktemp("agents")
    words = [*SMALL, "batch_size=8", "group_size=2", f"steps={STEPS}", "data.max_prompt_length=900", "journal.keep=100"]
    words += ["max_response_length=120", "envs=[calculator,speller]"]
    for name in ("calculator", "speller"):
        tasks = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, check=True).stdout
        (directory / f"{name}.jsonl").write_bytes(tasks)
        words += [f"agents.{name}.agent={name}:solve", f"agents.{name}.tasks={name}.jsonl"]
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    with LaunchRun(
        words, run_dir=directory / "run", env={"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{path}"}
    ) as run:
        run.wait_for_trained(1)
        for name in ("calculator", "speller"):
            run.send(name, signal.SIGKILL)
        run.must_end(0)
        yield run


def notes(run: LaunchRun, name: str) -> list[dict[str, Any]]:
    assert run.run_dir is not None
    return [json.loads(line) for line in (run.run_dir / "agents" / f"{name}.jsonl").read_text().splitlines()]


def test_every_step_is_trained_on_tokens_of_the_policy(run: LaunchRun) -> None:
    lines = run.metrics()
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(line["data/unmatched_tokens"] == 0 for line in lines)
    assert {line["data/rollouts"] for line in lines} == {8}
    assert all(line["data/trained_tokens"] > 0 for line in lines)
    assert not list(run.run_dir.glob("quarantine/*"))  # type: ignore[union-attr]


def test_both_agents_take_part_and_are_started_again(run: LaunchRun) -> None:
    for name in ("calculator", "speller"):
        assert run.service(name)["restarts"] == 1
        assert any("over" in note for note in notes(run, name))
    env_ids = {key.split("/")[1] for line in run.metrics() for key in line if key.startswith("env/")}
    assert len(env_ids) >= 2


def test_each_group_is_posted_once(run: LaunchRun) -> None:
    assert run.run_dir is not None
    store = Store(ServerSettings(data_dir=run.run_dir / "api"))
    try:
        posted, groups = set(store.keys), store.totals["groups"]
    finally:
        store.close()
    assert groups == len(posted) >= STEPS * 8 // 2 - 1
    listed = [note for name in ("calculator", "speller") for note in notes(run, name)]
    over = Counter(note["group"] for note in listed if "over" in note)
    assert set(over) <= posted, "every group that is over was posted: none failed"
    assert set(over.values()) == {1}
    # The notes of a runner that is started again leave out what was over.
    begun = {note["group"] for note in listed if "task" in note}
    assert begun >= set(over)
