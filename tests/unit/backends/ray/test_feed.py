"""The trajectory feed: what fills a slot, what is left out and counted, when a batch is acked, and how it ends."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.serving import eventually

from atropos_verl.backends.ray.feed import TrajectoryFeed
from atropos_verl.backends.ray.transfer import Row
from atropos_verl.config.schema import OffPolicyConfig, RunConfig
from atropos_verl.errors import AtroposConnectionError
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.leases import HeldBatch
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.batch_source import BatchSource
from atropos_verl.training.staleness import BatchProvenance
from atropos_verl.training.step import RunTotals
from atropos_verl.types import SampleSettings

WAIT = 10.0


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

    def discard_through(self, step: int) -> int:
        self.calls.append(("discard", step))
        return 0

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
        self.source.batches = self.batches  # type: ignore[assignment]
        self.throttle = StalenessThrottle(Ledger(), 8, 1)
        self.source.attach(provenance, self.throttle, RunTotals())
        if provenance.resumed_at is not None:
            self.source.resume(provenance.resumed_at)
        self.feed = TrajectoryFeed(self.source, self.store, provenance, served_version=lambda: self.served, **settings)

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


def three_batches() -> list[list[dict[str, Any]]]:
    """The first group is too old for version 3 and a bound of 1."""
    return [[group(2 * n + 1, **of(1 if n == 0 else 3)), group(2 * n + 2, **of(3))] for n in range(3)]


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


@pytest.mark.parametrize(("groups", "max_staleness"), [(1, None), (2, None), (2, 3)])
def test_a_batch_with_nothing_to_train_on_is_followed_by_the_next(
    groups: int, max_staleness: int | None, made: Any
) -> None:
    """One of all its groups, too, which would fill a slot by its size."""
    masked = {**group(1), "masks": [[-100] * 3] * 4}
    world = made([[masked] * groups, [group(2), group(3)]], max_staleness=max_staleness)
    assert firsts(world.filled("a")) == [2] * 4 + [3] * 4
    counts = world.feed.slots["a"].counts
    assert (counts["groups"], counts["untrained"], counts["sequences"]) == (groups + 2, 4 * groups, 8)
    world.train("a", 1)
    world.feed.stop()
    assert world.batches.named("ack") == [1, 2]


def test_stale_groups_are_left_out_and_the_slot_filled_from_the_next_batch(made: Any) -> None:
    world = made([[group(1, **of(2)), group(2, **of(3))], [group(3, **of(3)), group(4, **of(3))]], max_staleness=0)
    world.served = 3
    rows = world.filled("a")
    assert firsts(rows) == [2] * 4 + [3] * 4
    counts = world.feed.slots["a"].counts
    assert (counts["stale"], counts["carried"], counts["groups"]) == (1, 1, 2)
    assert {row.tag["min_global_steps"] for row in rows} == {3}
    world.train("a", 4)
    world.feed.stop()
    assert world.batches.named("ack") == [1, 2], "both batches that the slot was made of"
    assert world.batches.named("trained") == [(1, 4)] and world.batches.named("release") == []


def test_what_is_above_the_size_of_a_slot_is_trained_on_in_the_next(made: Any) -> None:
    world = made(three_batches(), max_staleness=1)
    world.served = 3
    assert firsts(world.filled("a")) == [2] * 4 + [3] * 4
    world.train("a", 4)
    world.served = 4
    assert firsts(world.filled("b")) == [4] * 4 + [5] * 4
    counts = world.feed.slots["b"].counts
    assert (counts["stale"], counts["carried"], counts["groups"]) == (0, 1, 2)
    assert [score for _, score in world.feed.slots["b"].scores] == [0.0, 1.0, 2.0, 3.0] * 2
    assert world.batches.named("trained") == [(1, 4)], "the second batch is not done with"
    world.train("b", 5)
    world.feed.stop()
    assert world.batches.named("trained") == [(1, 4), (2, 5)]
    assert world.batches.named("release") == [], "of the third, a part is trained on"


_AFTER = {
    # (steps that were taken from 4 on, step of the checkpoint): groups of the slots after it
    (1, 3): [[1, 2], [3, 4], [5, 6]],
    (1, 4): [[4, 5], [6, 7]],
    (2, 3): [[1, 2], [3, 4], [5, 6]],
    (2, 4): [[4, 5], [6, 7]],
    (2, 5): [[6, 7]],
}


@pytest.mark.parametrize(("steps", "checkpoint"), list(_AFTER))
def test_a_resumed_run_takes_the_groups_that_its_checkpoint_does_not_hold(
    tmp_path: Path, steps: int, checkpoint: int
) -> None:
    """Slots of groups 2 and 3, then of 4 and 5; 6 is left over. Then another process goes on from a checkpoint."""
    world = World(tmp_path, three_batches(), max_staleness=1)
    world.served = 3
    world.feed.start()
    for step in range(4, 4 + steps):
        world.filled(f"s{step}")
        world.train(f"s{step}", step)
    world.feed.stop()
    assert world.batches.named("release") == []
    bodies = [*world.batches.bodies, [group(7, **of(3)), group(8, **of(3))]]
    after = World(tmp_path, bodies, max_staleness=4, resumed_at=checkpoint)
    after.served = checkpoint
    after.feed.start()
    expected = _AFTER[steps, checkpoint]
    seen = [sorted(set(firsts(after.filled(f"r{number}")))) for number in range(len(expected))]
    for number in range(len(expected)):
        after.train(f"r{number}", checkpoint + 1 + number, checkpoint + 1 + number)
    after.feed.stop()
    assert seen == expected
    left = [entry.sequence for entry in after.batches.journal.pending(checkpoint + len(expected))]
    assert left == ([] if expected[-1][-1] == 6 else [4]), "of the last batch group 8 is to come"


def test_the_throttle_counts_filled_slots(made: Any) -> None:
    world = made(three_batches(), max_staleness=1)
    world.served = 3
    world.filled("a")
    assert world.throttle.expected_staleness == 1, "what begins now is trained on after that slot"
    world.filled("b", 5)
    assert world.throttle.expected_staleness == 2
    world.train("a b", 4)
    assert world.throttle.expected_staleness == 0


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
    assert not [thread for thread in threading.enumerate() if thread.name == "trajectory-feed"]
    assert world.feed.failure is None
