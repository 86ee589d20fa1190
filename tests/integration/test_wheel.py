"""The package as ``pip install`` leaves it: no checkout, an empty working directory."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support.runs import REPOSITORY

pytestmark = pytest.mark.slow


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("ATROPOS_", "PYTHONPATH"))}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that holds the wheel, and reads what it depends on from that of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    source, env = directory / "source", directory / "env"  # pip builds in place, and leaves a directory behind
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{REPOSITORY}", str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), str(source)], check=True)
    venv.create(env)
    [wheel], python = directory.glob("*.whl"), env / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, env=_variables())
    # A .pth of a directory that a .pth names is not read: the checkout, installed editable there, stays hidden.
    packages = {kind: sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    [site] = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(packages.values())))
    return env / "bin" / "atropos-verl"


def run(installed: Path, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(installed), *words]
    return subprocess.run(command, cwd=directory, env=_variables(), capture_output=True, text=True, timeout=300)


def test_three_steps_of_the_demo_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = run(installed, tmp_path, "train", "steps=3", f"run_dir={run_dir}", "eval.before=false", "eval.after=false")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
    assert list(tmp_path.iterdir()) == [run_dir]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train --config-name ray_one_gpu_lora --cfg", "lora_rank: 32"),
        ("launch --config-name two_environments --dry-run", "assets/environments/short_words.py"),
        ("doctor --config-name ray_one_gpu_lora --json", '"vllm"'),
    ],
)
def test_the_shipped_configurations_are_found(installed: Path, tmp_path: Path, words: str, shown: str) -> None:
    result = run(installed, tmp_path, *words.split())
    assert result.returncode == (1 if "doctor" in words else 0), result.stdout + result.stderr
    assert shown in result.stdout
    assert not list(tmp_path.iterdir())
