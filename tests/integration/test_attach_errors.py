"""Messages for an API that is not there, and for wrong settings. Nothing may start.

torch takes seconds to import, so here it cannot be imported at all: who tries gets another message.
"""

import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from support.http_faults import refused_url

from atropos_verl.launch.train import main

NO_API = """
ATROPOS API ERROR: Cannot connect to Atropos API at {url} - ensure server is running

Ensure that:
1. Atropos server is running on {url}
2. The API endpoints are accessible
3. Network connectivity is available
"""
# What tests/unit/config/test_config.py cannot see: the whole line, and what is checked after the settings are read.
CASES = {
    "atropos.api_url={url} atropos.timeout=1": NO_API,
    "model.path=/nowhere": "model.path: /nowhere is not a Hugging Face model directory",
    "env.script=/nowhere.py": "env.script: there is no /nowhere.py",
    "resume=/nowhere": "resume: /nowhere is not a checkpoint of this project",
    "data.filter_path=nowhere:keep": "data.filter_path: cannot import nowhere",
    "trainer.device=cuda": "trainer.device: there is no GPU here (CUDA_VISIBLE_DEVICES='' leaves none)",
    "run_dir=a-file": "run_dir: {cwd}/a-file is a file",
    "run_dir=/dev/null/run": "run_dir: cannot write to /dev/null/run: Not a directory",
    "run_dir=used resume=disable": "run_dir: {cwd}/used already holds a run; choose another, or resume=auto",
    "gateway.port={taken}": "gateway.port: inference gateway: cannot listen on 127.0.0.1:{taken}: Address already in "
    "use. Set gateway.port to a free port",
}


@patch.dict("os.environ", CUDA_VISIBLE_DEVICES="")
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_before_anything_starts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = Mock(wraps=subprocess.Popen)
    monkeypatch.setattr("subprocess.Popen", processes)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("used").mkdir()
    Path("used", "metrics.jsonl").write_text('{"step": 1}\n')
    with refused_url() as url, socket.create_server(("127.0.0.1", 0)) as holder:
        known = {"url": url, "taken": holder.getsockname()[1], "cwd": tmp_path}
        code = main(["run_dir=run", *case.format(**known).split()], "atropos")
    output, error = capsys.readouterr()
    message = CASES[case].format(**known)
    if CASES[case] is NO_API:
        assert (code, error) == (1, message)
        assert output.startswith("contacting the trajectory API at http://") and output.count("\n") == 1
    else:
        assert (code, output) == (2, "")
        assert error.startswith(f"CONFIGURATION ERROR: {message}") and "Traceback" not in error
    assert processes.call_count <= 1, "a look at what the environment's Python has"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a-file", "metrics.jsonl", "used"], "nothing was made"
