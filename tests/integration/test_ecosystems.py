"""Environments of other ecosystems, in interpreters of their own: rewards are the native runner's, tokens the policy's.

Each needs the directory of a virtual environment that has its package: ``ATROPOS_VERL_TEST_VERIFIERS=DIRECTORY``, …
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun
from support.serving import eventually

from atropos_verl.launch.probes import free_port, request_json

SUPPORT = REPOSITORY / "tests" / "support" / "ecosystems"
PATH = {"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{SUPPORT}"}
SETTINGS = {
    "verifiers": ("agent.runtime.type=subprocess", "taskset.turns=2"),
    "openenv": ("seeds=8", "max_turns=2"),
    "nemo-gym": ("skip_venv_if_present=true", "tasks=tools.jsonl"),
    "harbor": (
        "agent.import_path=harbor_parts:AsksTwice",
        "environment.import_path=harbor_parts:Directory",
        "rewards.letters=2.0",
        "rewards.length=-0.25",
    ),
}


def interpreter(prefix: str) -> str:
    variable = f"ATROPOS_VERL_TEST_{prefix.replace('-', '_').upper()}"
    return os.environ.get(variable) or pytest.skip(f"{variable} names no virtual environment")


@contextlib.contextmanager
def served(prefix: str, tmp_path: Path) -> Iterator[str]:
    """Where the tasks of an ecosystem are found, which are there for the length of the block."""
    python = f"{interpreter(prefix)}/bin/python"
    if prefix == "harbor":
        subprocess.run([python, str(SUPPORT / "harbor_parts.py"), str(tmp_path / "tasks")], check=True)
        yield str(tmp_path / "tasks")
    elif prefix == "openenv":
        url = f"http://127.0.0.1:{(port := free_port())}"
        with subprocess.Popen([python, str(SUPPORT / "guess_env.py"), str(port)]) as server:
            try:
                eventually(lambda: request_json(f"{url}/health") is not None, "the server", timeout=90.0)
                yield url
            finally:
                server.kill()
    elif prefix == "nemo-gym":
        write_gym(tmp_path)
        yield "resources_servers/words/words.yaml"
    else:
        yield "offline_v1"


def write_gym(directory: Path) -> None:
    shutil.copytree(SUPPORT / "words", directory / "resources_servers" / "words")
    for server in ("resources_servers/words", "responses_api_agents/simple_agent", "responses_api_models/openai_model"):
        (directory / server).mkdir(parents=True, exist_ok=True)
        (directory / server / ".venv").symlink_to(interpreter("nemo-gym"))  # as Gym's own, installed by uv
    hint = {"type": "function", "name": "hint", "description": "", "strict": True}
    hint["parameters"] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    for file, tools in (("tools.jsonl", [hint]), ("plain.jsonl", [])):
        rows = []
        for number, word in enumerate(("sun", "moon", "star", "rain", "snow", "wind", "tree", "leaf")):
            params = {"input": [{"role": "user", "content": f"Spell this word backward (example: sun -> nus): {word}"}]}
            params |= {"tools": tools} if tools and number % 2 else {}
            rows.append(json.dumps({"responses_create_params": params, "word": word}))
        (directory / file).write_text("\n".join(rows))


def environment(prefix: str, target: str, settings: Sequence[str], weight: int = 1) -> list[str]:
    """The words of a launch for an environment of this ecosystem, which has its name."""
    name = prefix.replace("-", "_")
    args = json.dumps([word for setting in settings for word in ("--set", setting)])
    values = {"ecosystem": f"'{prefix}:{target}'", "python": interpreter(prefix), "args": args, "weight": weight}
    return [f"environments.{name}.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("prefix", SETTINGS)
def test_rewards_are_the_native_ones_and_tokens_are_trained(prefix: str, tmp_path: Path) -> None:
    with served(prefix, tmp_path) as target:
        python = f"{interpreter(prefix)}/bin/python"
        command = [python, str(SUPPORT / "compare.py"), f"{prefix}:{target}", *SETTINGS[prefix]]
        cwd, env = tmp_path if prefix == "nemo-gym" else SUPPORT, {**os.environ, **PATH}
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rewards = json.loads(done.stdout.splitlines()[-1])
        assert rewards["adapter"] == rewards["native"]
        assert len(rewards["adapter"]) == 8
        assert len(set(rewards["adapter"])) > 2
        settings = [setting.replace("tools.jsonl", "plain.jsonl") for setting in SETTINGS[prefix]]
        words = [*SMALL, "batch_size=8", "steps=3", "data.max_prompt_length=400", "max_response_length=40"]
        words += [f"envs=[{prefix.replace('-', '_')}]", *environment(prefix, target, settings)]
        with LaunchRun(words, run_dir=tmp_path / "run", env=PATH) as run:
            run.must_end(0)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["data/unmatched_tokens"] == 0 < line["data/trained_tokens"] for line in lines)


def test_three_ecosystems_hold_their_shares_and_outlast_a_kill(tmp_path: Path) -> None:
    weights = {"verifiers": 2, "openenv": 1, "harbor": 1}
    words = [*SMALL, "batch_size=16", "steps=10000", "save_freq=-1", "data.max_prompt_length=700"]
    words += ["max_response_length=40", f"envs=[{','.join(weights)}]"]
    with contextlib.ExitStack() as stack:
        for prefix, weight in weights.items():
            target = stack.enter_context(served(prefix, tmp_path))
            settings = SETTINGS[prefix][: 1 if prefix == "verifiers" else None]
            words += environment(prefix, target, settings, weight)
        run = stack.enter_context(LaunchRun(words, run_dir=tmp_path / "run", env=PATH))

        def sequences() -> list[Counter[str]]:
            """Trained ones of each step since all three take part. The one that is killed has two numbers."""
            entries = (run.state().get("api") or {}).get("environments", [])
            names = {f"env/{entry['env_id']}/sequences": entry["name"].removesuffix("_0") for entry in entries}
            steps = []
            for line in run.metrics():
                steps.append(Counter[str]())
                for key, name in names.items():
                    steps[-1][name] += int(line.get(key, 0))
            first = next((at for at, step in enumerate(steps) if len(+step) == 3), len(steps))
            return steps[first:]

        run.wait_until(lambda: len(sequences()) >= 20, "20 steps with all three")
        run.kill_and_wait_for_restart("openenv")
        killed = len(sequences())
        run.wait_until(lambda: sum(step["openenv"] for step in sequences()[killed:]) > 0, "openenv is back")
        steps, lines = sequences(), run.metrics()
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert all(line["data/unmatched_tokens"] == 0 for line in lines)
    trained = sum(steps[:20], Counter[str]())
    assert trained.total() == 20 * 16
    for name, weight in weights.items():
        assert abs(trained[name] - 80 * weight) <= 4, trained
    assert all(step["verifiers"] and step["harbor"] for step in steps), "the others go on"
