"""Runs as ``TraceReader``, ``report`` and the app behind ``view`` tell them. Values are worked out here by hand.

Ids of the demo model's tokenizer: a = 64, b = 65, c = 66, <|im_end|> = 258.
"""

import contextlib
import functools
import json
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.serving import eventually
from support.traced_run import HOSTILE, PROMPT, Run, group, write_run

from atropos_verl.assets import demo_model_path
from atropos_verl.cli import main
from atropos_verl.errors import ConfigError
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.report.run_report import load_run
from atropos_verl.report.trace_reader import RolloutFilter, TraceReader, distance, load_decoder, send_rollouts
from atropos_verl.report.view import RunView
from atropos_verl.training import trace
from atropos_verl.training.trace import NAME, TraceWriter
from atropos_verl.types import NOT_TRAINED, RepairedTokens, ScoredGroup, SequenceMatch

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def steps(reader: TraceReader) -> list[int | None]:
    return [one["step"] for one in reader.rollouts()]


def test_turns_have_the_roles_of_the_template(run: Run) -> None:
    text = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    encode = load_decoder(str(demo_model_path())).tokenizer.encode
    prompt, answer = encode(text).ids, encode("ba<|im_end|>").ids
    mask = np.array([NOT_TRAINED] * len(prompt) + answer)
    run.step(1, ScoredGroup(token_ids=(np.array(prompt + answer),), masks=(mask,), scores=np.ones(1), group_id="g"))
    reader = run.read()
    turns = reader.sequence(reader.rollouts()[0]["id"])["turns"]
    assert [(turn["role"], turn["text"], turn["trained"]) for turn in turns] == [
        ("system", "be<|im_end|>\n", False),
        ("user", "ab<|im_end|>\n", False),
        ("assistant", "ba<|im_end|>", True),
    ]


def test_every_group_has_an_end_and_a_reason(run: Run) -> None:
    bad = group([66], [64], scores=(float("nan"), 0.0), name="bad")
    long = group([66] * 8, [64], name="long")
    run.step(1, group([66], [64]), bad, long, group([66], [64], name="old"), stale=[3], max_token_len=5)
    run.writer.arrived(2, [group([66], [64], name="waits")])
    reader = run.read()
    ids = {row["group"] for row in reader.rollouts()} | {2 << 16}  # what is under way is not listed
    states = {row["hash"]: row["state"] for row in map(reader.group, ids)}
    assert states == {"g": "trained", "bad": "quarantined", "long": "trained", "old": "stale", "waits": "under_way"}
    assert [row["state"] for row in reader.rollouts(RolloutFilter(state="overlong"))] == ["overlong"]
    [refused, _] = reader.rollouts(RolloutFilter(reason="NAN"))
    assert "scores[0]" in refused["reason"] and refused["step"] == 1
    counts = {"trained": 3, "quarantined": 2, "overlong": 1, "stale": 2, "under_way": 2}
    assert reader.counts()["sequences"] == counts


def test_filters_find_by_each_field(run: Run) -> None:
    run.step(1, group([66], [64, 65], env_id=3, generation_params={"policy_version": 5}))
    run.step(2, group([66, 66], [64], scores=(0.25, 0.75), env_id=None))
    reader = run.read()

    def positions(**wanted: Any) -> list[tuple[int, int]]:
        return [(row["step"], row["position"]) for row in reader.rollouts(RolloutFilter(**wanted))]

    assert positions(step=1) == positions(environment=3) == positions(version=5) == [(1, 1), (1, 0)]
    assert positions(reward_min=0.25, reward_max=0.75) == [(2, 1), (2, 0)]
    assert positions(length_min=4) == [(2, 0), (1, 1)] and positions(length_max=3) == [(2, 1), (1, 0)]
    assert positions(text="abcc") == [(2, 0)] and positions(text="abc") == [(2, 0), (1, 0)]
    assert positions(text='"; DROP') == positions(step=10**30) == []
    first = reader.rollouts(limit=1)[0]
    assert [row["position"] for row in reader.rollouts(limit=2, before=first["id"])] == [0, 1]


def test_a_resumed_run_has_under_way_what_no_checkpoint_holds(run: Run) -> None:
    groups = [group([66, 258], name=name) for name in ("first", "rest")]
    run.collect(1, *groups)
    run.writer.ended([(1, 0)], 1)
    run.writer.ended([(1, 1)], 2)
    run.read()
    again = Run(run.dir, step=1)
    again.writer.arrived(1, groups)
    states = [(one["state"], one["step"]) for one in again.read().rollouts()]
    assert states == [("under_way", None), ("trained", 1)]
    once_more = Run(run.dir, step=1)
    once_more.step(2, group([66, 258], name="next"))
    assert steps(once_more.read()) == [2, None, 1]
    assert steps(Run(run.dir).read()) == []


def test_a_full_trace_thins_out_older_groups_and_keeps_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, most_bytes=400_000)
    for number in range(1, 601):
        run.step(number, group([66] * 100, [64] * (number % 50 + 1)))
        if number % 10 == 0:
            run.writer.close()
            run = Run(tmp_path, step=number, most_bytes=400_000)
    reader = run.read()
    assert (tmp_path / NAME).stat().st_size < 800_000
    rows = reader.rollouts(limit=1000)
    assert len(rows) < 1200 and reader.counts()["sequences"] == {"trained": 1200}
    assert sum(row["weight"] for row in rows) == pytest.approx(1200, rel=0.1)
    assert [row["step"] for row in rows[:4]] == [600, 600, 599, 599]
    with pytest.raises(KeyError):
        reader.group(1 << 16)


def test_survivors_tells_of_the_slow_and_the_unposted(run: Run, capsys: Capture) -> None:
    for number, seconds, tokens in [(1, 1.0, 1), (2, 1.0, 1), (3, 9.0, 8), (4, 9.0, 8)]:
        run.writer.request([(number, tokens, 0)], prompt=number, prompt_tokens=2, begun=100.0, seconds=seconds)
    run.writer.request([(5, 8, 0)], 5, 2, 100.0, 9.0, session="s")
    run.writer.session("s", "aborted", "no tool")
    run.writer.request([], 6, 2, 100.0, 2.0, reason="the client left")

    def match(order: int, size: int) -> SequenceMatch:
        zeros = np.zeros(size)
        return SequenceMatch(
            found=np.arange(size) > 1, versions=zeros.astype(np.int64), logprobs=zeros, records=(order,)
        )

    fast, slow = group([66], [64]), group([66] * 8, [64] * 8, env_id=1, name="slow")
    run.step(1, fast, slow, matches=[[match(1, 3), match(2, 3)], [match(3, 10), None]], stale=[1])
    (run.dir / "summary.json").write_text("{}")
    (run.dir / "metrics.jsonl").write_text('{"step": 1}\n')
    found = run.read().survivors()
    assert found["ends"] == {"trained": 2, "stale": 2, "given_up": 2, "failed": 1}
    length = found["by"]["length"]
    # 1, 1 trained; begun: 1, 1, 8, 8, 8, 8
    assert length["distance"] == pytest.approx(4 / 6) and length["trained_mean"] == 1.0
    # begun: 1, 1, 9, (unknown), 9, 9, 2
    assert found["by"]["latency"]["distance"] == pytest.approx(4 / 6)
    assert found["by"]["environment"]["begun"] == {"0": 2, "1": 2, "none": 3}
    assert found["by"]["environment"]["distance"] == pytest.approx(0.5)

    main(["report", str(run.dir), "--survivors"])
    (run.dir / "summary.json").unlink()
    main(["report", str(run.dir), "--survivors"])
    first, second = capsys.readouterr().out.split("begun, 2 trained (")[1:]
    assert first.startswith("failed 1, given_up 2, stale 2, trained 2)") and "0.667" in first
    assert second.startswith("failed 1, given_up 1, stale 2, trained 2); under way, not counted: 1")


def test_the_distance_is_that_of_the_distribution_functions() -> None:
    one = np.ones(4)
    assert distance(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]), one, one) == 0
    assert distance(np.array([1.0, 2, 3, 4]), np.array([3.0, 4]), one, np.ones(2)) == 0.5
    assert distance(np.array([1.0, 4]), np.array([1.0, 4]), np.ones(2), np.array([3.0, 1.0])) == 0.25


def test_a_run_without_an_index_has_no_rollouts_and_tells_no_password(tmp_path: Path) -> None:
    reader = TraceReader(tmp_path)
    assert reader.rollouts() == [] and reader.counts()["groups"] == {} and not reader.has_index
    assert reader.survivors()["begun"] == 0 and reader.live()["state"] is None
    (tmp_path / "state.json").write_text('{"time": 0, "api_url": "http://:p4ss@host:1/x", "services": []}')
    assert reader.live()["state"]["api_url"] == "http://host:1/x" and "p4ss" not in json.dumps(reader.live())


def test_a_stale_group_is_told_with_its_repaired_tokens(run: Run) -> None:
    shorter, longer = [*PROMPT, 67], [*PROMPT, 66, 66, 258]
    matches = []
    for ids in (shorter, longer):
        mask = np.arange(len(ids)) > 1
        repaired = RepairedTokens(token_ids=np.array(ids), loss_mask=mask, origin=None, posted=4)
        unknown = np.full(len(ids), np.nan)
        versions = np.full(len(ids), -2)
        matches.append(SequenceMatch(found=mask, versions=versions, logprobs=unknown, repaired=repaired))
    run.collect(1, group([66, 258], [64, 258]), matches=[matches], stale=[0])
    run.step(2, group([66, 258], name="next"))
    reader = run.read()
    second, first = (one["id"] for one in reader.rollouts(RolloutFilter(state="stale")))
    for id_, ids in ((first, shorter), (second, longer)):
        items = reader.sequence(id_)["items"]
        assert [item["id"] for item in items] == ids
        assert [item["trained"] for item in items] == [False, False, *[True] * (len(ids) - 2)]
    assert [one["step"] for one in reader.rollouts(RolloutFilter(state="trained"))] == [2]


def test_a_value_that_sqlite_does_not_hold_costs_only_itself(run: Run) -> None:
    run.step(1, group([66, 258], env_id=10**30))
    run.writer.request([], 5, 2, 0.0, 1.0, None, "EngineError: \ud800")
    run.writer.session("s", "aborted", "\ud800")
    run.step(2, group([66, 258]))
    assert [(one["step"], one["environment"]) for one in run.read().rollouts()] == [(2, 0), (1, None)]


def test_reading_leaves_no_file_and_sees_what_a_resumed_run_adds(run: Run) -> None:
    run.step(1, group([66, 258]))
    reader = run.read()
    assert steps(reader) == [1]
    assert [path.name for path in run.dir.glob("trace*")] == ["trace.sqlite"]
    for number in (2, 3):
        again = Run(run.dir, step=number - 1)
        again.step(number, group([66, 258], name=f"g{number}"))
        if number == 2:
            eventually(lambda: steps(reader) == [2, 1], "step 2 is written", 20)
        again.writer.close()
        assert steps(reader) == list(range(number, 0, -1))


def test_many_requests_without_a_group_are_counted_in_one_pass(run: Run) -> None:
    for prompt in range(2_000):
        run.writer.request([(10 * prompt + i, 5, 1) for i in range(10)], prompt, 9, 0.0, 1.0)
    reader = run.read()
    reader.rollouts()  # opens the database
    thousands: list[int] = []  # of SQLite's instructions
    reader._local.db.set_progress_handler(lambda: thousands.append(1), 1000)
    assert reader.survivors()["ends"] == {"under_way": 20_000}
    assert 0 < len(thousands) < 20_000 / 2, "more than 500 instructions for each request"


def test_ids_go_on_behind_batches_that_the_journal_forgot(run: Run) -> None:
    """``journal.keep=0`` after a checkpoint: no file says which numbers there were."""
    run.step(7, group([66, 258]))
    run.read()
    journal = BatchJournal(run.dir / "journal")
    journal.number_from(TraceWriter(run.dir, 1 << 30).begin(1) + 1)
    assert [journal.record(b"x").sequence for _ in range(2)] == [8, 9]


def test_a_slow_disk_costs_a_part_of_the_trace_and_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(trace, "_GATHER_SECONDS", 0.01)
    monkeypatch.setattr(trace, "_MOST_WAITING", 1_000)
    run = Run(tmp_path)
    goes_on = threading.Event()
    run.writer._put(lambda: goes_on.wait(60), 0)
    eventually(lambda: not run.writer._jobs, "the disk is waited for")
    for number in range(2_000):
        run.writer.request([(number, 5, 1)], number, 9, 0.0, 1.0)
    run.writer.session("s", "finished", None)  # which is written all the same
    assert len(run.writer._jobs) == 1_002 and caplog.text.count("the disk is too slow") == 1
    goes_on.set()
    eventually(lambda: not run.writer._jobs, "all that was taken is written")
    run.step(1, group([66, 258]))
    assert steps(run.read()) == [1]


def test_a_locked_trace_is_kept_and_a_broken_one_begins_anew(
    run: Run, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    run.step(1, group([66, 258]))
    run.read()
    monkeypatch.setattr("sqlite3.connect", functools.partial(sqlite3.connect, timeout=0.01))
    with contextlib.closing(sqlite3.connect(run.dir / NAME)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        locked = Run(run.dir, step=1)
        locked.step(2, group([66, 258]))
        locked.writer.close()
    assert "is written no further; training goes on" in caplog.text
    assert steps(TraceReader(run.dir)) == [1]
    (run.dir / NAME).write_bytes(b"no database" * 1000)
    again = Run(run.dir, step=1)
    again.step(2, group([66, 258]))
    assert steps(again.read()) == [2] and "begins anew" in caplog.text


def test_rollouts_of_a_step_reach_wandb_and_trackio(tmp_path: Path, monkeypatch: Patch) -> None:
    reader = TraceReader(write_run(tmp_path / "run", steps=3))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Trace=lambda **about: about))
    tracking = Mock(logger={"wandb": SimpleNamespace(Table=lambda **about: about), "trackio": Mock(), "file": Mock()})
    for step in range(1, 5):
        send_rollouts(tracking, reader, step)
    wandb, trackio = (call.kwargs for call in tracking.log.call_args_list)
    assert (wandb["step"], wandb["backend"], trackio["backend"]) == (2, ["wandb"], ["trackio"])
    table = wandb["data"]["rollouts"]
    assert table["columns"][-2:] == ["prompt", "answer"]
    assert table["data"][:2] == [
        [2, 2 << 32 | 1, 0, 0.0, 4, "ab", "a<|im_end|>"],
        [2, 2 << 32, 0, 1.0, 4, "ab", "c<|im_end|>"],
    ]
    assert [turn["content"] for turn in trackio["data"]["rollouts"][0]["messages"]] == ["ab", "a<|im_end|>"]
    tracking.logger = {"tensorboard": Mock()}
    send_rollouts(tracking, reader, 2)
    assert tracking.log.call_count == 2


def client_of(place: Path, host: str = "localhost", **options: Any) -> TestClient:
    return TestClient(RunView([place], **options), base_url=f"http://{host}")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "known", steps=3)


@pytest.fixture(scope="module")
def client(run_dir: Path) -> TestClient:
    return client_of(run_dir.parent, hosts=("localhost",))


def test_rollouts_are_found_and_told_token_by_token(client: TestClient) -> None:
    first_of_step_1 = 1 << 32

    def ask(path: str) -> Any:
        return client.get(f"/api/runs/known/{path}").json()

    assert [run["name"] for run in client.get("/api/runs").json()] == ["known"]
    found = ask("rollouts?step=1&reward_min=0.5&state=&limit=5")
    assert [row["id"] for row in found["rollouts"]] == [first_of_step_1] and found["has_index"]
    about = ("state", "reward", "prompt_tokens", "tokens", "trained_tokens", "first_version", "last_version")
    assert [found["rollouts"][0][name] for name in about] == ["trained", 1.0, 2, 4, 2, 1, 1]
    group = ask("groups/65536")
    assert (group["size"], group["reward"]) == (2, 0.5)
    told = ask(f"sequences/{first_of_step_1}")
    assert "items" not in told
    assert [(turn["role"], turn["text"]) for turn in told["turns"]] == [("prompt", "ab"), ("policy", "c<|im_end|>")]
    items = ask(f"sequences/{first_of_step_1}?tokens=1")["items"]
    columns = ("id", "text", "trained", "unmatched", "advantage", "logprob", "mismatch", "version")
    assert [[item[name] for name in columns] for item in items] == [
        [65, "b", False, False, None, None, None, None],
        [66, "c", True, False, 1.0, -0.5, -0.25, 1],
        [258, "<|im_end|>", True, True, 1.0, -0.25, 0.0, None],
    ]
    assert ask("survivors")["ends"] == {"quarantined": 2, "trained": 4}
    assert ask("counts")["groups"] == {"quarantined": 1, "trained": 2}


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("other/counts", 404, "no run is called 'other'"),
        ("known/groups/9", 404, "not in the trace"),
        (f"known/groups/{10**30}", 404, "not in the trace"),
        ("known/sessions/none", 404, "not in the trace"),
        ("known/rollouts?step=two", 400, "$.step"),
        ("known/rollouts?before=two", 400, "two"),
    ],
)
def test_what_is_not_there_is_refused_with_a_reason(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(f"/api/runs/{path}")
    assert answer.status_code == status and said in answer.json()["detail"]


def test_it_only_reads_and_every_answer_forbids_scripts_of_others(client: TestClient) -> None:
    for path in ("/", "/api/runs", "/api/runs/known/rollouts", "/static/main.js", "/api/runs/none/counts"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert client.request(method, path).status_code == 405
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    for outside in ("../view.py", "%2e%2e/view.py"):
        assert client.get(f"/static/{outside}").status_code == 404


def test_other_sites_and_requests_without_the_token_are_refused(client: TestClient, run_dir: Path) -> None:
    foreign = {"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}
    for name, value in foreign.items():
        assert client.get("/api/runs", headers={name: value}).status_code == 403
    remote = client_of(run_dir, "node7:8090", token="secret")
    assert [remote.get(path).status_code for path in ("/", "/static/main.js")] == [200, 200]
    for path in ("", "/known/events", "/known/rollouts", "/known/survivors"):
        assert remote.get(f"/api/runs{path}").status_code == 401
    for token, status in (("secret", 200), ("other", 401)):
        assert remote.get("/api/runs", headers={"authorization": f"Bearer {token}"}).status_code == status


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
    client = client_of(run_dir)
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


def step(number: int, reward: float | None, **metrics: Any) -> str:
    figures = {"timing/step": 2.0, "data/groups": 3, "data/trained_tokens": 1000, "data/quarantined": 1}
    line = {"step": number, "policy_version": number, "loss": -0.5, "reward/mean": reward, **figures, **metrics}
    return json.dumps(line) + "\n"


def make_run(root: Path, *rewards: float | None, end: str = "", **summary: Any) -> Path:
    """``end``: of the file of metrics."""
    root.mkdir(parents=True)
    lines = [step(number, reward) for number, reward in enumerate(rewards, 1)]
    (root / "metrics.jsonl").write_text("".join(lines) + end)
    if summary:
        (root / "summary.json").write_text(json.dumps(summary))
    return root


def test_a_run_that_goes_on_has_the_figures_of_its_steps(tmp_path: Path) -> None:
    evaluated = step(8, None, **{"held_out/score": 0.625, "held_out/step": 6})
    end = evaluated + '{"step": 9, "los'  # being written
    data = load_run(make_run(tmp_path / "run", 0.0, 0.2, 0.4, None, 0.6, 0.8, 1.0, end=end))
    assert not data.is_finished
    assert [line["step"] for line in data.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert data.summary["reward_first"] == pytest.approx((0.0 + 0.2 + 0.4) / 3)  # half of six, as in summary.json
    assert data.summary["reward_last"] == pytest.approx((0.6 + 0.8 + 1.0) / 3)
    assert (data.summary["tokens_trained"], data.summary["seconds"]) == (8000, 16.0)
    assert data.series("reward/mean") == [(1, 0.0), (2, 0.2), (3, 0.4), (5, 0.6), (6, 0.8), (7, 1.0)]
    # a score stands at the step it is of
    assert data.series("held_out/score") == [(6, 0.625)] and data.summary["held_out_steps"] == {6: 0.625}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", "", "run: no step is done yet"),
        ("metrics.jsonl", f"junk\n{step(1, 0.5)}", "metrics.jsonl:1 is no step: 'junk'"),
        ("metrics.jsonl", f"[1]\n{step(1, 0.5)}", r"metrics.jsonl:1 is no step: '\[1\]'"),
        ("summary.json", "{", "cannot read .*summary.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    root = make_run(tmp_path / "run", 0.5)
    (root / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_run(root)


def test_a_directory_without_a_run_is_exit_code_2(tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(tmp_path)]) == 2
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"cannot read {tmp_path}/metrics.jsonl (No such file or directory); is {tmp_path} the run directory of a run?\n"
        f"{tmp_path}: no step is done yet\n"
    )


def test_runs_are_told_one_after_the_other(tmp_path: Path, capsys: Capture) -> None:
    """A summary of fewer steps is that of the run before the resume."""
    scores = {"steps": 2, "tokens_trained": 77, "held_out_before": 0.25, "held_out_after": 0.75}
    one = make_run(tmp_path / "x", 0.1, 0.2, **scores)
    resumed = make_run(tmp_path / "y", 0.1, 0.2, 0.9, **scores)
    assert main(["report", str(one), str(resumed)]) == 0
    first, second = capsys.readouterr().out.split(str(resumed))
    assert f"{one} (finished)" in first and "0.250 → 0.750" in first and "trained 77" in first
    assert re.search(r"step +2\.00 +2\.00 +4\.0s", first)
    assert "(not finished: figures so far)" in second and "0.900" in second and "trained 3,000" in second
