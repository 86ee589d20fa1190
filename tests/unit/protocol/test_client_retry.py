"""Which calls are tried again, counted at a real server that misbehaves."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import pytest
from support.http_faults import (
    Behaviour,
    FaultServer,
    answer,
    close_before_answer,
    drip_body,
    error,
    late_server,
    reset_before_answer,
    reset_mid_body,
    silent,
    truncated,
)
from support.serving import eventually

from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ServiceError,
)
from atropos_verl.protocol import client as client_module
from atropos_verl.protocol.client import AtroposClient, FetchedBatch, retry_interval
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration

STATUS = {"current_step": 3, "queue_size": 2}
INFO = {"batch_size": 8, "max_token_len": 65}
GROUP = b'{"tokens":[[5,6]],"masks":[[-100,6]],"scores":[1.0]}'
BATCH = b'{"batch":[' + GROUP + b"]}"
REGISTRATION = TrainerRegistration(
    wandb_group="g", wandb_project="p", batch_size=8, max_token_len=65, checkpoint_dir="/c",
    save_checkpoint_interval=5, starting_step=0, num_steps=10,
)  # fmt: skip

SAFE: dict[str, tuple[Callable[[AtroposClient], object], object]] = {
    "/status": (lambda client: client.status(), STATUS),
    "/info": (lambda client: client.info(), INFO),
    "/batch/renew": (lambda client: client.renew("lease-1", 60.0), {"status": "success"}),
    "/batch/ack": (lambda client: client.ack("lease-1"), {"status": "success"}),
}
UNSAFE: dict[str, Callable[[AtroposClient], object]] = {
    "/register": lambda client: client.register(REGISTRATION),
    "/register-env": lambda client: client.register_env(
        EnvRegistration(max_token_length=64, desired_name="e", group_size=4)
    ),
    "/reset_data": lambda client: client.reset_data(),
    "/scored_data_list": lambda client: client.post_scored_data_list([GROUP]),
    "/batch": lambda client: client.get_batch(),
}
FAULTS = {
    "503": (error(503), AtroposHTTPStatusError),
    "500": (error(500), AtroposHTTPStatusError),
    "reset": (reset_before_answer(), AtroposConnectionError),
    "closed": (close_before_answer(), AtroposConnectionError),
    "reset mid-body": (reset_mid_body(BATCH, 12), AtroposConnectionError),
    "cut mid-body": (truncated(BATCH, 12, promise_length=True), AtroposConnectionError),
}


@pytest.fixture
def client(fault_server: FaultServer) -> Iterator[AtroposClient]:
    with AtroposClient(fault_server.url, timeout=20.0, retry_attempts=4, retry_delay=0.01) as client:
        yield client


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", SAFE)
def test_a_safe_call_is_repeated_until_it_succeeds(
    fault_server: FaultServer, client: AtroposClient, path: str, fault: str
) -> None:
    call, good = SAFE[path]
    broken = FAULTS[fault][0]
    fault_server.script(path, broken, broken, answer(good))
    call(client)
    assert fault_server.count(path) == 3


@pytest.mark.parametrize("path", SAFE)
def test_a_safe_call_gives_up_after_its_tries(fault_server: FaultServer, client: AtroposClient, path: str) -> None:
    fault_server.script(path, error(503, b"down for repairs"))
    with pytest.raises(AtroposHTTPStatusError, match="HTTP 503: down for repairs"):
        SAFE[path][0](client)
    assert fault_server.count(path) == 4


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", UNSAFE)
def test_what_may_have_been_carried_out_is_never_repeated(
    fault_server: FaultServer, client: AtroposClient, path: str, fault: str
) -> None:
    broken, kind = FAULTS[fault]
    fault_server.script(path, broken)
    with pytest.raises(kind):
        UNSAFE[path](client)
    assert fault_server.count(path) == 1


@pytest.mark.parametrize("path", UNSAFE)
def test_a_silent_api_is_not_asked_a_second_time_for_what_must_not_happen_twice(
    fault_server: FaultServer, path: str
) -> None:
    fault_server.script(path, silent())
    with (
        AtroposClient(fault_server.url, timeout=1.0, retry_delay=0.01) as client,
        pytest.raises(AtroposTimeoutError, match=r"no answer to (GET|POST) /\S+ within 1 s"),
    ):
        UNSAFE[path](client)
    eventually(lambda: fault_server.count(path) == 1, "the server to have read the request")


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/register", {"uuid": 2**127}),
        ("/scored_data_list", {"status": "received"}),
        ("/batch", json.loads(BATCH)),
        ("/status", STATUS),
    ],
)
def test_every_call_is_repeated_while_the_connection_is_refused(path: str, good: object) -> None:
    with late_server(0.4) as server:
        server.script(path, answer(good))
        with AtroposClient(server.url, timeout=20.0, retry_attempts=30, retry_delay=0.02) as client:
            ({**UNSAFE, "/status": SAFE["/status"][0]})[path](client)
        assert server.count(path) == 1


def test_an_idempotency_key_makes_a_post_repeatable(fault_server: FaultServer, client: AtroposClient) -> None:
    path = "/scored_data_list"
    fault_server.script(path, reset_before_answer(), error(502), answer({"status": "received"}))
    client.post_scored_data_list([GROUP], idempotency_key="k-1")
    assert fault_server.count(path) == 3
    assert {request.headers["idempotency-key"] for request in fault_server.requests} == {"k-1"}


def test_a_lost_answer_costs_a_safe_call_a_third_of_its_time(fault_server: FaultServer) -> None:
    fault_server.script("/status", silent(), answer(STATUS))
    with AtroposClient(fault_server.url, timeout=3.0, retry_delay=0.01) as client:
        assert client.status().current_step == 3
    assert fault_server.count("/status") >= 2


@pytest.mark.parametrize("fault", [silent(), drip_body(b"x" * 4000, 4000, 0.05)])
def test_all_tries_together_end_within_the_timeout(fault_server: FaultServer, fault: Callable[..., None]) -> None:
    fault_server.script("/status", fault)  # never ends by itself, or only after minutes
    with (
        AtroposClient(fault_server.url, timeout=0.6, retry_delay=0.01) as client,
        pytest.raises(AtroposTimeoutError, match=r"no answer (to GET /status )?within 0\.6 s") as caught,
    ):
        client.status()
    assert caught.value.base_url == fault_server.url
    assert fault_server.count("/status") <= 3


def test_the_interval_grows_by_half_and_stays_after_the_quick_tries() -> None:
    # 0.2, 0.2*1.5, 0.2*2.25, 0.2*3.375, and no further
    assert [retry_interval(i, attempts=4, delay=0.2) for i in range(6)] == pytest.approx(
        [0.2, 0.3, 0.45, 0.675, 0.675, 0.675]
    )


def test_the_first_repetition_is_logged_at_info_and_later_ones_as_warnings(
    fault_server: FaultServer, client: AtroposClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="atropos_verl")
    fault_server.script("/status", error(503), error(503), error(503), answer(STATUS))
    client.status()
    records = [record for record in caplog.records if record.name == "atropos_verl.protocol.client"]
    assert [record.levelno for record in records] == [logging.INFO, logging.WARNING, logging.WARNING]
    assert "GET /status: try 1 failed" in records[0].getMessage()
    assert "HTTP 503" in records[0].getMessage()


def test_null_and_empty_batches_are_waited_for_and_a_poll_asks_once(
    fault_server: FaultServer, client: AtroposClient
) -> None:
    fault_server.script("/batch", *[answer({"batch": batch}) for batch in (None, None, [])], answer(BATCH))
    assert client.poll_batch() is None
    assert fault_server.count("/batch") == 1
    assert client.get_batch() == FetchedBatch(BATCH)
    assert fault_server.count("/batch") == 4
    assert client.poll_batch() == FetchedBatch(BATCH)
    assert fault_server.count("/batch") == 5
    assert "x-atropos-lease" not in fault_server.last("/batch").headers


def test_polling_goes_on_after_the_quick_tries_until_max_wait_time(fault_server: FaultServer) -> None:
    fault_server.script("/batch", answer({"batch": None}))
    fault_server.script("/status", answer({"current_step": 7, "queue_size": 5}))
    with (
        AtroposClient(fault_server.url, retry_attempts=1, retry_delay=0.02, max_wait_time=1.0) as client,
        pytest.raises(AtroposTimeoutError) as caught,
    ):
        client.get_batch()
    reason = caught.value.reason
    assert fault_server.count("/batch") > 1
    assert f"({fault_server.count('/batch')} tries)" in reason
    assert f"no batch from Atropos API at {fault_server.url} in " in reason
    assert "at step 7 with 5 groups in its queue" in reason
    assert "Is an environment running" in reason
    assert "batch size" in reason
    assert str(caught.value).startswith("ATROPOS API ERROR: no batch")


def test_no_time_to_wait_still_means_one_try(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/batch", answer({"batch": None}))
    with pytest.raises(AtroposTimeoutError, match=r"\(1 tries\); its /status does not answer either"):
        client.get_batch(max_wait_time=0.0)
    assert fault_server.count("/batch") == 1


def test_should_stop_ends_the_wait(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/batch", answer({"batch": None}))
    asked: list[int] = []

    def should_stop() -> None:
        asked.append(fault_server.count("/batch"))
        if asked[-1] == 2:
            raise ServiceError("the environment died", "environment", -9)

    with pytest.raises(ServiceError, match="the environment died"):
        client.get_batch(should_stop=should_stop)
    assert fault_server.count("/batch") == 2
    assert asked[0] == 1  # never before the first try


def test_a_batch_that_keeps_arriving_is_not_cut_off(fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body, minutes = b'{"batch":[' + GROUP + b" " * 5000 + b"]}", count(step=60.0)
    fault_server.script("/batch", drip_body(body, pieces=3, interval=0.01))
    monkeypatch.setattr(
        client_module, "time", SimpleNamespace(monotonic=lambda: next(minutes))
    )  # one for each look at it
    with AtroposClient(fault_server.url, timeout=30.0) as client:
        found = client.poll_batch()
    assert found is not None and found.body == body and next(minutes) > 60.0


WITHOUT_LENGTH = truncated(BATCH, len(BATCH) - 3, promise_length=False)
LOSING = [
    *[FAULTS[name] for name in ("reset", "closed", "reset mid-body", "cut mid-body")],
    (drip_body(BATCH, pieces=2, interval=30.0), AtroposTimeoutError, r"stopped arriving for 1 s"),
    (WITHOUT_LENGTH, AtroposProtocolError, f"cut off after {len(BATCH) - 3} bytes"),
]


@pytest.mark.parametrize("fault", LOSING)
def test_an_answer_that_breaks_says_that_the_batch_may_be_lost(
    fault_server: FaultServer, fault: tuple[Behaviour, type[AtroposAPIError]]
) -> None:
    behaviour, kind, *said = fault
    fault_server.script("/batch", behaviour)
    with (
        AtroposClient(fault_server.url, timeout=1.0 if kind is AtroposTimeoutError else 20.0) as client,
        pytest.raises(kind, match=f"{''.join(said)}.*; the batch may be lost"),
    ):
        client.get_batch()
    assert fault_server.count("/batch") == 1


def test_an_error_word_in_an_ok_answer_is_an_error(fault_server: FaultServer, client: AtroposClient) -> None:
    said = "Trainer not registered. Call /register first."
    fault_server.script("/batch", answer({"status": "error", "message": said, "batch": []}))
    with pytest.raises(AtroposProtocolError, match=said):
        client.get_batch()
    assert fault_server.count("/batch") == 1


def test_the_raw_body_is_returned_undecoded_and_decompressed(fault_server: FaultServer, client: AtroposClient) -> None:
    odd = b'{"batch":[{"scores":[NaN],"tokens":[[1' + b",1" * 5000 + b"]]}]}"
    fault_server.script("/batch", answer(odd, compressed=True))
    assert client.get_batch().body == odd


def test_a_lease_is_asked_for_and_acknowledged(fault_server: FaultServer) -> None:
    fault_server.script("/batch", answer(BATCH, headers={"X-Atropos-Lease-Id": "L-7"}))
    fault_server.script("/batch/ack", answer({"status": "success"}))
    with AtroposClient(fault_server.url, lease_seconds=90.0) as client:
        fetched = client.get_batch()
        client.ack(fetched.lease_id)
        client.ack(None)
    assert fetched.lease_id == "L-7"
    assert fault_server.last("/batch").headers["x-atropos-lease"] == "90"
    assert fault_server.last("/batch/ack").json() == {"lease_id": "L-7"}
    assert fault_server.count("/batch/ack") == 1


def test_threads_may_share_a_client(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/status", answer(STATUS))
    fault_server.script("/scored_data_list", answer({"status": "received"}))

    def work(_: int) -> int:
        client.post_scored_data_list([GROUP])
        return client.status().queue_size

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(40))) == {2}
    assert (fault_server.count("/status"), fault_server.count("/scored_data_list")) == (40, 40)
