"""The check of ``make check`` finds a cycle of every kind, and none where there is none."""

import itertools
from collections.abc import Callable
from pathlib import Path

import import_cycles
import pytest

_NUMBERS = itertools.count()
_IMPORT_B = "from {package}.b import thing\n"
_IMPORT_A = "from {package}.a import other\n"
Plant = Callable[[dict[str, str]], str]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes a package of these files, under a name no other test has used, and returns that."""
    root = tmp_path / f"planted_{next(_NUMBERS)}"
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> str:
        for name, text in {"__init__.py": "", **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text.format(package=root.name))
        return root.name

    return write


@pytest.mark.parametrize(
    ("files", "on_the_path"),
    [
        ({"a.py": _IMPORT_B, "b.py": _IMPORT_A}, "line 1: from {package}.b import thing"),
        ({"a.py": _IMPORT_B, "b.py": "def use():\n    " + _IMPORT_A}, "line 2: from {package}.a import other"),
        (
            {"a.py": _IMPORT_B, "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    " + _IMPORT_A},
            "line 3: from {package}.a import other",
        ),
        (
            {"room/__init__.py": "from {package}.room.a import thing\n", "room/a.py": ""},
            "{package}.room.a -> {package}.room  (lies in it)",
        ),
        ({"__init__.py": "from {package}.a import thing\n", "a.py": ""}, "{package}.a -> {package}  (lies in it)"),
    ],
    ids=["module level", "in a function", "TYPE_CHECKING", "package", "root"],
)
def test_a_planted_cycle_is_found(
    plant: Plant, files: dict[str, str], on_the_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    package = plant(files)
    assert import_cycles.main(package) == 1
    output = capsys.readouterr().out
    assert on_the_path.format(package=package) in output
    assert f"1 import cycles in {package}" in output


def test_two_cycles_are_both_told(plant: Plant) -> None:
    cycles = {"a.py": _IMPORT_B, "b.py": _IMPORT_A, "c.py": "import {package}.d\n", "d.py": "import {package}.c\n"}
    assert len(import_cycles.find_cycles(plant(cycles))) == 2


def test_packages_and_modules_named_by_strings_close_no_cycle(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    package = plant(
        {
            "a.py": '"""Not this: {package}.room."""\nWORKER = "{package}.b.Worker"\n' + _IMPORT_B,
            "b.py": "",
            "room/__init__.py": "",
            "room/c.py": "import {package}.a\n",
            "settings.yaml": "loss: {package}.room:loss  # {package}.b\n",
        }
    )
    assert import_cycles.main(package) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"named by a string: {package}.b in a.py",
        f"named by a string: {package}.room in settings.yaml",
        f"0 import cycles in {package}",
    ]
