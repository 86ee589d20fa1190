"""JSON bytes ⇄ ``ScoredGroup``: the edge where a trajectory API's answer becomes arrays.

``decode_batch`` takes the body of ``GET /batch``. Each group is decoded on its own, so a group that breaks the contract
never takes the good ones with it: it comes back with ``defect`` set, and ``build_samples`` quarantines it. Field names
and types are those of upstream's ``ScoredData`` (``atroposlib/api/server.py``, atroposlib 0.4.0).

Two readers give the same result. The fast one is a typed msgspec decoder. What it refuses (NaN literals, lone
surrogates, a field of the wrong type) goes to ``wire_fallback``, which walks plain Python objects, and so can either
accept what Python's ``json`` emits or name field, sequence, index and value of what is wrong.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.errors import AtroposProtocolError, DataError
from atropos_verl.protocol import packed, wire_fallback
from atropos_verl.types import FloatArray, IntArray, ScoredGroup

__all__ = ["decode_batch", "decode_group", "encode_group"]

NO_LOGPROB = 1.0
"""Upstream's "no value" in ``inference_logprobs``."""

IntRows: TypeAlias = Sequence[Sequence[int] | NDArray[np.integer[Any]]]
FloatRows: TypeAlias = Sequence[Sequence[float] | NDArray[np.floating[Any]] | None]

_MaybeRows: TypeAlias = list[list[float] | dict[str, Any] | None] | dict[str, Any] | None
_MaybeDict: TypeAlias = dict[str, Any] | list[Any] | None


class _GroupFields(msgspec.Struct):
    """``ScoredData`` as it is allowed to look; ``{}`` and ``[]`` are what environments send for "absent"."""

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float]
    advantages: _MaybeRows = None
    ref_logprobs: _MaybeRows = None
    messages: Any = None
    generation_params: _MaybeDict = None
    inference_logprobs: _MaybeRows = None
    overrides: list[_MaybeDict] | dict[str, Any] | None = None
    group_overrides: _MaybeDict = None
    images: Any = None
    env_id: int | None = None
    distill_token_ids: Any = None
    distill_logprobs: Any = None


class _KnownFieldsOnly(_GroupFields, forbid_unknown_fields=True):
    """The same, refusing unknown names: then the names have to be looked up, which costs a second scan."""


class _Envelope(msgspec.Struct):
    batch: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    status: Any = None
    message: Any = None
    detail: Any = None


def decode_batch(body: bytes) -> list[ScoredGroup]:
    """Groups in the body of ``GET /batch``, in the order of the server. JSON or packed (``api/packed.py``).

    ``{"batch": null}`` and ``{"batch": []}`` mean "not yet" and give ``[]``. A group that cannot be decoded is in the
    list too, with ``defect`` naming field, sequence, index and value.

    Raises:
        AtroposProtocolError: the server reported an error, or the body is not an answer to ``GET /batch``.
    """
    if body.startswith(packed.MAGIC):
        return packed.decode_packed(body, decode_group)
    try:
        envelope = msgspec.json.decode(body, type=_Envelope)
        batch, status = envelope.batch, envelope.status
        explanation = envelope.message if envelope.message is not None else envelope.detail
        groups = None if batch is None or isinstance(batch, msgspec.UnsetType) else [bytes(raw) for raw in batch]
        known = not isinstance(batch, msgspec.UnsetType)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        split = wire_fallback.split_batch(body)
        groups, known = split.groups, split.has_batch
        status, explanation = split.fields.get("status"), split.fields.get("message") or split.fields.get("detail")
    if status == "error":
        raise AtroposProtocolError(
            "the server answered GET /batch with an error: "
            f"{str(explanation)[:500] if explanation else 'no message; is the trainer registered?'}"
        )
    if not known:
        raise AtroposProtocolError(
            f"the answer to GET /batch has no 'batch' field; is this an Atropos API? It begins {body[:120]!r}"
        )
    return [decode_group(raw) for raw in groups or ()]


def decode_group(raw: bytes) -> ScoredGroup:
    """One ``ScoredData`` object. Never raises for its content: what is wrong with it is in ``defect``.

    ``group_id`` is the first 16 hex digits of the XXH3-128 of ``raw``: a name, not a proof, and 60 times faster than
    SHA-256, which took a third of the server's own work on a POST. Who could forge a collision could post anything.
    """
    group_id = xxhash.xxh3_128_hexdigest(raw)[:16]
    unknown: tuple[str, ...] = ()
    try:
        try:
            fields: _GroupFields = _DECODE_KNOWN.decode(raw)
        except msgspec.ValidationError:
            fields = _DECODE_ANY.decode(raw)
            unknown = _unknown_fields(raw)
        return _from_fields(fields, unknown, group_id, raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, _NotAbsentError):
        return wire_fallback.decode_group(raw, group_id, _FIELD_NAMES)


def encode_group(
    *,
    tokens: IntRows,
    masks: IntRows,
    scores: Sequence[float] | NDArray[np.floating[Any]],
    advantages: FloatRows | None = None,
    ref_logprobs: FloatRows | None = None,
    messages: Any = None,
    generation_params: Mapping[str, Any] | None = None,
    inference_logprobs: FloatRows | None = None,
    overrides: Sequence[Mapping[str, Any] | None] | None = None,
    group_overrides: Mapping[str, Any] | None = None,
    images: Any = None,
    env_id: int | None = None,
    distill_token_ids: Any = None,
    distill_logprobs: Any = None,
) -> bytes:
    """The JSON body of ``POST /scored_data``. Fields that are None are left out.

    Args:
        tokens, masks: [G][T_g] lists or integer arrays; a mask entry is -100 (not trained) or the token id.
        scores: [G].
        advantages, ref_logprobs, inference_logprobs: [G][T_g]; a row that is None is sent as ``[]``. NaN in
            ``inference_logprobs`` is sent as 1.0, upstream's "no value".

    Raises:
        DataError: a value that JSON cannot carry (NaN or infinity), named by field, sequence and index; or lists
            whose lengths differ.
    """
    sequences = len(tokens)
    for name, length in (("masks", len(masks)), ("scores", len(scores))):
        if length != sequences:
            raise DataError(f"{name} has {length} entries, but tokens has {sequences}")
    fields: dict[str, Any] = {
        "tokens": [_plain(row) for row in tokens],
        "masks": [_plain(row) for row in masks],
        "scores": _finite(_plain(scores), "scores"),
        "advantages": _float_rows(advantages, "advantages"),
        "ref_logprobs": _float_rows(ref_logprobs, "ref_logprobs"),
        "messages": messages,
        "generation_params": generation_params,
        "inference_logprobs": _float_rows(inference_logprobs, "inference_logprobs", missing=NO_LOGPROB),
        "overrides": None if overrides is None else [dict(entry or {}) for entry in overrides],
        "group_overrides": group_overrides,
        "images": images,
        "env_id": env_id,
        "distill_token_ids": distill_token_ids,
        "distill_logprobs": distill_logprobs,
    }
    present = {name: value for name, value in fields.items() if value is not None}
    return msgspec.json.encode(present, enc_hook=_encode_numpy)


# ---------------------------------------------------------------------- decoding, fast path


class _NotAbsentError(Exception):
    """A field holds an object where only an empty one (absent) is allowed; the fallback names it."""


def _from_fields(fields: _GroupFields, unknown: tuple[str, ...], group_id: str, raw: bytes) -> ScoredGroup:
    return ScoredGroup(
        token_ids=tuple([_ints(row) for row in fields.tokens]),
        masks=tuple([_ints(row) for row in fields.masks]),
        scores=np.array(fields.scores, dtype=np.float64),
        advantages=_rows(fields.advantages),
        inference_logprobs=_rows(fields.inference_logprobs),
        ref_logprobs=_rows(fields.ref_logprobs),
        overrides=_overrides(fields.overrides),
        group_overrides=_dict(fields.group_overrides),
        generation_params=_dict(fields.generation_params),
        messages=wire_fallback.present(fields.messages),
        images=wire_fallback.present(fields.images),
        distill_token_ids=wire_fallback.present(fields.distill_token_ids),
        distill_logprobs=wire_fallback.present(fields.distill_logprobs),
        env_id=fields.env_id,
        group_id=group_id,
        unknown_fields=unknown,
        raw=raw,
    )


def _ints(row: list[int]) -> IntArray:
    # array('q') is the fastest way from a list of ints (20 ns a token, np.array 35), and it checks the range.
    return np.frombuffer(array("q", row), dtype=np.int64) if row else np.zeros(0, dtype=np.int64)


def _rows(rows: _MaybeRows) -> tuple[FloatArray | None, ...] | None:
    if not rows:
        return None
    if isinstance(rows, dict):
        raise _NotAbsentError
    found: list[FloatArray | None] = []
    for row in rows:
        if not row:
            found.append(None)
        elif isinstance(row, dict):
            raise _NotAbsentError
        else:
            found.append(np.fromiter(row, np.float64, len(row)))
    return None if all(row is None for row in found) else tuple(found)


def _dict(value: _MaybeDict) -> dict[str, Any] | None:
    if not value:
        return None
    if isinstance(value, list):
        raise _NotAbsentError
    return value


def _overrides(value: list[_MaybeDict] | dict[str, Any] | None) -> tuple[dict[str, Any], ...] | None:
    if not value:
        return None
    if isinstance(value, dict):
        raise _NotAbsentError
    entries = tuple([_dict(entry) or {} for entry in value])
    return entries if any(entries) else None


def _unknown_fields(raw: bytes) -> tuple[str, ...]:
    found = _DECODE_NAMES.decode(raw)
    names = [name for name in found if name not in _FIELD_NAMES]
    return tuple(sorted(n for n in names if bytes(found[n]).translate(None, b" \t\r\n") not in _ABSENT))


_ABSENT = (b"null", b"[]", b"{}")
_DECODE_KNOWN = msgspec.json.Decoder(_KnownFieldsOnly)
_DECODE_ANY = msgspec.json.Decoder(_GroupFields)
_DECODE_NAMES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FIELD_NAMES = frozenset(_GroupFields.__struct_fields__)


# ---------------------------------------------------------------------- encoding


def _plain(row: Any) -> list[Any]:
    return row.tolist() if isinstance(row, np.ndarray) else list(row)


def _float_rows(rows: FloatRows | None, field: str, missing: float | None = None) -> list[list[float]] | None:
    if rows is None:
        return None
    return [[] if row is None else _finite(_plain(row), f"{field}[{i}]", missing) for i, row in enumerate(rows)]


def _finite(values: list[float], where: str, missing: float | None = None) -> list[float]:
    """``values``, NaN replaced by ``missing`` when that is given; any other non-finite value raises."""
    # isfinite per value would double the time; the sum of finite values is finite, or the slow way decides.
    if math.isfinite(sum(values)):
        return values
    found = []
    for index, value in enumerate(values):
        if missing is not None and math.isnan(value):
            value = missing
        elif not math.isfinite(value):
            raise DataError(f"{where}[{index}] = {value!r} is not finite; JSON and the trajectory API cannot carry it")
        found.append(value)
    return found


def _encode_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot send {type(value).__name__} in a scored group")
