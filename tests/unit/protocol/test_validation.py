"""The door: what is refused, with field, sequence, index and value; and what is let in as it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.trajectory_server import group

from atropos_verl.protocol.schema import Refusal, check_group, split_list


def refusal(body: Any, **options: Any) -> Refusal:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refusal) as caught:
        check_group(raw, **options)
    return caught.value


def changed(**fields: Any) -> dict[str, Any]:
    return {**group(1, 2, env_id=0), **fields}


NAN, INF = float("nan"), float("inf")
GOOD_ROW = [0.1, 0.2, 0.3]

REFUSED: dict[str, tuple[Any, tuple[str, str, int | None, int | None], str]] = {
    "no tokens": ({"masks": [], "scores": []}, ("missing", "tokens", None, None), "tokens"),
    "empty group": (changed(tokens=[], masks=[], scores=[]), ("empty", "tokens", None, None), "the group is empty"),
    "empty sequence": (
        changed(tokens=[[1], []], masks=[[1], []]),
        ("empty", "tokens", 1, None),
        "tokens[1]: the sequence is empty",
    ),
    "masks short": (
        changed(masks=[[1, 7, 100]]),
        ("length", "masks", None, None),
        "masks: 1 entries, but tokens has 2",
    ),
    "scores long": (changed(scores=[1, 2, 3]), ("length", "scores", None, None), "scores: 3 entries"),
    "mask row": (
        changed(masks=[[1, 7, 100], [1, 7]]),
        ("length", "masks", 1, None),
        "masks[1]: 2 entries, but tokens[1] has 3",
    ),
    "advantages row": (
        changed(advantages=[GOOD_ROW, [0.1]]),
        ("length", "advantages", 1, None),
        "advantages[1]: 1 entries, but tokens[1] has 3",
    ),
    "logprobs rows": (
        changed(inference_logprobs=[GOOD_ROW]),
        ("length", "inference_logprobs", None, None),
        "inference_logprobs: 1 entries",
    ),
    "overrides": (changed(overrides=[{}]), ("length", "overrides", None, None), "overrides: 1 entries"),
    "NaN score": (changed(scores=[0.0, NAN]), ("not_finite", "scores", 1, None), "scores[1] = nan: must be finite"),
    "Infinity": (
        changed(advantages=[GOOD_ROW, [0.1, INF, 0.2]]),
        ("not_finite", "advantages", 1, 1),
        "advantages[1][1] = inf: must be finite",
    ),
    "1e999": (b'{"tokens":[[1]],"masks":[[1]],"scores":[1e999]}', ("not_finite", "scores", 0, None), "scores[0] = inf"),
    "NaN in a message": (
        changed(messages=[[{"role": "user", "content": NAN}]]),
        ("not_finite", "", None, None),
        "NaN is not JSON",
    ),
    "text for a token": (
        changed(tokens=[[1, "a", 3], [1, 2, 3]]),
        ("type", "tokens", 0, 1),
        'tokens[0][1] = "a": expected an integer token id',
    ),
    "5.5 for a token": (changed(tokens=[[1, 5.5, 3], [1, 2, 3]]), ("type", "tokens", 0, 1), "tokens[0][1] = 5.5"),
    "text for scores": (changed(scores="high"), ("type", "scores", None, None), 'scores = "high": expected a list'),
    "null score": (changed(scores=[None, 1.0]), ("type", "scores", 0, None), "scores[0] = null: expected a number"),
    "negative id": (changed(tokens=[[1, 2, 3], [1, 2, -5]]), ("vocabulary", "tokens", 1, 2), "tokens[1][2] = -5"),
    "2^40": (changed(tokens=[[2**40, 2, 3], [1, 2, 3]]), ("vocabulary", "tokens", 0, 0), f"tokens[0][0] = {2**40}"),
    "2^80": (changed(tokens=[[2**80, 2, 3], [1, 2, 3]]), ("vocabulary", "tokens", 0, 0), f"tokens[0][0] = {2**80}"),
    "mask 2^40": (changed(masks=[[1, 2, 3], [1, 2, -(2**40)]]), ("vocabulary", "masks", 1, 2), "masks[1][2]"),
    "message without role": (
        changed(messages=[[{"content": "x"}]]),
        ("message", "messages", 0, 0),
        "Message must have 'role' and 'content' fields",
    ),
    "messages no list": (changed(messages="hello"), ("type", "messages", None, None), "messages is not a list"),
    "extras an object": (
        changed(advantages={"a": 1}),
        ("type", "advantages", None, None),
        'advantages = {"a": 1}: expected a list',
    ),
    "env_id text": (
        changed(env_id="one"),
        ("type", "env_id", None, None),
        'env_id = "one": expected an integer or null',
    ),
    "a list": (b"[1, 2]", ("type", "", None, None), "group: expected an object, got [1, 2]"),
    "cut off": (b'{"tokens": [[1', ("malformed_json", "", None, None), "not JSON"),
    "empty body": (b"", ("malformed_json", "", None, None), "not JSON"),
    "not UTF-8": (
        b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"messages":[[{"role":"u","content":"\xff"}]]}',
        ("encoding", "", None, None),
        "not UTF-8",
    ),
    "not UTF-8 in an unknown field": (
        b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"note":"\xff"}',
        ("encoding", "", None, None),
        "not UTF-8",
    ),
    "deep": (
        b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"images":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        ("malformed_json", "", None, None),
        "nested too deeply",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    body, (reason, field, sequence, index), text = REFUSED[name]
    found = refusal(body)
    assert (found.reason, found.field, found.sequence, found.index) == (reason, field, sequence, index)
    assert text in found.message
    answer = found.as_fields()
    assert answer["detail"][0]["msg"] == found.message
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_ids_beyond_the_vocabulary_the_trainer_registered() -> None:
    raw = json.dumps(group(1, 2)).encode()
    assert check_group(raw, vocab_size=102).tokens == 6
    found = refusal(raw, vocab_size=101)
    assert (found.field, found.sequence, found.index, found.value) == ("tokens", 1, 2, 101)
    assert found.message.startswith("tokens[1][2] = 101: outside the vocabulary [0, 101)")


def test_unknown_environments() -> None:
    raw = json.dumps(group(1, 2, env_id=3)).encode()
    assert check_group(raw, environments=4).env_id == 3
    assert "env_id = 3 is not a registered environment (0 to 2)" in refusal(raw, environments=3).message
    assert "none is registered" in refusal(raw, environments=0).message
    assert refusal(json.dumps(group(1, 2, env_id=-1)).encode(), environments=3).reason == "unknown_env"


def test_a_group_is_kept_as_it_came_with_null_for_what_is_absent() -> None:
    raw = b' {"tokens" : [[1, 2]],"masks":[[-100,2]], "scores":[1], "advantages": null }\n'
    checked = check_group(raw)
    assert checked.complete() == (
        b'{"tokens" : [[1, 2]],"masks":[[-100,2]], "scores":[1], "advantages": null ,"ref_logprobs":null,'
        b'"messages":null,"generation_params":null,"inference_logprobs":null,"overrides":null,'
        b'"group_overrides":null,"images":null,"env_id":null,"distill_token_ids":null,"distill_logprobs":null}'
    )
    assert (checked.env_id, checked.size, checked.tokens) == (None, 1, 2)


def test_unknown_fields_are_kept() -> None:
    raw = json.dumps(group(1, 2, note={"mine": [1, 2]})).encode()
    assert json.loads(check_group(raw).raw)["note"] == {"mine": [1, 2]}


@pytest.mark.parametrize("absent", [None, [], {}])
def test_empty_means_absent(absent: Any) -> None:
    fields = dict.fromkeys(("advantages", "inference_logprobs", "messages", "overrides", "images"), absent)
    assert check_group(json.dumps(group(1, 2, env_id=0, **fields)).encode()).size == 2


def test_rows_may_be_absent_one_by_one() -> None:
    raw = json.dumps(group(1, 3, env_id=0, advantages=[GOOD_ROW, None, []])).encode()
    assert check_group(raw).size == 3


def test_lengths_of_extras_of_an_anonymous_group_are_left_to_the_trainer() -> None:
    """Upstream's own tests post such, and expect 200."""
    raw = json.dumps(group(1, 2, advantages=[[0.1], [0.2]])).encode()
    assert check_group(raw).size == 2
    assert refusal(raw, strict=True).reason == "length"


def test_numbers_that_upstream_makes_integers() -> None:
    raw = json.dumps({"tokens": [[1.0, 2]], "masks": [[True, 2.0]], "scores": [1]}).encode()
    stored = json.loads(check_group(raw).raw)
    assert (stored["tokens"], stored["masks"]) == ([[1, 2]], [[1, 2]])
    assert all(type(value) is int for row in (*stored["tokens"], *stored["masks"]) for value in row)


def test_lone_surrogates_in_a_message_are_kept() -> None:
    raw = json.dumps(group(1, 2, messages=[[{"role": "user", "content": "\ud800"}]])).encode()
    content = json.loads(check_group(raw).raw)["messages"][0][0]["content"]
    assert content.encode("utf-8", "surrogatepass") == b"\xed\xa0\x80"


def test_a_list_is_split_without_decoding() -> None:
    assert split_list(b'[{"a": 1},  {"b":2}]') == [b'{"a": 1}', b'{"b":2}']
    assert split_list(b"[]") == []
    with pytest.raises(Refusal, match="not a list"):
        split_list(b'{"tokens": []}')
    with pytest.raises(Refusal, match="not JSON"):
        split_list(b"[{]")
