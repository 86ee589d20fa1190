"""Seeded good groups, and such that the trajectory API accepts with HTTP 200 and that must never be trained on.

Each of these starts as a good one and gets exactly one fault, so a group that is not refused points at a missing check.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from atropos_verl.types import NOT_TRAINED, ScoredGroup

Group = dict[str, Any]


def comparable(group: ScoredGroup) -> str:
    """Every field of a decoded group as text, because NaN and arrays do not compare."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.tolist()
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    return repr({name: plain(getattr(group, name)) for name in ScoredGroup.__slots__})


def good_group(rng: random.Random, *, group_size: int = 4, vocab_size: int = 256) -> Group:
    """Prompt of 2-4 tokens, answers of 3-8, distinct scores, all fields set."""

    def tokens_of(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(2, vocab_size) for _ in range(rng.randint(shortest, longest))]

    prompt = tokens_of(2, 4)
    answers = [tokens_of(3, 8) for _ in range(group_size)]
    tokens = [prompt + answer for answer in answers]
    return {
        "tokens": tokens,
        "masks": [[NOT_TRAINED] * len(prompt) + answer for answer in answers],
        "scores": [float(i) for i in range(group_size)],
        "advantages": [[rng.uniform(-1, 1) for _ in row] for row in tokens],
        "inference_logprobs": [[1.0] * len(prompt) + [-rng.random() for _ in answer] for answer in answers],
        "overrides": [{"set_advantage_to_zero": False} for _ in tokens],
        "group_overrides": {},
        "generation_params": {"temperature": 1.0},
    }


def malformed_groups(seed: int, count: int, *, same_size: bool = False) -> list[Group]:
    """``count`` malformed groups of four, every kind in turn.

    ``same_size``: only kinds that keep the number of sequences. Upstream never delivers a batch again when sizes do not
    add up to the batch size, so a test that wants its groups back has to ask for these.
    """
    rng = random.Random(seed)
    groups = [good_group(rng) for _ in range(count)]
    for group, spoil in zip(groups, itertools.cycle(_KINDS[3 if same_size else 0 :]), strict=False):
        spoil(group, rng.randrange(4))
    return groups


_PER_TOKEN = ("tokens", "masks", "advantages", "inference_logprobs")
_ROWS = (*_PER_TOKEN, "scores", "overrides")
_BAD_IDS = (-1, -5, -100, -(2**31), 2**40, 2**70, 261, 1260)
"""The demo model has 261."""
_ENTRIES = [
    *((("tokens",), 0, bad) for bad in _BAD_IDS),
    *((("tokens", "masks"), -1, bad) for bad in _BAD_IDS),
    *((("masks",), 0, bad) for bad in (-1, -99, -101)),
    (("masks",), -1, 1),  # another token's id
    *(((field,), -1, bad) for field in ("advantages", "inference_logprobs") for bad in (1e300, -1e300)),
    *((("inference_logprobs",), -1, bad) for bad in (0.5, 2.0, 13.0)),
]
"""Fields, place in a row, and what stands there."""
_FIELDS: list[Group] = [
    {"scores": []},
    {"scores": [0.0, 1e300, 1.0, 2.0]},
    {"generation_params": {"temperature": "warm"}},
    *({"overrides": [{}, {}, bad, {}]} for bad in ({"set_advantage_to_zero": "yes"}, {"temperature": "hot"})),
    {"overrides": [{"temperature": -1.0}, {}, {}, {}]},
]


def _with_entry(fields: tuple[str, ...], at: int, bad: Any) -> Callable[[Group, int], None]:
    def spoil(group: Group, row: int) -> None:
        for field in fields:
            group[field][row][at] = bad

    return spoil


_KINDS: list[Callable[[Group, int], Any]] = [
    lambda group, row: group.update({field: [] for field in _ROWS}),  # the first three change the size
    *(lambda group, row, f=field: group[f].pop(row) for field in _ROWS[:1]),
    *(lambda group, row, f=field: group[f].append(group[f][0]) for field in _ROWS),
    *(lambda group, row, f=field: group[f].pop(row) for field in _ROWS[1:]),
    *(lambda group, row, f=field: group[f][row].pop() for field in _PER_TOKEN[1:]),
    *(lambda group, row, f=field: group[f][row].append(group[f][row][0]) for field in _PER_TOKEN[1:]),
    *(_with_entry(*entry) for entry in _ENTRIES),
    *(lambda group, row, f=fields: group.update(f) for fields in _FIELDS),
    lambda group, row: [group[field][row].clear() for field in _PER_TOKEN],
    lambda group, row: group.update(masks=[[int(entry != NOT_TRAINED) for entry in m] for m in group["masks"]]),
]
