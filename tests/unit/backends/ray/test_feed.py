"""The trajectory feed: what fills a slot, what is left out and counted, when a batch is acked, how it ends; its rows:
prompt and response, the multi-turn mask, scores, logprobs, versions, tags.

The advantages that reach verl's optimiser are those of the local backend, to the last bit, whatever order verl has.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.serving import eventually

from atropos_verl.backends.ray.feed import ADVANTAGES, Row, TrajectoryFeed, finish_batch, make_rows
from atropos_verl.config.schema import OffPolicyConfig, RunConfig
from atropos_verl.errors import AtroposConnectionError
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.leases import HeldBatch
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.batch_source import BatchSource
from atropos_verl.training.samples import build_samples, collect_samples
from atropos_verl.training.staleness import BatchProvenance
from atropos_verl.training.step import RunTotals
from atropos_verl.types import UNKNOWN_VERSION, SampleSettings

WAIT = 60.0


def group(first: int, size: int = 4, **fields: Any) -> dict[str, Any]:
    tokens = [[first, 7, 20 + i] for i in range(size)]
    scores = [float(i) for i in range(size)]
    return {"tokens": tokens, "masks": [[-100, *row[1:]] for row in tokens], "scores": scores, **fields}


class Batches:
    """In the place of ``LeasedBatches``: bodies from a list, and a note of every call."""

    def __init__(self, directory: Path, bodies: Sequence[list[dict[str, Any]]]) -> None:
        self.journal = BatchJournal(directory)
        self.bodies = list(bodies)
        self.calls: list[tuple[str, Any]] = []
        self.journal.discard_through = lambda step: self.calls.append(("discard", step))  # type: ignore[method-assign]
        self.failure: Exception | None = None
        self.asked = threading.Event()

    def fetch(self, max_wait_time: float, should_stop: Any, meta: Any = None) -> HeldBatch:
        self.asked.set()
        while not self.bodies:
            should_stop()
            if self.failure is not None:
                raise self.failure
        body = json.dumps({"batch": self.bodies.pop(0)}).encode()
        return HeldBatch(body, self.journal.record(body))

    def resume(self, after_step: int) -> list[HeldBatch]:
        return [HeldBatch(self.journal.read(entry), entry) for entry in self.journal.pending(after_step)]

    def trained(self, entry: JournalEntry, step: int) -> JournalEntry:
        self.calls.append(("trained", (entry.sequence, step)))
        return self.journal.change(entry, step=step)

    def ack(self, entry: JournalEntry) -> str:
        self.calls.append(("ack", entry.sequence))
        return "acked"

    def release(self, entry: JournalEntry) -> None:
        self.calls.append(("release", entry.sequence))

    def named(self, name: str) -> list[Any]:
        return [value for kind, value in self.calls if kind == name]


class Store:
    def __init__(self) -> None:
        self.status: dict[str, str] = {}
        self.rows: dict[str, list[Row]] = {}
        self.changed = threading.Condition()

    def running(self, uid: str) -> None:
        self.status[uid] = "running"

    def put(self, uid: str, rows: list[Row]) -> None:
        with self.changed:
            self.rows[uid] = rows
            self.status[uid] = "finished"
            self.changed.notify_all()

    def wait(self, uid: str) -> list[Row]:
        with self.changed:
            assert self.changed.wait_for(lambda: uid in self.rows, WAIT), f"slot {uid} was not filled"
        return self.rows[uid]


class World:
    def __init__(self, tmp_path: Path, bodies: Sequence[list[dict[str, Any]]], **settings: Any) -> None:
        self.batches, self.store, self.served = Batches(tmp_path / "journal", bodies), Store(), 0
        samples = SampleSettings(vocab_size=100, max_token_len=16)
        off_policy = OffPolicyConfig(max_staleness=settings.pop("max_staleness", None))
        provenance = BatchProvenance(off_policy, None, samples)
        provenance.resumed_at = settings.pop("resumed_at", None)
        config = RunConfig.from_mapping({"batch_size": 8, "group_size": 4, "atropos": {"api_url": "http://unused"}})
        self.source = BatchSource(config, tmp_path)
        self.source.batches, self.source.journal = self.batches, self.batches.journal  # type: ignore[assignment]
        self.throttle = StalenessThrottle(Ledger(), 8, 1)
        self.source.attach(provenance, self.throttle, RunTotals())
        if provenance.resumed_at is not None:
            self.source.resume(provenance.resumed_at)
        self.feed = TrajectoryFeed(self.source, self.store, samples, served_version=lambda: self.served, **settings)

    def filled(self, uid: str, step: int = 1) -> list[Row]:
        self.feed.request(uid, step)
        return self.store.wait(uid)

    def train(self, uids: str, step: int, covered: int = 0) -> None:
        self.feed.acknowledge(self.feed.trained(uids.split(), step), covered)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    worlds: list[World] = []

    def make(bodies: Sequence[list[dict[str, Any]]], **settings: Any) -> World:
        worlds.append(World(tmp_path, bodies, **settings))
        worlds[-1].feed.start()
        return worlds[-1]

    yield make
    for world in worlds:
        world.feed.stop()


def firsts(rows: list[Row]) -> list[int]:
    return [int(row.fields["input_ids"][0]) for row in rows]


def of(version: int) -> dict[str, Any]:
    return {"generation_params": {"policy_version": version}}


def test_one_slot_is_one_batch_and_it_is_acked_after_the_step(made: Any) -> None:
    world = made([[group(1), group(2)], [group(3), group(4)]])
    rows = world.filled("a")
    assert firsts(rows) == [1] * 4 + [2] * 4
    assert world.store.status["a"] == "finished"
    assert world.batches.named("ack") == []
    slots = world.feed.trained(["a"], 5)
    assert world.batches.named("trained") == [(1, 5)]
    assert slots[0].scores == [(None, score) for score in (0.0, 1.0, 2.0, 3.0)] * 2
    assert world.batches.named("ack") == []
    world.feed.acknowledge(slots, covered_step=4)
    assert world.batches.named("ack") == [1]
    assert world.batches.named("discard") == [4]
    assert firsts(world.filled("b")) == [3] * 4 + [4] * 4


@pytest.mark.parametrize(
    ("bad", "good", "settings", "reason"),
    [
        ({"scores": [0.0, 1.0, 2.0, float("nan")]}, {}, {}, "scores[3] = nan"),
        ({"generation_params": {"temperature": 0.5}}, {}, {}, "rollout.temperature"),
        ({}, {"inference_logprobs": [[1.0, -1.0, -1.0]] * 4}, {"needs_logprobs": True}, "inference_logprobs"),
    ],
)
def test_a_bad_group_is_quarantined_with_its_reason_and_the_rest_is_trained(
    made: Any, tmp_path: Path, bad: dict[str, Any], good: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    world = made([[group(1, **good), group(2, **bad)]], **settings)
    assert firsts(world.filled("a")) == [1] * 4
    (path,) = (tmp_path / "quarantine").glob("*.json")
    assert reason in path.read_text()
    assert world.feed.slots["a"].counts["quarantined"] == 1


@pytest.mark.parametrize("max_staleness", [None, 3])
def test_a_batch_with_nothing_to_train_on_is_followed_by_the_next(max_staleness: int | None, made: Any) -> None:
    masked = {**group(1), "masks": [[-100] * 3] * 4}
    world = made([[masked, masked], [group(2), group(3)]], max_staleness=max_staleness)
    assert firsts(world.filled("a")) == [2] * 4 + [3] * 4
    counts = world.feed.slots["a"].counts
    assert (counts["groups"], counts["untrained"], counts["sequences"]) == (4, 8, 8)
    assert world.throttle.expected_staleness == 1, "it is one slot, whose step is to come"
    world.train("a", 1)
    world.feed.stop()
    assert world.batches.named("ack") == [1, 2]
    assert world.batches.named("trained") == [(1, 1), (2, 1)]
    assert world.throttle.expected_staleness == 0


def test_stale_groups_are_left_out_and_the_rest_of_the_batch_is_the_step(made: Any) -> None:
    bodies = [[group(1, **of(2)), group(2, **of(3))], [group(3, **of(2)), group(4, **of(2))], [group(5, **of(3))]]
    world = made(bodies, max_staleness=0)
    world.served = 3
    rows = world.filled("a")
    assert firsts(rows) == [2] * 4 and {row.tag["min_global_steps"] for row in rows} == {3}
    counts = world.feed.slots["a"].counts
    assert (counts["stale"], counts["groups"], counts["rollouts"]) == (1, 1, 4)
    assert firsts(world.filled("b")) == [5] * 4
    assert world.feed.slots["b"].counts["stale"] == 2
    world.train("a b", 4)
    world.feed.stop()
    assert world.batches.named("ack") == [1, 2, 3] and world.batches.named("release") == []


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_a_resumed_run_takes_the_batches_that_its_checkpoint_does_not_hold(tmp_path: Path, checkpoint: int) -> None:
    """Two steps were taken; the third batch was waiting when the process ended."""
    world = World(tmp_path, [[group(1)], [group(2)], [group(3)]])
    world.feed.start()
    for step in (1, 2):
        world.filled(f"s{step}")
        world.train(f"s{step}", step)
    world.filled("s3")
    world.feed.stop()
    after = World(tmp_path, [], resumed_at=checkpoint)
    after.feed.start()
    seen = [firsts(after.filled(f"r{number}"))[0] for number in range(checkpoint, 3)]
    after.feed.stop()
    assert seen == [1, 2, 3][checkpoint:]


def test_untrained_batches_go_back_when_it_stops_and_trained_or_evicted_ones_do_not(made: Any) -> None:
    world = made([[group(1)], [group(2)], [group(3)], [group(4)]])
    for uid in ("acked", "trained", "evicted", "untrained"):
        world.filled(uid)
    world.train("acked", 1)
    world.feed.trained(["trained"], 2)
    world.feed.evicted({"evicted", "unknown"})
    world.feed.stop()
    assert (world.batches.named("ack"), world.batches.named("release")) == ([1, 3], [4])


def test_a_failure_is_kept_for_the_trainer(made: Any) -> None:
    world = made([])
    world.batches.failure = AtroposConnectionError("the API is gone", "http://x")
    world.feed.request("a", 1)
    eventually(lambda: world.feed.failure is not None, "the feed to end", timeout=WAIT)
    with pytest.raises(AtroposConnectionError, match="the API is gone"):
        world.feed.check()


def test_it_stops_while_it_waits(made: Any) -> None:
    world = made([])
    world.feed.request("a", 1)
    assert world.batches.asked.wait(WAIT)
    world.feed.stop()
    assert world.feed.failure is None and not world.feed._thread.is_alive()


# Two turns of the policy with a tool's answer (30 31) between them; the second sequence has one turn.
GROUP = {
    "tokens": [[5, 6, 10, 11, 30, 31, 12], [5, 6, 10]],
    "masks": [[-100, -100, 10, 11, -100, -100, 12], [-100, -100, 10]],
    "scores": [1.0, 0.0],
    "inference_logprobs": [[1.0, 1.0, -0.5, -0.25, 1.0, 1.0, -0.125], [1.0, 1.0, -2.0]],
    "advantages": [[0.0, 0.0, 0.5, -0.5, 9.0, 9.0, 2.0], None],
    "overrides": [{}, {"set_advantage_to_zero": True}],
}


def rows_of(group: dict[str, object], **known: object) -> list[Row]:
    """``known``: what is known of each sample besides."""
    groups = decode_batch(json.dumps({"batch": [group]}).encode())
    report, advantages = collect_samples(groups)
    samples = [replace(sample, **known) for sample in report.samples]
    sizes = {g.group_id: len(g) for g in groups}
    return make_rows("slot", samples, advantages, served=7, global_steps=7, group_sizes=sizes)


def test_a_multi_turn_sequence_keeps_its_mask_and_everything_is_aligned() -> None:
    first, second = rows_of(GROUP)
    fields = first.fields
    assert first.key == "slot_0_0"
    assert second.key == "slot_1_0"
    assert fields["prompts"].tolist() == [5, 6]
    assert fields["responses"].tolist() == [10, 11, 30, 31, 12]
    assert fields["response_mask"].tolist() == [1, 1, 0, 0, 1]
    assert fields["input_ids"].tolist() == GROUP["tokens"][0]
    assert fields["loss_mask"].tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert fields["position_ids"].tolist() == list(range(7))
    assert fields["rollout_log_probs"].tolist() == [-0.5, -0.25, 0.0, 0.0, -0.125]
    assert fields["rm_scores"].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert fields["num_turns"] == 4
    assert second.fields["num_turns"] == 2
    assert fields["uid"] == second.fields["uid"], "verl's estimators group by this field"
    expected = {"prompt_len": 2, "response_len": 5, "seq_len": 7, "global_steps": 7, "group_size": 2}
    assert {**expected, "rollout_log_probs": True}.items() <= first.tag.items()


def test_missing_logprobs_are_said_and_a_sequence_without_a_trained_token_is_left_out() -> None:
    first, second = rows_of({**GROUP, "inference_logprobs": [[1.0] * 7, [1.0, 1.0, -2.0]]})
    assert (first.tag["rollout_log_probs"], second.tag["rollout_log_probs"]) == (False, True)
    assert first.fields["rollout_log_probs"].tolist() == [0.0] * 5
    group = {"tokens": [[5, 6, 10], [5, 6, 11]], "masks": [[-100] * 3, [-100, -100, 11]], "scores": [1.0, 0.0]}
    assert [row.key for row in rows_of(group)] == ["slot_1_0"]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"token_versions": np.array([9, 9, 2, 3, 9, 9, UNKNOWN_VERSION]), "policy_version": 2}, (2, 3, False)),
        ({"token_versions": np.array([9, 9, 2, 3, 9, 9, 3])}, (2, 3, True)),
        ({"policy_version": 4}, (4, 4, False)),
        ({}, (7, 7, False)),
    ],
)
def test_versions_are_those_of_the_trained_tokens_else_stated_else_served(
    known: dict[str, object], expected: tuple[int, int, bool]
) -> None:
    tag = rows_of({name: rows[:1] for name, rows in GROUP.items()}, **known)[0].tag
    assert (tag["min_global_steps"], tag["max_global_steps"], tag["versions_known"]) == expected


def batch(seed: int = 0, groups: int = 5) -> bytes:
    """Groups of 1-4 sequences, some with token-level advantages, some zeroed, of two turns."""
    rng, made = np.random.default_rng(seed), []
    for number in range(groups):
        size = number % 4 + 1
        tokens = [rng.integers(1, 90, int(rng.integers(6, 12))).tolist() for _ in range(size)]
        masks = [[-100, -100, *row[2:4], -100, *row[5:]] for row in tokens]
        advantages = [rng.normal(size=len(row)).tolist() if rng.random() < 0.4 else None for row in tokens]
        overrides = [{"set_advantage_to_zero": bool(rng.random() < 0.3)} for _ in tokens]
        extra = {"advantages": advantages, "overrides": overrides}
        made.append({"tokens": tokens, "masks": masks, "scores": rng.normal(size=size).tolist(), **extra})
    return json.dumps({"batch": made}).encode()


def stored(body: bytes, shuffle: int = 0, padding: int = 2) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Rows as they come back from TransferQueue: in another order, with verl's padding."""
    groups = decode_batch(body)
    report, advantages = collect_samples(groups)
    sizes = {group.group_id: len(group) for group in groups}
    rows = make_rows("slot", report.samples, advantages, served=0, global_steps=1, group_sizes=sizes)
    rows = [rows[i] for i in np.random.default_rng(shuffle).permutation(len(rows))]
    masks = [row.fields["response_mask"] for row in rows] + [torch.zeros(1, dtype=torch.int64)] * padding
    # verl copies the fields of the first row into padding, our own at their full length.
    own = [row.fields[ADVANTAGES] for row in rows] + [rows[0].fields[ADVANTAGES]] * padding
    verls = [torch.full((mask.numel(),), 7.0) for mask in masks]
    columns = {"response_mask": masks, "advantages": verls, ADVANTAGES: own}
    values = {name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()}
    keys = [row.key for row in rows] + [f"pad_{i}_0" for i in range(padding)]
    tags = [row.tag for row in rows] + [{**rows[0].tag, "is_padding": True}] * padding
    return values, keys, tags


@pytest.mark.parametrize("normalization", ["none", "batch", "global"])
@pytest.mark.parametrize("clipping", [None, (-0.7, 0.9)])
def test_advantages_equal_the_local_backends_exactly(normalization: str, clipping: tuple[float, float] | None) -> None:
    ours, theirs = RunningMoments(), RunningMoments()
    for seed in range(3):  # "global" carries statistics from batch to batch
        body = batch(seed)
        settings = SampleSettings(normalization=normalization, clipping=clipping)
        expected = build_samples(decode_batch(body), settings, running=theirs).samples
        values, keys, tags = stored(body, shuffle=seed)
        finished, _ = finish_batch(
            values, keys, tags, from_data=True, normalization=normalization, clipping=clipping, running=ours
        )
        rows = zip(keys, finished.unbind(), strict=True)
        found = {int(key.rsplit("_", 2)[1]): row for key, row in rows if not key.startswith("pad")}
        assert len(found) == len(expected) > 8
        for index, sample in enumerate(expected):
            start = int(np.argmax(sample.loss_mask))
            want = torch.from_numpy(sample.advantages[start:].astype(np.float32))
            assert torch.equal(found[index], want), (index, found[index], want)
    assert ours.state_dict() == theirs.state_dict()


def test_rows_of_padding_are_zero_and_in_no_statistic() -> None:
    settings: dict[str, Any] = {"from_data": True, "normalization": "batch", "clipping": None, "running": None}
    (without, _), (finished, _) = (finish_batch(*stored(batch(1), padding=n), **settings) for n in (0, 5))
    rows = finished.unbind()
    assert all(float(row.abs().sum()) == 0.0 for row in rows[-5:])
    assert all(torch.equal(a, b) for a, b in zip(rows[:-5], without.unbind(), strict=True))


def test_verls_own_estimate_is_kept_but_for_what_the_environment_says() -> None:
    """KL in reward, or another estimator of verl: its advantages, with overrides, zeros and groups of one put right."""
    values, keys, tags = stored(batch(2), padding=0)
    finished, _ = finish_batch(values, keys, tags, from_data=False, normalization="none", clipping=None, running=None)
    kinds = set()
    columns = (nested.unbind() for nested in (finished, values["response_mask"], values[ADVANTAGES]))
    for row, mask, own, tag in zip(*columns, tags, strict=True):
        if tag["advantage_to_zero"] or (tag["group_size"] == 1 and not tag["advantage_replaced"]):
            want, kind = torch.zeros(mask.numel()), "zero"
        elif tag["advantage_replaced"]:
            want, kind = own.float() * mask, "replaced"
        else:
            want, kind = 7.0 * mask, "verl's"
        kinds.add(kind)
        assert torch.equal(row, want.float()), kind
    assert kinds == {"zero", "replaced", "verl's"}


def test_rows_of_a_rollout_are_those_of_one_session_and_have_one_advantage() -> None:
    tokens = [[5, 6, 10], [5, 6, 11], [5, 7, 12]]
    group = {"tokens": tokens, "masks": [[-100, -100, row[2]] for row in tokens], "scores": [1.0, 1.0, 0.0]}
    rows = rows_of({**group, "rollout_ids": [3, 3, 9], "weights": [1.0, 0.5, 1.0]})
    assert [row.key for row in rows] == ["slot_0_0", "slot_0_1", "slot_1_0"]
    assert [row.tag["weight"] for row in rows] == [1.0, 0.5, 1.0]
    first, second, third = (float(row.fields[ADVANTAGES][0]) for row in rows)
    assert first == second == -third == pytest.approx(0.5 / (0.5**0.5 + 1e-6))
