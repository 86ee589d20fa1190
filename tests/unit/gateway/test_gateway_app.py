"""All endpoints share key, errors, health, metrics, pauses, and the end of requests whose client goes away."""

import asyncio
import contextlib
import gc
import json
import logging
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

from atropos_verl.engine.protocol import RequestGate
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError
from atropos_verl.gateway.service import GatewayService
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import GenerationRequest

TOKENIZER = build_tiny_tokenizer()


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    (value,) = [line.split(" ")[-1] for line in lines if line.startswith(f"atropos_verl_gateway_{name} ")]
    return float(value)


def test_key_is_needed_everywhere_but_for_health() -> None:
    with serving(FakeEngine(), TOKENIZER, api_key="s3cret") as client:
        assert client.get("/health").status_code == 200
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/generate"), ("GET", "/nothing")):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"x-api-key": "x"}):
                response = client.request(method, path, headers=headers, json={"prompt": "a"})
                assert response.status_code == 401, (path, headers)
                assert response.json()["error"]["type"] == "authentication_error"
                assert "s3cret" not in response.text
        basic = b64encode(b"run:s3cret").decode()
        for right in ({"Authorization": "Bearer s3cret"}, {"Authorization": f"Basic {basic}"}, {"x-api-key": "s3cret"}):
            assert client.post("/generate", headers=right, json={"prompt": [1], "max_tokens": 1}).status_code == 200
            assert client.get("/nothing", headers=right).status_code == 404


def test_a_web_page_cannot_use_it() -> None:
    engine, body = FakeEngine(), b'{"prompt": [1], "max_tokens": 1}'
    with serving(engine, TOKENIZER, allowed_hosts=("127.0.0.1", "localhost")) as client:
        for name, value, status in (
            ("Origin", "https://elsewhere.example", 403),
            ("Referer", "https://elsewhere.example/page", 403),
            ("Sec-Fetch-Site", "cross-site", 403),
            ("Host", "rebound.example", 403),
            ("Content-Type", "text/plain", 415),
            ("Content-Type", "application/x-www-form-urlencoded", 415),
            ("Host", "localhost:9004", 200),
            ("Sec-Fetch-Site", "none", 200),
            ("Content-Type", "application/json; charset=utf-8", 200),
        ):
            engine.reset()
            assert client.post("/generate", headers={name: value}, content=body).status_code == status
            headers = {} if name == "Content-Type" else {name: value}
            assert client.get("/v1/models", headers=headers).is_error == (status == 403)
            assert len(engine.requests) == (status == 200)


def test_what_one_request_may_ask_for_is_bounded() -> None:
    engine = FakeEngine(max_context_len=1 << 20)
    with serving(engine, TOKENIZER) as client:
        for body, param in (
            ({"prompt": ["a"] * 400_000}, "prompt"),
            ({"prompt": ["a"] * 100, "n": 100}, "n"),
            ({"prompt": ["a"] * 4, "n": 1024, "max_tokens": 1 << 30}, "max_tokens"),
        ):
            response = client.post("/v1/completions", json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert engine.requests == []
        refused(client, "/v1/completions", prompt="a", chat_template_kwargs=json.loads("[" * 900 + "]" * 900))
        many = client.post("/v1/completions", content=b'{"prompt":[' + b"[]," * (1 << 18) + b"[]]}")
        assert many.status_code == 400 and "262144 brackets" in many.json()["error"]["message"]
        deep = client.post("/v1/completions", content=b'{"prompt":' + b"[" * 100_000)
        assert deep.status_code == 400 and "JSON" in deep.json()["error"]["message"]


def test_refused_requests_are_not_kept_until_the_collector_comes() -> None:
    body = json.dumps({"prompt": [5] * 77_777 + ["a"]}).encode()
    with serving(FakeEngine(), TOKENIZER) as client:
        gc.collect()
        gc.disable()
        try:
            for _ in range(30):
                assert client.post("/v1/completions", content=body).status_code == 400
            kept = sum(isinstance(item, list) and len(item) == 77_778 for item in gc.get_objects())
        finally:
            gc.enable()
    assert kept <= 10, "the last of each thread that reads"


def test_health_models_and_unknown_routes() -> None:
    engine = FakeEngine(max_context_len=99)
    engine.policy_version = 12
    with serving(engine, TOKENIZER, model_name="org/tiny") as client:
        health = client.get("/health").json()
        assert health == {"status": "ok", "policy_version": 12, "paused": False, "in_flight": 0}
        (card,) = client.get("/v1/models").json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("org/tiny", "model", 99)
        wrong = client.post("/v1/generate", json={})
        assert wrong.status_code == 404 and wrong.json()["error"]["type"] == "not_found_error"
        assert client.get("/generate").status_code == 405


def test_engine_errors_become_http_errors_and_faults_leave_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with serving(engine, TOKENIZER) as client:
        for error, status, text in (
            (GenerationRequestError("token id 9999 is outside the vocabulary", "prompt"), 400, "9999"),
            (EngineStoppedError("closed"), 503, "has stopped"),
            (EngineError("out of memory"), 500, "out of memory"),
            (TimeoutError("not admitted within 1 s"), 504, "not admitted"),
            (KeyError("inner secret"), 500, "KeyError"),
        ):
            engine.fail_with = error
            caplog.clear()
            for path, body in (("/generate", {"prompt": [1]}), ("/v1/completions", {"prompt": ["a", "b"]})):
                response = client.post(path, json=body)
                assert response.status_code == status
                assert text in response.json()["error"]["message"]
                assert "secret" not in response.text
            streamed = client.post("/v1/completions", json={"prompt": "a", "stream": True})
            assert streamed.status_code == status  # nothing had been sent yet
            assert not engine.active
            logged = [record.exc_info for record in caplog.records if record.levelno == logging.ERROR]
            assert len(logged) == (3 if status >= 500 else 0)
            assert all((info is not None and info[0] is type(error)) == (status == 500) for info in logged)


def test_metrics_count_requests_tokens_and_version() -> None:
    engine = FakeEngine()
    engine.policy_version = 2
    with serving(engine, TOKENIZER) as client:
        client.post("/generate", json={"prompt": [1, 2, 3], "max_tokens": 4, "n": 2})
        client.post("/generate", json={"prompt": [1], "top_p": 9})
        client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 5, "stream": True})
        eventually(lambda: 'endpoint="/v1/completions",status="200"' in client.get("/metrics").text, "the last one")
        text = client.get("/metrics").text
        assert 'atropos_verl_gateway_requests_total{endpoint="/generate",status="200"} 1.0\n' in text
        assert 'atropos_verl_gateway_requests_total{endpoint="/generate",status="400"} 1.0\n' in text
        assert metric(client, "prompt_tokens_total") == 5
        assert metric(client, "generated_tokens_total") == 13
        assert metric(client, "policy_version") == 2
        eventually(lambda: metric(client, "requests_in_flight") == 0, "the end of the last one")
        assert "# TYPE atropos_verl_gateway_requests_total counter\n" in text
        assert "# TYPE atropos_verl_gateway_paused gauge\n" in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": [1, 2], "n": 4, "max_tokens": 400}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 400}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 400, "stream": True}),
        ("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 400}}),
    ],
)
def test_client_that_hangs_up_frees_its_slots(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine(token_delay=0.05)  # 20 s per request, were it not cancelled
    with serving(engine, TOKENIZER) as client:
        connection = raw_post(client, path, body)
        prompts = body.get("prompt")
        expected = 2 if prompts == ["a", "b"] else 1
        eventually(lambda: len(engine.active) == expected, "the request to be running")
        assert client.get("/health").json()["in_flight"] == 1
        connection.close()
        eventually(lambda: not engine.active, "the slots to be free")
        assert sorted(engine.cancelled) == sorted(engine.started) and engine.finished == []
        eventually(
            lambda: f'endpoint="{path}",status="499"}} 1' in client.get("/metrics").text, "status 499 to be counted"
        )
        assert client.get("/health").json()["in_flight"] == 0


def test_short_requests_are_read_while_many_long_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
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
    engine = FakeEngine()
    engine.pause()
    with serving(engine, TOKENIZER, request_timeout=0.2) as client:
        response = client.post("/generate", json={"prompt": [1]})
        assert response.status_code == 504
        error = response.json()["error"]
        assert error["type"] == "timeout_error" and "0.2 s" in error["message"]
        assert not engine.active and len(engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_an_answer_is_sent_after_its_record_is_safe(stream: bool) -> None:
    stored: Future[None] = Future()
    recorded: list[tuple[int, ...]] = []

    class SlowLedger(Ledger):
        def record(self, prompt_token_ids: Any, generations: Any, temperature: float = 1.0) -> Any:
            recorded.extend(generation.token_ids for generation in generations)
            return stored, []

    with serving(FakeEngine(), TOKENIZER, ledger=SlowLedger()) as client, ThreadPoolExecutor(1) as pool:
        body = {"prompt": [1], "max_tokens": 2, "stream": stream}
        answer = pool.submit(client.post, "/v1/completions", json=body)
        eventually(lambda: recorded == [(2, 3)], "the completion to be recorded")
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


def test_aborted_generation_is_not_passed_off_as_a_whole_one() -> None:
    engine = FakeEngine()
    engine.abort_all = True
    with serving(engine, TOKENIZER) as client:
        response = client.post("/generate", json={"prompt": [1], "max_tokens": 2})
        assert response.status_code == 503 and response.json()["error"]["code"] == "aborted"


def test_body_that_is_too_large_is_a_413_and_is_not_kept() -> None:
    engine = FakeEngine()
    with serving(engine, TOKENIZER) as client:
        response = client.post("/generate", content=(b"[" * (1 << 20) for _ in range(65)))
        assert response.status_code == 413
        assert "16777216 bytes" in response.json()["error"]["message"]
        assert client.post("/generate", json={"prompt": [1], "max_tokens": 1}).status_code == 200


def test_base_url_with_a_slash_at_its_end_still_reaches_everything() -> None:
    with serving(FakeEngine(), TOKENIZER) as client:
        assert client.get(f"{client.base_url}//health").status_code == 200  # base_url.replace("/v1", "") + "/health"
        response = client.post(f"{client.base_url}//generate", json={"prompt": [1], "max_tokens": 1})
        assert response.json()["token_ids"] == [[2]]


def test_equal_refusals_show_in_our_log_once_in_10_s(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"Authorization": "Bearer k"}
    monkeypatch.setattr("atropos_verl.http_thread._SAME_LINE_SECONDS", 1e9)
    with caplog.at_level(logging.WARNING, "atropos_verl"), serving(FakeEngine(), TOKENIZER, api_key="k") as client:
        for _ in range(3):
            client.get("/v1/models")
            client.get("/v1/health%0AFORGED%1B[2J", headers=right)
            client.post("/generate", headers=right, json={"prompt": [1], "logit_bias": {"1": 5}})
        shown = [record.getMessage() for record in caplog.records]
        monkeypatch.setattr("atropos_verl.http_thread._SAME_LINE_SECONDS", 0.0)
        client.get("/v1/models")
        client.get("/v1/health%0AFORGED%1B[2J", headers=right)
        client.post("/generate", headers=right, json={"prompt": [1], "logit_bias": {"1": 5}})
    assert [record.getMessage() for record in caplog.records] == shown * 2
    key, path, field = shown
    assert "/v1/models" in key and "API key" in key
    assert "GET /v1/healthFORGED?[2J: no such endpoint" in path
    assert "/generate: a client was refused: logit_bias: not supported" in field


def test_the_runs_bound_on_new_tokens_holds_for_requests_that_ask_for_more(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    chat = {"messages": [{"role": "user", "content": "a"}]}
    with serving(engine, TOKENIZER, max_new_tokens=3) as client:
        for path, body in (
            ("/generate", {"prompt": [1], "max_tokens": 99}),
            ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 99}}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 99}),
            ("/v1/chat/completions", {**chat, "max_tokens": 99}),
            ("/v1/chat/completions", chat),
            ("/generate", {"prompt": [1], "max_tokens": 2}),
        ):
            post(client, path, **body)
    assert [request.max_tokens for request in engine.requests] == [3, 3, 3, 3, 3, 2]
    [said] = [message for message in caplog.messages if "max_response_length" in message]
    assert said == "requests ask for up to 99 new tokens; max_response_length=3 is what they get"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 1}),
        ("/generate", {"text": ["a", "b", "c"], "sampling_params": {"n": 2, "max_new_tokens": 1}}),
    ],
)
def test_the_prompts_of_one_request_share_its_turns(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    with serving(engine, TOKENIZER) as client:
        assert client.post(path, json=body).status_code == 200
    assert sorted((request.place, request.asked) for request in engine.requests) == [(0, 6), (2, 6), (4, 6)]


def test_conversations_that_may_be_continued_are_bounded_with_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atropos_verl.gateway.service._MAX_KEPT_BYTES", 100_000)
    items = [
        {"type": "message", "role": "user", "content": "a"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": json.dumps({"a": "x" * 60_000})},
    ]
    engine = FakeEngine(max_context_len=1 << 20)
    with serving(engine, TOKENIZER) as client:
        first, second = (post(client, "/v1/responses", input=items, max_output_tokens=1)["id"] for _ in range(2))
        for known, status in ((first, 400), (second, 200)):
            body = {"input": "and?", "previous_response_id": known, "max_output_tokens": 1, "store": False}
            assert client.post("/v1/responses", json=body).status_code == status
