"""The client against the real trajectory API of atroposlib, over HTTP, in a process of its own."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.http_faults import Behaviour, FaultServer, Link
from support.malformed import VOCAB_SIZE, good_group, malformed_cases, poison_groups
from support.trajectory_server import UpstreamApi

from atropos_verl.errors import (
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
)
from atropos_verl.protocol.client import ApiInfo, ApiStatus, AtroposClient
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.samples import build_samples
from atropos_verl.types import SampleSettings

GROUP_SIZE = 4
BATCH_SIZE = 8


def registration(*, batch_size: int = BATCH_SIZE, starting_step: int = 0) -> TrainerRegistration:
    return TrainerRegistration(
        max_token_len=65,
        wandb_group="group",
        wandb_project="project",
        batch_size=batch_size,
        checkpoint_dir="/checkpoints",
        save_checkpoint_interval=5,
        starting_step=starting_step,
        num_steps=10,
    )


ENVIRONMENT = EnvRegistration(max_token_length=64, desired_name="spelling", group_size=GROUP_SIZE)


def group(number: int, env_id: int | None = None) -> bytes:
    made = good_group(random.Random(number), group_size=GROUP_SIZE)
    return json.dumps({**made, "env_id": env_id}).encode()


@pytest.fixture
def client(upstream: UpstreamApi) -> Iterator[AtroposClient]:
    """A client of an API that has forgotten everything (but it answers /batch with 500 until someone registers)."""
    with AtroposClient(upstream.url, timeout=20.0, retry_attempts=3, retry_delay=0.02) as client:
        client.reset_data()
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


def test_registration_carries_real_values(client: AtroposClient) -> None:
    uuid = client.register(registration(starting_step=20))
    assert uuid.isdigit()
    assert client.info() == ApiInfo(batch_size=8, max_token_len=65)  # exclusive: 64 tokens still pass
    assert client.status() == ApiStatus(current_step=20, queue_size=0)
    assert client.register(registration(batch_size=16)) != uuid
    assert client.info().batch_size == 8  # upstream ignores a second registration, which is why the caller compares


def test_an_environment_waits_for_the_first_get_batch(client: AtroposClient) -> None:
    client.register(registration(starting_step=7))
    assert client.register_env(ENVIRONMENT) is None
    assert client.poll_batch() is None
    assert [client.register_env(ENVIRONMENT) for _ in range(2)] == [0, 1]


def started(client: AtroposClient, environments: int = 1) -> list[int]:
    client.register(registration())
    assert client.poll_batch() is None
    results = [client.register_env(ENVIRONMENT) for _ in range(environments)]
    return [env_id for env_id in results if env_id is not None]


def test_groups_come_back_as_a_batch(client: AtroposClient) -> None:
    (env_id,) = started(client)
    assert client.post_scored_data_list([group(1, env_id)]) == 0
    assert client.poll_batch() is None  # 4 of 8 sequences
    assert client.status() == ApiStatus(current_step=0, queue_size=1)
    assert client.post_scored_data_list([group(2, env_id)]) == 0
    fetched = client.get_batch()
    assert fetched.lease_id is None  # upstream has none,
    client.ack(fetched.lease_id)  # so there is nothing to acknowledge
    groups = decode_batch(fetched.body)
    expected = [good_group(random.Random(number), group_size=GROUP_SIZE) for number in (1, 2)]
    assert [[row.tolist() for row in g.token_ids] for g in groups] == [g["tokens"] for g in expected]
    assert [g.scores.tolist() for g in groups] == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert client.status() == ApiStatus(current_step=1, queue_size=0)
    assert client.poll_batch() is None  # destructive: it is gone


def test_a_list_of_groups_in_one_request(client: AtroposClient) -> None:
    (env_id,) = started(client)
    assert client.post_scored_data_list([group(i, env_id) for i in range(4)]) == 0
    assert client.status().queue_size == 4
    assert [len(decode_batch(client.get_batch().body)) for _ in range(2)] == [2, 2]
    assert client.post_scored_data_list([]) == 0


def test_a_group_of_another_size_is_buffered(client: AtroposClient) -> None:
    (env_id,) = started(client)
    half = json.dumps({**good_group(random.Random(1), group_size=2), "env_id": env_id}).encode()
    assert client.post_scored_data_list([half]) == 1
    assert client.post_scored_data_list([half, group(3, env_id)]) == 1
    assert sorted(len(g) for g in decode_batch(client.get_batch().body)) == [2, 2, 4]


def test_a_long_batch_arrives_compressed_and_whole(client: AtroposClient) -> None:
    started(client)
    tokens = [[i % 250 + 2 for i in range(20_000)] for _ in range(GROUP_SIZE)]
    long = json.dumps({"tokens": tokens, "masks": tokens, "scores": [0.0, 1.0, 2.0, 3.0]}).encode()
    client.post_scored_data_list([long, long])
    groups = decode_batch(client.get_batch().body)
    assert [[row.tolist() for row in g.token_ids] for g in groups] == [tokens, tokens]


def test_a_group_the_api_refuses(client: AtroposClient) -> None:
    started(client)
    with pytest.raises(AtroposHTTPStatusError, match=r"HTTP 422: .*scores") as caught:
        client.post_scored_data_list([b'{"tokens":[[1]],"masks":[[1]],"scores":"high"}'])
    assert caught.value.status_code == 422
    with pytest.raises(AtroposHTTPStatusError):
        client.post_scored_data_list([group(1), b"{}"])
    assert client.status().queue_size == 0


def test_waiting_for_a_batch_that_never_comes(client: AtroposClient) -> None:
    started(client)
    client.post_scored_data_list([group(1)])
    with pytest.raises(AtroposTimeoutError, match=r"at step 0 with 1 groups in its queue. Is an environment running"):
        client.get_batch(max_wait_time=0.3)


def test_reset_forgets_everything(client: AtroposClient) -> None:
    (env_id,) = started(client)
    client.post_scored_data_list([group(1, env_id)])
    client.reset_data()
    assert client.status() == ApiStatus(current_step=0, queue_size=0)
    assert client.info().batch_size == -1
    with pytest.raises(AtroposHTTPStatusError, match="HTTP 500"):  # upstream's answer until someone registers
        client.poll_batch()
    started(client)
    assert client.status().queue_size == 0


def test_a_path_prefix_in_front_of_the_real_api(client: AtroposClient, upstream: UpstreamApi) -> None:
    client.register(registration(starting_step=3))
    with FaultServer() as proxy:
        proxy.script("/team/atropos/status", forward_to(upstream.url, "/status"))
        proxy.script("/team/atropos/info", forward_to(upstream.url, "/info"))
        with AtroposClient(f"{proxy.url}/team/atropos/", timeout=20.0) as prefixed:
            prefixed.check()
            assert prefixed.status().current_step == 3
        with (
            AtroposClient(f"{proxy.url}/team", timeout=20.0) as wrong,
            pytest.raises(AtroposHTTPStatusError, match=r"is the path prefix right\?"),
        ):
            wrong.check()


def forward_to(url: str, path: str) -> Behaviour:
    """A reverse proxy's part of the work: the real API's answer, byte for byte."""
    parts = urlsplit(url)

    def behave(link: Link) -> None:
        with socket.create_connection((parts.hostname, parts.port), timeout=20.0) as behind:
            behind.sendall(f"GET {path} HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n\r\n".encode())
            while data := behind.recv(65536):
                link.send(data)

    return behave


# --- malformed data --------------------------------------------------------------------------------------------------


def test_the_api_accepts_malformed_groups_and_every_one_is_quarantined_beside_the_good(client: AtroposClient) -> None:
    started(client)
    cases = malformed_cases(seed=0, count=99, group_size=GROUP_SIZE, same_size=True)
    bodies = [case.encode() for case in cases]
    for body in bodies:
        client.post_scored_data_list([body])  # each alone, so that a refusal names its case
    good = [group(1000 + i) for i in range(99)]
    client.post_scored_data_list(good)
    groups = []
    for _ in range(99):
        groups += decode_batch(client.get_batch().body)
    assert len(groups) == 198
    report = build_samples(groups, SampleSettings(vocab_size=VOCAB_SIZE))
    assert len(report.quarantined) == 99
    assert all(entry.reason for entry in report.quarantined)
    assert report.groups == 99
    assert len(report.samples) == 99 * GROUP_SIZE
    assert client.poll_batch() is None


@pytest.mark.parametrize("size", [0, 3, 5])
def test_upstream_accepts_the_kinds_of_other_sizes_too(client: AtroposClient, size: int) -> None:
    started(client)
    cases = malformed_cases(seed=1, count=36, group_size=GROUP_SIZE)
    chosen = [case for case in cases if len(case.group["tokens"]) == size]
    assert len(chosen) == 1
    client.post_scored_data_list([chosen[0].encode()])  # not refused


def test_one_nan_score_costs_the_api_its_whole_batch(client: AtroposClient) -> None:
    started(client)
    client.post_scored_data_list([poison_groups()[0]])
    client.post_scored_data_list([group(1)])
    with pytest.raises(AtroposHTTPStatusError, match=r"HTTP 500.*the batch may be lost"):
        client.get_batch()
    assert client.poll_batch() is None
    client.post_scored_data_list([group(2), group(3)])  # and the API goes on
    assert len(decode_batch(client.get_batch().body)) == 2
