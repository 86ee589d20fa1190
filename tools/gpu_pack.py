"""Lays the wheels that tests/gpu/drill.py needs into folders of 40 MB, for a GPU machine that downloads nothing.

python tools/gpu_pack.py build/gpu-pack                       # for Python 3.12 beside torch 2.11: all else is packed
python tools/gpu_pack.py build/gpu-pack --have FREEZE         # without what `pip list --format=freeze` there shows
sh build/gpu-pack/install.sh DIR                              # there, once all folders have arrived; then
PYTHONPATH=DIR python tests/gpu/drill.py

Versions are those of requirements/gpu-vllm.txt. torch and what it brings is never packed. A wheel that is larger (verl
imports ray) is cut into parts, which install.sh joins.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 40_000_000
"""Bytes of a folder."""
_WITH_TORCH = ("torch", "triton", "cuda-bindings", "cuda-toolkit", "numpy", "sympy", "networkx", "fsspec", "filelock")
_NOT_IMPORTED = ("wandb", "tensorboard", "pylatexenc", "pybind11")
"""verl demands them, and nothing of the local backend imports them."""
_FOR_TESTS = ("pytest", "pytest-asyncio", "pytest-timeout")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux1")
_INSTALL = """#!/bin/sh
# sh install.sh DIR: installs every wheel of the folders beside this file into DIR (for PYTHONPATH).
set -eu
cd "$(dirname "$0")"
for first in */*.whl.part00; do
    [ -e "$first" ] || continue
    name=$(basename "$first" .part00)
    cat */"$name".part* > "$name"
done
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$1" $(ls */*.whl *.whl 2>/dev/null)
"""


def pip(*words: str) -> bool:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    return subprocess.run(command, stderr=subprocess.PIPE).returncode == 0


def fetch(name: str, version: str, python: str, directory: Path) -> Path | None:
    """The wheel for CPython ``python`` on Linux x86_64; made here where there is only a source distribution. None: that
    would be one for the Python that runs this."""
    tags = [word for platform in _PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *tags]
    package, here = f"{name}=={version}", directory / name
    if not pip("download", "--no-deps", *target, "-d", str(here), package) and not pip(
        "wheel", "--no-deps", "-w", str(here), package
    ):
        raise SystemExit(f"{package}: neither a wheel for Python {python} nor one that can be made here")
    [wheel] = here.glob("*.whl")
    if (
        not wheel.stem.endswith("-any")
        and f"cp{python.replace('.', '')}" not in wheel.name
        and "abi3" not in wheel.name
    ):
        return None
    return wheel


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        own = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
        texts = HeaderParser().parsestr(archive.read(next(own)).decode()).get_all("Requires-Dist") or []
    return [Requirement(text) for text in texts]


def gather(python: str, have: dict[str, str], directory: Path) -> list[Path]:
    """The wheels of this package and of everything that it needs at run time, each once."""
    pins = read_pins(ROOT / "requirements/gpu-vllm.txt")
    if not pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), str(ROOT)):
        raise SystemExit("the wheel of this package cannot be built")
    wheels = list(directory.glob("*.whl"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *_FOR_TESTS)]
    seen = {*_WITH_TORCH, *_NOT_IMPORTED}
    target = {"extra": "", "python_version": python, "python_full_version": f"{python}.0"}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or not (requirement.marker is None or requirement.marker.evaluate(target)):
            continue
        if name in have and requirement.specifier.contains(have[name], prereleases=True):
            continue
        seen.add(name)
        if name not in pins:
            raise SystemExit(f"requirements/gpu-vllm.txt has no {name}")
        if (wheel := fetch(name, pins[name], python, directory)) is None:
            sys.stdout.write(f"left out: {name} {pins[name]} has no wheel for Python {python}\n")
            continue
        wheels.append(wheel)
        wanted += requirements_of(wheel)
    return wheels


def read_pins(file: Path) -> dict[str, str]:
    lines = [line.partition("==") for line in file.read_text().splitlines() if "==" in line and line[0] != "#"]
    return {canonicalize_name(name): version.strip() for name, _, version in lines}


def lay(wheels: list[Path], target: Path) -> list[int]:
    """Copies the wheels into ``target/1``, ``target/2``, …, the largest first; returns the bytes of each folder."""
    pieces: list[tuple[str, bytes]] = []
    for wheel in wheels:
        content = wheel.read_bytes()
        if len(content) <= LIMIT:
            pieces.append((wheel.name, content))
            continue
        for number, start in enumerate(range(0, len(content), LIMIT // 2)):
            pieces.append((f"{wheel.name}.part{number:02}", content[start : start + LIMIT // 2]))
    sizes: list[int] = []
    for name, content in sorted(pieces, key=lambda piece: -len(piece[1])):
        number = next((n for n, size in enumerate(sizes) if size + len(content) <= LIMIT), len(sizes))
        if number == len(sizes):
            sizes.append(0)
        sizes[number] += len(content)
        folder = target / str(number + 1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (target / "install.sh").write_text(_INSTALL)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="a new one")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's (default: 3.12)")
    parser.add_argument("--have", type=Path, help="its `pip list --format=freeze`")
    options = parser.parse_args()
    if options.directory.exists() and any(options.directory.iterdir()):
        raise SystemExit(f"{options.directory} is not empty")
    have = read_pins(options.have) if options.have else {}
    with tempfile.TemporaryDirectory() as scratch:
        wheels = gather(options.python, have, Path(scratch))
        sizes = lay(wheels, options.directory)
    for number, size in enumerate(sizes, 1):
        sys.stdout.write(f"{options.directory / str(number)}  {size / 1e6:.1f} MB\n")
    sys.stdout.write(f"{len(wheels)} wheels, {sum(sizes) / 1e6:.0f} MB in {len(sizes)} folders\n")


if __name__ == "__main__":
    main()
