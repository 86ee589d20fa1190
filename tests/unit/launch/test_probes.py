"""Ports and requests against real sockets; the gateway's counters; the entries of a process at the API."""

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.serving import eventually

from atropos_verl.config.schema import RunConfig
from atropos_verl.launch import probes
from atropos_verl.launch.probes import Poller, connected_entries, free_port, request_json


class Answers(http.server.BaseHTTPRequestHandler):
    """/200, /404, /503 answer with that status; /text is no JSON; /garbage breaks the protocol; /hang never answers."""

    release = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/hang":
            self.release.wait(30)
        elif self.path == "/garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        else:
            body = b"plain" if self.path == "/text" else b'{"a": 1}'
            self.send_response(200 if self.path == "/text" else int(self.path[1:]))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Answers.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_free_port_can_be_bound_and_a_foreign_address_has_none() -> None:
    for host in ("127.0.0.1", "localhost"):
        with socket.create_server((host, free_port(host))):
            pass
    with pytest.raises(OSError, match="assign requested address"):
        free_port("192.0.2.1")


@pytest.mark.parametrize(
    ("path", "answer"),
    [("200", {"a": 1}), ("text", "plain"), ("404", None), ("503", None), ("garbage", None), ("hang", None)],
)
def test_only_2xx_is_an_answer(url: str, path: str, answer: Any) -> None:
    assert request_json(f"{url}/{path}", timeout=0.5 if path == "hang" else 30.0) == answer


def test_nobody_there_is_no_answer_and_a_proxy_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_json(f"http://127.0.0.1:{free_port()}/", timeout=0.5) is None
    assert request_json("http://no-such-host.invalid/", timeout=0.5) is None
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert request_json(f"{url}/200", timeout=10) == {"a": 1}


def test_a_batch_that_was_handed_out_is_seen_before_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    poller = Poller(RunConfig.from_mapping({"atropos": {"api_url": "http://a"}}), None)
    seen = []
    for status in ({"current_step": 3}, {"current_step": 3}, None, {"current_step": 4}, {"current_step": 5}):
        monkeypatch.setattr(probes, "request_json", lambda *_, answer=status, **__: answer)
        poller.ask_api()
        seen.append(poller.batch_at > 0)
    assert seen == [False, False, False, False, True], "what happened while it did not answer is not known"


def test_a_gateway_that_pauses_has_got_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: a first step of 48 s was called a stall, since the API had not answered when its batch was taken."""
    poller = Poller(RunConfig(), "http://g", generates=False)
    seen = []
    for paused in (True, False, True, True):
        health = {"paused": paused, "policy_version": 0}
        monkeypatch.setattr(probes, "request_json", lambda *_, answer=health, **__: answer)
        poller._ask_gateway()
        seen.append(poller.batch_at)
    assert seen[:2] == [0.0, 0.0] and seen[2] == seen[3] > 0.0


def test_a_strange_answer_does_not_end_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_INTERVAL", 0.01)
    poller = Poller(RunConfig.from_mapping({"atropos": {"api_url": "http://a"}}), None)
    answers: list[Any] = [{"current_step": 1}, {"current_step": "many"}]
    monkeypatch.setattr(probes, "request_json", lambda *_, **__: answers.pop(0) if answers else {"current_step": 2})
    poller.start()
    eventually(lambda: poller.api == {"current_step": 2}, "the answer after a strange one")
    poller.stop()


def test_entries_of_a_process_are_found_by_its_name_alone() -> None:
    rows = [
        {"env_id": 0, "name": "words_0", "state": "disconnected"},
        {"env_id": 1, "name": "words_1", "state": "alive"},
        {"env_id": 2, "name": "words-2_0", "state": "alive"},
        {"env_id": 3, "name": "words_short_0", "state": "alive"},
    ]
    assert [row["env_id"] for row in connected_entries({"environments": rows}, "words")] == [1]
    assert [row["env_id"] for row in connected_entries({"environments": rows}, "words-2")] == [2]
    assert connected_entries({"current_step": 1}, "words") == []
