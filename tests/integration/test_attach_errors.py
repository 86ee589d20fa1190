"""Messages for an API that is not there, and for wrong settings. Nothing may start.

torch takes seconds to import, so here it cannot be imported at all: who tries gets another message.
"""

import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from support.http_faults import refused_url

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
_ALL = """
import contextlib, io, json, os, sys
sys.modules["torch"] = None
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from atropos_verl.launch.train import main

processes, ends = [], []
sys.addaudithook(lambda event, about: processes.append(about[1]) if event == "subprocess.Popen" else None)
for words in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words.split(), "atropos")
    ends.append((code, out.getvalue(), err.getvalue(), len(processes)))
    processes.clear()
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case → exit code, output, errors and number of processes of the training command, and what was to be said."""
    cwd = tmp_path_factory.mktemp("errors")
    (cwd / "a-file").touch()
    (cwd / "used").mkdir()
    (cwd / "used" / "metrics.jsonl").write_text('{"step": 1}\n')
    with refused_url() as url, socket.create_server(("127.0.0.1", 0)) as holder:
        known = {"url": url, "taken": holder.getsockname()[1], "cwd": cwd}
        words = [f"run_dir=run {case.format(**known)}" for case in CASES]
        command = [sys.executable, "-c", _ALL, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in cwd.rglob("*")) == ["a-file", "metrics.jsonl", "used"], "nothing was made"
    said = [text.format(**known) for text in CASES.values()]
    return {case: (*end, text) for case, end, text in zip(CASES, json.loads(done.stdout), said, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_before_anything_starts(ends: dict[str, Any], case: str) -> None:
    code, output, error, processes, message = ends[case]
    if CASES[case] is NO_API:
        assert (code, error) == (1, message)
        assert output.startswith("contacting the trajectory API at http://") and output.count("\n") == 1
    else:
        assert (code, output) == (2, "")
        assert error.startswith(f"CONFIGURATION ERROR: {message}") and "Traceback" not in error
    assert processes <= 1, "a look at what the environment's Python has"
