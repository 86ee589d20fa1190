"""What a group must satisfy before anything is computed from it.

Each check returns a reason that names field, sequence, index, value and what would be right, or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_verl.errors import UnsupportedFieldError
from atropos_verl.types import FloatArray, IntArray, SampleSettings, ScoredGroup

__all__ = [
    "NOT_TRAINED",
    "NO_LOGPROB",
    "check_supported",
    "fault_in_group",
    "sampling_temperature",
    "stated_temperature",
]

NOT_TRAINED = -100
"""Mask entry of a token that is not trained."""
NO_LOGPROB = 1.0
"""Wire value of a token without a logprob."""
LOGPROB_TOLERANCE = 1e-6
"""Engines that round in float32 report logprobs a hair above 0; those are read as 0."""
MAX_MAGNITUDE = 1e30
"""Scores and advantages beyond this overflow float32, in which the loss is computed."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy decoding (vLLM's bound)."""

_UNSUPPORTED = ("images", "distill_token_ids", "distill_logprobs", "ref_logprobs")


def fault_in_group(group: ScoredGroup, settings: SampleSettings) -> str | None:
    """The first thing wrong with ``group``, or None."""
    if group.defect is not None:
        return group.defect
    for check in _faults(group, settings):
        if check is not None:
            return check
    return None


def check_supported(group: ScoredGroup, ignored: tuple[str, ...]) -> None:
    """Refuse, by name, fields that carry a value and that this trainer does not use.

    Raises:
        UnsupportedFieldError: names the field and the setting that lets the user ignore it.
    """
    present = [name for name in _UNSUPPORTED if getattr(group, name) is not None]
    for name in (*present, *group.unknown_fields):
        if name not in ignored:
            kind = "not known to this version" if name in group.unknown_fields else "not used by this trainer"
            raise UnsupportedFieldError(
                f"{name}: the environment {_environment(group)}sends this ScoredData field, which is {kind}. "
                f"Set data.ignore_fields=[{name}] to train without it"
            )


def stated_temperature(group: ScoredGroup, index: int) -> float | None:
    """What the environment says sequence ``index`` was sampled with; None: nothing (or nothing that is a number)."""
    for _, value in _temperatures(group, index):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def sampling_temperature(group: ScoredGroup, index: int, default: float) -> float:
    """Temperature that sequence ``index`` was sampled with: overrides > generation_params > group_overrides > default.

    0 (greedy, anything below 1e-5) becomes 1: engines report the logprobs of temperature 1 for greedy tokens, and
    dividing logits by 0 means nothing. Call only after ``fault_in_group`` found nothing.
    """
    found = next((value for _, value in _temperatures(group, index) if value is not None), default)
    return float(found) if found >= GREEDY_BELOW else 1.0


def _environment(group: ScoredGroup) -> str:
    return "" if group.env_id is None else f"with env_id {group.env_id} "


def _faults(group: ScoredGroup, settings: SampleSettings) -> Iterable[str | None]:
    size = len(group.token_ids)
    if size == 0:
        yield "tokens: the group is empty (no sequence)"
        return
    yield _fault_in_sizes(group, size)
    for i, (tokens, masks) in enumerate(zip(group.token_ids, group.masks, strict=True)):
        yield _fault_in_tokens(tokens, i, settings.vocab_size)
        yield _fault_in_masks(masks, tokens, i)
    yield _fault_in_floats(group.scores, "scores")
    for name in ("advantages", "inference_logprobs"):
        for i, row in enumerate(getattr(group, name) or ()):
            if row is not None:
                yield _fault_in_length(row, group.token_ids[i], f"{name}[{i}]", i)
                yield _fault_in_floats(row, f"{name}[{i}]")
                if name == "inference_logprobs":
                    yield _fault_in_logprobs(row, i)
    for i in range(size):
        yield _fault_in_overrides(group, i)


def _fault_in_sizes(group: ScoredGroup, size: int) -> str | None:
    for name in ("masks", "scores", "advantages", "inference_logprobs", "overrides"):
        value = getattr(group, name)
        if value is not None and len(value) != size:
            return f"{name}: {len(value)} entries, but tokens has {size}; one per sequence is needed"
    return None


def _fault_in_tokens(tokens: IntArray, i: int, vocab_size: int | None) -> str | None:
    if tokens.size == 0:
        return f"tokens[{i}]: the sequence is empty"
    bad = tokens < 0
    if vocab_size is not None:
        bad |= tokens >= vocab_size
    if not bad.any():
        return None
    t = _first(bad)
    if vocab_size is None:
        return f"tokens[{i}][{t}] = {tokens[t]}: a token id is never negative"
    return (
        f"tokens[{i}][{t}] = {tokens[t]}: outside the vocabulary [0, {vocab_size}); "
        "does the environment use the trained model's tokenizer?"
    )


def _fault_in_masks(masks: IntArray, tokens: IntArray, i: int) -> str | None:
    fault = _fault_in_length(masks, tokens, f"masks[{i}]", i)
    if fault is not None:
        return fault
    bad = (masks != NOT_TRAINED) & (masks != tokens)
    if not bad.any():
        return None
    t = _first(bad)
    hint = ""
    if ((masks == 0) | (masks == 1)).all():
        hint = "; a 0/1 mask is not Atropos's format, put the token id where the token is trained and -100 elsewhere"
    return f"masks[{i}][{t}] = {masks[t]}: must be {NOT_TRAINED} (not trained) or the token id {tokens[t]}{hint}"


def _fault_in_length(row: NDArray[Any], tokens: IntArray, where: str, i: int) -> str | None:
    if row.shape == tokens.shape:
        return None
    return f"{where}: {row.shape[0]} entries, but tokens[{i}] has {tokens.shape[0]}; one per token is needed"


def _fault_in_floats(row: FloatArray, where: str) -> str | None:
    fits = np.abs(row) <= MAX_MAGNITUDE  # False for NaN too
    if fits.all():
        return None
    t = _first(~fits)
    if math.isfinite(row[t]):
        return f"{where}[{t}] = {row[t]}: beyond ±{MAX_MAGNITUDE:g}, which float32 cannot be trained with"
    return f"{where}[{t}] = {row[t]}: must be finite"


def _fault_in_logprobs(row: FloatArray, i: int) -> str | None:
    bad = (row > LOGPROB_TOLERANCE) & (row != NO_LOGPROB)
    if not bad.any():
        return None
    t = _first(bad)
    return (
        f"inference_logprobs[{i}][{t}] = {row[t]}: a logprob is at most 0 "
        f"({NO_LOGPROB} means no value); are these probabilities?"
    )


def _fault_in_overrides(group: ScoredGroup, i: int) -> str | None:
    entry = {} if group.overrides is None else group.overrides[i]
    zero = entry.get("set_advantage_to_zero")
    if zero is not None and not isinstance(zero, bool):
        return f"overrides[{i}].set_advantage_to_zero = {_show(zero)}: must be true or false"
    for where, value in _temperatures(group, i):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{where} = {_show(value)}: must be a number"
        if not 0 <= value <= MAX_MAGNITUDE:
            return f"{where} = {_show(value)}: must be finite and at least 0"
    return None


def _temperatures(group: ScoredGroup, i: int) -> tuple[tuple[str, Any], ...]:
    """Where a temperature may stand, strongest first."""
    own = {} if group.overrides is None else group.overrides[i]
    return (
        (f"overrides[{i}].temperature", own.get("temperature")),
        ("generation_params.temperature", (group.generation_params or {}).get("temperature")),
        ("group_overrides.temperature", (group.group_overrides or {}).get("temperature")),
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _first(bad: NDArray[np.bool_]) -> int:
    return int(np.argmax(bad))
