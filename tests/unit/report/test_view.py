"""The app behind ``atropos-verl view``, called without a socket."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.traced_run import HOSTILE, write_run

from atropos_verl.report.view import RunView

LOCAL = ("localhost", "127.0.0.1", "::1")
SEQUENCE = 1 << 32
"""The first answer of step 1."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "known", steps=3)


@pytest.fixture
def client(run_dir: Path) -> TestClient:
    return TestClient(RunView([run_dir.parent], hosts=LOCAL), base_url="http://localhost")


def test_rollouts_are_found_and_told_token_by_token(client: TestClient) -> None:
    assert [run["name"] for run in client.get("/api/runs").json()] == ["known"]
    found = client.get("/api/runs/known/rollouts?step=1&reward_min=0.5&state=&limit=5").json()
    assert [row["id"] for row in found["rollouts"]] == [SEQUENCE] and found["has_index"]
    assert client.get("/api/runs/known/groups/65536").json()["size"] == 2
    without = client.get(f"/api/runs/known/sequences/{SEQUENCE}").json()
    assert "items" not in without and [turn["text"] for turn in without["turns"]] == ["ab", "c<|im_end|>"]
    items = client.get(f"/api/runs/known/sequences/{SEQUENCE}?tokens=2").json()["items"]
    told = [
        [item[name] for name in ("text", "trained", "advantage", "mismatch", "version", "unmatched")] for item in items
    ]
    assert told == [["c", True, 1.0, -0.25, 1, False], ["<|im_end|>", True, 1.0, 0.0, None, True]]
    assert client.get("/api/runs/known/survivors").json()["ends"] == {"quarantined": 2, "trained": 4}
    assert client.get("/api/runs/known/counts").json()["groups"] == {"quarantined": 1, "trained": 2}


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("runs/other/counts", 404, "no run is called 'other'"),
        ("runs/known/groups/9", 404, "not in the trace"),
        ("runs/known/sessions/none", 404, "not in the trace"),
        ("runs/known/rollouts?step=two", 400, "$.step"),
        ("runs/known/rollouts?before=two", 400, "two"),
    ],
)
def test_what_is_not_there_is_refused_with_a_reason(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == status and said in answer.json()["detail"]


def test_it_only_reads(client: TestClient, run_dir: Path) -> None:
    for path in ("/", "/api/runs", "/api/runs/known/rollouts", "/static/main.js"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert client.request(method, path).status_code == 405
    assert client.get("/static/../view.py").status_code == 404
    assert client.get("/static/%2e%2e/view.py").status_code == 404


def test_pages_of_other_sites_and_requests_without_the_token_are_refused(run_dir: Path) -> None:
    local = TestClient(RunView([run_dir], hosts=LOCAL), base_url="http://localhost")
    assert local.get("/", headers={"host": "evil.example"}).status_code == 403
    assert local.get("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403
    assert local.get("/api/runs", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    remote = TestClient(RunView([run_dir], token="secret"), base_url="http://node7:8090")
    assert [remote.get(path).status_code for path in ("/", "/static/main.js")] == [200, 200]
    for path in ("", "/known/events", "/known/rollouts", "/known/survivors"):
        assert remote.get(f"/api/runs{path}").status_code == 401
    assert remote.get("/api/runs", headers={"authorization": "Bearer secret"}).status_code == 200
    assert remote.get("/api/runs", headers={"authorization": "Bearer other"}).status_code == 401


def test_every_answer_forbids_scripts_of_others(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/api/runs", "/api/runs/none/counts"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"


def events(client: TestClient, last: str = "") -> Iterator[tuple[str, Any, str]]:
    """The events of one connection, which ends after the second look."""
    looks = iter([False, False, True])
    client.app.is_ending = lambda: next(looks)  # type: ignore[attr-defined]
    text = client.get("/api/runs/run/events?metric=loss&metric=env/*", headers={"last-event-id": last}).text
    for part in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.split("\n"))
        yield fields["event"], json.loads(fields["data"]), fields.get("id", "")


def test_events_go_on_behind_the_last_one_that_was_received(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    client = TestClient(RunView([run_dir], hosts=LOCAL), base_url="http://localhost")
    [(kind, told, last), (live, state, _)] = events(client)
    assert (kind, live) == ("steps", "live") and told["anew"] and state["running"]
    assert [line["step"] for line in told["lines"]] == [1, 2]
    assert set(told["lines"][0]) >= {"step", "loss"} and "reward/mean" not in told["lines"][0]
    assert state["state"]["diagnosis"].endswith(HOSTILE)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": NaN}\n{"step": 4, "lo')
    kind, told, last = next(events(client, last))
    assert told == {"anew": False, "lines": [{"step": 3, "loss": None}]}
    assert [kind for kind, *_ in events(client, last)] == ["live"]
    new = tmp_path / "new"
    new.write_text('{"step": 1, "loss": 0.5}\nnoise\n')
    new.replace(run_dir / "metrics.jsonl")
    assert next(events(client, last))[1] == {"anew": True, "lines": [{"step": 1, "loss": 0.5}]}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "run" / "logs").mkdir(parents=True)
    view = RunView([tmp_path / "a", tmp_path / "b" / "run", tmp_path / "none"])
    assert view.runs() == {"run": tmp_path / "a" / "run", "run (2)": tmp_path / "b" / "run"}
