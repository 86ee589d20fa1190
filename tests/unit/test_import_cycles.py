"""The check of ``make check`` finds a cycle of every kind, and none where there is none."""

import itertools
from pathlib import Path

import import_cycles
import pytest

_NUMBERS = itertools.count()
_IMPORT_B = "from {package}.b import thing\n"
_IMPORT_A = "from {package}.a import other\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package that can be imported, under a name no other test has used."""
    root = tmp_path / f"planted_{next(_NUMBERS)}"
    root.mkdir()
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return root


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(package=root.name))


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
    package: Path, files: dict[str, str], on_the_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(package, files)
    assert import_cycles.main(package.name) == 1
    output = capsys.readouterr().out
    assert on_the_path.format(package=package.name) in output
    assert f"1 import cycles in {package.name}" in output


def test_two_cycles_are_both_told(package: Path) -> None:
    _write(package, {"a.py": _IMPORT_B, "b.py": _IMPORT_A})
    _write(package, {"c.py": "import {package}.d\n", "d.py": "import {package}.c\n"})
    assert len(import_cycles.find_cycles(package.name)) == 2


def test_packages_without_imports_of_their_own_close_no_cycle(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(package, {"a.py": _IMPORT_B, "b.py": "", "room/__init__.py": "", "room/c.py": "import {package}.a\n"})
    assert import_cycles.main(package.name) == 0
    assert capsys.readouterr().out == f"0 import cycles in {package.name}\n"


def test_modules_named_by_strings_are_listed_and_are_no_edges(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(
        package,
        {
            "a.py": '"""Not this: {package}.room."""\nWORKER = "{package}.b.Worker"\n' + _IMPORT_B,
            "b.py": "",
            "room/__init__.py": "",
            "settings.yaml": "loss: {package}.room:loss  # {package}.b\n",
        },
    )
    assert import_cycles.main(package.name) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f"named by a string: {package.name}.b in a.py",
        f"named by a string: {package.name}.room in settings.yaml",
    ]
