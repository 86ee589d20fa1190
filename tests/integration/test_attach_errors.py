"""Messages for an ``atropos.api_url`` that is not a working trajectory API, and for wrong settings. Nothing may start.

torch takes seconds to import, so in these runs it cannot be imported at all: who tries gets another message.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import http_faults
from support.http_faults import FaultServer, make_certificate, refused_url
from support.runs import REPOSITORY, TrainingRun

TIMEOUT = 1
"""``atropos.timeout`` of these runs, seconds."""

_HINTS = """

Ensure that:
1. Atropos server is running on {url}
2. The API endpoints are accessible
3. Network connectivity is available
"""

_NOT_ATROPOS = "The server at {url} answers, but is not an Atropos trajectory API: GET /status gave "
REASONS = {
    "refused": "Cannot connect to Atropos API at {url} - ensure server is running",
    "dns": "Cannot connect to Atropos API at {url} - host name 'atropos-api.invalid' cannot be resolved (DNS)",
    "tls": "Cannot connect to Atropos API at {url} - TLS handshake failed: certificate of '127.0.0.1' not accepted "
    "(self-signed certificate); set atropos.ca_file if the API has a certificate of its own",
    "silent": "Atropos API at {url} - no answer to GET /status within 1 s",
    "404": "Atropos API at {url} answered GET /status with HTTP 404 - is the path prefix right?",
    "500": "Atropos API at {url} answered GET /status with HTTP 500: no luck",
    "web page": f"{_NOT_ATROPOS}b'<!doctype html><html><body>Welcome</body></html>', which is not JSON",
    "garbage": f"{_NOT_ATROPOS}something that is not HTTP "
    "(illegal status line: bytearray(b'\\x00\\x01SSH-2.0-something'))",
    "other JSON": f"{_NOT_ATROPOS}no integer 'current_step' but {{'hello': 'world'}}",
}

_BEHAVIOURS = {
    "silent": http_faults.silent(),
    "404": http_faults.error(404),
    "500": http_faults.error(500),
    "web page": http_faults.html_page(),
    "garbage": http_faults.garbage(),
    "other JSON": http_faults.answer({"hello": "world"}),
}


@contextmanager
def _broken_api(fault: str, directory: Path) -> Iterator[str]:
    """The URL of an API that fails in one way."""
    with ExitStack() as stack:
        if fault == "refused":
            yield stack.enter_context(refused_url())
        elif fault == "dns":
            yield "http://atropos-api.invalid:9001"  # RFC 2606: there never is such a host
        elif fault == "tls":
            pair = make_certificate(directory)
            if pair is None:
                pytest.skip("needs the openssl program")
            yield stack.enter_context(FaultServer(tls=pair)).url
        else:
            server = stack.enter_context(FaultServer())
            server.script("/status", _BEHAVIOURS[fault])
            yield server.url


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which ``import torch`` fails."""
    trap = tmp_path / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('torch was imported before it was needed')\n")
    return {"PYTHONPATH": f"{trap.parent}:{REPOSITORY / 'src'}"}


@pytest.mark.parametrize("fault", REASONS)
def test_a_broken_api_is_one_message_and_exit_code_1(fault: str, tmp_path: Path, without_torch: dict[str, str]) -> None:
    with _broken_api(fault, tmp_path) as url:
        words = [f"atropos.api_url={url}", f"atropos.timeout={TIMEOUT}"]
        with TrainingRun(words, run_dir=tmp_path / "run", env=without_torch) as run:
            assert run.wait(timeout=TIMEOUT + 30) == 1
            run.assert_nothing_left()
            assert run.stderr == f"\nATROPOS API ERROR: {REASONS[fault]}{_HINTS}".replace("{url}", url)
            assert run.stdout == f"contacting the trajectory API at {url} ...\n"
            # The traceback is for the log, not for the terminal.
            assert "Traceback" in run.log("trainer")


def test_the_environment_variables_give_url_and_timeout(tmp_path: Path, without_torch: dict[str, str]) -> None:
    with FaultServer() as server:
        server.script("/status", http_faults.silent())
        variables = {**without_torch, "ATROPOS_API_URL": server.url, "ATROPOS_TIMEOUT": "1"}
        with TrainingRun([], run_dir=tmp_path / "run", env=variables) as run:
            assert run.wait(timeout=30) == 1
            assert f"Atropos API at {server.url} - no answer to GET /status within 1 s" in run.stderr


CONFIGURATION_ERRORS = {
    "unknown key": (["optim.lrr=3"], "optim.lrr: unknown key; did you mean optim.lr? (--help lists all keys)"),
    "wrong type": (["steps=many"], "steps: Input should be a valid integer"),
    "out of range": (["batch_retry_delay=-1"], "batch_retry_delay: Input should be greater than 0"),
    "contradiction": (["batch_size=10", "group_size=4"], "batch_size (10) must be a multiple of group_size (4)"),
    "two losses": (
        ["use_advantage_weighting=true", "loss.type=grpo"],
        "use_advantage_weighting=True contradicts loss.type=grpo",
    ),
    "not key=value": (["steps"], "'steps' is not of the form key=value"),
    "no model there": (["model.path=/nowhere"], "model.path: /nowhere is not a Hugging Face model directory"),
    "no environment there": (["env.script=/nowhere.py"], "env.script: /nowhere.py does not exist"),
    "no such checkpoint": (["resume=/nowhere"], "resume: /nowhere is not a checkpoint of this project"),
}


@pytest.mark.parametrize("case", CONFIGURATION_ERRORS)
def test_a_wrong_setting_is_named_before_anything_starts(
    case: str, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    words, message = CONFIGURATION_ERRORS[case]
    with TrainingRun(words, run_dir=tmp_path / "run", env=without_torch) as run:
        assert run.wait(timeout=30) == 2
        assert run.stderr.strip().startswith(f"CONFIGURATION ERROR: {message}"), run.stderr
        assert "Traceback" not in run.stderr
        assert run.stdout == ""
        assert run.processes_seen <= 1, "something was started"
        run.assert_nothing_left()
    assert not (tmp_path / "run").exists()


def test_help_names_every_key_and_exits_0(tmp_path: Path, without_torch: dict[str, str]) -> None:
    from atropos_verl.config.schema import describe

    with TrainingRun(["--help"], env=without_torch, cwd=tmp_path) as run:
        assert run.wait(timeout=30) == 0
        listed = {line.split()[0] for line in run.stdout.splitlines() if line.startswith("  ")}
    assert {name for name, *_ in describe()} <= listed


def test_a_run_directory_that_cannot_be_made(tmp_path: Path, without_torch: dict[str, str]) -> None:
    (tmp_path / "file").write_text("not a directory")
    with TrainingRun([f"run_dir={tmp_path}/file/run"], cwd=tmp_path, env=without_torch) as run:
        assert run.wait(timeout=30) == 2
        assert f"CONFIGURATION ERROR: run_dir: cannot write to {tmp_path}/file/run: Not a directory" in run.stderr
        run.assert_nothing_left()


def test_a_run_that_is_already_there_is_not_overwritten(tmp_path: Path, without_torch: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    with TrainingRun(["resume=disable"], run_dir=run_dir, env=without_torch) as run:
        assert run.wait(timeout=30) == 2
        assert f"run_dir: {run_dir} already holds a run; choose another, or resume=auto" in run.stderr
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_gateway_port_that_is_taken(tmp_path: Path, without_torch: dict[str, str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with TrainingRun([f"gateway.port={port}"], run_dir=tmp_path / "run", env=without_torch) as run:
            assert run.wait(timeout=30) == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in run.stderr
            assert "Set gateway.port to a free port" in run.stderr
            run.assert_nothing_left()
