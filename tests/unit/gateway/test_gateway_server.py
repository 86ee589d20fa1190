"""GatewayServer: start, stop, ports, signals."""

import logging
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import eventually
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.config.schema import GatewayConfig
from atropos_verl.errors import ServiceError
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.http_thread import bracketed, listen, reachable

TOKENIZER = build_tiny_tokenizer()


def make_app(engine: FakeEngine | None = None, **options: Any) -> object:
    return create_app(engine or FakeEngine(), TOKENIZER, model_name="tiny", **options)


def test_start_serves_and_stop_ends_it_and_it_can_start_again(caplog: pytest.LogCaptureFixture) -> None:
    server = GatewayServer(make_app())
    assert not server.is_running
    with pytest.raises(ServiceError, match="not started"):
        _ = server.url
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            url = server.start(timeout=10.0)
        assert url == server.url == server.start()  # idempotent
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        server.stop(timeout=10.0)
        server.stop(timeout=10.0)
        assert not server.is_running
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    assert "GET /health" not in caplog.text  # no access log
    assert [t for t in threading.enumerate() if t.name == "inference-gateway"] == []


def test_who_connects_before_the_start_waits_and_is_answered() -> None:
    listener = listen("127.0.0.1", 0, "inference gateway", "advice")
    port = listener.getsockname()[1]
    assert listener.proto == socket.IPPROTO_TCP, "else asyncio leaves out TCP_NODELAY, and answers wait 44 ms"
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as early:
        early.sendall(b"GET /health HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
        with GatewayServer(make_app(), listener=listener) as server:
            assert server.url == f"http://127.0.0.1:{port}"
            assert early.makefile("rb").read().startswith(b"HTTP/1.1 200")
    assert listener.fileno() == -1  # closed by the server
    assert server.start(timeout=10.0) == f"http://127.0.0.1:{port}"  # again, with a socket of its own
    server.stop()


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("127.0.0.2", "127.0.0.2"),
        ("a.example", "a.example"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]"),
        ("::", "[::1]"),
    ],
)
def test_every_bind_address_has_a_url_that_can_be_called(host: str, called: str) -> None:
    assert bracketed(reachable(host)) == called
    assert bool(GatewayConfig(host=host).for_app()["allowed_hosts"]) == host.startswith(("127.", "::1"))


@pytest.mark.parametrize("in_time", [True, False])
def test_stop_lets_requests_finish_and_cancels_those_that_take_too_long(in_time: bool) -> None:
    engine = FakeEngine(token_delay=0.02)
    if not in_time:
        engine.pause()  # for ever
    server = GatewayServer(make_app(engine))
    url = server.start()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/generate", json={"prompt": [1], "max_tokens": 20}, timeout=30)
        eventually(lambda: len(engine.active) == 1, "the request to be running")
        server.stop(timeout=20.0 if in_time else 0.5)
        assert not server.is_running and not engine.active
        if in_time:
            assert len(answer.result(10.0).json()["token_ids"][0]) == 20
        else:
            assert len(engine.cancelled) == 1
            failure = answer.exception(10.0)
            assert isinstance(failure, httpx.HTTPError) or answer.result().status_code != 200
