"""Environments of other ecosystems, in interpreters of their own: rewards are the native runner's, tokens the policy's.

Each needs the directory of a virtual environment that has its package: ``ATROPOS_VERL_TEST_VERIFIERS=DIRECTORY``, …
"""

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun
from support.serving import eventually
from support.trajectory_server import free_port

SUPPORT = REPOSITORY / "tests" / "support" / "ecosystems"


def interpreter(name: str) -> str:
    directory = os.environ.get(f"ATROPOS_VERL_TEST_{name.upper()}")
    if directory is None:
        pytest.skip(f"ATROPOS_VERL_TEST_{name.upper()} names no virtual environment")
    return directory


def launched(tmp_path: Path, name: str, target: str, python: str, *settings: str) -> LaunchRun:
    args = [word for setting in settings for word in ("--set", setting)]
    words = [
        *SMALL,
        "batch_size=8",
        "steps=3",
        "data.max_prompt_length=400",
        "max_response_length=40",
        f"envs=[{name}]",
    ]
    words += [f"environments.{name}.ecosystem='{name}:{target}'", f"environments.{name}.python={python}"]
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


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def assert_equal_rewards(named: str, python: str, *settings: str) -> None:
    command = [f"{python}/bin/python", str(SUPPORT / "compare.py"), named, *settings]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{SUPPORT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = json.loads(done.stdout.splitlines()[-1])
    assert rewards["adapter"] == rewards["native"]
    assert len(rewards["adapter"]) == 8
    assert len(set(rewards["adapter"])) > 2
