"""Messages for an ``atropos.api_url`` that is not a working trajectory API, and for wrong settings. Nothing may start.

torch takes seconds to import, so in these runs it cannot be imported at all: who tries gets another message.
"""

import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from support import http_faults
from support.http_faults import FaultServer, refused_url
from support.runs import REPOSITORY, TrainingRun

_HINTS = """

Ensure that:
1. Atropos server is running on {url}
2. The API endpoints are accessible
3. Network connectivity is available
"""

# One of each kind of failure; tests/unit/protocol/test_client.py has the reason of every one.
REASONS = {
    "refused": "Cannot connect to Atropos API at {url} - ensure server is running",
    "silent": "Atropos API at {url} - no answer to GET /status within 1 s",
    "web page": "The server at {url} answers, but is not an Atropos trajectory API: GET /status gave "
    "b'<!doctype html><html><body>Welcome</body></html>', which is not JSON",
}


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which ``import torch`` fails."""
    trap = tmp_path / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('torch was imported before it was needed')\n")
    return {"PYTHONPATH": f"{trap.parent}:{REPOSITORY / 'src'}"}


@pytest.mark.parametrize("fault", REASONS)
def test_a_broken_api_is_one_message_and_exit_code_1(
    fault: str, tmp_path: Path, without_torch: dict[str, str], fault_server: FaultServer
) -> None:
    fault_server.script("/status", http_faults.silent() if fault == "silent" else http_faults.html_page())
    api: AbstractContextManager[str] = refused_url() if fault == "refused" else nullcontext(fault_server.url)
    with api as url:
        words = [f"atropos.api_url={url}", "atropos.timeout=1"]
        with TrainingRun(words, run_dir=tmp_path / "run", env=without_torch) as run:
            run.must_end(1)
            assert run.stderr == f"\nATROPOS API ERROR: {REASONS[fault]}{_HINTS}".replace("{url}", url)
            assert run.stdout == f"contacting the trajectory API at {url} ...\n"
    assert not (tmp_path / "run").exists()


# What tests/unit/config/test_config.py cannot see: the whole line, and what is checked after the settings are read.
CONFIGURATION_ERRORS = {
    "unknown key": (["optim.lrr=3"], "optim.lrr: unknown key; did you mean optim.lr? (--help lists all keys)"),
    "no model there": (["model.path=/nowhere"], "model.path: /nowhere is not a Hugging Face model directory"),
    "no environment there": (["env.script=/nowhere.py"], "env.script: there is no /nowhere.py"),
    "no such checkpoint": (["resume=/nowhere"], "resume: /nowhere is not a checkpoint of this project"),
    "no such module": (["data.filter_path=nowhere:keep"], "data.filter_path: cannot import nowhere"),
    "no GPU": (["trainer.device=cuda"], "trainer.device: there is no GPU here (CUDA_VISIBLE_DEVICES='' leaves none)"),
    "a file": (["run_dir=a-file"], "run_dir: {cwd}/a-file is a file"),
    "no directory": (["run_dir=/dev/null/run"], "run_dir: cannot write to /dev/null/run: Not a directory"),
}


@pytest.mark.parametrize("case", CONFIGURATION_ERRORS)
def test_a_wrong_setting_is_named_before_anything_starts(
    case: str, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    words, message = CONFIGURATION_ERRORS[case]
    without_torch["CUDA_VISIBLE_DEVICES"] = ""
    (tmp_path / "a-file").touch()
    message = message.format(cwd=tmp_path)
    with TrainingRun([f"run_dir={tmp_path}/run", *words], cwd=tmp_path, env=without_torch) as run:
        run.must_end(2)
        assert run.stderr.startswith(f"CONFIGURATION ERROR: {message}"), run.stderr
        assert "Traceback" not in run.stderr
        assert run.stdout == ""
        # Itself, and a look at what the environment's Python has.
        assert run.processes_seen <= 2, "something was started"
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_already_there_is_not_overwritten(tmp_path: Path, without_torch: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    with TrainingRun(["resume=disable"], run_dir=run_dir, env=without_torch) as run:
        run.must_end(2)
        assert f"run_dir: {run_dir} already holds a run; choose another, or resume=auto" in run.stderr
    assert {path.name: path.read_text() for path in run_dir.iterdir()} == {"metrics.jsonl": '{"step": 1}\n'}


def test_a_gateway_port_that_is_taken(tmp_path: Path, without_torch: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with TrainingRun([f"gateway.port={port}"], run_dir=tmp_path / "run", env=without_torch) as run:
            run.must_end(2)
            assert "CONFIGURATION ERROR: gateway.port: inference gateway: cannot listen" in run.stderr
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in run.stderr
            assert "Set gateway.port to a free port" in run.stderr
            assert "Traceback" not in run.stderr
