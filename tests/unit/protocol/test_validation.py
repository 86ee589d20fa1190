"""The door: what is refused, with field, sequence, index and value; and what is let in as it came."""

import json
from typing import Any

import pytest
from atroposlib.api.server import ScoredData
from support.trajectory_server import complete, group

from atropos_verl.protocol.schema import Refusal, check_group, split_list
from atropos_verl.protocol.wire import decode_group

NAN, INF = float("nan"), float("inf")
GOOD = b'{"tokens":[[1]],"masks":[[1]],"scores":[1]}'
ROW = [1, 7, 100]
Place = tuple[str | int, ...]


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def changed(**fields: Any) -> dict[str, Any]:
    return {**group(1, 2, env_id=0), **fields}


def ids(row: list[Any]) -> dict[str, Any]:
    return changed(tokens=[row, [1, 2, 3]])


def says(content: Any) -> dict[str, Any]:
    return group(1, 2, messages=[[{"role": "user", "content": content}]])


def with_bytes(field: bytes) -> bytes:
    return GOOD[:-1] + b"," + field + b"}"


# Deeper than readers of a batch take, not too deep to be passed over.
DEEP_MESSAGES = b'"messages":[[{"role":"u","content":' + b'{"a":[' * 32 + b"1" + b"]}" * 32 + b"}]]"
DEEP_UNKNOWN = b'"x":' + b'["]",{"a":' * 33 + b"1" + b"}]" * 33
REFUSED: dict[str, tuple[Any, str, Place, str]] = {
    "no tokens": ({"masks": [], "scores": []}, "missing", ("tokens",), "tokens"),
    "empty group": (changed(tokens=[], masks=[], scores=[]), "empty", ("tokens",), "the group is empty"),
    "empty row": (changed(tokens=[[1], []], masks=[[1], []]), "empty", ("tokens", 1), "tokens[1]: the sequence is"),
    "masks": (changed(masks=[[1, 7, 100]]), "length", ("masks",), "masks: 1 entries, but tokens has 2"),
    "rollout ids": (changed(rollout_ids=[1]), "length", ("rollout_ids",), "rollout_ids: 1 entries, but tokens has 2"),
    "rollout id": (changed(rollout_ids=[1, "a"]), "type", ("rollout_ids", 1), 'rollout_ids[1] = "a": expected an int'),
    "scores": (changed(rollout_ids=[4, 4], scores=[1, 2]), "rollout", ("scores", 1), "both are of rollout 4"),
    "weights": (changed(weights=[1, 2, 3]), "length", ("weights",), "weights: 3 entries, but tokens has 2"),
    "weight": (changed(weights=[1, -2]), "weight", ("weights", 1), "weights[1] = -2.0: a weight is at least 0"),
    "mask": (changed(masks=[ROW, [1, 7]]), "length", ("masks", 1), "masks[1]: 2 entries, but tokens[1] has 3"),
    "advantage": (changed(advantages=[ROW, [1]]), "length", ("advantages", 1), "advantages[1]: 1 entries, but"),
    "logprobs": (changed(inference_logprobs=[ROW]), "length", ("inference_logprobs",), "inference_logprobs: 1 entries"),
    "overrides": (changed(overrides=[{}]), "length", ("overrides",), "overrides: 1 entries"),
    "NaN score": (changed(scores=[0.0, NAN]), "not_finite", ("scores", 1), "scores[1] = nan: must be finite"),
    "Infinity": (changed(advantages=[ROW, [0, INF, 0]]), "not_finite", ("advantages", 1, 1), "[1][1] = inf: must be"),
    "1e999": (b'{"tokens":[[1]],"masks":[[1]],"scores":[1e999]}', "not_finite", ("scores", 0), "scores[0] = inf"),
    "NaN in a message": (says(NAN), "not_finite", (), "NaN is not JSON"),
    "text for a token": (ids([1, "a", 3]), "type", ("tokens", 0, 1), 'tokens[0][1] = "a": expected an integer'),
    "text for scores": (changed(scores="high"), "type", ("scores",), 'scores = "high": expected a list'),
    "null score": (changed(scores=[None, 1.0]), "type", ("scores", 0), "scores[0] = null: expected a number"),
    "negative id": (ids([1, 2, -5]), "vocabulary", ("tokens", 0, 2), "tokens[0][2] = -5"),
    "2^40": (ids([2**40, 2, 3]), "vocabulary", ("tokens", 0, 0), f"tokens[0][0] = {2**40}"),
    "mask 2^40": (changed(masks=[[1, 2, 3], [1, 2, -(2**40)]]), "vocabulary", ("masks", 1, 2), "masks[1][2]"),
    "no role": (changed(messages=[[{"content": "x"}]]), "message", ("messages", 0, 0), "must have 'role' and"),
    "messages no list": (changed(messages="hello"), "type", ("messages",), "messages is not a list"),
    "no conversation": (changed(messages=["hi"]), "type", ("messages", 0), "messages[0] is not a list"),
    "extras": (changed(advantages={"a": 1}), "type", ("advantages",), 'advantages = {"a": 1}: expected a list'),
    "env_id text": (changed(env_id="one"), "type", ("env_id",), 'env_id = "one": expected an integer'),
    "a list": (b"[1, 2]", "type", (), "group: expected an object, got [1, 2]"),
    "cut off": (b'{"tokens": [[1', "malformed_json", (), "not JSON"),
    "not UTF-8": (with_bytes(b'"messages":[[{"role":"u","content":"\xff"}]]'), "encoding", (), "not UTF-8"),
    "deep": (with_bytes(b'"images":' + b"[" * 100_000 + b"]" * 100_000), "malformed_json", (), "nested too deeply"),
    "deep messages": (with_bytes(DEEP_MESSAGES), "malformed_json", ("messages",), "messages: nested too deeply"),
    "deep unknown": (with_bytes(DEEP_UNKNOWN), "malformed_json", ("x",), "x: nested too deeply"),
    "deep, read twice": (with_bytes(b'"env_id":"0",' + DEEP_UNKNOWN), "malformed_json", ("x",), "x: nested too deep"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "encoding", (), "byte order mark"),
    "UTF-32": (GOOD.decode().encode("utf-32"), "encoding", (), "not UTF-8 (byte 0)"),
    "nan as text": (changed(scores=["nan", 1]), "not_finite", ("scores", 0), "scores[0] = nan: must be finite"),
    "huge env_id": (changed(env_id=10**30), "unknown_env", ("env_id",), f"env_id = {10**30} is not a registered"),
    "endless env_id": (with_bytes(b'"env_id":' + b"9" * 5000), "malformed_json", (), "not JSON"),
    "overrides a text": (changed(overrides=""), "type", ("overrides",), 'overrides = "": expected a list'),
    "overrides an object": (changed(overrides={"a": 1}), "type", ("overrides",), "expected a list"),
    "entry 0": (changed(overrides=[0, {}]), "type", ("overrides",), "overrides[0] = 0: expected an object"),
    "params": (changed(generation_params=[1]), "type", ("generation_params",), "expected an object"),
    "env_id -1": (changed(env_id=-1), "unknown_env", ("env_id",), "-1 is not a registered environment (0 to 0)"),
    "env_id 1": (changed(env_id=1), "unknown_env", ("env_id",), "env_id = 1 is not a registered environment (0 to 0)"),
    "no environment": (changed(), "unknown_env", ("env_id",), "0 is not a registered environment (none is registered)"),
    "anonymous": (group(1, 2, advantages=[[1], [1]]), "length", ("advantages", 0), "advantages[0]: 1 entries, but tok"),
    "vocabulary": (changed(), "vocabulary", ("tokens", 1, 2), "tokens[1][2] = 101: outside the vocabulary [0, 101)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    body, reason, place, text = REFUSED[name]
    with pytest.raises(Refusal) as caught:
        rules = {"environments": 0 if name == "no environment" else 1, "strict": name == "anonymous"}
        check_group(encoded(body), **rules, vocab_size=101 if name == "vocabulary" else None)
    assert text in caught.value.message
    answer = caught.value.as_fields()
    assert answer["detail"] == [{"type": reason, "loc": ["body", *place], "msg": caught.value.message}]
    assert [answer[key] for key in ("field", "sequence", "index") if key in answer] == list(place)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert name != "vocabulary" or answer["value"] == 101


def test_a_group_is_kept_as_it_came_with_null_for_what_is_absent() -> None:
    raw = b' {"tokens" : [[1, 2]],"masks":[[-100,2]], "note":{"a": 1}, "scores":[1], "seed":[], "advantages": null }\n'
    checked = check_group(raw)
    assert complete(checked) == (
        raw.strip()[:-1] + b',"ref_logprobs":null,'
        b'"messages":null,"generation_params":null,"inference_logprobs":null,"overrides":null,'
        b'"group_overrides":null,"images":null,"env_id":null,"distill_token_ids":null,"distill_logprobs":null}'
    )
    assert (checked.env_id, checked.size, checked.tokens, checked.unknown) == (None, 1, 2, ("note",))
    # Lone surrogates, too.
    assert json.loads(check_group(encoded(says("\ud800"))).raw)["messages"][0][0]["content"] == "\ud800"


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": [[1.0, True, "7"]], "masks": [[True, 2.0, "-100"]], "scores": [True]},
        {"scores": ["1.5"], "advantages": [[True, "0.5", 1]], "inference_logprobs": [["-0.5", False, -1]]},
        {"env_id": "0", "ref_logprobs": [["1e-3", 0, 1]]},
        {"env_id": 0.0},
        {"env_id": False},
    ],
)
def test_numbers_are_converted_as_upstreams_server_does(fields: dict[str, Any]) -> None:
    raw = json.dumps({"tokens": [[1, 2, 3]], "masks": [[1, 2, 3]], "scores": [1], **fields}).encode()
    checked = check_group(raw, environments=1)
    expected = ScoredData.model_validate_json(raw).model_dump()
    stored = json.loads(complete(checked))
    assert stored == expected
    numbers = [stored[name] for name in ("tokens", "masks", "scores", "advantages", "inference_logprobs", "env_id")]
    assert not any(kind in json.dumps(numbers) for kind in ("true", "false", '"'))
    assert decode_group(complete(checked)).defect is None


def test_a_list_is_split_without_decoding() -> None:
    assert split_list(b'[{"a": 1},  {"b":2}]') == [b'{"a": 1}', b'{"b":2}']
    assert split_list(b"[]") == []
    with pytest.raises(Refusal, match="not a list"):
        split_list(b'{"tokens": []}')
    with pytest.raises(Refusal, match="not JSON"):
        split_list(b"[{]")
