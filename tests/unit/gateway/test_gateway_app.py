"""What all endpoints share: start and stop, key, errors, metrics, pauses, bounds, and clients that go away."""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import threading
from base64 import b64encode
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import eventually, post, raw_post, refused, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.config.schema import GatewayConfig
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError, ServiceError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.service import GatewayService
from atropos_verl.http_thread import bracketed, listen, reachable
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import GenerationRequest

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
TOKENIZER = build_tiny_tokenizer()
USER = {"role": "user", "content": "a"}


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    (value,) = [line.split(" ")[-1] for line in lines if line.startswith(f"atropos_verl_gateway_{name} ")]
    return float(value)


def test_who_connects_before_the_start_is_answered_and_it_can_start_again(caplog: Log) -> None:
    listener = listen("127.0.0.1", 0, "inference gateway", "advice")
    address = listener.getsockname()
    assert listener.proto == socket.IPPROTO_TCP, "else asyncio leaves out TCP_NODELAY, and answers wait 44 ms"
    server = GatewayServer(create_app(FakeEngine(), TOKENIZER, model_name="tiny"), listener=listener)
    with pytest.raises(ServiceError, match="not started"):
        _ = server.url
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.INFO), socket.create_connection(address, timeout=10.0) as early:
        early.sendall(b"GET /health HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
        server.start(timeout=10.0)
        assert early.makefile("rb").read().startswith(b"HTTP/1.1 200")
        for _ in range(2):  # the second time with a socket of its own
            url = server.start(timeout=10.0)
            assert url == server.url == f"http://127.0.0.1:{address[1]}"
            assert httpx.get(f"{url}/health").json()["status"] == "ok"
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
            server.stop(timeout=10.0)
            server.stop(timeout=10.0)
            assert not server.is_running and listener.fileno() == -1
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
    assert "GET /health" not in caplog.text  # no access log
    assert [t for t in threading.enumerate() if t.name == "inference-gateway"] == []


def test_every_bind_address_has_a_url_that_can_be_called() -> None:
    called = {"127.0.0.2": "127.0.0.2", "a.example": "a.example", "0.0.0.0": "127.0.0.1", "::1": "[::1]", "::": "[::1]"}
    assert {host: bracketed(reachable(host)) for host in called} == called
    guarded = [host for host in called if GatewayConfig(host=host).for_app()["allowed_hosts"]]
    assert guarded == ["127.0.0.2", "::1"]


@pytest.mark.parametrize("in_time", [True, False])
def test_stop_lets_requests_finish_and_cancels_those_that_take_too_long(in_time: bool) -> None:
    engine = FakeEngine(token_delay=0.02)
    if not in_time:
        engine.pause()  # for ever
    server = GatewayServer(create_app(engine, TOKENIZER, model_name="tiny"))
    url = server.start()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/generate", json={"prompt": [1], "max_tokens": 20}, timeout=30)
        eventually(lambda: len(engine.active) == 1, "the request to be running")
        server.stop(timeout=20.0 if in_time else 0.5)
        assert not server.is_running and not engine.active
        if in_time:
            assert len(answer.result(10.0).json()["token_ids"][0]) == 20
        else:
            failure = answer.exception(10.0)
            assert isinstance(failure, httpx.HTTPError) or answer.result().status_code != 200


def test_without_the_key_or_from_a_web_page_nothing_but_health_can_be_called() -> None:
    engine, hosts = FakeEngine(), ("127.0.0.1", "localhost")
    basic, json_body = b64encode(b"run:s3cret").decode(), {"prompt": [1], "max_tokens": 1}
    with serving(engine, TOKENIZER, api_key="s3cret", allowed_hosts=hosts) as client:
        assert client.get("/health").status_code == 200
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/generate"), ("GET", "/nothing")):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"x-api-key": "x"}):
                response = client.request(method, path, headers=headers, json=json_body)
                assert response.status_code == 401, (path, headers)
                assert response.json()["error"]["type"] == "authentication_error"
                assert "s3cret" not in response.text
        for right in ({"Authorization": "Bearer s3cret"}, {"Authorization": f"Basic {basic}"}, {"x-api-key": "s3cret"}):
            assert client.get("/v1/models", headers=right).status_code == 200
            assert client.get("/nothing", headers=right).status_code == 404
        for name, value, status in (
            ("Host", "rebound.example", 403),
            ("Sec-Fetch-Site", "cross-site", 403),
            ("Content-Type", "text/plain", 415),
            ("Content-Type", "application/json; charset=utf-8", 200),
        ):
            assert client.post("/generate", headers={**right, name: value}, json=json_body).status_code == status
        assert len(engine.requests) == 1


def test_what_one_request_may_ask_for_is_bounded(client: httpx.Client, engine: FakeEngine) -> None:
    engine.max_context_len = 1 << 20
    for body, param in (
        ({"prompt": ["a"] * 400_000}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"prompt": ["a"] * 4, "n": 1024, "max_tokens": 1 << 30}, "max_tokens"),
    ):
        assert refused(client, "/v1/completions", **body)["param"] == param
    refused(client, "/v1/completions", prompt="a", chat_template_kwargs=json.loads("[" * 900 + "]" * 900))
    for content, status, said in (
        (b'{"prompt":[' + b"[]," * (1 << 18) + b"[]]}", 400, "262144 brackets"),
        (b'{"prompt":' + b"[" * 100_000, 400, "JSON"),
        *((body, 400, "JSON") for body in (b"", b"{", b"[1]", b'"x"', b'{"prompt": "\xff"}')),
        ((b"[" * (1 << 20) for _ in range(65)), 413, "16777216 bytes"),
    ):
        response = client.post("/v1/completions", content=content)
        assert response.status_code == status and said in response.json()["error"]["message"]
    assert engine.requests == []
    assert client.post("/generate", json={"prompt": [1], "max_tokens": 1}).status_code == 200


def test_refused_requests_are_not_kept_until_the_collector_comes(client: httpx.Client) -> None:
    body = json.dumps({"prompt": [5] * 77_777 + ["a"]}).encode()
    gc.collect()
    gc.disable()
    try:
        for _ in range(30):
            assert client.post("/v1/completions", content=body).status_code == 400
        kept = sum(isinstance(item, list) and len(item) == 77_778 for item in gc.get_objects())
    finally:
        gc.enable()
    assert kept <= 10, "the last of each thread that reads"


def test_health_models_and_unknown_routes(client: httpx.Client, engine: FakeEngine) -> None:
    engine.max_context_len, engine.policy_version = 99, 12
    health = {"status": "ok", "policy_version": 12, "paused": False, "in_flight": 0}
    for path in ("/health", f"{client.base_url}//health"):  # base_url.replace("/v1", "") + "/health"
        assert client.get(path).json() == health
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 99)
    wrong = client.post("/v1/generate", json={})
    assert wrong.status_code == 404 and wrong.json()["error"]["type"] == "not_found_error"
    assert client.get("/generate").status_code == 405


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (GenerationRequestError("token id 9999 is outside the vocabulary", "prompt"), 400, "9999"),
        (EngineStoppedError("closed"), 503, "has stopped"),
        (EngineError("out of memory"), 500, "out of memory"),
        (TimeoutError("not admitted within 1 s"), 504, "not admitted"),
        (KeyError("inner secret"), 500, "KeyError"),
        (None, 503, "aborted on the server"),  # not passed off as a whole answer
    ],
)
def test_engine_errors_become_http_errors_and_faults_leave_a_traceback(
    client: httpx.Client, engine: FakeEngine, caplog: Log, error: Any, status: int, text: str
) -> None:
    engine.fail_with, engine.abort_all = error, error is None
    for path, body in (
        ("/generate", {"prompt": [1]}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "stream": True}),  # nothing had been sent yet
    ):
        response = client.post(path, json=body)
        assert response.status_code == status
        assert text in response.json()["error"]["message"] and "secret" not in response.text
    assert not engine.active
    logged = [record.exc_info for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == (3 if status >= 500 else 0)
    assert all((info is not None and info[0] is type(error)) == (status == 500) for info in logged)


def test_equal_refusals_show_in_our_log_once_in_10_s(caplog: Log, monkeypatch: Patch) -> None:
    right = {"Authorization": "Bearer k"}
    with caplog.at_level(logging.WARNING, "atropos_verl"), serving(FakeEngine(), TOKENIZER, api_key="k") as client:
        for seconds, times in ((1e9, 3), (0.0, 1)):
            monkeypatch.setattr("atropos_verl.http_thread._SAME_LINE_SECONDS", seconds)
            for _ in range(times):
                client.get("/v1/models")
                client.get("/v1/health%0AFORGED%1B[2J", headers=right)
                client.post("/generate", headers=right, json={"prompt": [1], "logit_bias": {"1": 5}})
    key, path, field, *again = caplog.messages
    assert again == [key, path, field]
    assert "/v1/models" in key and "API key" in key
    assert "GET /v1/healthFORGED?[2J: no such endpoint" in path
    assert "/generate: a client was refused: logit_bias: not supported" in field


def test_metrics_count_requests_tokens_and_version() -> None:
    engine = FakeEngine()
    engine.policy_version = 2
    with serving(engine, TOKENIZER) as client:
        client.post("/generate", json={"prompt": [1, 2, 3], "max_tokens": 4, "n": 2})
        client.post("/generate", json={"prompt": [1], "top_p": 9})
        client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 5, "stream": True})
        eventually(lambda: metric(client, "requests_in_flight") == 0, "the end of the last one")
        text = client.get("/metrics").text
        for path, status in (("/generate", 200), ("/generate", 400), ("/v1/completions", 200)):
            assert f'requests_total{{endpoint="{path}",status="{status}"}} 1.0\n' in text
        figures = {"prompt_tokens_total": 5, "generated_tokens_total": 13, "policy_version": 2}
        assert {name: metric(client, name) for name in figures} == figures
        assert "# TYPE atropos_verl_gateway_requests_total counter\n" in text
        assert "# TYPE atropos_verl_gateway_paused gauge\n" in text


@pytest.mark.parametrize(
    ("path", "more", "running"),
    [("/generate", {"n": 4}, 1), ("/v1/completions", {}, 2), ("/v1/chat/completions", {"stream": True}, 1)],
)
def test_client_that_hangs_up_frees_its_slots(
    client: httpx.Client, engine: FakeEngine, path: str, more: Any, running: int
) -> None:
    engine.token_delay = 0.05  # 20 s per request, were it not cancelled
    body = {"prompt": ["a", "b"] if running == 2 else "a", "messages": [USER], "max_tokens": 400, **more}
    with raw_post(client, path, body):
        eventually(lambda: len(engine.active) == running, "the request to be running")
        assert client.get("/health").json()["in_flight"] == 1
    counted = f'endpoint="{path}",status="499"}} 1'
    eventually(lambda: counted in client.get("/metrics").text, "status 499 to be counted")
    assert client.get("/health").json()["in_flight"] == 0 and not engine.active
    assert sorted(engine.cancelled) == sorted(engine.started) and len(engine.started) == running


def test_short_requests_are_read_while_many_long_ones_are(monkeypatch: Patch) -> None:
    tokenizer, go_on, encode = build_tiny_tokenizer(), threading.Event(), TOKENIZER.encode

    def slow_where_long(text: str, **options: Any) -> Any:
        assert len(text) < 1000 or go_on.wait(15.0)
        return encode(text[:9], **options)

    monkeypatch.setattr(tokenizer, "encode", slow_where_long)
    with serving(FakeEngine(), tokenizer) as client, ThreadPoolExecutor(40) as pool:
        body = {"prompt": "x" * 200_000, "max_tokens": 1}
        long = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(40)]
        eventually(lambda: client.get("/health").json()["in_flight"] == 40, "all long requests to be there")
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        assert not any(answer.done() for answer in long)
        go_on.set()
        assert {answer.result().status_code for answer in long} == {200}


def test_request_during_a_pause_waits_and_is_served_unless_its_client_hangs_up() -> None:
    engine, gate = FakeEngine(), RequestGate()
    with serving(engine, TOKENIZER, gate=gate) as client, ThreadPoolExecutor(1) as pool:
        gate.pause(timeout=5.0)
        waiting = pool.submit(client.post, "/generate", json={"prompt": [1], "max_tokens": 2})
        eventually(lambda: gate.waiting == 1, "the request to wait at the gate")
        leaving = raw_post(client, "/generate", {"prompt": [7]})
        eventually(lambda: gate.waiting == 2, "another request to wait at the gate")
        leaving.close()
        eventually(lambda: gate.waiting == 1, "the request of a client that hung up to be forgotten")
        health = client.get("/health")  # alive all the same: environments stop asking a server that is not
        assert health.status_code == 200
        assert health.json() == {"status": "paused", "policy_version": 0, "paused": True, "in_flight": 1}
        assert metric(client, "paused") == 1 and metric(client, "paused_seconds_total") > 0
        assert not waiting.done() and engine.started == []
        engine.policy_version = 1
        gate.resume()
        answer = waiting.result(15.0).json()
        assert (answer["policy_version"], answer["token_ids"]) == (1, [[2, 3]])
        assert len(engine.started) == 1 and gate.in_flight == 0


def test_request_timeout_is_a_504_and_frees_the_slot() -> None:
    engine = FakeEngine(token_delay=20.0)
    with serving(engine, TOKENIZER, request_timeout=0.2) as client:
        response = client.post("/generate", json={"prompt": [1]})
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (504, "timeout_error") and "0.2 s" in error["message"]
        assert not engine.active and len(engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_an_answer_is_sent_after_its_record_is_safe(monkeypatch: Patch, stream: bool) -> None:
    stored, recorded = Future[None](), list[Any]()
    monkeypatch.setattr(Ledger, "record", lambda self, prompt, made, temperature: recorded.extend(made) or (stored, []))
    with serving(FakeEngine(), TOKENIZER, ledger=Ledger()) as client, ThreadPoolExecutor(1) as pool:
        body = {"prompt": [1], "max_tokens": 2, "stream": stream}
        answer = pool.submit(client.post, "/v1/completions", json=body)
        eventually(lambda: [made.token_ids for made in recorded] == [(2, 3)], "the completion to be recorded")
        assert client.get("/health").json()["in_flight"] == 1 and not answer.done()
        stored.set_result(None)
        assert answer.result(15.0).status_code == 200


@pytest.mark.parametrize(("read", "of_records"), [(0, []), (2, [2]), (5, [5]), (6, [5])])
def test_a_stream_is_told_once_whenever_its_reader_leaves(read: int, of_records: list[int]) -> None:
    """What it made is recorded, and the record is its end. Without a token, it failed."""
    engine, told = FakeEngine(), []
    engine.fail_with = None if read else EngineError("broken")

    async def follow() -> None:
        gate = RequestGate()
        service = GatewayService(engine, None, "tiny", gate, Ledger(), None, on_request=lambda *end: told.append(end))  # type: ignore[arg-type]
        request = GenerationRequest(prompt_token_ids=(1,), max_tokens=5, request_id="r")
        async with aclosing(service.stream(request)) as deltas:
            for _ in range(read or 1):
                await anext(deltas, None)

    with contextlib.suppress(EngineError):
        asyncio.run(follow())
    [(records, *_, reason)] = told
    assert [tokens for _, tokens, _ in records] == of_records and (reason is None) == bool(read)


def test_the_runs_bound_on_new_tokens_holds_for_requests_that_ask_for_more(caplog: Log) -> None:
    engine = FakeEngine()
    with serving(engine, TOKENIZER, max_new_tokens=3) as client:
        for asked in ({"max_tokens": 99}, {}, {"max_tokens": 2}):
            post(client, "/v1/chat/completions", messages=[USER], **asked)
    assert [request.max_tokens for request in engine.requests] == [3, 3, 2]
    [said] = [message for message in caplog.messages if "max_response_length" in message]
    assert said == "requests ask for up to 99 new tokens; max_response_length=3 is what they get"


def test_conversations_that_may_be_continued_are_bounded_with_their_calls(
    client: httpx.Client, engine: FakeEngine, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("atropos_verl.gateway.service._MAX_KEPT_BYTES", 100_000)
    engine.max_context_len = 1 << 20
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": json.dumps({"a": "x" * 60_000})}
    asked: dict[str, Any] = {"input": [USER, call], "max_output_tokens": 1}
    first, second = (post(client, "/v1/responses", **asked)["id"] for _ in range(2))
    asked |= {"input": "and?", "store": False}
    refused(client, "/v1/responses", **asked, previous_response_id=first)
    post(client, "/v1/responses", **asked, previous_response_id=second)
