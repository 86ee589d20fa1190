"""Formats of files, and trajectory APIs as real servers: what is asked of them, and what comes back."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.http_faults import wait_for

from atropos_verl.errors import AtroposAPIError, AtroposConnectionError, AtroposProtocolError, ConfigError, DataError
from atropos_verl.launch.probes import free_port, request_json
from atropos_verl.launch.process import ManagedProcess, ServiceSpec
from atropos_verl.protocol.client import AtroposClient, TrainerRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.report.sources import is_url, load_groups, read_path, read_url

G1 = b'{"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [1.0]}'
G2 = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [2.0]}'
NAN = b'{"tokens": [[7, 8]], "masks": [[-100, 8]], "scores": [NaN]}'


def shown(content: bytes) -> list[tuple[str, list[float], str | None]]:
    return [(f.origin, f.group.scores.tolist(), f.group.defect) for f in load_groups(content, "FILE")]


@pytest.mark.parametrize(
    "content",
    [
        b'{"batch": [' + G1 + b", " + G2 + b"]}",
        b'\n{ "batch":[' + G1 + b"," + G2 + b"]}\n",
        b'{"lease_id": "x", "batch": [' + G1 + b", " + G2 + b"]}",
        b"[" + G1 + b"," + G2 + b"]",
    ],
)
def test_batches_and_lists(content: bytes) -> None:
    assert shown(content) == [("group 0", [1.0], None), ("group 1", [2.0], None)]


def test_lines_keep_their_numbers_and_a_bad_line_does_not_hide_the_rest() -> None:
    found = shown(G1 + b"\n\n{oops\n" + G2 + b"\r\n")
    assert [origin for origin, *_ in found] == ["line 1", "line 3", "line 4"]
    assert [scores for _, scores, _ in found] == [[1.0], [], [2.0]]
    assert found[1][2] is not None
    assert found[1][2].startswith("group: not JSON")


def test_one_group_on_one_line_or_many() -> None:
    assert shown(G1) == [("group 0", [1.0], None)]
    assert shown(json.dumps(json.loads(G1), indent=2).encode()) == [("group 0", [1.0], None)]


@pytest.mark.parametrize("content", [NAN, NAN.replace(b", ", b",\n"), b"[" + NAN + b"]", b'{"batch":[' + NAN + b"]}"])
def test_nan_is_read_as_python_writes_it(content: bytes) -> None:
    (found,) = load_groups(content, "FILE")
    assert str(found.group.scores.tolist()) == "[nan]"


def test_nothing_yet_is_no_group() -> None:
    assert load_groups(b'{"batch": null}', "FILE") == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b" \n", "FILE is empty"),
        (b"<html>", r"FILE: neither JSON nor JSON lines \(line 1: group: not JSON"),
        (b"3", "FILE: neither a batch, a group nor a quarantine file; it begins b'3'"),
        (b'{"batch": [', "FILE: the answer to GET /batch is not JSON"),
        (b'{"batch": 3}', "FILE: the answer to GET /batch is not an object with a list"),
        (b'{"reason": "x"}', "FILE: not a quarantine file"),
    ],
)
def test_other_content_is_refused_by_name(content: bytes, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        load_groups(content, "FILE")


def test_a_directory_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b'{"reason": "why", "group_id": "b", "group": ' + G2 + b"}")
    (tmp_path / "a.jsonl").write_bytes(G1 + b"\n" + G1)
    (tmp_path / "batch_000001.json").write_bytes(b'{"batch":[' + G2 + b"]}")
    (tmp_path / "batch_000001.meta.json").write_text("{}")
    (tmp_path / "note.txt").write_text("no")
    found = read_path(tmp_path)
    assert [(f.origin, f.recorded_reason, f.group.scores.tolist()) for f in found] == [
        ("a.jsonl line 1", None, [1.0]),
        ("a.jsonl line 2", None, [1.0]),
        ("b.json", "why", [2.0]),
        ("batch_000001.json group 0", None, [2.0]),
    ]


def test_what_is_a_url() -> None:
    assert is_url("http://h:1/api")
    assert is_url("https://h")
    assert not is_url("runs/http/batch.json")


# ---------------------------------------------------------------------- trajectory APIs


@dataclass
class FakeApi:
    """Answers with what the test puts here; notes what it was asked."""

    latest: bytes = G1
    batch: bytes = b'{"batch": [' + G1 + b"]}"
    requests: list[str] = field(default_factory=list)
    token: str | None = None
    url: str = ""


@pytest.fixture
def api() -> Iterator[FakeApi]:
    state = FakeApi()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            state.token = self.headers.get("Authorization")
            answers = {
                "/prefix/status": b'{"current_step": 4, "queue_size": 0}',
                "/prefix/info": b'{"batch_size": 8, "max_token_len": 64}',
                "/prefix/latest_example": state.latest,
                "/prefix/batch": state.batch,
            }
            body = answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/prefix"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("end", ["", "/", "/latest_example"])
def test_an_api_is_asked_for_its_latest_example_and_nothing_destructive(api: FakeApi, end: str) -> None:
    (found,) = read_url(api.url + end, token="secret")
    assert (found.origin, found.group.token_ids[0].tolist()) == ("latest example", [5, 6])
    assert api.requests == ["/prefix/status", "/prefix/info", "/prefix/latest_example"]
    assert api.token == "Bearer secret"


def test_an_api_that_has_nothing_yet(api: FakeApi) -> None:
    api.latest = b'{"tokens":[],"masks":[],"scores":[],"advantages":[],"images":[]}'
    assert read_url(api.url) == []
    api.batch = b'{"batch": null}'
    assert read_url(api.url, take_batch=True) == []


def test_a_batch_is_taken_only_when_told_to(api: FakeApi) -> None:
    with pytest.raises(ConfigError, match="add --take-batch"):
        read_url(f"{api.url}/batch")
    assert api.requests == []
    (found,) = read_url(f"{api.url}/batch", take_batch=True)
    assert found.group.scores.tolist() == [1.0]
    assert api.requests == ["/prefix/batch"]


def test_a_taken_batch_is_saved_before_it_is_decoded(api: FakeApi, tmp_path: Path) -> None:
    api.batch = b'{"status": "error", "batch": ["kept all the same"]}'
    saved = tmp_path / "batch.json"
    with pytest.raises(AtroposProtocolError):
        read_url(api.url, take_batch=True, save=saved)
    assert not saved.exists()  # the client itself refused it
    api.batch = b'{"batch": ["' + b"x" * 5000 + b'"], "status": "error"}'
    with pytest.raises(AtroposProtocolError):
        read_url(api.url, take_batch=True, save=saved)
    assert saved.read_bytes() == api.batch
    api.requests.clear()
    with pytest.raises(ConfigError, match=f"--save: {saved}: File exists"):
        read_url(api.url, take_batch=True, save=saved)
    assert api.requests == []


def test_no_api_there(api: FakeApi) -> None:
    with pytest.raises(AtroposConnectionError, match="ensure server is running"):
        read_url(f"http://127.0.0.1:{free_port()}", timeout=1.0)
    with pytest.raises(AtroposAPIError, match="HTTP 404"):
        read_url(api.url.removesuffix("/prefix"))


def test_the_real_trajectory_api(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(port))
    process = ManagedProcess(ServiceSpec(name="api", command=command, cwd=tmp_path, log_path=tmp_path / "api.log"))
    process.start()
    try:
        wait_for(lambda: request_json(f"{url}/status") is not None, "the API", 60.0)
        assert read_url(url) == []
        with AtroposClient(url) as client:
            client.register(
                TrainerRegistration(
                    wandb_group="g",
                    wandb_project="p",
                    batch_size=1,
                    max_token_len=64,
                    checkpoint_dir=str(tmp_path),
                    save_checkpoint_interval=0,
                    starting_step=0,
                    num_steps=5,
                )
            )
            client.post_scored_data_list([encode_group(tokens=[[5, 6]], masks=[[-100, 6]], scores=[0.5])])
        for _ in range(2):  # looking takes nothing away
            (found,) = read_url(url)
            assert (found.origin, found.group.scores.tolist()) == ("latest example", [0.5])
        (found,) = read_url(url, take_batch=True)
        assert (found.origin, found.group.token_ids[0].tolist()) == ("group 0", [5, 6])
        assert read_url(url, take_batch=True) == []
    finally:
        process.stop()
