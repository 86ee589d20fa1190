"""The client against the real trajectory API of atroposlib, over HTTP, in a process of its own."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.malformed import good_group
from support.trajectory_server import UpstreamApi
from support.trajectory_server import registration as registration_fields

from atropos_verl.errors import (
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
)
from atropos_verl.protocol.client import ApiInfo, ApiStatus, AtroposClient
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import decode_batch

GROUP_SIZE = 4


def registration(**fields: int) -> TrainerRegistration:
    return TrainerRegistration(**registration_fields(**fields))


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
    assert client.info() == ApiInfo(batch_size=8, max_token_len=64)
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
    client.post_scored_data_list([group(1, env_id)])
    assert client.poll_batch() is None  # 4 of 8 sequences
    assert client.status() == ApiStatus(current_step=0, queue_size=1)
    client.post_scored_data_list([group(2, env_id)])
    fetched = client.get_batch()
    assert fetched.lease_id is None  # upstream has none,
    client.ack(fetched.lease_id)  # so there is nothing to acknowledge
    groups = decode_batch(fetched.body)
    expected = [good_group(random.Random(number), group_size=GROUP_SIZE) for number in (1, 2)]
    assert [[row.tolist() for row in g.token_ids] for g in groups] == [g["tokens"] for g in expected]
    assert [g.scores.tolist() for g in groups] == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert client.status() == ApiStatus(current_step=1, queue_size=0)
    assert client.poll_batch() is None  # destructive: it is gone


def test_groups_of_one_request_and_of_another_size(client: AtroposClient) -> None:
    """Upstream buffers a group of another size until two of them make a whole one."""
    (env_id,) = started(client)
    client.post_scored_data_list([group(i, env_id) for i in range(4)])
    assert client.status().queue_size == 4
    assert [len(decode_batch(client.get_batch().body)) for _ in range(2)] == [2, 2]
    client.post_scored_data_list([])
    half = json.dumps({**good_group(random.Random(1), group_size=2), "env_id": env_id}).encode()
    client.post_scored_data_list([half])
    client.post_scored_data_list([half, group(3, env_id)])
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


def test_one_nan_score_costs_the_api_its_whole_batch(client: AtroposClient) -> None:
    started(client)
    poisoned = {**json.loads(group(0)), "scores": [float("nan")] * GROUP_SIZE}  # which upstream accepts
    client.post_scored_data_list([json.dumps(poisoned).encode()])
    client.post_scored_data_list([group(1)])
    with pytest.raises(AtroposHTTPStatusError, match=r"HTTP 500.*the batch may be lost"):
        client.get_batch()
    assert client.poll_batch() is None
    client.post_scored_data_list([group(2), group(3)])  # and the API goes on
    assert len(decode_batch(client.get_batch().body)) == 2
