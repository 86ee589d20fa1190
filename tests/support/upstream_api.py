"""The real trajectory API of atroposlib as a subprocess on a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class UpstreamApi:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait(timeout=10.0)


@contextmanager
def upstream_api(directory: Path, *, ready_timeout: float = 90.0) -> Iterator[UpstreamApi]:
    """Start it, wait until ``/status`` answers, and end it by its pid. ``directory`` gets its log."""
    port = _free_port()
    log_path = directory / f"upstream_api_{port}.log"
    command = [sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
    api = UpstreamApi(f"http://127.0.0.1:{port}", process, log_path)
    try:
        _wait_until_ready(api, ready_timeout)
        yield api
    finally:
        process.terminate()
        try:
            process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10.0)


def _wait_until_ready(api: UpstreamApi, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while True:
            try:
                if client.get(f"{api.url}/status").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            log = api.log_path.read_text(errors="replace")[-2000:]
            assert api.process.poll() is None, f"the API exited with {api.process.returncode}:\n{log}"
            assert time.monotonic() < deadline, f"the API is not ready after {timeout} s:\n{log}"
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
