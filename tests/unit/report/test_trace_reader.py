"""What the writer notes, as the reader tells it. Values are worked out here by hand.

Ids of the demo model's tokenizer: a = 64, b = 65, c = 66, newline = 198, <|im_end|> = 258.
"""

import argparse
import contextlib
import functools
import io
import json
import sqlite3
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console
from support.serving import eventually
from support.traced_run import write_run

from atropos_verl.assets import demo_model_path
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.report import run_report as report
from atropos_verl.report.trace_reader import RolloutFilter, TraceReader, distance, send_rollouts
from atropos_verl.training import trace
from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import Applied
from atropos_verl.training.trace import NAME, TraceWriter
from atropos_verl.types import (
    NOT_TRAINED,
    RepairedTokens,
    SampleReport,
    SampleSettings,
    ScoredGroup,
    SequenceMatch,
)

PROMPT = [64, 65]


def group(
    *answers: Sequence[int], scores: Sequence[float] = (1.0, 0.0), env_id: int | None = 0, name: str = "g", **more: Any
) -> ScoredGroup:
    return ScoredGroup(
        token_ids=tuple(np.array([*PROMPT, *answer]) for answer in answers),
        masks=tuple(np.array([NOT_TRAINED, NOT_TRAINED, *answer]) for answer in answers),
        scores=np.array(scores[: len(answers)]),
        env_id=env_id,
        group_id=name,
        **more,
    )


class Run:
    """A writer, and the steps that a backend takes with it."""

    def __init__(self, run_dir: Path, step: int | None = None, most_bytes: int = 1 << 30) -> None:
        (run_dir / "config.json").write_text(json.dumps({"model": {"path": None}}))
        self.dir = run_dir
        self.writer = TraceWriter(run_dir, most_bytes)
        self.writer.begin(step)

    def arrive(self, batch: int, *groups: ScoredGroup) -> None:
        self.writer.arrived(batch, groups)

    def collect(
        self,
        batch: int,
        *groups: ScoredGroup,
        matches: list[list[SequenceMatch | None]] | None = None,
        stale: Sequence[int] = (),
        **settings: Any,
    ) -> SampleReport:
        kept = [i for i in range(len(groups)) if i not in stale]
        applied = Applied([groups[i] for i in kept], kept, {})
        report = build_samples(applied.groups, SampleSettings(**settings))
        matches = matches or [[None] * len(one) for one in groups]
        self.writer.collected([(batch, i) for i in range(len(groups))], groups, matches, applied, report)
        return report

    def step(self, batch: int, *groups: ScoredGroup, step: int | None = None, **more: Any) -> None:
        self.arrive(batch, *groups)
        self.collect(batch, *groups, **more)
        self.writer.ended([(batch, i) for i in range(len(groups))], step or batch)

    def read(self) -> TraceReader:
        self.writer.close()
        return TraceReader(self.dir)


def test_a_trained_group_is_told_token_by_token(tmp_path: Path) -> None:
    run = Run(tmp_path)
    found = np.array([False, False, True, False])
    versions = np.array([-2, -2, 3, -2])
    one = group([66, 258], [64, 258], inference_logprobs=(np.array([1.0, 1.0, -0.5, -0.25]), None))
    one = ScoredGroup(**{name: getattr(one, name) for name in one.__slots__} | {"token_versions": (versions, None)})
    match = SequenceMatch(found=found, versions=versions, logprobs=np.full(4, np.nan), unmatched_tokens=1)
    run.arrive(1, one)
    run.collect(1, one, matches=[[match, None]], estimator="plain")
    run.writer.ended([(1, 0)], 7, trainer_logprobs={(1, 0, 0): np.array([0.0, 0.0, -0.75, -0.25])})
    reader = run.read()
    [newest, first] = reader.rollouts()
    assert (newest["position"], first["position"]) == (1, 0)
    about = ("state", "step", "reward", "prompt_tokens", "tokens", "trained_tokens", "first_version", "last_version")
    assert [first[name] for name in about] == ["trained", 7, 1.0, 2, 4, 2, 3, 3]
    told = reader.sequence(first["id"])
    assert [item["text"] for item in told["items"]] == ["a", "b", "c", "<|im_end|>"]
    third, last = told["items"][2:]
    assert third == {
        "id": 66, "text": "c", "trained": True, "unmatched": False, "advantage": 1.0, "logprob": -0.5,
        "mismatch": -0.25, "version": 3,
    }  # fmt: skip
    assert (last["unmatched"], last["version"], last["mismatch"]) == (True, None, 0.0)
    assert not told["items"][0]["trained"] and told["items"][0]["advantage"] is None
    assert [(turn["role"], turn["text"]) for turn in told["turns"]] == [("prompt", "ab"), ("policy", "c<|im_end|>")]
    assert reader.group(first["group"])["reward"] == 0.5
    json.dumps([told, reader.group(first["group"])], allow_nan=False)


def test_turns_have_the_roles_of_the_template(tmp_path: Path) -> None:
    run = Run(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_path()))
    ids = tokenizer.encode("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer.encode("ba<|im_end|>")
    one = ScoredGroup(
        token_ids=(np.array(ids + answer),),
        masks=(np.array([NOT_TRAINED] * len(ids) + answer),),
        scores=np.array([1.0]),
        group_id="g",
    )
    run.step(1, one)
    reader = run.read()
    turns = reader.sequence(reader.rollouts()[0]["id"])["turns"]
    assert [(turn["role"], turn["trained"]) for turn in turns] == [
        ("system", False), ("user", False), ("assistant", True)
    ]  # fmt: skip
    assert [turn["text"] for turn in turns] == ["be<|im_end|>\n", "ab<|im_end|>\n", "ba<|im_end|>"]


def test_every_group_has_an_end_and_a_reason(tmp_path: Path) -> None:
    run = Run(tmp_path)
    bad = group([66], [64], scores=(float("nan"), 0.0), name="bad")
    long = group([66] * 8, [64], name="long")
    groups = (group([66], [64]), bad, long, group([66], [64], name="old"))
    run.step(1, *groups, stale=[3], max_token_len=5)
    run.arrive(2, group([66], [64], name="waits"))
    reader = run.read()
    ids = {row["group"] for row in reader.rollouts()} | {2 << 16}  # what is under way is not listed
    states = {row["hash"]: row["state"] for row in map(reader.group, ids)}
    assert states == {"g": "trained", "bad": "quarantined", "long": "trained", "old": "stale", "waits": "under_way"}
    assert [row["state"] for row in reader.rollouts(RolloutFilter(state="overlong"))] == ["overlong"]
    [refused, _] = reader.rollouts(RolloutFilter(reason="NaN")) or reader.rollouts(RolloutFilter(reason="nan"))
    assert "scores[0]" in refused["reason"] and refused["step"] == 1
    assert reader.counts()["sequences"] == {
        "trained": 3, "quarantined": 2, "overlong": 1, "stale": 2, "under_way": 2
    }  # fmt: skip


def test_filters_find_by_each_field(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1, group([66], [64, 65], env_id=3, generation_params={"policy_version": 5}))
    run.step(2, group([66, 66], [64], scores=(0.25, 0.75), env_id=None))
    reader = run.read()

    def positions(**wanted: Any) -> list[tuple[int, int]]:
        return [(row["step"], row["position"]) for row in reader.rollouts(RolloutFilter(**wanted))]

    assert positions(step=1) == positions(environment=3) == positions(version=5) == [(1, 1), (1, 0)]
    assert positions(reward_min=0.25, reward_max=0.75) == [(2, 1), (2, 0)]
    assert positions(length_min=4) == [(2, 0), (1, 1)] and positions(length_max=3) == [(2, 1), (1, 0)]
    assert positions(text="abcc") == [(2, 0)] and positions(text="abc") == [(2, 0), (1, 0)]
    assert positions(text='"; DROP') == []
    first = reader.rollouts(limit=1)[0]
    assert [row["position"] for row in reader.rollouts(limit=2, before=first["id"])] == [0, 1]


def test_what_a_resumed_run_trains_on_again_is_under_way(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number in (1, 2):
        run.step(number, group([66], [64], name=f"g{number}"))
    run.read()
    again = Run(tmp_path, step=1)
    states = [row["state"] for row in again.read().rollouts()]
    assert states == ["under_way", "under_way", "trained", "trained"]
    once_more = Run(tmp_path, step=1)
    once_more.step(2, group([66], [64], name="g2"))
    assert [row["step"] for row in once_more.read().rollouts()] == [2, 2, 1, 1]
    anew = Run(tmp_path)
    assert anew.read().rollouts() == []


def test_a_full_trace_thins_out_the_older_groups_and_keeps_the_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, most_bytes=400_000)
    for number in range(1, 601):
        run.step(number, group([66] * 100, [64] * (number % 50 + 1)))
        if number % 10 == 0:
            run.writer.close()
            run = Run(tmp_path, step=number, most_bytes=400_000)
    reader = run.read()
    assert sum(file.stat().st_size for file in tmp_path.glob("trace.sqlite")) < 800_000
    rows = reader.rollouts(limit=1000)
    assert len(rows) < 1200 and reader.counts()["sequences"] == {"trained": 1200}
    assert sum(row["weight"] for row in rows) == pytest.approx(1200, rel=0.1)
    assert [row["step"] for row in rows[:4]] == [600, 600, 599, 599]
    with pytest.raises(KeyError):
        reader.group(1 << 16)


def test_survivors_shows_that_the_slow_and_the_unposted_are_not_trained(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number, seconds, tokens in [(1, 1.0, 1), (2, 1.0, 1), (3, 9.0, 8), (4, 9.0, 8)]:
        run.writer.request([(number, tokens, 0)], prompt=number, prompt_tokens=2, begun=100.0, seconds=seconds)
    run.writer.request([(5, 8, 0)], 5, 2, 100.0, 9.0, session="s")
    run.writer.session("s", "aborted", "no tool")
    run.writer.request([], 6, 2, 100.0, 2.0, reason="the client left")

    def match(order: int, size: int) -> SequenceMatch:
        size += 2
        found = np.arange(size) > 1
        return SequenceMatch(
            found=found, versions=np.zeros(size, np.int64), logprobs=np.zeros(size), records=(order,)
        )  # fmt: skip

    fast, slow = group([66], [64]), group([66] * 8, [64] * 8, env_id=1, name="slow")
    run.step(1, fast, slow, matches=[[match(1, 1), match(2, 1)], [match(3, 8), None]], stale=[1])
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    found = run.read().survivors()
    console = Console(file=io.StringIO(), width=120)
    report.run(argparse.Namespace(run_dirs=[tmp_path], survivors=True), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "7 begun, 2 trained (failed 1, given_up 2, stale 2, trained 2)" in shown and "0.667" in shown
    (tmp_path / "summary.json").unlink()
    report.run(argparse.Namespace(run_dirs=[tmp_path], survivors=True), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "6 begun, 2 trained (failed 1, given_up 1, stale 2, trained 2); under way, not counted: 1" in shown
    assert found["ends"] == {"trained": 2, "stale": 2, "given_up": 2, "failed": 1}
    length = found["by"]["length"]
    # 1, 1 trained; begun: 1, 1, 8, 8, 8, 8
    assert length["distance"] == pytest.approx(4 / 6) and length["trained_mean"] == 1.0
    # begun: 1, 1, 9, (unknown), 9, 9, 2
    assert found["by"]["latency"]["distance"] == pytest.approx(4 / 6)
    assert found["by"]["environment"]["begun"] == {"0": 2, "1": 2, "none": 3}
    assert found["by"]["environment"]["distance"] == pytest.approx(0.5)


def test_the_distance_is_that_of_the_distribution_functions() -> None:
    one = np.ones(4)
    assert distance(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]), one, one) == 0
    assert distance(np.array([1.0, 2, 3, 4]), np.array([3.0, 4]), one, np.ones(2)) == 0.5
    assert distance(np.array([1.0, 4]), np.array([1.0, 4]), np.ones(2), np.array([3.0, 1.0])) == 0.25


def test_a_run_without_an_index_has_no_rollouts(tmp_path: Path) -> None:
    reader = TraceReader(tmp_path)
    assert reader.rollouts() == [] and reader.counts()["groups"] == {} and not reader.has_index
    assert reader.survivors()["begun"] == 0 and reader.live()["state"] is None


def test_a_stale_group_is_told_with_its_repaired_tokens_whatever_their_number(tmp_path: Path) -> None:
    run = Run(tmp_path)
    shorter, longer = [*PROMPT, 67], [*PROMPT, 66, 66, 258]
    matches: list[SequenceMatch | None] = []
    for ids in (shorter, longer):
        mask = np.array([False, False, *[True] * (len(ids) - 2)])
        repaired = RepairedTokens(token_ids=np.array(ids), loss_mask=mask, origin=None, posted=4)
        versions = np.full(len(ids), -2)
        matches.append(
            SequenceMatch(found=mask, versions=versions, logprobs=np.full(len(ids), np.nan), repaired=repaired)
        )
    old = group([66, 258], [64, 258])
    run.arrive(1, old)
    run.collect(1, old, matches=[matches], stale=[0])
    run.step(2, group([66, 258], name="next"))
    reader = run.read()
    second, first = (one["id"] for one in reader.rollouts(RolloutFilter(state="stale")))
    for id_, ids in ((first, shorter), (second, longer)):
        items = reader.sequence(id_)["items"]
        assert [item["id"] for item in items] == ids
        assert [item["trained"] for item in items] == [False, False, *[True] * (len(ids) - 2)]
    assert [one["step"] for one in reader.rollouts(RolloutFilter(state="trained"))] == [2]


def test_a_value_that_sqlite_does_not_hold_costs_itself_and_not_the_trace(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1, group([66, 258], env_id=10**30))
    run.writer.request([], 5, 2, 0.0, 1.0, None, "EngineError: \ud800")
    run.writer.session("s", "aborted", "\ud800")
    run.step(2, group([66, 258]))
    assert [(one["step"], one["environment"]) for one in run.read().rollouts()] == [(2, 0), (1, None)]


def test_of_a_batch_taken_again_what_a_checkpoint_holds_stays_trained(tmp_path: Path) -> None:
    run = Run(tmp_path)
    groups = [group([66, 258], name=name) for name in ("first", "rest")]
    run.arrive(1, *groups)
    run.collect(1, *groups)
    run.writer.ended([(1, 0)], 1)
    run.writer.ended([(1, 1)], 2)
    run.writer.close()
    again = Run(tmp_path, step=1)
    again.arrive(1, *groups)
    states = [(one["state"], one["step"]) for one in again.read().rollouts()]
    assert states == [("under_way", None), ("trained", 1)]


def test_no_password_of_a_url_is_told(tmp_path: Path) -> None:
    state = {"time": 0, "api_url": "http://:p4ss@host:1/x", "services": []}
    (tmp_path / "state.json").write_text(json.dumps(state))
    live = TraceReader(tmp_path).live()
    assert live["state"]["api_url"] == "http://host:1/x" and "p4ss" not in json.dumps(live)


def test_reading_a_finished_run_leaves_no_file_and_sees_what_a_resumed_one_adds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1, group([66, 258]))
    reader = run.read()
    assert len(reader.rollouts()) == 1
    assert [path.name for path in tmp_path.glob("trace*")] == ["trace.sqlite"]
    assert reader.rollouts(RolloutFilter(step=10**30)) == []
    with pytest.raises(KeyError):
        reader.group(10**30)
    for number in (2, 3):
        again = Run(tmp_path, step=number - 1)
        again.step(number, group([66, 258], name=f"g{number}"))
        if number == 2:
            eventually(lambda: [one["step"] for one in reader.rollouts()] == [2, 1], "step 2 is written", 20)
        again.writer.close()
        assert [one["step"] for one in reader.rollouts()] == list(range(number, 0, -1))


def test_many_requests_that_no_group_brought_are_counted_in_one_pass(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for prompt in range(2_000):
        run.writer.request([(10 * prompt + i, 5, 1) for i in range(10)], prompt, 9, 0.0, 1.0)
    reader = run.read()
    reader.rollouts()  # opens the database
    thousands: list[int] = []  # of SQLite's instructions
    reader._local.db.set_progress_handler(lambda: thousands.append(1), 1000)
    assert reader.survivors()["ends"] == {"under_way": 20_000}
    assert 0 < len(thousands) < 20_000 / 2, "more than 500 instructions for each request"


def test_ids_go_on_behind_those_of_batches_that_the_journal_forgot(tmp_path: Path) -> None:
    """``journal.keep=0`` after a checkpoint: no file says which numbers there were."""
    run = Run(tmp_path)
    run.step(7, group([66, 258]))
    run.read()
    journal = BatchJournal(tmp_path / "journal")
    journal.number_from(TraceWriter(tmp_path, 1 << 30).begin(1) + 1)
    assert [journal.record(b"x").sequence for _ in range(2)] == [8, 9]


def test_a_disk_that_is_too_slow_costs_a_part_of_the_trace_and_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
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
    assert [one["state"] for one in run.read().rollouts()] == ["trained"]


def test_a_locked_trace_is_kept_and_one_that_is_no_database_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.step(1, group([66, 258]))
    run.read()
    monkeypatch.setattr("sqlite3.connect", functools.partial(sqlite3.connect, timeout=0.01))
    with contextlib.closing(sqlite3.connect(tmp_path / NAME)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        locked = Run(tmp_path, step=1)
        locked.step(2, group([66, 258]))
        locked.writer.close()
    assert "is written no further; training goes on" in caplog.text
    assert [one["step"] for one in TraceReader(tmp_path).rollouts()] == [1]
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    again = Run(tmp_path, step=1)
    again.step(2, group([66, 258]))
    assert [one["step"] for one in again.read().rollouts()] == [2] and "begins anew" in caplog.text


def test_rollouts_of_a_step_are_a_table_in_wandb_and_conversations_in_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
