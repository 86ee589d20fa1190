"""The package as ``pip install`` leaves it: no checkout, an empty working directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that sees the wheel's files before the checkout's."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # pip builds in place, and leaves a directory behind
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{REPOSITORY}", str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), str(source)], check=True)
    [wheel] = directory.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(directory / "site"), str(wheel)], check=True)
    return {**os.environ, "PYTHONPATH": str(directory / "site")}


def run(installed: dict[str, str], directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atropos_verl.cli", *words]
    return subprocess.run(command, cwd=directory, env=installed, capture_output=True, text=True, timeout=300)


def test_three_steps_of_the_demo_in_an_empty_directory(installed: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = run(installed, tmp_path, "train", "steps=3", f"run_dir={run_dir}", "eval.before=false", "eval.after=false")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
    assert list(tmp_path.iterdir()) == [run_dir]


@pytest.mark.parametrize("name", ["local_demo", "two_environments", "ray_one_gpu_lora", "smollm2"])
def test_the_shipped_configurations_are_found(installed: dict[str, str], tmp_path: Path, name: str) -> None:
    verb = "launch" if name in ("local_demo", "two_environments") else "train"
    words = ["backend=ray"] if name.startswith("ray") else []
    result = run(installed, tmp_path, verb, "--config-name", name, "--cfg", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "steps" in result.stdout or "total_training_steps" in result.stdout
    assert not list(tmp_path.iterdir())
