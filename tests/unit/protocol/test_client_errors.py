"""What the user is told: one true reason for each way in which the API can fail."""

import contextlib
import errno
import socket
from pathlib import Path

import httpx
import pytest
from support.http_faults import (
    FaultServer,
    answer,
    close_before_answer,
    error,
    garbage,
    html_page,
    make_certificate,
    refused_url,
    reset_before_answer,
    reset_mid_body,
    truncated,
)

from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ConfigError,
)
from atropos_verl.protocol.client import AtroposClient

STATUS = {"current_step": 0, "queue_size": 0}


def quick(url: str, **options: object) -> AtroposClient:
    return AtroposClient(url, **{"timeout": 5.0, "retry_attempts": 2, "retry_delay": 0.01, **options})  # type: ignore[arg-type]


def reason_of_failure(client: AtroposClient, kind: type[AtroposAPIError] = AtroposConnectionError) -> str:
    with client, pytest.raises(kind) as caught:
        client.check()
    assert caught.value.base_url == client.api_url
    return caught.value.reason


def test_a_name_that_cannot_be_resolved() -> None:
    assert reason_of_failure(quick("http://no-such-host.invalid:9001")) == (
        "Cannot connect to Atropos API at http://no-such-host.invalid:9001 - "
        "host name 'no-such-host.invalid' cannot be resolved (DNS)"
    )


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_an_unreachable_network(number: int) -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route") from OSError(number, "No route to host")

    reason = reason_of_failure(quick("http://10.0.0.1", transport=httpx.MockTransport(unreachable)))
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
        reason = reason_of_failure(quick(url, timeout=0.5), AtroposTimeoutError)
    assert issubclass(AtroposTimeoutError, TimeoutError)
    assert reason == f"Cannot connect to Atropos API at {url} - no answer within 0.5 s"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_a_certificate_that_is_not_trusted_is_refused_at_once(certificate: tuple[Path, Path]) -> None:
    with FaultServer(tls=certificate) as server:
        reason = reason_of_failure(quick(server.url))
        assert server.connections == 1  # waiting does not make a certificate better
        assert server.requests == []
    assert reason.startswith(
        f"Cannot connect to Atropos API at {server.url} - TLS handshake failed: certificate of '127.0.0.1' not accepted"
    )
    assert "self-signed certificate" in reason
    assert "atropos.ca_file" in reason


def test_a_certificate_file_makes_it_trusted(certificate: tuple[Path, Path]) -> None:
    with FaultServer(tls=certificate) as server, quick(server.url, verify=str(certificate[0])) as client:
        server.script("/status", answer(STATUS))
        assert client.status().queue_size == 0


def test_https_to_a_server_that_speaks_http(fault_server: FaultServer) -> None:
    reason = reason_of_failure(quick(fault_server.url.replace("http:", "https:")))
    assert "TLS handshake failed" in reason
    assert reason.endswith("is it an http:// API?")


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
        (500, b"Internal Server Error", ": Internal Server Error"),
        (500, b"x" * 10_000, ": " + "x" * 500),
        (502, b"", ": empty answer"),
    ],
)
def test_http_errors(fault_server: FaultServer, status: int, body: bytes, said: str) -> None:
    fault_server.script("/status", error(status, body, {"location": "https://example.invalid/status"}))
    with quick(fault_server.url) as client, pytest.raises(AtroposHTTPStatusError) as caught:
        client.check()
    failure = caught.value
    assert failure.reason == f"Atropos API at {fault_server.url} answered GET /status with HTTP {status}{said}"
    assert (failure.status_code, failure.body) == (status, body.decode()[:500].translate({10: "?", 27: "?"}))
    assert status >= 500 or fault_server.count("/status") == 1  # an error of the request is not repeated


def test_a_500_for_a_batch_says_what_upstream_does_with_nan(fault_server: FaultServer) -> None:
    fault_server.script("/batch", error(500, b"Internal Server Error"))
    with quick(fault_server.url) as client, pytest.raises(AtroposHTTPStatusError, match=r"the batch may be lost.*NaN"):
        client.poll_batch()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (reset_before_answer(), "connection reset before an answer to GET /status"),
        (close_before_answer(), "connection closed before an answer to GET /status"),
        (reset_mid_body(b'{"current_step": 0}', 5), "connection reset while reading the answer to GET /status"),
        (
            truncated(b'{"current_step": 0}', 5, promise_length=True),
            "connection closed while reading the answer to GET /status",
        ),
    ],
)
def test_a_connection_that_breaks(fault_server: FaultServer, behaviour: object, said: str) -> None:
    fault_server.script("/status", behaviour)  # type: ignore[arg-type]
    reason = reason_of_failure(quick(fault_server.url))
    assert reason == f"Atropos API at {fault_server.url} - {said}"


@pytest.mark.parametrize(
    ("behaviour", "detail"),
    [
        (html_page(), "GET /status gave b'<!doctype html><html><body>Welcome</body></html>', which is not JSON"),
        (garbage(), "GET /status gave something that is not HTTP"),
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
def test_something_else_answers(fault_server: FaultServer, behaviour: object, detail: str) -> None:
    fault_server.script("/status", behaviour)  # type: ignore[arg-type]
    reason = reason_of_failure(quick(fault_server.url), AtroposProtocolError)
    assert reason.startswith(f"The server at {fault_server.url} answers, but is not an Atropos trajectory API: ")
    assert detail in reason
    assert fault_server.count("/status") == 1


def test_an_answer_to_batch_that_is_no_batch(fault_server: FaultServer) -> None:
    fault_server.script("/batch", html_page(), answer({"groups": []}), answer(b'{"batch": [,]}'))
    with quick(fault_server.url) as client:
        for _ in range(3):
            with pytest.raises(AtroposProtocolError, match="is not an Atropos trajectory API: GET /batch gave"):
                client.get_batch()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:9001", "ftp://host", "http://", "http://:9001", "http://host:99999", "http://host:port",
     "http://host:0", "http://ho st", "http://host/?q=1", "http://host/#part", "http://[::1", None, 9001],
)  # fmt: skip
def test_a_url_that_is_none_is_refused_at_once(url: object) -> None:
    with pytest.raises(ConfigError) as caught:
        AtroposClient(url)  # type: ignore[arg-type]
    assert caught.value.key == "atropos.api_url"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"token": "two words"}, "atropos.token"),
        ({"token": "line\r\nX-Evil: 1"}, "atropos.token"),
        ({"token": ""}, "atropos.token"),
        ({"token": "t", "headers": {"authorization": "Basic x"}}, "atropos.token"),
        ({"headers": {"bad name": "1"}}, "atropos.headers"),
        ({"headers": {"x": "a\r\nb"}}, "atropos.headers"),
        ({"verify": "/no/such/file.pem"}, "atropos.ca_file"),
    ],
)
def test_a_setting_out_of_range_is_named(options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AtroposClient("http://localhost:9001", **options)  # type: ignore[arg-type]
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        AtroposClient("http://host", token="hush hush")
    assert "hush" not in str(caught.value)
    assert AtroposClient("http://user:hush@host:9001/api").api_url == "http://***@host:9001/api"
    with pytest.raises(ConfigError) as caught:
        AtroposClient("http://user:hush@host:99999")
    assert "hush" not in str(caught.value)
    assert AtroposClient("http://user:h@ush@host:9001").api_url == "http://***@host:9001"
    with pytest.raises(ConfigError, match=r"\*\*\*@host.*%2F") as caught:
        AtroposClient("http://user:hush/cd@host")
    assert "hush" not in str(caught.value)


def test_a_wait_too_short_to_be_written_is_not_asked_for() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("x-atropos-wait"))
        return httpx.Response(200, json={"batch": None, "current_step": 0, "queue_size": 0})

    with AtroposClient("http://host", transport=httpx.MockTransport(answer), max_wait_time=0.0004) as client:
        client.features = frozenset({"wait"})
        with pytest.raises(AtroposTimeoutError):
            client.get_batch()
    assert set(asked) == {None}


@pytest.mark.parametrize("prefix", ["", "/", "/api", "/api/", "/a/b"])
def test_a_path_prefix_is_kept(fault_server: FaultServer, prefix: str) -> None:
    path = f"{prefix.rstrip('/')}/status"
    fault_server.script(path, answer(STATUS))
    with quick(fault_server.url + prefix) as client:
        assert client.status().current_step == 0
        assert client.api_url == fault_server.url + prefix
    assert fault_server.count(path) == 1


def test_token_and_headers_go_with_every_request(fault_server: FaultServer) -> None:
    fault_server.script("/status", answer(STATUS))
    fault_server.script("/scored_data_list", answer({"status": "received"}))
    with quick(fault_server.url, token="abc.DEF-1", headers={"X-Team": "red"}) as client:
        client.status()
        client.post_scored_data_list([b"{}"])
    for request in fault_server.requests:
        assert (request.headers["authorization"], request.headers["x-team"]) == ("Bearer abc.DEF-1", "red")
    assert fault_server.last("/scored_data_list").headers["content-type"] == "application/json"
    assert fault_server.connections == 2  # one for each request


def use_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_no_proxy_stands_between_this_machine_and_itself(
    fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused_url() as proxy:
        use_proxy(monkeypatch, proxy)
        fault_server.script("/status", answer(STATUS))
        with quick(fault_server.url) as client:
            assert client.status().queue_size == 0
        with quick("http://api.example.invalid") as client, pytest.raises(AtroposConnectionError):
            client.status()  # by the proxy, which is dead
    assert fault_server.count("/status") == 1


def test_a_proxy_of_an_unknown_kind_is_named_and_not_asked_for_on_this_machine(
    fault_server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "telnet://proxy:1")
    fault_server.script("/status", answer(STATUS))
    with quick(fault_server.url) as client:
        assert client.status().queue_size == 0
    with pytest.raises(ConfigError, match=r"proxy that ALL_PROXY .* cannot be used: .*telnet"):
        quick("http://api.example.invalid")
