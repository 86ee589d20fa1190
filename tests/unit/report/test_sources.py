"""Formats of files, and trajectory APIs as real servers: what is asked of them, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http_faults import FaultServer, answer, refused_url
from support.trajectory_server import UpstreamApi, registration

from atropos_verl.errors import AtroposAPIError, AtroposConnectionError, AtroposProtocolError, ConfigError, DataError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.report.inspect import load_groups, read_path, read_url

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


# ---------------------------------------------------------------------- trajectory APIs


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.script("/prefix/status", answer({"current_step": 4, "queue_size": 0}))
        server.script("/prefix/info", answer({"batch_size": 8, "max_token_len": 64}))
        server.script("/prefix/latest_example", answer(G1))
        server.script("/prefix/batch", answer(b'{"batch": [' + G1 + b"]}"))
        yield server


@pytest.fixture
def url(server: FaultServer) -> str:
    return f"{server.url}/prefix"


def asked(server: FaultServer) -> list[str]:
    return [request.path for request in server.requests]


@pytest.mark.parametrize("end", ["", "/", "/latest_example"])
def test_an_api_is_asked_for_its_latest_example_and_nothing_destructive(
    server: FaultServer, url: str, end: str
) -> None:
    (found,) = read_url(url + end, token="secret")
    assert (found.origin, found.group.token_ids[0].tolist()) == ("latest example", [5, 6])
    assert asked(server) == ["/prefix/status", "/prefix/info", "/prefix/latest_example"]
    assert server.requests[-1].headers["authorization"] == "Bearer secret"


def test_an_api_that_has_nothing_yet(server: FaultServer, url: str) -> None:
    empty = {"tokens": [], "masks": [], "scores": [], "advantages": [], "images": []}
    server.script("/prefix/latest_example", answer(empty))
    assert read_url(url) == []
    server.script("/prefix/batch", answer({"batch": None}))
    assert read_url(url, take_batch=True) == []


def test_a_batch_is_taken_only_when_told_to(server: FaultServer, url: str) -> None:
    with pytest.raises(ConfigError, match="add --take-batch"):
        read_url(f"{url}/batch")
    assert asked(server) == []
    (found,) = read_url(f"{url}/batch", take_batch=True)
    assert found.group.scores.tolist() == [1.0]
    assert asked(server) == ["/prefix/batch"]


def test_a_taken_batch_is_saved_before_it_is_decoded(server: FaultServer, url: str, tmp_path: Path) -> None:
    saved = tmp_path / "batch.json"
    server.script("/prefix/batch", answer({"status": "error", "batch": ["kept all the same"]}))
    with pytest.raises(AtroposProtocolError):
        read_url(url, take_batch=True, save=saved)
    assert not saved.exists()  # the client itself refused it
    body = b'{"batch": ["' + b"x" * 5000 + b'"], "status": "error"}'
    server.script("/prefix/batch", answer(body))
    with pytest.raises(AtroposProtocolError):
        read_url(url, take_batch=True, save=saved)
    assert saved.read_bytes() == body
    server.requests.clear()
    with pytest.raises(ConfigError, match=f"--save: {saved}: File exists"):
        read_url(url, take_batch=True, save=saved)
    assert asked(server) == []


def test_no_api_there(server: FaultServer) -> None:
    with refused_url() as refused, pytest.raises(AtroposConnectionError, match="ensure server is running"):
        read_url(refused, timeout=1.0)
    with pytest.raises(AtroposAPIError, match="HTTP 404"):
        read_url(server.url)


def test_the_real_trajectory_api(tmp_path: Path) -> None:
    with UpstreamApi(tmp_path) as api:
        assert read_url(api.url) == []
        with AtroposClient(api.url) as client:
            client.register(TrainerRegistration(**registration(batch_size=1)))
            client.post_scored_data_list([encode_group(tokens=[[5, 6]], masks=[[-100, 6]], scores=[0.5])])
        for _ in range(2):  # looking takes nothing away
            (found,) = read_url(api.url)
            assert (found.origin, found.group.scores.tolist()) == ("latest example", [0.5])
        (found,) = read_url(api.url, take_batch=True)
        assert (found.origin, found.group.token_ids[0].tolist()) == ("group 0", [5, 6])
        assert read_url(api.url, take_batch=True) == []
