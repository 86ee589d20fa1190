"""Clients that connect and say nothing: the server has fewer file descriptors than they have connections."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from support.runs import TrainingRun
from support.trajectory_server import ServerProcess, group_bytes, registration

from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration

SILENT = 2000
SAID = (b"", b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
PREFIX = ("sh", "-c", 'ulimit -n 1024; exec "$@"', "sh")


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    """This process may hold its end of the connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 3 * SILENT)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_api_goes_on_beside_2000_silent_connections_at_1024_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerProcess, "prefix", PREFIX)
    with ExitStack() as stack, ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data")) as server:
        client = stack.enter_context(AtroposClient(server.url, timeout=60.0, retry_attempts=100))
        client.register(TrainerRegistration(**registration(4)))
        for number in range(SILENT):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60.0))
            silent.sendall(SAID[number % 2])
            if number % 100 == 0:
                client.post_scored_data_list([group_bytes(number, 4)], idempotency_key=str(number))
                assert client.get_batch(max_wait_time=60.0) is not None
        assert server.process.poll() is None
        assert server.log_path.stat().st_size < 50_000


@pytest.mark.skipif(not os.environ.get("ATROPOS_VERL_SILENT_RUN"), reason="a whole run: ATROPOS_VERL_SILENT_RUN=1")
def test_a_run_goes_on_beside_silent_connections_at_1024_files(tmp_path: Path) -> None:
    """2000 at its gateway, 2000 at its API."""
    run = TrainingRun(["steps=12", "save_freq=6"], run_dir=tmp_path / "run")
    run.command = [*PREFIX, *run.command]
    with run, ExitStack() as stack:
        run.wait_for_step(1)
        [file] = (tmp_path / "run" / "launch").glob("environment*.yaml")
        told = yaml.safe_load(file.read_text())
        for url in (told["openai"][0]["base_url"], told["env"]["rollout_server_url"]):
            for _ in range(SILENT):
                place = ("127.0.0.1", urlsplit(url).port)
                stack.enter_context(socket.create_connection(place, timeout=60.0))
        beside = run.trained()
        run.must_end(0)
        assert beside + 3 <= run.trained() == 12
        assert sum(path.stat().st_size for path in (tmp_path / "run" / "logs").iterdir()) < 500_000
