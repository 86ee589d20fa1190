"""The wire, as JSON and packed: values, absence, defects; one bad group among good ones; all readers agree."""

import json
import random
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from atroposlib.api import server as upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from support.malformed import comparable, good_group, malformed_groups
from support.scripted_api import batch_of
from support.trajectory_server import complete, group, registration

from atropos_verl.errors import AtroposProtocolError, DataError
from atropos_verl.protocol import wire
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import EXTRAS, FIELD_NAMES, Refusal, check_group
from atropos_verl.protocol.wire import MAGIC, decode_batch, decode_group, encode_group, join_packed, pack_group
from atropos_verl.types import ScoredGroup

NAN, INF = float("nan"), float("inf")
GROUP: dict[str, Any] = {
    "tokens": [[5, 6, 7], [5, 6, 8, 2]],
    "masks": [[-100, -100, 7], [-100, -100, 8, 2]],
    "scores": [1, 0.5],
}
RAW = json.dumps(GROUP).encode()


def only(**changes: Any) -> ScoredGroup:
    (group,) = decode_batch(batch_of([{**GROUP, **changes}]))
    return group


def test_a_group_becomes_arrays_and_unknown_fields_that_hold_something_are_named() -> None:
    said = [[{"role": "user", "content": "é"}]]
    group = only(env_id=3, generation_params={"temperature": 0.7}, messages=said, reward_model="v2", more=[], rank={})
    assert [row.tolist() for row in group.token_ids] == [[5, 6, 7], [5, 6, 8, 2]]
    assert [row.tolist() for row in group.masks] == [[-100, -100, 7], [-100, -100, 8, 2]]
    assert group.scores.tolist() == [1.0, 0.5]
    assert {row.dtype for row in (*group.token_ids, *group.masks)} == {np.dtype(np.int64)}
    assert group.scores.dtype == np.float64
    assert (group.env_id, group.generation_params, group.defect) == (3, {"temperature": 0.7}, None)
    assert (group.messages, group.unknown_fields) == (said, ("reward_model",))
    # printf '{}' | xxhsum -H2
    assert decode_group(b"{}").group_id == "dc7048f8f8747f56" != decode_group(b"{} ").group_id


@pytest.mark.parametrize("body", [b'{"batch": null}', b'{"batch": []}', b'{"batch":null,"status":"ok"}'])
def test_no_batch_yet(body: bytes) -> None:
    assert decode_batch(body) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"status": "error", "batch": []}', "is the trainer registered"),
        (b'{"status": "error", "message": "x", "batch": [NaN]}', "error: x"),
        (b"", "0 bytes long"),
        (b"<html>no</html>", "begins b'<html>no</html>'"),
        (b"[]", "not an object with a list 'batch'"),
        (b'{"batch": 5}', "not an object with a list 'batch'"),
        (b'{"queue_size": 3}', "has no 'batch' field"),
        (b'{"batch": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "not JSON"),
        (b'{"batch": []} trailing', "not JSON"),
    ],
)
def test_answers_that_are_no_batch(body: bytes, message: str) -> None:
    with pytest.raises(AtroposProtocolError, match=message):
        decode_batch(body)


@pytest.mark.parametrize("absent", [None, [], {}])
def test_null_and_empty_mean_absent(absent: Any) -> None:
    fields = FIELD_NAMES - {*GROUP, "env_id"}
    group = only(**dict.fromkeys(fields, absent))
    assert (group.defect, {getattr(group, name) for name in fields}) == (None, {None})


def test_absence_per_sequence() -> None:
    group = only(advantages=[[], [1, 2, 3, 0.5]], inference_logprobs=[{}, None], overrides=[None, {"temperature": 2}])
    none, row = group.advantages or ()
    assert none is None and row is not None and row.tolist() == [1.0, 2.0, 3.0, 0.5]
    assert (group.inference_logprobs, group.overrides) == (None, ({}, {"temperature": 2}))
    assert [only(images=images).images for images in ([None, None], [None, "a"])] == [None, [None, "a"]]


@pytest.mark.parametrize(
    ("bad", "defect"),
    [
        ({"tokens": [[5, 6, 7], [5, 3.0, 8, 2]]}, "tokens[1][1] = 3.0: expected an integer"),
        ({"tokens": [[5, True, 7], [1]]}, "tokens[0][1] = true: expected an integer"),
        ({"tokens": [[1], [2**63]]}, "tokens[1][0] = 9223372036854775808: does not fit in 64 bits"),
        ({"masks": [[1], [-(2**63) - 1]]}, "masks[1][0] = -9223372036854775809: does not fit in 64 bits"),
        ({"tokens": [5, 6]}, "tokens[0] = 5: expected a list"),
        ({"tokens": None}, "tokens = null: expected a list"),
        ({"scores": [True, 0.0]}, "scores[0] = true: expected a number"),
        ({"scores": ["1", 0.0]}, 'scores[0] = "1": expected a number'),
        ({"scores": [10**400, 1]}, f"scores[0] = 1{'0' * 79}… (401 characters): too large for a 64-bit float"),
        ({"advantages": [[1.0], {"b": 2}]}, 'advantages[1] = {"b": 2}: expected a list'),
        ({"inference_logprobs": [[-0.5, "x"]]}, 'inference_logprobs[0][1] = "x": expected a number'),
        ({"overrides": [1, {}]}, "overrides[0] = 1: expected an object"),
        ({"env_id": 1.5}, "env_id = 1.5: expected an integer"),
        *((bad, f"group: expected an object, got {json.dumps(bad)}") for bad in (None, 5, "a, b]", [1], True)),
    ],
)
def test_a_defect_names_field_index_and_value_and_stays_alone(bad: Any, defect: str) -> None:
    bad = {**GROUP, **bad} if isinstance(bad, dict) else bad
    first, second, third = decode_batch(batch_of([GROUP, bad, GROUP]))
    assert (second.defect, json.loads(second.raw), second.token_ids) == (defect, bad, ())
    for good in (first, third):
        assert (good.defect, good.scores.tolist()) == (None, [1.0, 0.5])


def test_nan_and_infinity_literals_take_nothing_else_along() -> None:
    good = {**GROUP, "messages": [[{"role": "user", "content": 'NaN, ]} \\" [{'}]]}
    groups = decode_batch(batch_of([good, {**GROUP, "scores": [NAN, -INF]}, None, good]))
    assert [group.defect is None for group in groups] == [True, True, False, True]
    assert str(groups[1].scores.tolist()) == "[nan, -inf]"
    assert groups[0].messages == groups[3].messages == good["messages"]


def test_lone_surrogates_and_broken_utf8() -> None:
    assert only(messages="\ud800").messages == "\ud800"
    first, second = decode_batch(b'{"batch": [' + RAW[:-1] + b', "messages": "\xff"},' + RAW + b"]}")
    assert (first.defect, second.defect) == ("group: not UTF-8 (byte 119)", None)


def test_encode_and_decode_again_from_arrays() -> None:
    raw = encode_group(
        tokens=[np.array([5, 6, 7]), [5, 8]],
        masks=[[-100, 6, 7], np.array([-100, 8])],
        scores=np.array([1.0, 0.0]),
        advantages=[None, np.array([0.0, 0.25])],
        inference_logprobs=[np.array([NAN, -0.5, -0.25]), None],
        overrides=[None, {"set_advantage_to_zero": np.bool_(True)}],
        generation_params={"temperature": np.float64(0.5)},
        env_id=2,
    )
    assert json.loads(raw) == {
        "tokens": [[5, 6, 7], [5, 8]],
        "masks": [[-100, 6, 7], [-100, 8]],
        "scores": [1.0, 0.0],
        "advantages": [[], [0.0, 0.25]],
        "inference_logprobs": [[1.0, -0.5, -0.25], []],
        "overrides": [{}, {"set_advantage_to_zero": True}],
        "generation_params": {"temperature": 0.5},
        "env_id": 2,
    }
    assert decode_group(raw).defect is None


FREE: dict[str, Any] = {
    "messages": [[{"role": "user", "content": "hej \u00e5\u4e16"}], []],
    "overrides": [{"set_advantage_to_zero": True}, {}],
    "group_overrides": {"temperature": 0.5},
    "generation_params": {"temperature": 0.7},
    "images": ["abc"],
    "distill_token_ids": [[[1]], [[2]]],
    "distill_logprobs": [[[-1.0]], [[-2.0]]],
}


def test_upstream_accepts_what_is_encoded() -> None:
    """Upstream's own pydantic models are the contract."""
    rows = {name: [[0.0, -1.0]] for name in EXTRAS}
    raw = encode_group(tokens=[[1, 2]], masks=[[-100, 2]], scores=[0.5], **rows, **FREE, env_id=0)
    parsed = upstream.ScoredData.model_validate_json(raw).model_dump()
    assert parsed == json.loads(raw)
    assert set(parsed) == set(upstream.ScoredData.model_fields) == FIELD_NAMES - {"rollout_ids", "weights"}
    for kind, registering in (
        (upstream.Registration, TrainerRegistration(**registration())),
        (upstream.RegisterEnv, EnvRegistration(max_token_length=64, desired_name="e", group_size=4)),
    ):
        sent = msgspec.json.encode(registering)
        assert kind.model_validate_json(sent).model_dump() == json.loads(sent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [NAN, 1.0]}, r"scores\[0\] = nan is not finite"),
        ({"advantages": [[0.0], [1.0, INF]]}, r"advantages\[1\]\[1\] = inf"),
        ({"inference_logprobs": [[-INF], None]}, r"inference_logprobs\[0\]\[0\] = -inf"),
    ],
)
def test_what_json_cannot_carry_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_group(**{"tokens": [[1], [1, 2]], "masks": [[1], [1, 2]], "scores": [0.0, 1.0], **changes})


def packed(*groups: dict[str, Any]) -> bytes:
    return b"".join(join_packed([pack_group(check_group(json.dumps(made).encode())) for made in groups]))


def assert_both_wires_agree(*groups: dict[str, Any]) -> None:
    found = decode_batch(packed(*groups))
    expected = [decode_group(complete(check_group(json.dumps(made).encode()))) for made in groups]
    assert list(map(comparable, found)) == [comparable(replace(one, raw=b"")) for one in expected]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "advantages": [[0.5, -0.25, 1e-300], [0.1, 0.2, 0.3]],
            "inference_logprobs": [[1.0, -0.5, -2.0], [1.0, -0.1, -3.5]],
            "ref_logprobs": [[1.0, -0.5, -2.0], None],
            **FREE,
        },
        *(dict.fromkeys((*EXTRAS, *FREE), absent) for absent in (None, [], {})),
        {"masks": [[1, 1, 1], [0, 1, 1]]},  # no token ids
        {"note": 5, "empty": [], "none": None, "seed": {"a": [1e300]}},
        {"advantages": [[0.1], [0.2, 0.3, 0.4, 0.5]]},  # of another length
        {"ref_logprobs": [[1.0, -0.5, -2.0], []]},
        {"rollout_ids": [7, 7, -3], "scores": [1.0, 1.0, 0.0], "weights": [1, 0.25, 1e-300]},
        {"rollout_ids": [5, 4, 3], "weights": []},
        {"advantages": [[0.1, 0.2, 0.3]]},  # a row too few
    ],
)
def test_both_wires_give_the_same_group(fields: dict[str, Any]) -> None:
    assert_both_wires_agree(group(3, len(fields.get("rollout_ids", "ab")), **fields))


def is_accepted(made: dict[str, Any]) -> bool:
    try:
        return check_group(json.dumps(made).encode()).size > 0
    except Refusal:
        return False


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_both_wires_give_the_same_batches(seed: int) -> None:
    rng = random.Random(seed)
    made = [good_group(rng, group_size=rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
    assert_both_wires_agree(*made, *filter(is_accepted, malformed_groups(seed, 6)))


def test_floats_are_halved_only_when_nothing_is_lost() -> None:
    sizes = []
    for value in (float(np.float32(-0.1)), -0.1):
        made = {"tokens": [[1] * 64], "masks": [[1] * 64], "scores": [1.0], "inference_logprobs": [[value] * 64]}
        sizes.append(len(packed(made)))
        assert_both_wires_agree({**made, "inference_logprobs": [[value] * 63 + [-1e-320]]})
    assert sizes[1] - sizes[0] == 64 * 4


def test_a_group_of_a_packed_batch_may_come_as_json() -> None:
    raw = json.dumps(group(3, 2, overrides={"temperature": 1})).encode()
    (found,) = decode_batch(b"".join(join_packed([wire.pack_json(raw)])))
    assert found.defect == 'overrides = {"temperature": 1}: expected a list' and found.raw == raw


def test_any_cut_is_an_error() -> None:
    body = packed(group(1, 2), group(2, 2))
    for wrong in (body + b"x", *(body[:length] for length in range(len(MAGIC), len(body), 7))):
        with pytest.raises(AtroposProtocolError, match=r"cannot be read: .*; is it cut off\?"):
            decode_batch(wrong)


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
ROWS = st.lists(st.lists(st.integers(-(2**64), 2**64) | st.integers(-100, 9), max_size=4), max_size=3)
NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9), max_size=3)
OBJECTS = st.lists(st.none() | st.dictionaries(st.text(max_size=3), JSON_VALUE), max_size=2)
OPTIONAL = ("advantages", "inference_logprobs", "overrides", "generation_params", "env_id", "images", "other")
ODD_GROUP = st.fixed_dictionaries(
    {"tokens": ROWS | JSON_VALUE, "masks": ROWS | JSON_VALUE, "scores": NUMBERS | JSON_VALUE},
    optional=dict.fromkeys(OPTIONAL, st.lists(NUMBERS | st.none(), max_size=3) | OBJECTS | JSON_VALUE),
)


@settings(max_examples=80, deadline=None)
@given(ODD_GROUP)
def test_fast_and_tolerant_reader_agree(value: dict[str, Any]) -> None:
    raw = json.dumps(value).encode()
    found = decode_group(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_DECODE_GROUP", msgspec.json.Decoder(int))  # refuses every group
        assert comparable(found) == comparable(decode_group(raw))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:batch 1-.\\', max_size=60).map(str.encode))
def test_any_bytes_give_groups_or_a_protocol_error(body: bytes) -> None:
    for candidate in (body, b'{"batch":[' + body + b"]}"):
        try:
            groups = decode_batch(candidate)
        except AtroposProtocolError:
            continue
        assert all(isinstance(group, ScoredGroup) for group in groups)
