"""A seeded fuzzer of groups that the trajectory API accepts with HTTP 200 and that must never be trained on.

Every group starts as a good one and gets exactly one fault, so a group that is not refused points at one missing check.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from atropos_verl.types import NOT_TRAINED, ScoredGroup

Group = dict[str, Any]
Spoil = Callable[[Group, random.Random, int], object]
Change = Callable[[Any, random.Random], object]
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


def _set_token(value: Callable[[random.Random, int], int]) -> Spoil:
    def spoil(group: Group, rng: random.Random, vocab_size: int) -> None:
        i = rng.randrange(len(group["tokens"]))
        bad = value(rng, vocab_size)
        t = rng.randrange(len(group["tokens"][i]))
        group["tokens"][i][t] = bad
        if group["masks"][i][t] != NOT_TRAINED:
            group["masks"][i][t] = bad

    return spoil


def _in_a_row(field: str, change: Change) -> Spoil:
    """``change`` gets one of the rows of ``field``."""
    return lambda group, rng, vocab_size: change(rng.choice(group[field]), rng)


def _in_all(field: str, change: Change) -> Spoil:
    return lambda group, rng, vocab_size: change(group[field], rng)


def _one_less(rows: list[Any], rng: random.Random) -> None:
    rows.pop(rng.randrange(len(rows)))


def _one_more(rows: list[Any], rng: random.Random) -> None:
    rows.append(rows[0])


def _huge(row: list[Any], rng: random.Random) -> None:
    row[rng.randrange(len(row))] = rng.choice([1e300, -1e300])


def _set(field: str, value: Any) -> Spoil:
    return lambda group, rng, vocab_size: group.update({field: value})


def _empty_sequence(group: Group, rng: random.Random, vocab_size: int) -> None:
    i = rng.randrange(len(group["tokens"]))
    for field in ("tokens", "masks", "advantages", "inference_logprobs"):
        group[field][i] = []


def _mask_of_other_token(group: Group, rng: random.Random, vocab_size: int) -> None:
    i = rng.randrange(len(group["tokens"]))
    group["masks"][i][-1] = (group["tokens"][i][-1] + 1) % vocab_size


def _zero_one_masks(group: Group, rng: random.Random, vocab_size: int) -> None:
    group["masks"] = [[int(entry != NOT_TRAINED) for entry in row] for row in group["masks"]]


def _entry(at: int, values: list[float]) -> Change:
    def change(row: list[Any], rng: random.Random) -> None:
        row[at] = rng.choice(values)

    return change


def _override(key: str, value: Any) -> Spoil:
    return _in_a_row("overrides", lambda entry, rng: entry.update({key: value}))


_ROWS = ("tokens", "masks", "scores", "advantages", "inference_logprobs", "overrides")
_PER_TOKEN = ("masks", "advantages", "inference_logprobs")
_CHANGE_SIZE = {"no sequence", "tokens: a sequence less", "tokens: a sequence more"}

_KINDS: dict[str, Spoil] = {
    "no sequence": lambda group, rng, vocab_size: group.update({field: [] for field in _ROWS}),
    **{f"{field}: a sequence less": _in_all(field, _one_less) for field in _ROWS},
    **{f"{field}: a sequence more": _in_all(field, _one_more) for field in _ROWS},
    **{f"{field}: a token less": _in_a_row(field, lambda row, _: row.pop()) for field in _PER_TOKEN},
    **{f"{field}: a token more": _in_a_row(field, _one_more) for field in _PER_TOKEN},
    "empty sequence": _empty_sequence,
    "id negative": _set_token(lambda rng, vocab_size: rng.choice([-1, -5, -100, -(2**31)])),
    "id 2**40": _set_token(lambda rng, vocab_size: 2**40),
    "id beyond 64 bits": _set_token(lambda rng, vocab_size: 2**70),
    "id outside the vocabulary": _set_token(lambda rng, vocab_size: vocab_size + rng.randrange(1000)),
    "masks: another token's id": _mask_of_other_token,
    "masks: zeros and ones": _zero_one_masks,
    "masks: negative": _in_a_row("masks", _entry(0, [-1, -99, -101])),
    "scores: none": _set("scores", []),
    "scores: beyond float32": _in_all("scores", _huge),
    "advantages: beyond float32": _in_a_row("advantages", _huge),
    "logprobs: positive": _in_a_row("inference_logprobs", _entry(-1, [0.5, 2.0, 13.0])),
    "logprobs: beyond float32": _in_a_row("inference_logprobs", _huge),
    "overrides: set_advantage_to_zero is text": _override("set_advantage_to_zero", "yes"),
    "overrides: temperature is text": _override("temperature", "hot"),
    "overrides: temperature negative": _override("temperature", -1.0),
    "generation_params: temperature is text": _set("generation_params", {"temperature": "warm"}),
}
