"""API batch → TransferQueue rows: prompt and response, the multi-turn mask, scores, logprobs, versions, tags.

The advantages that reach verl's optimiser are those of the local backend, to the last bit, whatever order verl has.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atropos_verl.backends.ray.transfer import ADVANTAGES, Row, finish_batch, make_rows
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.samples import build_samples, collect_samples
from atropos_verl.types import UNKNOWN_VERSION, SampleSettings

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


def test_missing_logprobs_are_said() -> None:
    first, second = rows_of({**GROUP, "inference_logprobs": [[1.0] * 7, [1.0, 1.0, -2.0]]})
    assert (first.tag["rollout_log_probs"], second.tag["rollout_log_probs"]) == (False, True)
    assert first.fields["rollout_log_probs"].tolist() == [0.0] * 5


def test_a_sequence_without_a_trained_token_is_left_out() -> None:
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
    rng = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        size = number % 4 + 1
        tokens = [rng.integers(1, 90, int(rng.integers(6, 12))).tolist() for _ in range(size)]
        masks = [[-100, -100, *row[2:4], -100, *row[5:]] for row in tokens]
        advantages = [rng.normal(size=len(row)).tolist() if rng.random() < 0.4 else None for row in tokens]
        overrides = [{"set_advantage_to_zero": bool(rng.random() < 0.3)} for _ in tokens]
        scores = rng.normal(size=size).tolist()
        made.append(
            {"tokens": tokens, "masks": masks, "scores": scores, "advantages": advantages, "overrides": overrides}
        )
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
