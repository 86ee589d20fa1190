"""The client against a real server that misbehaves: which calls are tried again, and what the user is told."""

import contextlib
import errno
import gzip
import json
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from support import http_faults as faults
from support.http_faults import Behaviour, FaultServer, Link, answer, error, silent
from support.serving import eventually
from support.trajectory_server import registration

from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ConfigError,
    ServiceError,
)
from atropos_verl.protocol import client as client_module
from atropos_verl.protocol.client import AtroposClient, FetchedBatch, retry_interval
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration

STATUS = {"current_step": 3, "queue_size": 2}
NO_BATCH = answer({"batch": None})
GROUP = b'{"tokens":[[5,6]],"masks":[[-100,6]],"scores":[1.0]}'
BATCH = b'{"batch":[' + GROUP + b"]}"
TRAINER = TrainerRegistration(**registration())
ENVIRONMENT = EnvRegistration(max_token_length=64, group_size=4)

Call = Callable[[AtroposClient], object]
SAFE: dict[str, tuple[Call, object]] = {
    "GET /status": (AtroposClient.status, STATUS),
    "GET /info": (AtroposClient.info, {"batch_size": 8, "max_token_len": 65}),
    "POST /batch/renew": (lambda client: client.renew("lease-1", 60.0), {}),
    "POST /batch/ack": (lambda client: client.ack("lease-1"), {}),
}
UNSAFE: dict[str, tuple[Call, object]] = {
    "POST /register": (lambda client: client.register(TRAINER), {"uuid": 2**127}),
    "POST /register-env": (lambda client: client.register_env(ENVIRONMENT), {"status": "success", "env_id": 0}),
    "GET /reset_data": (AtroposClient.reset_data, {}),
    "POST /scored_data_list": (lambda client: client.post_scored_data_list([GROUP]), {"status": "received"}),
    "GET /batch": (AtroposClient.get_batch, json.loads(BATCH)),
}
Fault = tuple[Behaviour, type[AtroposAPIError], str]
FAULTS: dict[str, Fault] = {
    "500": (error(500), AtroposHTTPStatusError, "answered {} with HTTP 500: no luck"),
    "reset": (Link.reset, AtroposConnectionError, "- connection reset before an answer to {}"),
    "closed": (faults.close_before_answer(), AtroposConnectionError, "- connection closed before an answer to {}"),
    "reset mid-body": (faults.reset_mid_body(BATCH, 12), AtroposConnectionError, "- connection reset while reading"),
    "cut": (faults.truncated(BATCH, 12, promise_length=True), AtroposConnectionError, "- connection closed while"),
}
SILENCE: Fault = (silent(), AtroposTimeoutError, "- no answer to {} within 1 s")


def quick(url: str, **options: Any) -> AtroposClient:
    return AtroposClient(url, **{"timeout": 20.0, "retry_attempts": 4, "retry_delay": 0.01, **options})


@pytest.fixture
def client(fault_server: FaultServer) -> Iterator[AtroposClient]:
    with quick(fault_server.url) as client:
        yield client


def failure(client: AtroposClient, call: Call, kind: type[AtroposAPIError] = AtroposConnectionError) -> str:
    with client, pytest.raises(kind) as caught:
        call(client)
    assert caught.value.base_url == client.api_url
    return caught.value.reason


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SAFE)
def test_a_safe_call_is_repeated_until_it_succeeds(
    fault_server: FaultServer, client: AtroposClient, caplog: pytest.LogCaptureFixture, name: str, fault: str
) -> None:
    caplog.set_level(logging.INFO, logger=client_module.__name__)
    (call, good), path = SAFE[name], name.split()[1]
    fault_server.script(path, *2 * [FAULTS[fault][0]], answer(good))
    call(client)
    assert fault_server.count(path) == 3
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert caplog.records[0].getMessage().startswith(f"{name}: try 1 failed (Atropos API at ")


@pytest.mark.parametrize("fault", [*FAULTS, "silence"])
@pytest.mark.parametrize("name", UNSAFE)
def test_what_may_have_been_carried_out_is_never_repeated(fault_server: FaultServer, name: str, fault: str) -> None:
    path, (broken, kind, said) = name.split()[1], FAULTS.get(fault, SILENCE)
    fault_server.script(path, broken)
    client = quick(fault_server.url, timeout=1.0 if fault == "silence" else 20.0)
    reason = failure(client, UNSAFE[name][0], kind)
    assert reason.startswith(f"Atropos API at {fault_server.url} {said.format(name)}")
    assert ("the batch may be lost" in reason) is (path == "/batch")
    assert (" NaN)" in reason) is (path == "/batch" and kind is AtroposHTTPStatusError)
    eventually(lambda: fault_server.count(path) == 1, "the server to have read the request")


@pytest.mark.parametrize("name", [*UNSAFE, "GET /status"])
def test_every_call_is_repeated_while_the_connection_is_refused(name: str) -> None:
    (call, good), path = {**SAFE, **UNSAFE}[name], name.split()[1]
    server = FaultServer()
    server.script(path, answer(good))
    with contextlib.ExitStack() as stack, quick(server.url, retry_attempts=30, retry_delay=0.02) as client:
        begins = threading.Timer(0.2, stack.enter_context, [server])
        begins.start()
        call(client)
        begins.join()
        assert server.count(path) == 1


def test_an_idempotency_key_makes_a_post_repeatable(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/scored_data_list", Link.reset, error(502), answer({"status": "received"}))
    client.post_scored_data_list([GROUP], idempotency_key="k-1")
    assert [request.headers["idempotency-key"] for request in fault_server.requests] == ["k-1"] * 3


def test_a_lost_answer_costs_a_safe_call_a_third_of_its_time(fault_server: FaultServer) -> None:
    fault_server.script("/status", silent(), answer(STATUS))
    with quick(fault_server.url, timeout=3.0) as client:
        assert client.status().current_step == 3


@pytest.mark.parametrize("fault", [silent(), faults.drip_body(b"x" * 4000, 4000, 0.05)])
def test_all_tries_together_end_within_the_timeout(fault_server: FaultServer, fault: Behaviour) -> None:
    fault_server.script("/status", fault)  # never ends by itself, or only after minutes
    reason = failure(quick(fault_server.url, timeout=0.6), AtroposClient.status, AtroposTimeoutError)
    assert "no answer" in reason and reason.endswith("within 0.6 s")
    assert fault_server.count("/status") <= 3


def test_the_interval_grows_by_half_and_stays_after_the_quick_tries() -> None:
    expected = [0.2, 0.3, 0.45, 0.675, 0.675, 0.675]
    assert [retry_interval(i, attempts=4, delay=0.2) for i in range(6)] == pytest.approx(expected)


def test_empty_batches_are_waited_for(fault_server: FaultServer, client: AtroposClient) -> None:
    odd = b'{"batch":[{"scores":[NaN],"tokens":[[1' + b",1" * 5000 + b"]]}]}"
    none = [answer({"batch": batch}) for batch in (None, None, [])]
    fault_server.script("/batch", *none, answer(BATCH), answer(gzip.compress(odd), 200, {"content-encoding": "gzip"}))
    assert client.poll_batch() is None
    assert fault_server.count("/batch") == 1
    assert client.get_batch() == FetchedBatch(BATCH)
    assert fault_server.count("/batch") == 4
    assert client.poll_batch() == FetchedBatch(odd)
    assert not client.leased and not {"x-atropos-lease", "x-atropos-wait"} & fault_server.last("/batch").headers.keys()


def test_polling_goes_on_after_the_quick_tries_until_max_wait_time(fault_server: FaultServer) -> None:
    fault_server.script("/batch", NO_BATCH)
    fault_server.script("/status", answer(STATUS))
    client = quick(fault_server.url, retry_attempts=1, retry_delay=0.02, max_wait_time=1.0)
    reason = failure(client, AtroposClient.get_batch, AtroposTimeoutError)
    assert reason.startswith(f"no batch from Atropos API at {fault_server.url} in ")
    assert (tries := fault_server.count("/batch")) > 1
    assert f"({tries} tries); it is at step 3 with 2 groups in its queue. Is an environment running" in reason


def test_no_time_to_wait_still_means_one_try(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/batch", NO_BATCH)
    with pytest.raises(AtroposTimeoutError, match=r"\(1 tries\); its /status does not answer either"):
        client.get_batch(max_wait_time=0.0)
    client.features = frozenset({"wait"})
    with pytest.raises(AtroposTimeoutError):  # too short to be written: 0.000 would be refused
        client.get_batch(max_wait_time=0.0004)
    assert not any("x-atropos-wait" in request.headers for request in fault_server.requests)


def test_an_api_that_waits_is_asked_to(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/batch", NO_BATCH, answer(BATCH))
    client.features = frozenset({"wait"})
    assert client.get_batch() == FetchedBatch(BATCH)
    assert [request.headers["x-atropos-wait"] for request in fault_server.requests] == ["0.500"] * 2


def test_should_stop_ends_the_wait(fault_server: FaultServer, client: AtroposClient) -> None:
    fault_server.script("/batch", NO_BATCH)
    asked: list[int] = []

    def should_stop() -> None:
        asked.append(fault_server.count("/batch"))
        if asked[-1] == 2:
            raise ServiceError("the environment died", "environment", -9)

    with pytest.raises(ServiceError, match="the environment died"):
        client.get_batch(should_stop=should_stop)
    assert (asked[0], fault_server.count("/batch")) == (1, 2)


def test_a_batch_that_keeps_arriving_is_kept(fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body, minutes = b'{"batch":[' + GROUP + b" " * 5000 + b"]}", count(step=60.0)  # one for each look at the time
    fault_server.script("/batch", faults.drip_body(body, pieces=3, interval=0.01))
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    assert quick(fault_server.url, timeout=30.0).poll_batch() == FetchedBatch(body) and next(minutes) > 60.0


LOST = "; the batch may be lost: the API takes it from its queue before it sends it"
NO_API = "The server at {} answers, but is not an Atropos trajectory API: GET /batch gave "
CUT = len(BATCH) - 3
NOT_REGISTERED = {"status": "error", "message": "Call /register first.", "batch": []}
NO_BATCHES: dict[str, Fault] = {
    "html": (faults.html_page(), AtroposProtocolError, NO_API + "b'<!doctype html><html><body>Welcome</body></html>'"),
    "another object": (answer({"groups": []}), AtroposProtocolError, NO_API + "b'{\"groups\": []}', which has no"),
    "no JSON": (answer(b'{"batch": [,]}'), AtroposProtocolError, NO_API + "b'{\"batch\": [,]}', which is not JSON"),
    "an error": (answer(NOT_REGISTERED), AtroposProtocolError, "{} answered GET /batch with status 'error': Call /"),
    "cut": (faults.truncated(BATCH, CUT, promise_length=False), AtroposProtocolError, "{} - the answer to GET /batch"),
    "stops": (faults.drip_body(BATCH, 2, 30.0), AtroposTimeoutError, "{} - GET /batch stopped arriving for 1 s" + LOST),
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_an_answer_that_is_no_batch_is_asked_for_once_and_named(fault_server: FaultServer, name: str) -> None:
    behaviour, kind, said = NO_BATCHES[name]
    fault_server.script("/batch", behaviour)
    reason = failure(quick(fault_server.url, timeout=1.0 if name == "stops" else 20.0), AtroposClient.get_batch, kind)
    assert reason.removeprefix("Atropos API at ").startswith(said.replace("{}", fault_server.url, 1))
    assert name != "cut" or reason.endswith(f" is cut off after {CUT} bytes{LOST}")
    assert fault_server.count("/batch") == 1


def test_a_name_that_cannot_be_resolved() -> None:
    assert failure(quick("http://no-such-host.invalid:9001"), AtroposClient.check) == (
        "Cannot connect to Atropos API at http://no-such-host.invalid:9001 - "
        "host name 'no-such-host.invalid' cannot be resolved (DNS)"
    )


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_an_unreachable_network(number: int) -> None:
    error = httpx.ConnectError("no route")
    error.__cause__ = OSError(number, "No route to host")
    network = httpx.MockTransport(Mock(side_effect=error))
    reason = failure(quick("http://10.0.0.1", transport=network), AtroposClient.check)
    assert reason == "Cannot connect to Atropos API at http://10.0.0.1 - network unreachable (No route to host)"


def test_a_connection_that_is_never_accepted() -> None:
    with socket.socket() as listener, contextlib.ExitStack() as fillers:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # a full backlog: Linux then drops further connection requests without an answer
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        reason = failure(quick(url, timeout=0.5), AtroposClient.check, AtroposTimeoutError)
    assert reason == f"Cannot connect to Atropos API at {url} - no answer within 0.5 s"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl program to make a certificate with")
def test_a_certificate_that_is_not_trusted_is_refused_at_once_and_a_file_makes_it_trusted(tmp_path: Path) -> None:
    certificate, key = tmp_path / "test.crt", tmp_path / "test.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with FaultServer(tls=(certificate, key)) as server:
        server.script("/status", answer(STATUS))
        reason = failure(quick(server.url), AtroposClient.check)
        assert (server.connections, server.requests) == (1, [])  # waiting does not make a certificate better
        with quick(server.url, verify=str(certificate)) as client:
            assert client.status().queue_size == 2
    why = "TLS handshake failed: certificate of '127.0.0.1' not accepted (self-signed certificate); set atropos.ca_file"
    assert reason.startswith(f"Cannot connect to Atropos API at {server.url} - {why} ")


def test_https_to_a_server_that_speaks_http(fault_server: FaultServer) -> None:
    reason = failure(quick(fault_server.url.replace("http:", "https:")), AtroposClient.check)
    assert "TLS handshake failed" in reason and reason.endswith("is it an http:// API?")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (301, b"", ", a redirect to https://example.invalid/status - set atropos.api_url to the final address"),
        (401, b"", " - check atropos.token"),
        (403, b"", " - check atropos.token"),
        (404, b"not here", " - is the path prefix right?"),
        (405, b"", " - is the path prefix right?"),
        (422, b'{"detail":"tokens"}', ': {"detail":"tokens"}'),
        (400, b"a\x1b[2J\nb", ": a?[2J?b"),
        (500, b"x" * 10_000, ": " + "x" * 500),
        (502, b"", ": empty answer"),
    ],
)
def test_http_errors(fault_server: FaultServer, client: AtroposClient, status: int, body: bytes, said: str) -> None:
    fault_server.script("/status", error(status, body, {"location": "https://example.invalid/status"}))
    with pytest.raises(AtroposHTTPStatusError) as caught:
        client.check()
    assert caught.value.reason == f"Atropos API at {client.api_url} answered GET /status with HTTP {status}{said}"
    shown = body.decode()[:500].translate({10: "?", 27: "?"})
    assert (caught.value.status_code, caught.value.body) == (status, shown)
    assert fault_server.count("/status") == (4 if status >= 500 else 1)


@pytest.mark.parametrize(
    ("behaviour", "detail"),
    [
        (faults.html_page(), "GET /status gave b'<!doctype html><html><body>Welcome</body></html>', which is not JSON"),
        (faults.garbage(), "GET /status gave something that is not HTTP"),
        (answer(b""), "GET /status gave b'', which is not JSON"),
        (answer([1, 2]), "GET /status gave b'[1, 2]', which is not a JSON object"),
        (answer({"status": "ok"}), "GET /status gave no integer 'current_step' but {'status': 'ok'}"),
        (answer({"current_step": "1", "queue_size": 0}), "GET /status gave no integer 'current_step'"),
        (answer({"current_step": 1, "queue_size": True}), "GET /status gave no integer 'queue_size'"),
        (answer(b"[" * 100_000), "which is not JSON"),
        (answer(b"not gzip", headers={"content-encoding": "gzip"}), "cannot be decompressed"),
        (answer(b"x" * (17 * 2**20)), "GET /status gave more than 16777216 bytes"),
    ],
)
def test_something_else_answers(fault_server: FaultServer, behaviour: Behaviour, detail: str) -> None:
    fault_server.script("/status", behaviour)
    reason = failure(quick(fault_server.url), AtroposClient.check, AtroposProtocolError)
    assert reason.startswith(f"The server at {fault_server.url} answers, but is not an Atropos trajectory API: ")
    assert detail in reason
    assert fault_server.count("/status") == 1


API = "http://host:9001"


@pytest.mark.parametrize(
    ("url", "options", "key"),
    [
        *((url, {}, "atropos.api_url") for url in ("", "localhost:9001", "ftp://host", "http://", "http://:9001")),
        *((f"http://{rest}", {}, "atropos.api_url") for rest in ("host:99999", "host:port", "host:0", "ho st", "[::1")),
        *((url, {}, "atropos.api_url") for url in ("http://host/?q=1", "http://host/#part", None, 9001)),
        ("http://user:hush@host:99999", {}, "atropos.api_url"),
        ("http://user:hush/cd@host", {}, "atropos.api_url"),
        (API, {"token": "hush hush"}, "atropos.token"),
        (API, {"token": "hush\r\nX-Evil: 1"}, "atropos.token"),
        (API, {"token": ""}, "atropos.token"),
        (API, {"token": "hush", "headers": {"authorization": "Basic x"}}, "atropos.token"),
        (API, {"headers": {"bad name": "1"}}, "atropos.headers"),
        (API, {"headers": {"x": "a\r\nb"}}, "atropos.headers"),
        (API, {"verify": "/no/such/file.pem"}, "atropos.ca_file"),
    ],
)
def test_a_setting_out_of_range_is_named_and_a_secret_is_not_shown(url: Any, options: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        AtroposClient(url, **options)
    assert caught.value.key == key
    assert "hush" not in str(caught.value)
    assert "/cd" not in str(url) or "'http://***@host' is not a URL: check its port, and write /" in str(caught.value)


@pytest.mark.parametrize("password", ["hush", "h@ush"])
def test_the_address_is_shown_without_its_password(password: str) -> None:
    assert AtroposClient(f"http://user:{password}@host:9001/api").api_url == "http://***@host:9001/api"


@pytest.mark.parametrize("prefix", ["", "/", "/api", "/api/", "/a/b"])
def test_path_prefix_token_and_headers_go_with_every_request(fault_server: FaultServer, prefix: str) -> None:
    paths = [f"{prefix.rstrip('/')}/{name}" for name in ("status", "scored_data_list")]
    for path in paths:
        fault_server.script(path, answer(STATUS))
    with quick(fault_server.url + prefix, token="abc.DEF-1", headers={"X-Team": "red"}) as client:
        client.status()
        client.post_scored_data_list([b"{}"])
        assert client.api_url == fault_server.url + prefix
    assert [request.path for request in fault_server.requests] == paths
    for request in fault_server.requests:
        assert (request.headers["authorization"], request.headers["x-team"]) == ("Bearer abc.DEF-1", "red")
    assert fault_server.requests[1].headers["content-type"] == "application/json"
    assert fault_server.connections == 2  # one for each request


def test_no_proxy_is_used_on_this_machine(fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fault_server.script("/status", answer(STATUS))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with faults.refused_url() as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy)
        assert quick(fault_server.url).status().queue_size == 2
        failure(quick("http://api.example.invalid"), AtroposClient.status)  # by the proxy, which is dead
    monkeypatch.setenv("ALL_PROXY", "telnet://proxy:1")
    assert quick(fault_server.url).status().queue_size == 2
    with pytest.raises(ConfigError, match=r"proxy that ALL_PROXY .* cannot be used: .*telnet"):
        quick("http://api.example.invalid")
