"""JSON bytes ⇄ ``ScoredGroup``: the edge where a trajectory API's answer becomes arrays.

``decode_batch`` takes the body of ``GET /batch``. Each group is decoded on its own, so a group that breaks the contract
never takes the good ones with it: it comes back with ``defect`` set, and ``build_samples`` quarantines it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.errors import AtroposProtocolError, DataError
from atropos_verl.protocol import packed
from atropos_verl.protocol.schema import (
    EXTRAS,
    FIELD_NAMES,
    TOO_DEEP,
    Refusal,
    ScoredData,
    float_row,
    free_fields,
    int_row,
    parse_object,
    to_fields,
    unknown_fields,
)
from atropos_verl.types import NO_LOGPROB, FloatArray, ScoredGroup

__all__ = ["decode_batch", "decode_group", "encode_group"]

Row: TypeAlias = Sequence[Any] | NDArray[Any]
Rows: TypeAlias = Sequence[Sequence[Any] | NDArray[Any]]

_STRINGS_AND_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)


class _Envelope(msgspec.Struct):
    batch: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    status: Any = None
    message: Any = None
    detail: Any = None


_DECODE_ENVELOPE = msgspec.json.Decoder(_Envelope)
_DECODE_GROUP = msgspec.json.Decoder(ScoredData)


def decode_batch(body: bytes) -> list[ScoredGroup]:
    """Groups in the body of ``GET /batch``, in the order of the server. JSON or packed (``protocol/packed.py``).

    ``{"batch": null}`` and ``{"batch": []}`` mean "not yet" and give ``[]``. A group that cannot be decoded is in the
    list too, with ``defect`` naming field, sequence, index and value.

    Raises:
        AtroposProtocolError: the server reported an error, or the body is not an answer to ``GET /batch``.
    """
    if body.startswith(packed.MAGIC):
        return packed.decode_packed(body, decode_group)
    try:
        envelope = _DECODE_ENVELOPE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        envelope = _split_batch(body)
    if envelope.status == "error":
        explanation = envelope.message or envelope.detail
        raise AtroposProtocolError(
            "the server answered GET /batch with an error: "
            f"{str(explanation)[:500] if explanation else 'no message; is the trainer registered?'}"
        )
    if envelope.batch is msgspec.UNSET:
        raise AtroposProtocolError(
            f"the answer to GET /batch has no 'batch' field; is this an Atropos API? It begins {body[:120]!r}"
        )
    return [decode_group(bytes(raw)) for raw in envelope.batch or ()]


def decode_group(raw: bytes) -> ScoredGroup:
    """One ``ScoredData`` object. Never raises for its content: ``defect`` says what is wrong with it.

    ``group_id`` is the first 16 hex digits of the XXH3-128 of ``raw``: a name, not a proof, and 60 times faster than
    SHA-256, which took a third of the server's own work on a POST. Who could forge a collision could post anything.
    """
    group_id = xxhash.xxh3_128_hexdigest(raw)[:16]
    unknown: tuple[str, ...] = ()
    try:
        try:
            fields = _DECODE_GROUP.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = parse_object(raw)
            fields, unknown = to_fields(found), unknown_fields(found)
        extras: dict[str, Any] = {name: _rows(fields.rows(name)) for name in EXTRAS}
        return ScoredGroup(
            token_ids=tuple([int_row(row, "q", "tokens", i) for i, row in enumerate(fields.tokens)]),
            masks=tuple([int_row(row, "q", "masks", i) for i, row in enumerate(fields.masks)]),
            scores=float_row(fields.scores),
            **extras,
            **free_fields(fields.free()),
            env_id=fields.env_id if isinstance(fields.env_id, int) else None,
            group_id=group_id,
            unknown_fields=unknown,
            raw=raw,
        )
    except Refusal as refusal:
        defect = refusal.message
    except RecursionError:
        defect = TOO_DEEP
    return ScoredGroup(token_ids=(), masks=(), scores=np.zeros(0), group_id=group_id, defect=defect, raw=raw)


def encode_group(*, tokens: Rows, masks: Rows, scores: Row, **optional: Any) -> bytes:
    """The JSON body of ``POST /scored_data``.

    Args:
        tokens, masks: [G][T_g] lists or integer arrays; a mask entry is -100 (not trained) or the token id.
        scores: [G].
        optional: other fields of ``ScoredData``, those that are None left out. ``advantages``, ``ref_logprobs`` and
            ``inference_logprobs`` are [G][T_g]; a row that is None is sent as ``[]``. NaN in ``inference_logprobs`` is
            sent as 1.0, upstream's "no value". An entry of ``overrides`` that is None is sent as ``{}``.

    Raises:
        DataError: a value that JSON cannot carry (NaN or infinity), named by field, sequence and index; lists whose
            lengths differ; or a field that ``ScoredData`` has not.
    """
    fields: dict[str, Any] = {"tokens": tokens, "masks": masks, "scores": _finite(scores, "scores")}
    for name in ("masks", "scores"):
        if len(fields[name]) != len(tokens):
            raise DataError(f"{name} has {len(fields[name])} entries, but tokens has {len(tokens)}")
    for name, value in optional.items():
        if name not in FIELD_NAMES:
            raise DataError(f"{name} is no field of ScoredData")
        if value is None:
            continue
        if name in EXTRAS:
            missing = NO_LOGPROB if name == "inference_logprobs" else None
            value = [_finite([] if row is None else row, f"{name}[{i}]", missing) for i, row in enumerate(value)]
        elif name == "overrides":
            value = [entry or {} for entry in value]
        fields[name] = value
    return msgspec.json.encode(fields, enc_hook=_encode_numpy)


def _rows(rows: list[list[float] | None]) -> tuple[FloatArray | None, ...] | None:
    """The rows of an extra; None when all of them are absent."""
    return tuple([float_row(row) if row else None for row in rows]) if any(rows) else None


# --- a body with a group that the typed decoder cannot skip ----------------------------------------------------------


def _split_batch(body: bytes) -> _Envelope:
    """Cut ``{"batch": [...], ...}`` at its brackets, whatever stands between them.

    Raises:
        AtroposProtocolError: not a JSON object, or cut short.
    """
    span = _batch_span(body)
    text = body if span is None else body[: span[0]] + b"[]" + body[span[1] :]
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AtroposProtocolError(
            f"the answer to GET /batch is not JSON ({str(error)[:80]}); is this an Atropos API? "
            f"It is {len(body)} bytes long and begins {body[:120]!r}"
        ) from error
    if not isinstance(fields, dict) or fields.get("batch") not in (None, []):
        raise AtroposProtocolError(
            "the answer to GET /batch is not an object with a list 'batch'; is this an Atropos API? "
            f"It begins {body[:120]!r}"
        )
    raw = None if span is None else [msgspec.Raw(element) for element in span[2]]
    return _Envelope(
        batch=raw if "batch" in fields else msgspec.UNSET,
        **{name: fields.get(name) for name in ("status", "message", "detail")},
    )


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


# --- encoding --------------------------------------------------------------------------------------------------------


def _finite(row: Row, where: str, missing: float | None = None) -> list[float]:
    """``row`` as a list, NaN replaced by ``missing`` when that is given; any other non-finite value raises."""
    values = np.array(row, np.float64)
    if missing is not None:
        values[np.isnan(values)] = missing
    bad = ~np.isfinite(values)
    if bad.any():
        index = int(np.argmax(bad))
        raise DataError(
            f"{where}[{index}] = {values[index]} is not finite; JSON and the trajectory API cannot carry it"
        )
    found: list[float] = values.tolist()
    return found


def _encode_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot send {type(value).__name__} in a scored group")
