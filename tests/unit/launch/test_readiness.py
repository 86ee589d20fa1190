"""Ports, probes and waits against real sockets and real processes."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_verl.errors import ServiceError
from atropos_verl.launch.process import ManagedProcess, ServiceSpec
from atropos_verl.launch.readiness import free_port, http_probe, wait_until_ready


class Answers(http.server.BaseHTTPRequestHandler):
    """/200, /404, /503 answer with that status; /garbage breaks the protocol; /hang never answers."""

    release = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/hang":
            self.release.wait(30)
        elif self.path == "/garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        else:
            self.send_response(int(self.path[1:]))
            self.send_header("Content-Length", "0")
            self.end_headers()

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


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_free_port_can_be_bound(host: str) -> None:
    port = free_port(host)
    with socket.create_server((host, port)):
        assert 1024 <= port <= 65535


def test_a_foreign_address_has_no_free_port() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        free_port("192.0.2.1")


@pytest.mark.parametrize(
    ("path", "ready"),
    [("200", True), ("204", True), ("404", False), ("503", False), ("garbage", False), ("hang", False)],
)
def test_only_2xx_is_ready(url: str, path: str, ready: bool) -> None:
    assert http_probe(f"{url}/{path}", timeout=0.5) is ready


def test_nobody_there_and_no_such_host_are_not_ready() -> None:
    assert http_probe(f"http://127.0.0.1:{free_port()}/", timeout=0.5) is False
    assert http_probe("http://no-such-host.invalid/", timeout=0.5) is False


def test_a_proxy_of_the_environment_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert http_probe(f"{url}/200", timeout=10) is True


def test_the_probe_is_repeated_until_it_says_yes() -> None:
    answers = iter([False, False, True])
    wait_until_ready(lambda: next(answers), name="api", timeout=10, interval=0.001)
    assert list(answers) == []


def service(directory: Path, script: str) -> ManagedProcess:
    process = ManagedProcess(
        ServiceSpec(name="api", command=("sh", "-c", script), cwd=directory, log_path=directory / "api.log")
    )
    process.start()
    return process


def test_running_out_of_time_names_service_seconds_and_log(tmp_path: Path) -> None:
    process = service(tmp_path, "echo loading; exec sleep 1000")
    try:
        wait_until_ready(lambda: process.log_tail() == "loading", name="api", timeout=20, process=process)
        with pytest.raises(ServiceError) as caught:
            wait_until_ready(lambda: False, name="api", timeout=0.2, interval=0.01, process=process)
    finally:
        process.stop()
    assert str(caught.value) == (
        f"api was not ready after 0.2 s; its log is {tmp_path}/api.log\n--- last lines of api ---\nloading"
    )
    assert caught.value.returncode is None


def test_a_death_ends_the_wait_long_before_the_timeout(tmp_path: Path) -> None:
    process = service(tmp_path, "echo address already in use; exit 1")
    with pytest.raises(ServiceError, match="exited with code 1") as caught:
        wait_until_ready(lambda: False, name="api", timeout=10_000, interval=0.01, process=process)
    assert caught.value.log_tail == "address already in use"
