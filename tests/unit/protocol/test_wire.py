"""The wire: values, absence, defects; one bad group among good ones; both readers agree."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.malformed import comparable

from atropos_verl.errors import AtroposProtocolError, DataError
from atropos_verl.protocol import wire
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import FIELD_NAMES
from atropos_verl.protocol.wire import decode_batch, decode_group, encode_group
from atropos_verl.types import ScoredGroup

NAN, INF = float("nan"), float("inf")
GROUP: dict[str, Any] = {
    "tokens": [[5, 6, 7], [5, 6, 8, 2]],
    "masks": [[-100, -100, 7], [-100, -100, 8, 2]],
    "scores": [1, 0.5],
}


def batch_of(*groups: Any) -> bytes:
    return json.dumps({"batch": list(groups)}).encode()


def only(**changes: Any) -> ScoredGroup:
    (group,) = decode_batch(batch_of({**GROUP, **changes}))
    return group


def test_a_group_becomes_arrays() -> None:
    group = only(env_id=3, generation_params={"temperature": 0.7}, messages=[[{"role": "user", "content": "é"}]])
    assert [row.tolist() for row in group.token_ids] == [[5, 6, 7], [5, 6, 8, 2]]
    assert [row.tolist() for row in group.masks] == [[-100, -100, 7], [-100, -100, 8, 2]]
    assert group.scores.tolist() == [1.0, 0.5]
    assert {row.dtype for row in (*group.token_ids, *group.masks)} == {np.dtype(np.int64)}
    assert group.scores.dtype == np.float64
    assert (group.env_id, group.generation_params, group.defect) == (3, {"temperature": 0.7}, None)
    assert group.messages == [[{"role": "user", "content": "é"}]]


@pytest.mark.parametrize("body", [b'{"batch": null}', b'{"batch": []}', b'{"batch":null,"status":"ok"}'])
def test_no_batch_yet(body: bytes) -> None:
    assert decode_batch(body) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"status": "error", "batch": []}', "is the trainer registered"),
        (b'{"status": "error", "message": "not registered"}', "not registered"),
        (b'{"status": "error", "message": "x", "batch": [NaN]}', "error: x"),
        (b"", "0 bytes long"),
        (b"<html>no</html>", "begins b'<html>no</html>'"),
        (b"[]", "not an object with a list 'batch'"),
        (b'{"batch": {"tokens": []}}', "not an object with a list 'batch'"),
        (b'{"batch": 5}', "not an object with a list 'batch'"),
        (b'{"queue_size": 3}', "has no 'batch' field"),
        (b'{"batch": [{"tokens": [[1, 2', "not JSON"),
        (b'{"batch": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "not JSON"),
        (b'{"batch": []} trailing', "not JSON"),
    ],
)
def test_answers_that_are_no_batch(body: bytes, message: str) -> None:
    with pytest.raises(AtroposProtocolError, match=message):
        decode_batch(body)


@pytest.mark.parametrize("absent", [None, [], {}])
@pytest.mark.parametrize("field", sorted(FIELD_NAMES - {*GROUP, "env_id"}))
def test_null_and_empty_mean_absent(field: str, absent: Any) -> None:
    group = only(**{field: absent})
    assert group.defect is None
    assert getattr(group, field) is None


def test_absence_per_sequence() -> None:
    group = only(advantages=[[], [1, 2, 3, 0.5]], inference_logprobs=[{}, None], overrides=[None, {"temperature": 2}])
    assert group.advantages is not None
    assert group.advantages[0] is None
    assert group.advantages[1] is not None
    assert group.advantages[1].tolist() == [1.0, 2.0, 3.0, 0.5]
    assert group.inference_logprobs is None
    assert group.overrides == ({}, {"temperature": 2})
    assert only(images=[None, None]).images is None
    assert only(images=[None, "a.png"]).images == [None, "a.png"]


def test_unknown_fields_are_kept_by_name() -> None:
    group = only(reward_model="v2", extra=None, more=[], rank={})
    assert group.unknown_fields == ("reward_model",)
    assert group.defect is None
    assert group.scores.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "defect"),
    [
        ({"tokens": [[5, 6, 7], [5, 3.0, 8, 2]]}, "tokens[1][1] = 3.0: expected an integer"),
        ({"tokens": [[5, True, 7], [1]]}, "tokens[0][1] = true: expected an integer"),
        ({"tokens": [[5, [6]], [1]]}, "tokens[0][1] = [6]: expected an integer"),
        ({"tokens": [[1], [2**63]]}, "tokens[1][0] = 9223372036854775808: does not fit in 64 bits"),
        ({"masks": [[1], [-(2**63) - 1]]}, "masks[1][0] = -9223372036854775809: does not fit in 64 bits"),
        ({"tokens": [5, 6]}, "tokens[0] = 5: expected a list"),
        ({"tokens": None}, "tokens = null: expected a list"),
        ({"scores": [True, 0.0]}, "scores[0] = true: expected a number"),
        ({"scores": ["1", 0.0]}, 'scores[0] = "1": expected a number'),
        ({"advantages": [[1.0], {"b": 2}]}, 'advantages[1] = {"b": 2}: expected a list'),
        ({"inference_logprobs": [[-0.5, "x"]]}, 'inference_logprobs[0][1] = "x": expected a number'),
        ({"overrides": [1, {}]}, "overrides[0] = 1: expected an object"),
        ({"env_id": 1.5}, "env_id = 1.5: expected an integer"),
    ],
)
def test_defects_name_field_index_and_value(changes: dict[str, Any], defect: str) -> None:
    bad = {**GROUP, **changes}
    first, second, third = decode_batch(batch_of(GROUP, bad, GROUP))
    assert second.defect == defect
    assert json.loads(second.raw) == bad
    assert second.token_ids == ()
    for good in (first, third):
        assert good.defect is None
        assert good.scores.tolist() == [1.0, 0.5]


NO_OBJECTS = {text: f"group: expected an object, got {text}" for text in ("null", "5", '"a, b]"', "[1]", "true")}
ODD_ELEMENTS = {
    **NO_OBJECTS,
    '{"tokens": [[1]], "masks": [[1]]}': "scores: the field is missing",
}


@pytest.mark.parametrize(("element", "defect"), ODD_ELEMENTS.items(), ids=list(ODD_ELEMENTS.values()))
def test_elements_that_are_no_groups_stay_alone(element: str, defect: str) -> None:
    first, second = decode_batch(b'{"batch": [' + element.encode() + b"," + json.dumps(GROUP).encode() + b"]}")
    assert first.defect == defect
    assert second.scores.tolist() == [1.0, 0.5]


def test_a_huge_value_is_cut_in_the_reason() -> None:
    group = only(scores=[10**400, 1])
    assert group.defect is not None
    assert group.defect.startswith("scores[0] = 1000")
    assert group.defect.endswith("(401 characters): too large for a 64-bit float")
    assert len(group.defect) < 160


def test_nan_and_infinity_literals_take_nothing_else_along() -> None:
    bad = {**GROUP, "scores": [NAN, -INF]}
    good = {**GROUP, "messages": [[{"role": "user", "content": 'NaN, ]} \\" [{'}]]}
    groups = decode_batch(batch_of(good, bad, None, good))
    assert [group.defect is None for group in groups] == [True, True, False, True]
    assert np.isnan(groups[1].scores[0])
    assert groups[1].scores[1] == -INF
    assert groups[0].messages == groups[3].messages == good["messages"]


def test_lone_surrogates_and_broken_utf8() -> None:
    lone = only(messages="\ud800").messages
    assert isinstance(lone, str) and lone.encode("utf-8", "surrogatepass") == b"\xed\xa0\x80"
    broken = json.dumps(GROUP).encode()[:-1] + b', "messages": "\xff"}'
    first, second = decode_batch(b'{"batch": [' + broken + b"," + json.dumps(GROUP).encode() + b"]}")
    assert first.defect == "group: not UTF-8 (byte 119)"
    assert second.defect is None


def test_group_id_is_a_hash_of_the_raw_bytes() -> None:
    raw = json.dumps(GROUP).encode()
    assert decode_group(raw).group_id == decode_group(raw).group_id
    assert len(decode_group(raw).group_id) == 16
    assert decode_group(raw + b" ").group_id != decode_group(raw).group_id
    # printf '{}' | xxhsum -H2
    assert decode_group(b"{}").group_id == "dc7048f8f8747f56"


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


def test_upstream_accepts_what_is_encoded() -> None:
    """Upstream's own pydantic model is the contract for POST /scored_data."""
    from atroposlib.api.server import ScoredData

    raw = encode_group(
        tokens=[[1, 2]],
        masks=[[-100, 2]],
        scores=[0.5],
        advantages=[[0.0, 1.0]],
        ref_logprobs=[[0.0, -1.0]],
        messages=[[{"role": "user", "content": "hi"}]],
        generation_params={"temperature": 1.0},
        inference_logprobs=[[1.0, -0.5]],
        overrides=[{"temperature": 1.0}],
        group_overrides={"group_size": 1},
        images=["a"],
        env_id=0,
        distill_token_ids=[[[1], [2]]],
        distill_logprobs=[[[0.0], [-1.0]]],
    )
    parsed = ScoredData.model_validate_json(raw).model_dump()
    assert parsed == json.loads(raw)
    assert set(parsed) == set(ScoredData.model_fields)


def test_upstream_accepts_the_registrations() -> None:
    from atroposlib.api.server import RegisterEnv, Registration

    trainer = TrainerRegistration(
        wandb_group="g", wandb_project="p", batch_size=8, max_token_len=65, checkpoint_dir="/c",
        save_checkpoint_interval=5, starting_step=0, num_steps=10,
    )  # fmt: skip
    sent = msgspec.json.encode(trainer)
    assert Registration.model_validate_json(sent).model_dump() == json.loads(sent)
    sent = msgspec.json.encode(EnvRegistration(max_token_length=64, desired_name="e", group_size=4))
    assert RegisterEnv.model_validate_json(sent).model_dump() == json.loads(sent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [NAN, 1.0]}, r"scores\[0\] = nan is not finite"),
        ({"advantages": [[0.0], [1.0, INF]]}, r"advantages\[1\]\[1\] = inf"),
        ({"inference_logprobs": [[-INF], None]}, r"inference_logprobs\[0\]\[0\] = -inf"),
    ],
)
def test_what_json_cannot_carry_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": [[1], [1, 2]], "masks": [[1], [1, 2]], "scores": [0.0, 1.0], **changes}
    with pytest.raises(DataError, match=message):
        encode_group(**arguments)


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
ROWS = st.lists(st.lists(st.integers(-(2**64), 2**64) | st.integers(-100, 9), max_size=4), max_size=3)
NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9), max_size=3)
ODD_GROUP = st.fixed_dictionaries(
    {"tokens": ROWS | JSON_VALUE, "masks": ROWS | JSON_VALUE, "scores": NUMBERS | JSON_VALUE},
    optional={
        "advantages": st.lists(NUMBERS, max_size=3) | JSON_VALUE,
        "inference_logprobs": st.lists(NUMBERS | st.none(), max_size=3) | JSON_VALUE,
        "overrides": st.lists(st.none() | st.dictionaries(st.text(max_size=3), JSON_VALUE), max_size=2) | JSON_VALUE,
        "generation_params": JSON_VALUE,
        "env_id": st.none() | st.integers() | JSON_VALUE,
        "images": JSON_VALUE,
        "other": JSON_VALUE,
    },
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


def test_the_fields_are_upstreams() -> None:
    from atroposlib.api.server import ScoredData

    assert set(ScoredData.model_fields) == FIELD_NAMES - {"rollout_ids", "weights"}
