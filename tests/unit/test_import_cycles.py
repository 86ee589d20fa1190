"""The check of ``make check`` finds a cycle of every kind, and none where there is none."""

import itertools
from pathlib import Path

import import_cycles
import pytest

Capture = pytest.CaptureFixture[str]
NUMBERS = itertools.count()
B, A = "from {package}.b import thing\n", "from {package}.a import other\n"


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({"a.py": B, "b.py": f"def use():\n    {A}"}, 1, "line 2: from {package}.a import other"),
        ({"room/__init__.py": "import {package}.room.a", "room/a.py": ""}, 1, "a -> {package}.room  (lies in it)"),
        (
            {"a.py": B, "b.py": A, "c.py": "import {package}.d", "d.py": "import {package}.c"},
            1,
            "\n2 import cycles in ",
        ),
        (
            {
                "a.py": '"""Not this: {package}.room."""\nWORKER = "{package}.b.Worker"\n' + B,
                "b.py": "",
                "room/__init__.py": "",
                "room/c.py": "import {package}.a\n",
                "settings.yaml": "loss: {package}.room:loss  # {package}.b\n",
            },
            0,
            "named by a string: {package}.b in a.py\n"
            "named by a string: {package}.room in settings.yaml\n"
            "0 import cycles in {package}\n",
        ),
    ],
    ids=["modules", "package", "two", "strings close none"],
)
def test_a_planted_cycle_is_found(
    files: dict[str, str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    root = tmp_path / f"planted_{next(NUMBERS)}"  # a name that no other test has used
    for name, text in {"__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.format(package=root.name))
    monkeypatch.syspath_prepend(tmp_path)
    assert import_cycles.main([root.name]) == code
    output, said = capsys.readouterr().out, said.format(package=root.name)
    assert said in output if code else said == output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["--help"], 0, "Find import cycles of a package"), (["no_such"], 2, "error: no_such is not importable")],
)
def test_help_and_a_package_that_is_not_there_are_answered(
    words: list[str], code: int, said: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        import_cycles.main(words)
    assert said in "".join(capsys.readouterr())
