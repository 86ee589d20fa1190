"""Two unmodified agents, on the SDKs of OpenAI (with a tool) and of Anthropic, trained in one launch; runners die."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from support.runs import REPOSITORY, SMALL, LaunchRun

from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

EXAMPLES = REPOSITORY / "examples" / "agents"
NAMES, STEPS = ("calculator", "speller"), 4


def test_every_step_is_trained_and_each_group_posted_once(tmp_path: Path) -> None:
    words = [*SMALL, "batch_size=8", "group_size=2", f"steps={STEPS}", "data.max_prompt_length=900", "journal.keep=100"]
    words += ["max_response_length=120", "envs=[calculator,speller]"]
    for name in NAMES:
        tasks = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, check=True).stdout
        (tmp_path / f"{name}.jsonl").write_bytes(tasks)
        words += [f"agents.{name}.agent={name}:solve", f"agents.{name}.tasks={name}.jsonl"]
    path = os.pathsep.join([str(REPOSITORY / "src"), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    with LaunchRun(words, run_dir=tmp_path / "run", env={"PYTHONPATH": path}) as run:
        run.wait_for_trained(1)
        for name in NAMES:
            run.send(name, signal.SIGKILL)
        run.must_end(0)

    lines = run.metrics()
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(line["data/unmatched_tokens"] == 0 < line["data/trained_tokens"] for line in lines)
    assert {line["data/rollouts"] for line in lines} == {8}
    assert not list((tmp_path / "run").glob("quarantine/*"))
    assert [run.service(name)["restarts"] for name in NAMES] == [1, 1]
    assert len({key.split("/")[1] for line in lines for key in line if key.startswith("env/")}) >= 2

    store = Store(ServerSettings(data_dir=tmp_path / "run" / "api"))
    store.close()
    assert store.totals["groups"] == len(set(store.keys)) >= STEPS * 8 // 2 - 1
    files = [(tmp_path / "run" / "agents" / f"{name}.jsonl").read_text() for name in NAMES]
    notes = [[json.loads(line) for line in file.splitlines()] for file in files]
    over = [Counter(note["group"] for note in own if "over" in note) for own in notes]
    assert all(set(own.values()) == {1} for own in over), "both take part"
    assert set(over[0] + over[1]) <= set(store.keys), "every group that is over was posted: none failed"
    # The notes of a runner that is started again leave out what was over.
    assert {note["group"] for own in notes for note in own if "task" in note} >= set(over[0] + over[1])
