"""Environments of other ecosystems, in interpreters of their own: rewards are the native runner's, tokens the policy's.

Each needs the directory of a virtual environment that has its package: ``ATROPOS_VERL_TEST_VERIFIERS=DIRECTORY``, …
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun
from support.serving import eventually
from support.trajectory_server import free_port

SUPPORT = REPOSITORY / "tests" / "support" / "ecosystems"
HARBOR = (
    "agent.import_path=harbor_parts:AsksTwice",
    "environment.import_path=harbor_parts:Directory",
    "rewards.letters=2.0",
    "rewards.length=-0.25",
)


def interpreter(name: str) -> str:
    directory = os.environ.get(f"ATROPOS_VERL_TEST_{name.upper()}")
    if directory is None:
        pytest.skip(f"ATROPOS_VERL_TEST_{name.upper()} names no virtual environment")
    return directory


def launched(tmp_path: Path, prefix: str, target: str, python: str, *settings: str) -> LaunchRun:
    name = prefix.replace("-", "_")
    args = [word for setting in settings for word in ("--set", setting)]
    words = [
        *SMALL,
        "batch_size=8",
        "steps=3",
        "data.max_prompt_length=400",
        "max_response_length=40",
        f"envs=[{name}]",
    ]
    words += [f"environments.{name}.ecosystem='{prefix}:{target}'", f"environments.{name}.python={python}"]
    words += [f"environments.{name}.args={json.dumps(args)}"]
    path = f"{REPOSITORY / 'src'}{os.pathsep}{SUPPORT}"
    with LaunchRun(words, run_dir=tmp_path / "run", env={"PYTHONPATH": path}) as run:
        run.must_end(0)
    return run


def check_steps(run: LaunchRun) -> None:
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["data/unmatched_tokens"] == 0 for line in lines)
    assert all(line["data/trained_tokens"] > 0 for line in lines)


def test_verifiers(tmp_path: Path) -> None:
    python = interpreter("verifiers")
    settings = ("agent.runtime.type=subprocess", "taskset.turns=2")
    assert_equal_rewards("verifiers:offline_v1", python, *settings)
    check_steps(launched(tmp_path, "verifiers", "offline_v1", python, *settings))


def test_openenv(tmp_path: Path) -> None:
    python = interpreter("openenv")
    port = free_port()
    command = [f"{python}/bin/python", str(SUPPORT / "guess_env.py"), str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        try:
            eventually(lambda: answers(f"{url}/health"), "the server", timeout=90.0)
            assert_equal_rewards(f"openenv:{url}", python, "seeds=8")
            check_steps(launched(tmp_path, "openenv", url, python, "seeds=8", "max_turns=2"))
        finally:
            server.kill()


def test_nemo_gym(tmp_path: Path) -> None:
    python = interpreter("nemo_gym")
    shutil.copytree(SUPPORT / "words", tmp_path / "resources_servers" / "words")
    for server in ("resources_servers/words", "responses_api_agents/simple_agent", "responses_api_models/openai_model"):
        (tmp_path / server).mkdir(parents=True, exist_ok=True)
        (tmp_path / server / ".venv").symlink_to(python)  # as Gym's own, which would be installed by uv
    hint = {"type": "function", "name": "hint", "description": "", "strict": True}
    hint["parameters"] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    for file, tools in (("tools.jsonl", [hint]), ("plain.jsonl", [])):
        rows = []
        for number, word in enumerate(("sun", "moon", "star", "rain", "snow", "wind", "tree", "leaf")):
            params = {"input": [{"role": "user", "content": f"Spell this word backward (example: sun -> nus): {word}"}]}
            params |= {"tools": tools} if tools and number % 2 else {}
            rows.append(json.dumps({"responses_create_params": params, "word": word}))
        (tmp_path / file).write_text("\n".join(rows))
    config, start = "resources_servers/words/words.yaml", "skip_venv_if_present=true"
    assert_equal_rewards(f"nemo-gym:{config}", python, "tasks=tools.jsonl", start, cwd=tmp_path)
    check_steps(launched(tmp_path, "nemo-gym", config, python, "tasks=plain.jsonl", start))


def test_harbor(tmp_path: Path) -> None:
    python = interpreter("harbor")
    subprocess.run([f"{python}/bin/python", str(SUPPORT / "harbor_parts.py"), str(tmp_path / "tasks")], check=True)
    assert_equal_rewards(f"harbor:{tmp_path / 'tasks'}", python, *HARBOR)
    check_steps(launched(tmp_path, "harbor", str(tmp_path / "tasks"), python, *HARBOR))


def test_three_ecosystems_hold_their_shares_and_outlast_a_kill(tmp_path: Path) -> None:
    pythons = {name: interpreter(name) for name in ("verifiers", "openenv", "harbor")}
    port = free_port()
    write = [f"{pythons['harbor']}/bin/python", str(SUPPORT / "harbor_parts.py"), str(tmp_path / "tasks")]
    subprocess.run(write, check=True)
    targets = {"verifiers": "offline_v1", "openenv": f"http://127.0.0.1:{port}", "harbor": str(tmp_path / "tasks")}
    words = [*SMALL, "batch_size=16", "steps=10000", "save_freq=-1"]
    words += ["data.max_prompt_length=700", "max_response_length=40"]
    words += [f"envs=[{','.join(pythons)}]"]
    for name, (settings, weight) in {
        "verifiers": (["agent.runtime.type=subprocess"], 2),
        "openenv": (["seeds=8", "max_turns=2"], 1),
        "harbor": (HARBOR, 1),
    }.items():
        given = json.dumps([word for setting in settings for word in ("--set", setting)])
        words += [f"environments.{name}.ecosystem='{name}:{targets[name]}'", f"environments.{name}.args={given}"]
        words += [f"environments.{name}.python={pythons[name]}", f"environments.{name}.weight={weight}"]
    env = {"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{SUPPORT}"}
    command = [f"{pythons['openenv']}/bin/python", str(SUPPORT / "guess_env.py"), str(port)]
    with subprocess.Popen(command) as server, LaunchRun(words, run_dir=tmp_path / "run", env=env) as run:
        try:

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
        finally:
            server.kill()
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert all(line["data/unmatched_tokens"] == 0 for line in lines)
    trained = sum(steps[:20], Counter[str]())
    assert trained.total() == 20 * 16
    for name, share in (("verifiers", 160), ("openenv", 80), ("harbor", 80)):
        assert abs(trained[name] - share) <= 4, trained
    assert all(step["verifiers"] and step["harbor"] for step in steps), "the others go on"


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def assert_equal_rewards(named: str, python: str, *settings: str, cwd: Path = SUPPORT) -> None:
    command = [f"{python}/bin/python", str(SUPPORT / "compare.py"), named, *settings]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{SUPPORT}"}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = json.loads(done.stdout.splitlines()[-1])
    assert rewards["adapter"] == rewards["native"]
    assert len(rewards["adapter"]) == 8
    assert len(set(rewards["adapter"])) > 2
