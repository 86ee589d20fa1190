"""The command line: what it prints, its exit codes, and what it does not import."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import LAUNCH, LIMIT, MAIN

from atropos_verl import __version__, cli
from atropos_verl.cli import main

Capture = pytest.CaptureFixture[str]
WORDS = ["--help", "--version", "inspect --help", "train --help", "doctor --json", "launch --dry-run"]
SAMPLES = "import atropos_verl.training.batch_source as _, atropos_verl as it; it.decode_batch; it.build_samples([])"
SERVER = "import uvicorn, atropos_verl.server.app as server; uvicorn.Config(server.TrajectoryApi()).load()"


@pytest.mark.parametrize("words", [*WORDS, "launch backend=ray --dry-run", SAMPLES, SERVER])
def test_nothing_heavy_is_imported(words: str) -> None:
    call = words if words.startswith("import") else f"from atropos_verl.cli import main; main({words.split()})"
    code = (
        f"import sys\ntry:\n    {call}\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'verl', 'ray', 'transformers', 'atroposlib', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_the_program_that_was_called(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            raise SystemExit(main(words))
        return capsys.readouterr().out

    assert shown("--version") == f"atropos-verl {__version__}\n"
    text = shown("--help")
    assert text.startswith("usage: atropos-verl [-h] [--version] COMMAND ...\n")
    assert re.search(r"^    train +train a policy", text, re.MULTILINE)
    assert re.search(r"^    inspect +show what the trainer", text, re.MULTILINE)
    text = shown("launch", "--help")
    assert text.startswith("usage: atropos-verl launch [") and "\n  --dry-run  " in text
    monkeypatch.setattr("sys.argv", ["recipe/atropos/main_atropos.py"])
    text = shown("train", "--help")
    assert text.startswith("usage: python recipe/atropos/main_atropos.py [") and "--dry-run" not in text
    assert main([]) == 2


@pytest.mark.parametrize("verb", cli._COMMANDS)
def test_no_option_is_guessed_from_its_beginning(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main([verb, "--hel"]))
    assert capsys.readouterr().out == ""


INTERRUPTED = """
import os, runpy, signal, sys

module, *sys.argv = sys.argv[1:]

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pydantic", [MAIN]),
        ("hydra", [MAIN, "steps=3"]),
        ("hydra", [LAUNCH, "--dry-run"]),
        ("verl", [MAIN, "eval.before=false"]),  # API and environment run by then
        ("httpx", [cli.__file__, "agents", "run", "x:y"]),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str, words: list[Any], tmp_path: Path) -> None:
    place = [f"run_dir={tmp_path / 'run'}"] if words[0] == MAIN else []
    command = [sys.executable, "-c", INTERRUPTED, module, *map(str, words), *place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
    assert not (tmp_path / "run" / "launch" / "tmp").exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text(3000 * '{"tokens": [[64, 65]], "masks": [[-100, 65]], "scores": [0.5]}\n')
    command = f"{sys.executable} -m atropos_verl.cli inspect {path} --limit 0 | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("line 1: id ")
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["serve-api", "view ."])
def test_a_port_that_is_none_is_refused(verb: str, capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    """Symptom: 99999 was 34463."""
    assert main([*verb.split(), "--port", "99999"]) == 2
    assert "--port: 99999 is no port: give one from 1 to 65535" in capsys.readouterr().err + caplog.text


def test_an_empty_data_directory_is_not_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["serve-api", "--data-dir", ""])
    assert "--data-dir: it is empty; name a directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_simulate_is_part_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
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
