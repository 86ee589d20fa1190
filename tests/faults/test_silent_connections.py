"""Clients that connect and say nothing: the server has fewer file descriptors than they have connections."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trajectory_server import ServerProcess, group_bytes, registration

from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration

SILENT = 2000


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may hold its end of the connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 2 * SILENT)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("said", [b"", b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"])
def test_the_api_goes_on_beside_2000_silent_connections_at_1024_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(ServerProcess, "prefix", ("sh", "-c", 'ulimit -n 1024; exec "$@"', "sh"))
    with contextlib.ExitStack() as stack, ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data")) as server:
        client = stack.enter_context(AtroposClient(server.url, timeout=60.0, retry_attempts=100))
        client.register(TrainerRegistration(**registration(4)))
        for number in range(SILENT):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60.0))
            silent.sendall(said)
            if number % 100 == 0:
                client.post_scored_data_list([group_bytes(number, 4)], idempotency_key=str(number))
                assert client.get_batch(max_wait_time=60.0) is not None
        assert server.process.poll() is None
        assert server.log_path.stat().st_size < 50_000
