"""The command line as a process: what it prints, its exit codes, and what it does not import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_verl import __version__
from atropos_verl.cli import main


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atropos_verl.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_version_and_help() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"atropos-verl {__version__}\n", "")
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: atropos-verl [-h] [--version] COMMAND ...\n")
    assert re.search(r"^    train +train a policy", done.stdout, re.MULTILINE)
    assert re.search(r"^    inspect +show what the trainer", done.stdout, re.MULTILINE)
    assert main([]) == 2


def test_help_of_a_run_says_the_program_that_was_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: atropos-verl launch [") and "\n  --dry-run  " in shown
    monkeypatch.setattr("sys.argv", ["recipe/atropos/main_atropos.py"])
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python recipe/atropos/main_atropos.py [") and "--dry-run" not in shown


@pytest.mark.parametrize("words", ["--help", "--version", "inspect --help", "train --help", "doctor --json"])
def test_nothing_heavy_is_imported_to_help_or_to_check(words: str) -> None:
    code = (
        "import sys\nfrom atropos_verl.cli import main\n"
        f"try:\n    main({words.split()!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'verl', 'ray', 'transformers', 'atroposlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    group = '{"tokens": [[64, 65]], "masks": [[-100, 65]], "scores": [0.5]}\n'
    path.write_text(group * 3000)
    command = f"{sys.executable} -m atropos_verl.cli inspect {path} --limit 0 | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("line 1: id ")
    assert done.stderr == ""


def test_simulate_is_found_in_a_checkout_and_missed_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["simulate", "--help"])
    assert "--environments" in capsys.readouterr().out
    monkeypatch.setattr("sys.path", [path for path in sys.path if not path.endswith("tools")])
    for name in [name for name in sys.modules if name.split(".")[0] == "simulate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("atropos_verl.cli.__file__", str(tmp_path / "site-packages" / "atropos_verl" / "cli.py"))
    with pytest.raises(SystemExit, match="2"):
        main(["simulate"])
    assert "it is part of a checkout (tools/simulate/)" in capsys.readouterr().err
