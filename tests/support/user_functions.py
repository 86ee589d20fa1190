"""Functions of a user for a run on Ray, whose processes import them by path."""

from __future__ import annotations

from typing import Any

__all__ = ["constant_loss", "numbered", "zero_sum"]


def constant_loss(logprobs: Any, *_: Any, **__: Any) -> Any:
    return logprobs.new_tensor(2.5), {"of_the_user": 7.0}


def zero_sum(scores: Any, group: Any) -> Any:
    return [score - 1.5 for score in scores]


def numbered(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(i) for i in range(len(completions))]
