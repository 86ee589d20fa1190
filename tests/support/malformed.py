"""A seeded fuzzer of groups that the trajectory API accepts with HTTP 200 and that must never be trained on.

Every group starts as a good one and gets exactly one fault, so a group that is not refused points at one missing check.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from atropos_verl.types import NOT_TRAINED, ScoredGroup

Group = dict[str, Any]
VOCAB_SIZE = 256
"""Ids of good tokens are below this; give it to the validation."""


@dataclass(frozen=True)
class MalformedGroup:
    kind: str
    group: Group

    def encode(self) -> bytes:
        return json.dumps(self.group).encode()


def comparable(group: ScoredGroup) -> str:
    """Every field of a decoded group as text, because NaN and arrays do not compare."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.tolist()
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    return repr({name: plain(getattr(group, name)) for name in ScoredGroup.__slots__})


def good_group(rng: random.Random, *, group_size: int = 4, vocab_size: int = VOCAB_SIZE) -> Group:
    """A group nothing is wrong with: prompt of 2-4 tokens, answers of 3-8, distinct scores, all fields set."""
    prompt = [rng.randrange(2, vocab_size) for _ in range(rng.randint(2, 4))]
    answers = [[rng.randrange(2, vocab_size) for _ in range(rng.randint(3, 8))] for _ in range(group_size)]
    tokens = [prompt + answer for answer in answers]
    hidden = len(prompt)
    return {
        "tokens": tokens,
        "masks": [[NOT_TRAINED] * hidden + row[hidden:] for row in tokens],
        "scores": [float(i) for i in range(group_size)],
        "advantages": [[rng.uniform(-1, 1) for _ in row] for row in tokens],
        "inference_logprobs": [[1.0] * hidden + [-rng.random() for _ in row[hidden:]] for row in tokens],
        "overrides": [{"set_advantage_to_zero": False} for _ in tokens],
        "group_overrides": {},
        "generation_params": {"temperature": 1.0},
    }


def malformed_cases(
    seed: int, count: int, *, group_size: int = 4, vocab_size: int = VOCAB_SIZE, same_size: bool = False
) -> list[MalformedGroup]:
    """``count`` malformed groups, every kind in turn.

    ``same_size``: only kinds that keep ``group_size`` sequences. Upstream never delivers a batch again when sizes do
    not add up to the batch size, so a test that wants its groups back has to ask for these.
    """
    rng = random.Random(seed)
    kinds = [kind for kind in _KINDS if not (same_size and kind in _CHANGE_SIZE)]
    cases = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        group = good_group(rng, group_size=group_size, vocab_size=vocab_size)
        _KINDS[kind](group, rng, vocab_size)
        cases.append(MalformedGroup(kind, group))
    return cases


def poison_groups(seed: int = 0) -> list[bytes]:
    """Groups with NaN or Infinity, as JSON of Python's dialect. Upstream accepts them, and then fails to encode the
    whole batch that holds one: post them only where that is the point."""
    rng = random.Random(seed)
    poisoned = []
    for field in ("scores", "advantages", "inference_logprobs"):
        for value in (float("nan"), float("inf"), float("-inf")):
            group = good_group(rng)
            row = group[field] if field == "scores" else group[field][0]
            row[-1] = value
            poisoned.append(json.dumps(group).encode())
    return poisoned


def _row(group: Group, field: str, rng: random.Random) -> list[Any]:
    rows: list[list[Any]] = group[field]
    return rng.choice(rows)


def _set_token(value: Callable[[random.Random, int], int]) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        i = rng.randrange(len(group["tokens"]))
        bad = value(rng, vocab_size)
        t = rng.randrange(len(group["tokens"][i]))
        group["tokens"][i][t] = bad
        if group["masks"][i][t] != NOT_TRAINED:
            group["masks"][i][t] = bad

    return spoil


def _shorten(field: str) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        _row(group, field, rng).pop()

    return spoil


def _lengthen(field: str, value: float) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        _row(group, field, rng).append(value)

    return spoil


def _one_row_less(field: str) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        group[field].pop(rng.randrange(len(group[field])))

    return spoil


def _one_row_more(field: str) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        group[field].append(group[field][0])

    return spoil


def _set(field: str, value: Any) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        group[field] = value

    return spoil


def _no_group(group: Group, rng: random.Random, vocab_size: int) -> None:
    for field in ("tokens", "masks", "scores", "advantages", "inference_logprobs", "overrides"):
        group[field] = []


def _empty_sequence(group: Group, rng: random.Random, vocab_size: int) -> None:
    i = rng.randrange(len(group["tokens"]))
    for field in ("tokens", "masks", "advantages", "inference_logprobs"):
        group[field][i] = []


def _mask_of_other_token(group: Group, rng: random.Random, vocab_size: int) -> None:
    i = rng.randrange(len(group["tokens"]))
    group["masks"][i][-1] = (group["tokens"][i][-1] + 1) % vocab_size


def _zero_one_masks(group: Group, rng: random.Random, vocab_size: int) -> None:
    group["masks"] = [[0 if entry == NOT_TRAINED else 1 for entry in row] for row in group["masks"]]


def _negative_mask(group: Group, rng: random.Random, vocab_size: int) -> None:
    _row(group, "masks", rng)[0] = rng.choice([-1, -99, -101])


def _positive_logprob(group: Group, rng: random.Random, vocab_size: int) -> None:
    _row(group, "inference_logprobs", rng)[-1] = rng.choice([0.5, 2.0, 13.0])


def _huge(field: str) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        row = group[field] if field == "scores" else _row(group, field, rng)
        row[rng.randrange(len(row))] = rng.choice([1e300, -1e300])

    return spoil


def _override(key: str, value: Any) -> Callable[[Group, random.Random, int], None]:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        rng.choice(group["overrides"])[key] = value

    return spoil


_CHANGE_SIZE = {"no sequence", "tokens: a sequence less", "tokens: a sequence more"}

_KINDS: dict[str, Callable[[Group, random.Random, int], None]] = {
    "no sequence": _no_group,
    "tokens: a sequence less": _one_row_less("tokens"),
    "tokens: a sequence more": _one_row_more("tokens"),
    "empty sequence": _empty_sequence,
    "id negative": _set_token(lambda rng, vocab_size: rng.choice([-1, -5, -100, -(2**31)])),
    "id 2**40": _set_token(lambda rng, vocab_size: 2**40),
    "id beyond 64 bits": _set_token(lambda rng, vocab_size: 2**70),
    "id outside the vocabulary": _set_token(lambda rng, vocab_size: vocab_size + rng.randrange(1000)),
    "masks: a token less": _shorten("masks"),
    "masks: a token more": _lengthen("masks", NOT_TRAINED),
    "masks: a sequence less": _one_row_less("masks"),
    "masks: a sequence more": _one_row_more("masks"),
    "masks: another token's id": _mask_of_other_token,
    "masks: zeros and ones": _zero_one_masks,
    "masks: negative": _negative_mask,
    "scores: one less": _one_row_less("scores"),
    "scores: one more": _one_row_more("scores"),
    "scores: none": _set("scores", []),
    "scores: beyond float32": _huge("scores"),
    "advantages: a token less": _shorten("advantages"),
    "advantages: a token more": _lengthen("advantages", 0.0),
    "advantages: a sequence less": _one_row_less("advantages"),
    "advantages: a sequence more": _one_row_more("advantages"),
    "advantages: beyond float32": _huge("advantages"),
    "logprobs: a token less": _shorten("inference_logprobs"),
    "logprobs: a token more": _lengthen("inference_logprobs", -0.5),
    "logprobs: a sequence less": _one_row_less("inference_logprobs"),
    "logprobs: a sequence more": _one_row_more("inference_logprobs"),
    "logprobs: positive": _positive_logprob,
    "logprobs: beyond float32": _huge("inference_logprobs"),
    "overrides: one less": _one_row_less("overrides"),
    "overrides: one more": _one_row_more("overrides"),
    "overrides: set_advantage_to_zero is text": _override("set_advantage_to_zero", "yes"),
    "overrides: temperature is text": _override("temperature", "hot"),
    "overrides: temperature negative": _override("temperature", -1.0),
    "generation_params: temperature is text": _set("generation_params", {"temperature": "warm"}),
}
