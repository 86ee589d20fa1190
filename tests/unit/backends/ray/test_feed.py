"""The trajectory feed: what fills a slot, when a batch is acked, its rows, and the advantages of the local backend."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from support.serving import eventually

from atropos_verl.backends.ray.feed import ADVANTAGES, Row, TrajectoryFeed, finish_batch, make_rows
from atropos_verl.config.schema import OffPolicyConfig, RunConfig
from atropos_verl.errors import AtroposConnectionError
from atropos_verl.protocol.client import FetchedBatch
from atropos_verl.protocol.leases import LeasedBatches
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


def group(first: int, **fields: Any) -> dict[str, Any]:
    tokens = [[first, 7, 20 + i] for i in range(4)]
    masks = [[-100, *row[1:]] for row in tokens]
    return {"tokens": tokens, "masks": masks, "scores": [0.0, 1.0, 2.0, 3.0], **fields}


def of(version: int) -> dict[str, Any]:
    return {"generation_params": {"policy_version": version}}


def encoded(*groups: dict[str, Any]) -> bytes:
    return json.dumps({"batch": groups}).encode()


class World:
    """A feed, and an API of these batches, the first under lease "1"; they may end with a failure of the API."""

    def __init__(
        self,
        run_dir: Path,
        *batches: list[dict[str, Any]] | Exception,
        max_staleness: int | None = None,
        needs_logprobs: bool = False,
    ) -> None:
        self.batches, self.leases = list(batches), iter("12345")
        self.served, self.asked = 0, threading.Event()
        self.rows: dict[str, Future[list[Row]]] = defaultdict(Future)
        self.store, self.api = Mock(), Mock(lease_seconds=1e6, get_batch=self.get_batch)
        self.store.put.side_effect = lambda uid, rows: self.rows[uid].set_result(rows)
        self.api.ack.return_value = "acked"
        samples = SampleSettings(vocab_size=100, max_token_len=16)
        provenance = BatchProvenance(OffPolicyConfig(max_staleness=max_staleness), None, samples)
        config = RunConfig.from_mapping({"batch_size": 8, "group_size": 4, "atropos": {"api_url": "http://unused"}})
        self.source = BatchSource(config, run_dir)
        self.source.batches = LeasedBatches(self.api, self.source.journal)
        self.throttle = StalenessThrottle(Ledger(), 8, 1)
        self.source.attach(provenance, self.throttle, RunTotals())
        rest: dict[str, Any] = {"served_version": lambda: self.served, "needs_logprobs": needs_logprobs}
        self.feed = TrajectoryFeed(self.source, self.store, samples, **rest)
        self.feed.start()

    def get_batch(self, max_wait_time: float, should_stop: Callable[[], None]) -> FetchedBatch:
        self.asked.set()
        while not self.batches:
            should_stop()
            time.sleep(0.001)
        if isinstance(batch := self.batches.pop(0), Exception):
            raise batch
        return FetchedBatch(encoded(*batch), next(self.leases))

    def filled(self, uid: str) -> list[Row]:
        rows = self.rows[uid]
        self.feed.request(uid, 1)
        return rows.result(WAIT)

    def firsts(self, uid: str) -> list[int]:
        return [int(row.fields["input_ids"][0]) for row in self.filled(uid)]

    def train(self, uids: str, step: int) -> None:
        self.feed.acknowledge(self.feed.trained(uids.split(), step))

    def steps(self) -> list[int | None]:
        """Of the batches in the journal."""
        return [entry.step for entry in self.source.journal.pending(0)]

    def close(self) -> None:
        self.feed.stop()
        self.source.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda *batches, **settings: stack.enter_context(closing(World(tmp_path, *batches, **settings)))


def test_one_slot_is_one_batch_and_it_is_acked_after_the_step(made: Any) -> None:
    world = made([group(1), group(2)], [group(3), group(4)])
    assert world.firsts("a") == [1] * 4 + [2] * 4
    assert world.store.mock_calls == [call.running("a"), call.put("a", world.rows["a"].result())]
    slots = world.feed.trained(["a"], 5)
    assert slots[0].scores == [(None, score) for score in (0.0, 1.0, 2.0, 3.0)] * 2
    assert (world.steps(), world.api.ack.mock_calls) == ([5], [])
    world.feed.acknowledge(slots, covered_step=4)
    assert (world.steps(), world.api.ack.mock_calls) == ([5], [call("1")])
    assert world.firsts("b") == [3] * 4 + [4] * 4
    world.feed.acknowledge([], covered_step=5)
    assert world.steps() == [None]


@pytest.mark.parametrize(
    ("bad", "good", "needs_logprobs", "reason"),
    [
        ({"scores": [0.0, 1.0, 2.0, float("nan")]}, {}, False, "scores[3] = nan"),
        ({"generation_params": {"temperature": 0.5}}, {}, False, "rollout.temperature"),
        ({}, {"inference_logprobs": [[1.0, -1.0, -1.0]] * 4}, True, "inference_logprobs"),
    ],
)
def test_a_bad_group_is_quarantined_with_its_reason_and_the_rest_is_trained(
    made: Any, tmp_path: Path, bad: dict[str, Any], good: dict[str, Any], needs_logprobs: bool, reason: str
) -> None:
    world = made([group(1, **good), group(2, **bad)], needs_logprobs=needs_logprobs)
    assert world.firsts("a") == [1] * 4
    (path,) = (tmp_path / "quarantine").glob("*.json")
    assert reason in path.read_text()
    assert world.feed.slots["a"].counts["quarantined"] == 1


def test_stale_and_masked_groups_are_left_out_and_a_batch_of_nothing_else_is_followed_by_the_next(made: Any) -> None:
    masked = group(3, masks=[[-100] * 3] * 4, **of(3))
    world = made(
        [group(1, **of(2)), group(2, **of(3))], [masked, group(4, **of(2))], [group(5, **of(3))], max_staleness=0
    )
    world.served = 3
    assert (world.firsts("a"), world.firsts("b")) == ([2] * 4, [5] * 4)
    assert {row.tag["min_global_steps"] for row in world.rows["a"].result()} == {3}
    names = ("groups", "stale", "rollouts", "sequences", "untrained")
    first, second = ([world.feed.slots[uid].counts[name] for name in names] for uid in "ab")
    assert (first, second) == ([1, 1, 4, 4, 0], [2, 1, 8, 4, 4])
    assert world.throttle.expected_staleness == 2, "two slots, whose steps are to come"
    world.train("a b", 4)
    world.feed.stop()
    assert world.throttle.expected_staleness == 0
    assert (world.steps(), world.api.release.mock_calls) == ([4, 4, 4], [])
    assert world.api.ack.mock_calls == [call("1"), call("2"), call("3")]


def test_untrained_batches_go_back_when_it_stops_and_trained_or_evicted_ones_do_not(made: Any) -> None:
    world = made([group(1)], [group(2)], [group(3)], [group(4)])
    for uid in ("acked", "trained", "evicted", "untrained"):
        world.filled(uid)
    world.train("acked", 1)
    world.feed.trained(["trained"], 2)
    world.feed.evicted({"evicted", "unknown"})
    world.feed.stop()
    assert (world.api.ack.mock_calls, world.api.release.mock_calls) == ([call("1"), call("3")], [call("4")])


def test_it_stops_while_it_waits_and_a_failure_is_kept_for_the_trainer(made: Any) -> None:
    world = made()
    world.feed.request("a", 1)
    assert world.asked.wait(WAIT)
    world.feed.stop()
    assert world.feed.failure is None and not world.feed._thread.is_alive()
    world = made(AtroposConnectionError("the API is gone", "http://x"))
    world.feed.request("a", 1)
    eventually(lambda: world.feed.failure is not None, "the feed to end", timeout=WAIT)
    with pytest.raises(AtroposConnectionError, match="the API is gone"):
        world.feed.check()


# Two turns of the policy with a tool's answer (30 31) between them; the second sequence has one turn.
GROUP = {
    "tokens": [[5, 6, 10, 11, 30, 31, 12], [5, 6, 10]],
    "masks": [[-100, -100, 10, 11, -100, -100, 12], [-100, -100, 10]],
    "scores": [1.0, 0.0],
    "inference_logprobs": [[1.0, 1.0, -0.5, -0.25, 1.0, 1.0, -0.125], [1.0, 1.0, -2.0]],
    "advantages": [[0.0, 0.0, 0.5, -0.5, 9.0, 9.0, 2.0], None],
    "overrides": [{}, {"set_advantage_to_zero": True}],
}


def rows_of(body: bytes, **known: object) -> list[Row]:
    """``known``: what is known of each sample besides."""
    groups = decode_batch(body)
    report, advantages = collect_samples(groups)
    samples = [replace(sample, **known) for sample in report.samples]
    sizes = {g.group_id: len(g) for g in groups}
    return make_rows("slot", samples, advantages, served=7, global_steps=7, group_sizes=sizes)


def test_a_multi_turn_sequence_keeps_its_mask_and_everything_is_aligned() -> None:
    first, second = rows_of(encoded(GROUP))
    expected = {
        "prompts": [5, 6],
        "responses": [10, 11, 30, 31, 12],
        "response_mask": [1, 1, 0, 0, 1],
        "input_ids": [5, 6, 10, 11, 30, 31, 12],
        "loss_mask": [0, 0, 1, 1, 0, 0, 1],
        "position_ids": [0, 1, 2, 3, 4, 5, 6],
        "rollout_log_probs": [-0.5, -0.25, 0.0, 0.0, -0.125],
        "rm_scores": [0.0, 0.0, 0.0, 0.0, 1.0],
    }
    assert {name: first.fields[name].tolist() for name in expected} == expected
    assert (first.key, first.fields["num_turns"]) == ("slot_0_0", 4)
    assert (second.key, second.fields["num_turns"]) == ("slot_1_0", 2)
    assert first.fields["uid"] == second.fields["uid"], "verl's estimators group by this field"
    tag = {"prompt_len": 2, "response_len": 5, "seq_len": 7, "global_steps": 7, "group_size": 2}
    assert (tag | {"rollout_log_probs": True}).items() <= first.tag.items()


def test_missing_logprobs_are_said_and_a_sequence_without_a_trained_token_is_left_out() -> None:
    first, second = rows_of(encoded(GROUP | {"inference_logprobs": [[1.0] * 7, [1.0, 1.0, -2.0]]}))
    assert (first.tag["rollout_log_probs"], second.tag["rollout_log_probs"]) == (False, True)
    assert first.fields["rollout_log_probs"].tolist() == [0.0] * 5
    masks = [[-100] * 7, [-100, -100, 10]]
    assert [row.key for row in rows_of(encoded(GROUP | {"masks": masks}))] == ["slot_1_0"]


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
    tag = rows_of(encoded({name: rows[:1] for name, rows in GROUP.items()}), **known)[0].tag
    assert (tag["min_global_steps"], tag["max_global_steps"], tag["versions_known"]) == expected


def random_batch(seed: int) -> bytes:
    """Groups of 1-4 sequences, some with token-level advantages, some zeroed, of two turns."""
    rng, made = np.random.default_rng(seed), []
    for size in (1, 2, 3, 4, 1):
        tokens = [rng.integers(1, 90, int(rng.integers(6, 12))).tolist() for _ in range(size)]
        masks = [[-100, -100, *row[2:4], -100, *row[5:]] for row in tokens]
        advantages = [rng.normal(size=len(row)).tolist() if rng.random() < 0.4 else None for row in tokens]
        overrides = [{"set_advantage_to_zero": bool(rng.random() < 0.3)} for _ in tokens]
        extra = {"advantages": advantages, "overrides": overrides}
        made.append({"tokens": tokens, "masks": masks, "scores": rng.normal(size=size).tolist(), **extra})
    return encoded(*made)


def stored(body: bytes, shuffle: int = 0, padding: int = 2) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Rows as they come back from TransferQueue: in another order, with verl's padding."""
    rows = rows_of(body)
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
    form: dict[str, Any] = {"normalization": normalization, "clipping": clipping}
    for seed in range(3):  # "global" carries statistics from batch to batch
        body = random_batch(seed)
        expected = build_samples(decode_batch(body), SampleSettings(**form), running=theirs).samples
        values, keys, tags = stored(body, shuffle=seed)
        finished, _ = finish_batch(values, keys, tags, from_data=True, running=ours, **form)
        rows = dict(zip(keys, finished.unbind(), strict=True))
        assert not any(rows.pop(f"pad_{number}_0").any() for number in range(2))
        found = {int(key.rsplit("_", 2)[1]): row for key, row in rows.items()}
        assert len(found) == len(expected) > 8
        for index, sample in enumerate(expected):
            start = int(np.argmax(sample.loss_mask))
            assert torch.equal(found[index], torch.from_numpy(sample.advantages[start:].astype(np.float32))), index
    assert ours.state_dict() == theirs.state_dict()


def test_verls_own_estimate_is_kept_but_for_what_the_environment_says() -> None:
    """KL in reward, or another estimator of verl: its advantages, with overrides, zeros and groups of one put right."""
    values, keys, tags = stored(random_batch(2), padding=0)
    settings: dict[str, Any] = {"normalization": "none", "clipping": None, "running": None}
    finished, _ = finish_batch(values, keys, tags, from_data=False, **settings)
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
    rows = rows_of(encoded(group | {"rollout_ids": [3, 3, 9], "weights": [1.0, 0.5, 1.0]}))
    assert [row.key for row in rows] == ["slot_0_0", "slot_0_1", "slot_1_0"]
    assert [row.tag["weight"] for row in rows] == [1.0, 0.5, 1.0]
    first, second, third = (float(row.fields[ADVANTAGES][0]) for row in rows)
    assert first == second == -third == pytest.approx(0.5 / (0.5**0.5 + 1e-6))
