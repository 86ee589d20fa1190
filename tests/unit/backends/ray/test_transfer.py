"""API batch → TransferQueue rows: prompt and response, the multi-turn mask, scores, logprobs, versions, tags."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from atropos_verl.backends.ray.transfer import ADVANTAGES, Row, make_rows
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.samples import collect_samples
from atropos_verl.types import UNKNOWN_VERSION

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


def test_token_level_advantages_reach_the_row_as_posted() -> None:
    first, second = rows_of(GROUP)
    trained = first.fields["response_mask"].bool()
    assert first.fields[ADVANTAGES].dtype == torch.float64
    assert first.fields[ADVANTAGES][trained].tolist() == [0.5, -0.5, 2.0]
    assert [(row.tag["advantage_replaced"], row.tag["advantage_to_zero"]) for row in (first, second)] == [
        (True, False),
        (False, True),
    ]
    # Not zeroed yet: its value still counts in the statistics of the batch.
    assert second.fields[ADVANTAGES].tolist() == pytest.approx([-0.5 / (0.5**0.5 + 1e-6)], rel=1e-12)


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
        ({"token_versions": np.array([9, 9, 2, 3, 9, 9, UNKNOWN_VERSION]), "policy_version": 2}, (2, 3)),
        ({"policy_version": 4}, (4, 4)),
        ({}, (7, 7)),
    ],
)
def test_versions_are_those_of_the_trained_tokens_else_stated_else_served(
    known: dict[str, object], expected: tuple[int, int]
) -> None:
    row = rows_of({name: rows[:1] for name, rows in GROUP.items()}, **known)[0]
    assert (row.tag["min_global_steps"], row.tag["max_global_steps"]) == expected
