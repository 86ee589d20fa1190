"""What every server of the project shares: whom it answers, and how many connections it keeps for how long."""

import asyncio
import base64
import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.serving import eventually

from atropos_verl import http_thread
from atropos_verl.errors import ServiceError
from atropos_verl.http_thread import Listener, ServerThread, environment_token, foreign_page, has_token, listen

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
OWN, SITE = {"host": "localhost:8000"}, "sec-fetch-site"


def test_pages_of_other_sites_are_found_by_what_their_browser_says() -> None:
    allowed: list[dict[str, str]] = [
        OWN,
        {"host": "[::1]:8000"},
        {"host": "LOCALHOST"},
        {**OWN, "origin": "http://localhost:8000", SITE: "same-origin"},
        {**OWN, "referer": "http://localhost:8000/page", SITE: "same-origin"},
        {**OWN, SITE: "none"},
        {**OWN, "origin": "http://a.example", SITE: "cross-site"},
        {**OWN, "referer": "http://a.example/x/y", SITE: "cross-site"},
    ]
    refused: list[tuple[dict[str, str], str]] = [
        ({"host": "evil.example:8000"}, "host 'evil.example:8000'"),
        ({"host": "localhost.evil.example"}, "host 'localhost.evil.example'"),
        ({"host": "["}, "host '['"),
        ({}, "host ''"),
        ({**OWN, "origin": "http://evil.example"}, "origin 'http://evil.example'"),
        ({**OWN, "origin": "null"}, "origin 'null'"),
        ({**OWN, "origin": "http://localhost:3000"}, "origin 'http://localhost:3000'"),
        ({**OWN, "referer": "http://evil.example/page"}, "origin 'http://evil.example'"),
        ({**OWN, SITE: "cross-site"}, "Sec-Fetch-Site: 'cross-site'"),
        ({**OWN, SITE: "same-site"}, "Sec-Fetch-Site: 'same-site'"),
        ({**OWN, SITE: "\n"}, r"Sec-Fetch-Site: '\n'"),
    ]
    rule = (("localhost", "127.0.0.1", "::1"), ["http://a.example"])
    assert [foreign_page(headers, *rule) for headers in allowed] == [None] * len(allowed)
    for headers, said in refused:
        assert said in str(foreign_page(headers, *rule))


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_a_token_is_taken_as_bearer_or_as_the_password_of_basic() -> None:
    for good in ("Bearer T", "bearer  T", basic("run:T"), basic(":T")):
        assert has_token({"authorization": good}, "T")
        assert has_token({"authorization": good}, "other", "T")
    bad = ("", "T", "Bearer", "Bearer TT", "Bearer t", "Basic T", basic("T"), basic("run:"), basic("T:x"), "Bearer ü")
    assert not any(has_token({"authorization": sent}, "T") for sent in bad)
    assert not has_token({}, "T") and not has_token({"authorization": "Bearer "}, "")
    assert environment_token("T") != environment_token("U")
    assert not has_token({"authorization": "Bearer T"}, environment_token("T"))


BUSY = threading.Event()


async def app(scope: Any, receive: Any, send: Any) -> None:
    status, body, parts = {"/long": (200, b"x" * 100_000, 500), "/refused": (401, b"", 1)}.get(
        scope["path"], (200, b"ok", 1)
    )
    while scope["path"] == "/busy" and BUSY.is_set():  # noqa: ASYNC110 - set in another thread
        await asyncio.sleep(0.005)
    while status == 200 and (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"%d" % (parts * len(body)))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in range(parts):
        await send({"type": "http.response.body", "body": body, "more_body": part < parts - 1})


@pytest.fixture
def listener() -> Listener:
    return listen("127.0.0.1", 0, "test", "")


@pytest.fixture
def port(listener: Listener) -> Iterator[int]:
    with ServerThread(app, service="test", advice="", host="127.0.0.1", port=0, listener=listener, lifespan="off"):
        yield listener.getsockname()[1]


def connect(port: int, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20.0)
    connection.sendall(said)
    return connection


def wait_for_the_end(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1000):
            pass


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
BODY_AHEAD = HEAD + b"Content-Length: 9\r\n\r\n"


@pytest.mark.parametrize("said", [b"", b"POST / HT", HEAD, BODY_AHEAD, BODY_AHEAD + b"12"])
def test_an_unfinished_request_is_closed(monkeypatch: Patch, said: bytes, port: int) -> None:
    monkeypatch.setattr(http_thread, "_SECONDS", 0.1)
    wait_for_the_end(connect(port, said))


@pytest.mark.parametrize(("length", "pause"), [(1, 0.01), (1000, 0.0)], ids=["byte by byte", "never ends"])
def test_an_endless_header_is_closed(monkeypatch: Patch, port: int, length: int, pause: float) -> None:
    monkeypatch.setattr(http_thread, "_SECONDS", 0.3)
    connection = connect(port, HEAD)
    with pytest.raises(OSError):
        while True:
            connection.sendall(b"X: " + b"y" * length + b"\r\n")
            http_thread.time.sleep(pause)


def test_a_body_that_was_refused_unread_is_no_header(port: int) -> None:
    length = 4 * http_thread._BYTES
    connection = connect(port, HEAD.replace(b"/", b"/refused", 1) + b"Content-Length: %d\r\n\r\n" % length)
    said = connection.recv(1000)  # refused before the body comes
    for _ in range(length // 1024):
        connection.sendall(b"x" * 1024)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while not said.endswith(b"ok") and (more := connection.recv(1000)):
        said += more
    assert [line[9:12] for line in said.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")] == [b"401", b"200"]


def test_who_does_not_read_is_not_waited_for(monkeypatch: Patch, listener: Listener, port: int) -> None:
    accept, accepted = listener.accept, list[Any]()
    monkeypatch.setattr(listener, "accept", lambda: accepted.append(accept()) or accepted[-1])
    monkeypatch.setattr(http_thread, "_SECONDS", 0.2)
    with connect(port, b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        eventually(lambda: bool(accepted) and listener.count == 0, "its end")


def test_what_is_no_http_is_refused_and_fills_no_log(port: int, caplog: Log) -> None:
    rng = random.Random(0)
    for length in [1, 5, 50, 500] * 25:
        connection = connect(port, rng.randbytes(length) + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        wait_for_the_end(connection)
    assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "ok"
    assert len(caplog.records) < 10


def test_idle_connections_make_room_for_the_next_and_kept_ones_are_used_again(listener: Listener, port: int) -> None:
    listener.limit = 8
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as kept:
        assert [kept.get("/").text for _ in range(2)] == ["ok", "ok"]
        silent = [connect(port, said) for said in (b"", HEAD, BODY_AHEAD) * 10]
        wait_for_the_end(silent[0])
        assert kept.get("/").text == "ok"
    for connection in silent:
        connection.close()
    eventually(lambda: listener.count == 0 and not listener.waiting, "every connection to be counted off")


def test_with_every_connection_busy_further_ones_are_refused_and_that_is_said_once(
    listener: Listener, port: int, caplog: Log
) -> None:
    listener.limit = 3
    BUSY.set()
    busy = [connect(port, HEAD.replace(b"/", b"/busy", 1) + b"Content-Length: 0\r\n\r\n") for _ in range(3)]
    eventually(lambda: listener.count == 3 and not listener.waiting, "the connections to be busy")
    for _ in range(5):
        wait_for_the_end(connect(port))
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "connections are refused: 3 are open and have requests under way"
    ]
    BUSY.clear()
    assert busy[0].recv(100).startswith(b"HTTP/1.1 200")


def test_without_file_descriptors_connections_wait_and_are_served_later(
    listener: Listener, port: int, caplog: Log, monkeypatch: Patch
) -> None:
    accept, left = socket.socket.accept, [0] * 3

    def scarce(self: socket.socket) -> Any:
        if self is listener and left:
            left.pop()
            raise OSError(24, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "ok"
    assert ["no file descriptor left" in record.getMessage() for record in caplog.records] == [True] and not left


def test_a_thread_that_ended_by_itself_is_named(monkeypatch: Patch) -> None:
    server = ServerThread(app, service="inference gateway", advice="", host="127.0.0.1", port=0)
    server.check_alive()
    with server:
        server.check_alive()
        assert server._server is not None
        monkeypatch.setattr(server._server, "main_loop", None)  # as if its loop had failed
        server._server.should_exit = True
        eventually(lambda: not server.is_running, "its end")
        with pytest.raises(ServiceError, match="inference gateway: its thread has ended"):
            server.check_alive()
    server.check_alive()


def test_an_application_that_does_not_start_is_an_error_and_leaves_no_thread() -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("broken application")

    server = ServerThread(broken, service="test", advice="", host="127.0.0.1", port=0, lifespan="on")
    with pytest.raises(ServiceError, match="test: failed to start"):
        server.start(timeout=20.0)
    assert not server.is_running
