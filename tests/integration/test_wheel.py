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
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith(("ATROPOS_", "PYTHONPATH"))}


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
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, env=VARIABLES)
    # A .pth of a directory that a .pth names is not read: the checkout, installed editable there, stays hidden.
    packages = {kind: sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    [site] = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(packages.values())))
    return env / "bin" / "atropos-verl"


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ("train steps=3 run_dir=run eval.before=false eval.after=false", 0, "training finished"),
        ("train --config-name ray_one_gpu_lora --cfg", 0, "lora_rank: 32"),
        ("launch --config-name two_environments --dry-run", 0, "assets/environments/short_words.py"),
        ("doctor --config-name ray_one_gpu_lora --json", 1, '"vllm"'),
    ],
)
def test_it_works_in_an_empty_directory(installed: Path, tmp_path: Path, words: str, code: int, shown: str) -> None:
    command, where = [str(installed), *words.split()], {"cwd": tmp_path, "env": VARIABLES}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **where)
    assert done.returncode == code, done.stdout + done.stderr
    assert shown in done.stdout
    made = [path.name for path in tmp_path.iterdir()]
    if "run_dir=run" in words:
        assert made == ["run"] and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    else:
        assert made == []
