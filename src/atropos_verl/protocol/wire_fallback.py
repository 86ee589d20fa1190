"""The tolerant reader behind ``wire``: for bodies and groups that the typed decoder refuses.

It accepts what Python's ``json`` module emits beyond the standard (NaN, Infinity, lone surrogates), and it names what
is wrong with the rest. It is slow (plain Python), and it runs only for groups that are odd.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atropos_verl.errors import AtroposProtocolError
from atropos_verl.types import FloatArray, IntArray, ScoredGroup

__all__ = ["BatchParts", "decode_group", "present", "split_batch"]

_INT64 = range(-(2**63), 2**63)
_STRINGS_AND_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class BatchParts:
    """The body of ``GET /batch``, cut up."""

    has_batch: bool
    groups: list[bytes] | None
    """JSON of each element of ``batch``; None for null."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Everything beside ``batch``."""


def split_batch(body: bytes) -> BatchParts:
    """Cut ``{"batch": [...], ...}`` at its brackets, whatever stands between them.

    Raises:
        AtroposProtocolError: not a JSON object, or cut short.
    """
    spans = _batch_span(body)
    if spans is None:
        fields = _load_envelope(body, body)
        return BatchParts("batch" in fields, None, fields)
    start, end, elements = spans
    fields = _load_envelope(body[:start] + b"[]" + body[end:], body)
    return BatchParts(True, elements, fields)


def _load_envelope(text: bytes, body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AtroposProtocolError(
            f"the answer to GET /batch is not JSON ({_short(str(error))}); is this an Atropos API? "
            f"It is {len(body)} bytes long and begins {body[:120]!r}"
        ) from error
    if not isinstance(fields, dict) or fields.get("batch") not in (None, []):
        raise AtroposProtocolError(
            "the answer to GET /batch is not an object with a list 'batch'; is this an Atropos API? "
            f"It begins {body[:120]!r}"
        )
    return fields


def _batch_span(body: bytes) -> tuple[int, int, list[bytes]] | None:
    """Byte range of the list under the key ``batch`` of the outermost object, and its elements. None: no such list."""
    depth, key_end, start, previous = 0, -1, -1, -1
    elements: list[bytes] = []
    element_start = -1
    for match in _STRINGS_AND_BRACKETS.finditer(body):
        token = match.group()
        at, end = match.span()
        if token in (b"{", b"["):
            depth += 1
            if depth == 2 and start < 0 and token == b"[" and key_end >= 0 and body[key_end:at].strip() == b":":
                start = previous = end
            elif depth == 3 and start >= 0:
                elements += _scalars(body[previous:at])
                element_start = at
        elif token in (b"}", b"]"):
            depth -= 1
            if depth == 2 and start >= 0:
                elements.append(body[element_start:end])
                previous = end
            elif depth == 1 and start >= 0:
                elements += _scalars(body[previous:at])
                return start - 1, end, elements
        elif depth == 1 and start < 0 and token == b'"batch"':
            key_end = end
        elif depth == 2 and start >= 0:
            elements += [*_scalars(body[previous:at]), token]
            previous = end
    return None


def _scalars(gap: bytes) -> list[bytes]:
    """Elements that are neither objects, lists nor strings, in the text between two that are."""
    return [piece.strip() for piece in gap.split(b",") if piece.strip()]


# ---------------------------------------------------------------------- one group


class _DefectError(Exception):
    """str() is the reason."""


def decode_group(raw: bytes, group_id: str, field_names: frozenset[str]) -> ScoredGroup:
    """As ``wire.decode_group``, from plain Python objects."""
    try:
        value = json.loads(raw)
        return _from_object(value, group_id, raw, field_names)
    except _DefectError as defect:
        reason = str(defect)
    except RecursionError:
        reason = "group: nested too deeply to be read"
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of more than 4300 digits
        reason = f"group: not JSON ({_short(str(error))})"
    return ScoredGroup(token_ids=(), masks=(), scores=np.zeros(0), group_id=group_id, defect=reason, raw=raw)


def _from_object(value: Any, group_id: str, raw: bytes, field_names: frozenset[str]) -> ScoredGroup:
    if not isinstance(value, dict):
        raise _DefectError(f"group: expected an object, got {_show(value)}")
    for name in ("tokens", "masks", "scores"):
        if name not in value:
            raise _DefectError(f"{name}: the field is missing")
    env_id = value.get("env_id")
    if env_id is not None and type(env_id) is not int:
        raise _DefectError(f"env_id = {_show(env_id)}: expected an integer or null")
    unknown = sorted(name for name in value if name not in field_names and value[name] not in (None, [], {}))
    return ScoredGroup(
        token_ids=_int_rows(value["tokens"], "tokens"),
        masks=_int_rows(value["masks"], "masks"),
        scores=_floats(_list(value["scores"], "scores"), "scores"),
        advantages=_maybe_rows(value.get("advantages"), "advantages"),
        inference_logprobs=_maybe_rows(value.get("inference_logprobs"), "inference_logprobs"),
        ref_logprobs=_maybe_rows(value.get("ref_logprobs"), "ref_logprobs"),
        overrides=_overrides(value.get("overrides")),
        group_overrides=_dict(value.get("group_overrides"), "group_overrides"),
        generation_params=_dict(value.get("generation_params"), "generation_params"),
        messages=present(value.get("messages")),
        images=present(value.get("images")),
        distill_token_ids=present(value.get("distill_token_ids")),
        distill_logprobs=present(value.get("distill_logprobs")),
        env_id=env_id,
        group_id=group_id,
        unknown_fields=tuple(unknown),
        raw=raw,
    )


def present(value: Any) -> Any:
    """``value``, or None when it is null, ``{}``, ``[]`` or a list of such: what environments send for "absent"."""
    return None if _is_empty(value) else value


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_empty(entry) for entry in value)
    return value is None or value == {}


def _int_rows(value: Any, name: str) -> tuple[IntArray, ...]:
    return tuple([_ints(_list(row, f"{name}[{i}]"), f"{name}[{i}]") for i, row in enumerate(_list(value, name))])


def _ints(row: list[Any], where: str) -> IntArray:
    for index, entry in enumerate(row):
        if type(entry) is not int:
            raise _DefectError(f"{where}[{index}] = {_show(entry)}: expected an integer token id")
        if entry not in _INT64:
            raise _DefectError(f"{where}[{index}] = {_show(entry)}: does not fit in 64 bits")
    return np.array(row, dtype=np.int64)


def _maybe_rows(value: Any, name: str) -> tuple[FloatArray | None, ...] | None:
    if value is None or value == {}:
        return None
    rows: list[FloatArray | None] = []
    for i, row in enumerate(_list(value, name)):
        absent = row in (None, [], {})
        rows.append(None if absent else _floats(_list(row, f"{name}[{i}]"), f"{name}[{i}]"))
    return None if all(row is None for row in rows) else tuple(rows)


def _floats(row: list[Any], where: str) -> FloatArray:
    found = np.zeros(len(row))
    for index, entry in enumerate(row):
        if type(entry) is not float and type(entry) is not int:
            raise _DefectError(f"{where}[{index}] = {_show(entry)}: expected a number")
        try:
            found[index] = entry
        except OverflowError:
            raise _DefectError(f"{where}[{index}] = {_show(entry)}: too large for a 64-bit float") from None
    return found


def _overrides(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None or value == {}:
        return None
    entries = tuple([_dict(entry, f"overrides[{i}]") or {} for i, entry in enumerate(_list(value, "overrides"))])
    return entries if any(entries) else None


def _dict(value: Any, where: str) -> dict[str, Any] | None:
    if value in (None, [], {}):
        return None
    if not isinstance(value, dict):
        raise _DefectError(f"{where} = {_show(value)}: expected an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _DefectError(f"{where} = {_show(value)}: expected a list")
    return value


def _show(value: Any) -> str:
    """JSON of a value, cut to a length that a log line can hold."""
    try:
        return _short(json.dumps(value))
    except ValueError:  # an integer of more than 4300 digits
        return "an integer of more than 4300 digits"


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
