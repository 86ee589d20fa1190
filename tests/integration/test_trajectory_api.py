"""Trajectory APIs over real HTTP, ours and atroposlib's: clients of all kinds, restarts, answers that nobody reads."""

import asyncio
import http.client
import json
import logging
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import atroposlib
import httpx
import pytest
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from support.serving import eventually
from support.trajectory_server import ServerProcess, TrajectoryServer, UpstreamApi, group_bytes, registration

from atropos_verl.assets import demo_model_path
from atropos_verl.cli import main
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposConnectionError, AtroposHTTPStatusError, AtroposProtocolError, StorageInUseError
from atropos_verl.http_thread import environment_token
from atropos_verl.launch.train import TrainingServices
from atropos_verl.protocol.client import ApiInfo, ApiStatus, AtroposClient
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.report.console import ProgressReporter
from atropos_verl.server import bodies
from atropos_verl.server.app import check_bind
from atropos_verl.server.settings import ServerSettings

Patch = pytest.MonkeyPatch
TRAINER = TrainerRegistration(**registration(8))
ENVIRONMENT = EnvRegistration(max_token_length=64, desired_name="words", group_size=4)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[TrajectoryServer]:
    """``request.param``: its settings."""
    with TrajectoryServer(ServerSettings(**getattr(request, "param", {}))) as running:
        yield running


def connected(server: TrajectoryServer, said: str) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=30.0)
    connection.sendall(said.encode())
    return connection


def asking(server: TrajectoryServer, path: str = "/batch") -> socket.socket:
    return connected(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")


def read_answer(connection: socket.socket) -> bytes:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.read()


def fill(server: TrajectoryServer, sequences: int, length: int = 3) -> list[list[int]]:
    """Posts one batch; returns its tokens."""
    tokens = [[i * 7 % 50_000 for i in range(length)] for _ in range(sequences)]
    posted = {"tokens": tokens, "masks": tokens, "scores": [1.0] * sequences}
    for path, body in (("register", registration(sequences)), ("scored_data", posted)):
        assert httpx.post(f"{server.url}/{path}", json=body, timeout=60.0).status_code == 200
    return tokens


@pytest.mark.parametrize("server", [{"compression": "always"}], indirect=True)
@pytest.mark.parametrize("encoding", ["gzip", None])
def test_a_large_batch_arrives_whole_in_both_wires(server: TrajectoryServer, encoding: str | None) -> None:
    tokens = fill(server, 64, 4096)
    headers = {"Accept-Encoding": encoding or "identity", "X-Atropos-Lease": "60"}
    with httpx.Client(base_url=server.url, timeout=60.0, headers=headers) as client:
        for accept in ("application/json", "application/vnd.atropos+packed"):
            answer = client.get("/batch", headers={"Accept": accept})
            assert answer.headers.get("content-encoding") == encoding
            [found] = decode_batch(answer.content)
            assert [row.tolist() for row in found.token_ids] == tokens
            client.post("/batch/release", json={"lease_id": answer.headers["X-Atropos-Lease-Id"]})


@pytest.mark.parametrize(
    ("server", "status"), [({"body_timeout": 0.2}, 408), ({"max_body_bytes": 100_000}, 413)], indirect=["server"]
)
def test_a_sender_that_falls_silent_or_announces_too_much_is_told(server: TrajectoryServer, status: int) -> None:
    head = "POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n"
    with connected(server, head + " " * 50_000) as connection:
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status}".encode())


@pytest.mark.parametrize("length", [3, 40_000])
def test_a_batch_that_nobody_reads_comes_back(server: TrajectoryServer, length: int) -> None:
    """Without a lease. Upstream loses it. 40 000 tokens do not fit into the socket's buffers, 3 do."""
    fill(server, 64, length)
    store = server.app.store
    connection = asking(server)
    eventually(lambda: bool(store.outstanding), "the batch is handed out")
    connection.recv(16)  # part of it is read, so the server has sent; then the client dies
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    eventually(lambda: len(store.returned) == 1, "the batch is back")
    again = json.loads(read_answer(asking(server)))["batch"]
    assert len(again[0]["tokens"]) == 64
    assert store.step == 1


@pytest.mark.parametrize(
    ("server", "then"),
    [({}, "close"), ({}, "ask again"), ({"delivery_grace": 0.1}, "stay quiet")],
    indirect=["server"],
)
def test_a_batch_that_was_read_counts_as_delivered(server: TrajectoryServer, then: str) -> None:
    fill(server, 8)
    store = server.app.store
    with asking(server) as connection:
        read_answer(connection)
        if then != "stay quiet":
            eventually(lambda: len(store.outstanding) == 1, "not yet known to be delivered")
        if then == "close":
            connection.close()
        elif then == "ask again":
            connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: not store.groups, "delivered")
    assert (store.outstanding, store.returned, store.totals["returns"]) == ({}, [], 0)


def test_a_lease_ends_without_anybody_asking(server: TrajectoryServer) -> None:
    fill(server, 8)
    httpx.get(f"{server.url}/batch", headers={"X-Atropos-Lease": "0.2"})
    eventually(lambda: len(server.app.store.returned) == 1, "the lease has ended")


def test_environments_and_trainer_carry_on_over_restarts(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data"), "--fsync") as server,
        AtroposClient(server.url, lease_seconds=60.0, retry_attempts=100) as client,
    ):

        def seen() -> list[Any]:
            own = [httpx.get(f"{server.url}/{path}").json() for path in ("status-env?env_id=0", "wandb_info")]
            return [client.status(), client.info(), *own]

        client.check()
        client.register(TRAINER)
        assert client.poll_batch() is None
        assert client.register_env(ENVIRONMENT) == 0
        with pytest.raises(AtroposHTTPStatusError, match=r"scores: 1 entries"):
            client.post_scored_data_list([group_bytes(1, 4, 0, scores=[1.0])])
        for number in range(5):
            client.post_scored_data_list([group_bytes(number, 4, 0)], idempotency_key=f"key {number}")
        leased = client.get_batch()
        assert leased.body.startswith(b"ATRPACK1") and leased.lease_id is not None
        before = seen()
        for end in (server.kill, server.stop):
            assert not end()
            server.start()
            assert seen() == before
        client.post_scored_data_list([group_bytes(4, 4, 0)], idempotency_key="key 4")
        client.ack(leased.lease_id)
        client.ack(leased.lease_id)
        batch = client.get_batch()
        assert [int(found.token_ids[0][0]) for found in decode_batch(batch.body)] == [2, 3]
        client.ack(batch.lease_id)
        assert (client.status().current_step, client.status().queue_size) == (2, 1)


def test_token_from_the_environment_and_json_logs(tmp_path: Path, monkeypatch: Patch) -> None:
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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org"])
def test_a_public_address_needs_a_token(host: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("ATROPOS_API_TOKEN", raising=False)
    assert main(["serve-api", "--port", "0", "--host", host]) == 2
    assert f"{host} is reached from other machines: give --token" in caplog.text
    assert check_bind(host, ServerSettings(token="x")).allowed_hosts == ()
    assert check_bind(host, ServerSettings(), insecure=True).allowed_hosts == ()
    assert "localhost" in check_bind("127.0.0.1", ServerSettings()).allowed_hosts


def test_a_used_directory_is_said(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path)
    with TrajectoryServer(settings), pytest.raises(StorageInUseError, match="is in use by trajectory API, pid"):
        TrajectoryServer(settings).start()


def test_it_stops_while_a_client_sits_on_a_connection(server: TrajectoryServer) -> None:
    with asking(server, "/status") as connection:
        read_answer(connection)
        server.stop(timeout=10.0)  # raises when it does not end


SUITES = ("test_api_compression.py", "test_api_legacy.py", "test_api_messages_handling.py")


def test_upstreams_own_tests_pass(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000, which upstream's tests demand, is taken")
    tests = Path(atroposlib.__path__[0]) / "tests"
    with ServerProcess(tmp_path, port=8000) as server:
        # Their fixtures also start upstream's server, which ends at once, since the port is taken.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tests}"]
        command += [str(tests / name) for name in SUITES]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert "36 passed" in ran.stdout and ran.returncode == 0, ran.stdout[-4000:]
        assert "trainer registered" in server.log_path.read_text(), "it was ours that answered"
        assert server.stop() == 0


@contextmanager
def api(run_dir: Path, **settings: Any) -> Iterator[tuple[AtroposClient, str]]:
    """A client of the API that a run in ``run_dir`` starts, with the token that the run made for it."""
    services = TrainingServices(RunConfig.from_mapping({"run_dir": str(run_dir), **settings}), gateway_port=9)
    try:
        made = services.start_api(ProgressReporter(total_steps=1)).atropos
        assert httpx.get(f"{made.api_url}/status").status_code == 401, "nobody else gets in"
        with AtroposClient(str(made.api_url), token=made.token) as client:
            yield client, str(made.token)
    finally:
        services.stop()


def test_a_resumed_run_finds_its_groups_and_not_its_dead_environments(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("ATROPOS_API_TOKEN", "meant-for-another-api")
    with api(tmp_path) as (client, _):
        client.register(TRAINER)
        client.poll_batch()
        assert client.register_env(ENVIRONMENT) == 0
        client.post_scored_data_list([group_bytes(1, env_id=0)])
    with api(tmp_path) as (client, token):
        assert client.status().queue_size == 1
        assert client.register_env(ENVIRONMENT) == 1
        # As Atropos's client sends the password of a URL.
        seen = httpx.get(f"{client.api_url}/status-env", params={"env_id": 1}, auth=("run", token)).json()
        assert seen["env_weight"] == 1.0, "the one before took half of it"
        theirs = ("run", environment_token(token))
        assert httpx.get(f"{client.api_url}/reset_data", auth=theirs).status_code == 403, "only the run itself resets"
    with api(tmp_path, resume="disable") as (client, _):
        assert (client.status().queue_size, client.info().batch_size) == (0, -1)


GROUP, BATCH, BURSTS = 8, 32, 6
"""Sequences of a group, groups of a batch, batches."""


class _BurstyEnv(BaseEnv):  # type: ignore[misc]  # atroposlib has no type information
    """Every group takes the same time, so those that begin together are posted together."""

    begun = given_up = 0

    async def setup(self) -> None: ...
    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...
    async def wandb_log(self, wandb_metrics: Any = None) -> None: ...

    async def get_next_item(self) -> int:
        self.begun += 1
        return self.begun

    async def collect_trajectories(self, item: int) -> Any:
        try:
            await asyncio.sleep(0.5 + 0.008 * (item % BATCH))
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        rows = [[item % 500 + 1, *range(2, 130), i + 1] for i in range(GROUP)]
        return {"tokens": rows, "masks": rows, "scores": [float(i) for i in range(GROUP)]}, []


async def _busy() -> None:
    """Another thing that the environment's process does: its event loop comes late to whatever it waits for."""
    while True:
        await asyncio.sleep(0.004)
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:
            pass


async def _given_up(url: str, client: AtroposClient) -> int:
    logging.getLogger("atroposlib.envs.base").setLevel(logging.ERROR)
    config = BaseEnvConfig(
        group_size=GROUP,
        max_num_workers=256,
        max_batches_offpolicy=2,
        tokenizer_name=str(demo_model_path()),
        rollout_server_url=url,
        use_wandb=False,
        wandb_name="bursty",
        total_steps=10**9,
        steps_per_eval=-1,
    )
    env = _BurstyEnv(config, [APIServerConfig(server_type="openai", api_key="x", model_name="x")], testing=True)
    tasks = [asyncio.create_task(env.env_manager()), asyncio.create_task(_busy())]
    try:
        for _ in range(BURSTS):
            while (fetched := await asyncio.to_thread(client.poll_batch)) is None:
                assert not tasks[0].done(), tasks[0].result()
                await asyncio.sleep(0.02)
            client.ack(fetched.lease_id)
        return env.given_up
    finally:
        tasks += env.workers
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_no_group_is_given_up_because_another_one_is_counted_twice(monkeypatch: Patch) -> None:
    """Without the barrier one is, in every second burst."""
    monkeypatch.setattr(bodies, "PATIENCE", 20.0)  # however long this machine stops a process
    monkeypatch.setattr(bodies, "SETTLING", 0.2)
    with TrajectoryServer() as server, AtroposClient(server.url, lease_seconds=60.0) as client:
        client.register(TrainerRegistration(**registration(BATCH * GROUP, max_token_len=512)))
        client.poll_batch()  # environments may register
        assert asyncio.run(_given_up(server.url, client)) == 0


@pytest.fixture
def client(upstream: UpstreamApi) -> Iterator[AtroposClient]:
    """A client of an API that has forgotten everything, and that a trainer and an environment then registered with."""
    with AtroposClient(upstream.url, timeout=20.0, retry_attempts=3, retry_delay=0.02) as client:
        client.reset_data()
        client.register(TrainerRegistration(**registration(starting_step=7)))
        assert client.register_env(ENVIRONMENT) is None, "an environment waits for the first GET /batch"
        assert client.poll_batch() is None
        assert client.register_env(ENVIRONMENT) == 0
        yield client


def test_before_anybody_registers(tmp_path: Path) -> None:
    with UpstreamApi(tmp_path) as fresh, AtroposClient(fresh.url, timeout=20.0, retry_delay=0.02) as client:
        client.check()
        assert client.status() == ApiStatus(current_step=0, queue_size=0)
        assert client.info() == ApiInfo(batch_size=-1, max_token_len=-1)
        assert client.register_env(ENVIRONMENT) is None
        with pytest.raises(AtroposProtocolError, match="status 'error': Trainer not registered"):
            client.get_batch()
        fresh.kill()
        with pytest.raises(AtroposConnectionError, match="ensure server is running"):
            client.status()


def test_registration_carries_real_values_until_a_reset(client: AtroposClient) -> None:
    assert client.info() == ApiInfo(batch_size=8, max_token_len=64)
    assert client.status() == ApiStatus(current_step=7, queue_size=0)
    assert client.register(TrainerRegistration(**registration(16))).isdigit()
    assert client.info().batch_size == 8  # upstream ignores a second registration, which is why the caller compares
    client.post_scored_data_list([group_bytes(1)])
    client.reset_data()
    assert (client.status(), client.info().batch_size) == (ApiStatus(current_step=0, queue_size=0), -1)
    with pytest.raises(AtroposHTTPStatusError, match="HTTP 500"):  # upstream's answer until someone registers
        client.poll_batch()


def test_a_group_the_api_refuses_and_one_that_costs_it_its_batch(client: AtroposClient) -> None:
    with pytest.raises(AtroposHTTPStatusError, match=r"HTTP 422: .*scores") as caught:
        client.post_scored_data_list([b'{"tokens":[[1]],"masks":[[1]],"scores":"high"}'])
    assert caught.value.status_code == 422
    with pytest.raises(AtroposHTTPStatusError):
        client.post_scored_data_list([group_bytes(1), b"{}"])
    assert client.status().queue_size == 0
    nan = group_bytes(0, scores=[float("nan")] * 4)  # which upstream accepts
    client.post_scored_data_list([nan, group_bytes(1)])
    with pytest.raises(AtroposHTTPStatusError, match=r"HTTP 500.*the batch may be lost"):
        client.get_batch()
    assert client.poll_batch() is None
    client.post_scored_data_list([])
    client.post_scored_data_list([group_bytes(i) for i in range(4)])  # and the API goes on
    assert [len(decode_batch(client.get_batch().body)) for _ in range(2)] == [2, 2]
