"""Functions of a user for a run on Ray, whose processes import them by path."""

from __future__ import annotations

from typing import Any


def constant_loss(logprobs: Any, *_: Any, **__: Any) -> Any:
    return logprobs.new_tensor(2.5), {"of_the_user": 7.0}


def two_or_minus_two(scores: Any, group: Any) -> Any:
    return [2.0 if score > 1.5 else -2.0 for score in scores]


def numbered(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(i) for i in range(len(completions))]
