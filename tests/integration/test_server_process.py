"""The server over real HTTP: our client, restarts, responses that nobody reads, the command line."""

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import eventually
from support.trajectory_server import ServerProcess, TrajectoryServer, group, group_bytes, registration

from atropos_verl.errors import AtroposHTTPStatusError, ConfigError, ServiceError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.server.app import check_bind
from atropos_verl.server.settings import ServerSettings

TRAINER = TrainerRegistration(**registration(8))


@pytest.fixture
def server() -> Iterator[TrajectoryServer]:
    with TrajectoryServer() as running:
        yield running


def connected(server: TrajectoryServer, said: str) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=30.0)
    connection.sendall(said.encode())
    return connection


def first_ids(body: bytes) -> list[int]:
    return [int(found.token_ids[0][0]) for found in decode_batch(body)]


def test_a_foreign_name_bound_to_this_machine_is_refused(server: TrajectoryServer) -> None:
    assert httpx.get(f"{server.url}/status", headers={"Host": "evil.example"}).status_code == 403


def test_our_client_shows_why_a_group_is_refused(server: TrajectoryServer) -> None:
    with AtroposClient(server.url) as client, pytest.raises(AtroposHTTPStatusError, match=r"scores: 1 entries"):
        client.post_scored_data_list([json.dumps({**group(1), "scores": [1.0]}).encode()])


@pytest.mark.parametrize("encoding", ["gzip", None])
def test_a_large_batch_arrives_whole_in_both_wires(encoding: str | None) -> None:
    tokens = [[i * 7 % 50_000 for i in range(4096)] for _ in range(16)]
    body = json.dumps({"tokens": tokens, "masks": tokens, "scores": [0.5] * 16}).encode()
    with (
        TrajectoryServer(ServerSettings(compression="always")) as server,
        httpx.Client(base_url=server.url, timeout=60.0, headers={"Accept-Encoding": encoding or "identity"}) as client,
    ):
        client.post("/register", json=registration(64))
        for _ in range(4):
            client.post("/scored_data", content=body)
        for accept in ("application/json", "application/vnd.atropos+packed"):
            answer = client.get("/batch", headers={"Accept": accept, "X-Atropos-Lease": "60"})
            assert answer.headers.get("content-encoding") == encoding
            found = decode_batch(answer.content)
            assert [row.tolist() for row in found[3].token_ids] == tokens
            client.post("/batch/release", json={"lease_id": answer.headers["X-Atropos-Lease-Id"]})


@pytest.mark.parametrize(("bound", "status"), [({"body_timeout": 0.2}, 408), ({"max_body_bytes": 100_000}, 413)])
def test_a_sender_that_falls_silent_or_announces_too_much_is_told(bound: Any, status: int) -> None:
    head = "POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n"
    with TrajectoryServer(ServerSettings(**bound)) as server, connected(server, head + " " * 50_000) as connection:
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status}".encode())


def raw_get(server: TrajectoryServer, path: str = "/batch") -> socket.socket:
    return connected(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")


def read_answer(connection: socket.socket) -> bytes:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.read()


def state_of(server: TrajectoryServer) -> Any:
    return server.app.store


def fill(server: TrajectoryServer, sequences: int, length: int = 3) -> None:
    httpx.post(f"{server.url}/register", json=registration(sequences), timeout=20.0)
    tokens = [[i % 1000 for i in range(length)] for _ in range(sequences)]
    posted = {"tokens": tokens, "masks": tokens, "scores": [1.0] * sequences}
    assert httpx.post(f"{server.url}/scored_data", json=posted, timeout=60.0).status_code == 200


@pytest.mark.parametrize("length", [3, 40_000])
def test_a_batch_that_nobody_reads_comes_back(server: TrajectoryServer, length: int) -> None:
    """Without a lease. Upstream loses it. 40 000 tokens do not fit into the socket's buffers, 3 do."""
    fill(server, 64, length)
    connection = raw_get(server)
    eventually(lambda: bool(state_of(server).outstanding), "the batch is handed out")
    connection.recv(16)  # part of it is read, so the server has sent; then the client dies
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    eventually(lambda: len(state_of(server).returned) == 1, "the batch is back")
    again = json.loads(read_answer(raw_get(server)))["batch"]
    assert len(again[0]["tokens"]) == 64
    assert state_of(server).step == 1


def test_a_batch_counts_as_delivered_once_the_connection_closes_or_is_used_again(server: TrajectoryServer) -> None:
    fill(server, 8)
    connection = raw_get(server)
    read_answer(connection)
    eventually(lambda: len(state_of(server).outstanding) == 1, "not yet known to be delivered")
    connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_answer(connection)
    assert (state_of(server).outstanding, state_of(server).returned) == ({}, [])
    connection.close()
    fill(server, 8)
    connection = raw_get(server)
    read_answer(connection)
    connection.close()
    eventually(lambda: not state_of(server).groups, "delivered")
    assert state_of(server).totals["returns"] == 0


def test_a_quiet_connection_counts_as_delivered_after_the_grace() -> None:
    with TrajectoryServer(ServerSettings(delivery_grace=0.1)) as server:
        fill(server, 8)
        with raw_get(server) as connection:
            read_answer(connection)
            eventually(lambda: not state_of(server).groups, "delivered")


def test_a_lease_ends_without_anybody_asking(server: TrajectoryServer) -> None:
    fill(server, 8)
    httpx.get(f"{server.url}/batch", headers={"X-Atropos-Lease": "0.2"})
    eventually(lambda: len(state_of(server).returned) == 1, "the lease has ended")


def seen_by_environment(url: str) -> list[dict[str, object]]:
    return [httpx.get(f"{url}/{path}").json() for path in ("status-env?env_id=0", "wandb_info")]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_environments_and_trainer_carry_on_over_a_restart(tmp_path: Path, how: str) -> None:
    with ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data"), "--fsync") as server:
        with AtroposClient(server.url, lease_seconds=60.0) as client:
            client.check()
            client.register(TRAINER)
            assert client.poll_batch() is None
            assert client.register_env(EnvRegistration(max_token_length=64, desired_name="words", group_size=4)) == 0
            for number in range(5):
                client.post_scored_data_list([group_bytes(number, 4, 0)], idempotency_key=f"key {number}")
            leased = client.get_batch()
            assert leased.body.startswith(b"ATRPACK1") and leased.lease_id is not None
            before = client.status(), client.info(), seen_by_environment(server.url)
        if how == "kill":
            server.kill()
        else:
            assert server.stop() == 0
        server.start()
        with AtroposClient(server.url, lease_seconds=60.0) as client:
            assert (client.status(), client.info(), seen_by_environment(server.url)) == before
            client.post_scored_data_list([group_bytes(4, 4, 0)], idempotency_key="key 4")
            client.ack(leased.lease_id)
            client.ack(leased.lease_id)
            batch = client.get_batch()
            assert first_ids(batch.body) == [2, 3]
            client.ack(batch.lease_id)
            assert (client.status().current_step, client.status().queue_size) == (2, 1)


def test_it_starts_without_torch_verl_or_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, uvicorn, atropos_verl.server.app as s; "
        "uvicorn.Config(s.TrajectoryApi()).load(); "
        "print(sorted({'torch', 'verl', 'transformers', 'ray', 'atroposlib', 'fastapi'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


def test_token_from_the_environment_and_json_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_API_TOKEN", "secret")
    with ServerProcess(tmp_path, "--log-format", "json") as server:
        assert httpx.get(f"{server.url}/status").status_code == 401
        with AtroposClient(server.url, token="secret") as client:
            client.register(TRAINER)
            client.post_scored_data_list([group_bytes(1, 8)])
            assert client.poll_batch() is not None
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log_path.read_text().splitlines()]
    serving, batch = lines[0], next(line for line in lines if line.get("event") == "batch")
    assert serving["event"] == "serving" and "IN MEMORY ONLY" in serving["message"]
    assert (batch["step"], batch["groups"], batch["tokens"], batch["level"]) == (1, 1, 24, "INFO")


def test_a_public_address_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(ConfigError, match="is reached from other machines: give --token"):
            check_bind(host, ServerSettings())
        assert check_bind(host, ServerSettings(token="x")).allowed_hosts == ()
        assert check_bind(host, ServerSettings(), insecure=True).allowed_hosts == ()
    assert "localhost" in check_bind("127.0.0.1", ServerSettings()).allowed_hosts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "give --token"),
        (["--data-dir", "."], "is of version 0.1.0 (segment-*.log): finish the run with it, or delete the directory"),
    ],
)
def test_a_configuration_that_cannot_be_served_ends_with_2(tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "segment-000001.log").write_bytes(b"ATRLOG1\n")
    command = [sys.executable, "-m", "atropos_verl.cli", "serve-api", "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "ATROPOS_API_TOKEN"}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path, check=False
    )
    assert ran.returncode == 2 and said in ran.stderr


def test_a_taken_port_and_a_used_directory_are_said(tmp_path: Path, server: TrajectoryServer) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ServiceError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        TrajectoryServer(port=port).start()
    with (
        TrajectoryServer(ServerSettings(data_dir=tmp_path)),
        pytest.raises(Exception, match="is in use by trajectory API, pid"),
    ):
        TrajectoryServer(ServerSettings(data_dir=tmp_path)).start()


def test_it_stops_while_a_client_sits_on_a_connection(server: TrajectoryServer) -> None:
    with raw_get(server, "/status") as connection:
        read_answer(connection)
        server.stop(timeout=10.0)  # raises when it does not end
