"""The packed wire against JSON: what a trainer gets is the same, group by group."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.malformed import comparable, good_group, malformed_cases
from support.trajectory_server import complete, group

from atropos_verl.errors import AtroposProtocolError
from atropos_verl.protocol.schema import Refusal, check_group
from atropos_verl.protocol.wire import MAGIC, decode_batch, decode_group, join_packed, pack_group, pack_json
from atropos_verl.types import ScoredGroup


def packed(*groups: dict[str, Any]) -> bytes:
    return b"".join(join_packed([pack_group(check_group(json.dumps(made).encode())) for made in groups]))


def assert_same(one: ScoredGroup, other: ScoredGroup) -> None:
    assert comparable(replace(one, raw=b"")) == comparable(replace(other, raw=b""))


def both(made: dict[str, Any]) -> tuple[ScoredGroup, ScoredGroup]:
    raw = complete(check_group(json.dumps(made).encode()))
    (found,) = decode_batch(packed(made))
    return found, decode_group(raw)


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "advantages": [[0.5, -0.25, 1e-300], [0.1, 0.2, 0.3]],
        "inference_logprobs": [[1.0, -0.5, -2.0], [1.0, -0.1, -3.5]],
        "ref_logprobs": [[1.0, -0.5, -2.0], []],
        "messages": [[{"role": "user", "content": "hej \u00e5\u4e16"}], []],
        "overrides": [{"set_advantage_to_zero": True}, {}],
        "group_overrides": {"temperature": 0.5},
        "generation_params": {"temperature": 0.7},
        "images": ["abc"],
        "distill_token_ids": [[[1]], [[2]]],
        "distill_logprobs": [[[-1.0]], [[-2.0]]],
    },
    "absent as empty": {"advantages": [], "overrides": {}, "messages": [], "generation_params": {}},
    "masks that are no token ids": {"masks": [[1, 1, 1], [0, 1, 1]]},
    "unknown fields": {"note": 5, "empty": [], "none": None, "seed": {"a": [1e300]}},
    "rows of another length": {"advantages": [[0.1], [0.2, 0.3, 0.4, 0.5]]},
    "rows of rollouts": {"rollout_ids": [7, 7, -3], "scores": [1.0, 1.0, 0.0], "weights": [1, 0.25, 1e-300]},
    "one row each": {"rollout_ids": [5, 4, 3], "weights": []},
    "a row too few": {"advantages": [[0.1, 0.2, 0.3]]},
}


@pytest.mark.parametrize("name", FIELDS)
def test_both_wires_give_the_same_group(name: str) -> None:
    made = group(3, len(FIELDS[name].get("rollout_ids", "ab")), **FIELDS[name])
    assert_same(*both(made))


def test_floats_are_halved_only_when_nothing_is_lost() -> None:
    exact, rounded = float(np.float32(-0.1)), -0.1
    ids = [[1] * 64]
    sizes = [
        len(packed({"tokens": ids, "masks": ids, "scores": [1.0], "inference_logprobs": [[value] * 64]}))
        for value in (exact, rounded)
    ]
    assert sizes[1] - sizes[0] == 64 * 4
    for value in (exact, rounded):
        made = {"tokens": [[1, 2]], "masks": [[1, 2]], "scores": [1.0], "inference_logprobs": [[value, -1e-320]]}
        (found,) = decode_batch(packed(made))
        assert found.inference_logprobs is not None and found.inference_logprobs[0] is not None
        assert found.inference_logprobs[0].tolist() == [value, -1e-320]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    made = [good_group(rng, group_size=rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
    made += [case.group for case in malformed_cases(seed, 6)]
    accepted = []
    for candidate in made:
        try:
            check_group(json.dumps(candidate).encode())
            accepted.append(candidate)
        except Refusal:
            continue
    found = decode_batch(packed(*accepted))
    assert len(found) == len(accepted)
    for one, candidate in zip(found, accepted, strict=True):
        assert_same(one, decode_group(complete(check_group(json.dumps(candidate).encode()))))


def test_a_group_of_a_packed_batch_may_come_as_json() -> None:
    raw = json.dumps(group(3, 2, overrides={"temperature": 1})).encode()
    (found,) = decode_batch(b"".join(join_packed([pack_json(raw)])))
    assert found.defect == 'overrides = {"temperature": 1}: expected a list' and found.raw == raw


def test_any_cut_is_an_error() -> None:
    body = packed(group(1, 2), group(2, 2))
    for length in range(len(MAGIC), len(body), 7):
        with pytest.raises(AtroposProtocolError, match="cannot be read"):
            decode_batch(body[:length])
    with pytest.raises(AtroposProtocolError, match="follow the last group"):
        decode_batch(body + b"x")
