"""JSON or packed bytes ⇄ ``ScoredGroup``: the edge where a trajectory API's answer becomes arrays.

``decode_batch`` takes the body of ``GET /batch``. Each group is decoded on its own, so a group that breaks the contract
never takes the good ones with it: it comes back with ``defect`` set, and ``build_samples`` quarantines it.
docs/internals.md describes the packed wire byte by byte."""

import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.errors import AtroposProtocolError, DataError
from atropos_verl.http_thread import printable
from atropos_verl.protocol.schema import (
    EXTRAS,
    TOO_DEEP,
    CheckedGroup,
    Refusal,
    ScoredData,
    float_row,
    free_fields,
    int_row,
    parse_object,
    read_fields,
    read_rollouts,
    to_fields,
    unknown_fields,
)
from atropos_verl.types import NO_LOGPROB, NOT_TRAINED, IntArray, ScoredGroup

MEDIA_TYPE = "application/vnd.atropos+packed"
MAGIC = b"ATRPACK1"

_U32 = struct.Struct("<I")
_HEAD = struct.Struct("<II")
_DTYPES: dict[str, np.dtype[Any]] = {
    "i4": np.dtype("<i4"),
    "u4": np.dtype("<u4"),
    "f4": np.dtype("<f4"),
    "f8": np.dtype("<f8"),
    "m1": np.dtype("u1"),
}

Row: TypeAlias = Sequence[Any] | NDArray[Any]
Rows: TypeAlias = Sequence[Row]


class _Envelope(msgspec.Struct):
    batch: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    status: Any = None
    message: Any = None
    detail: Any = None


class _Header(msgspec.Struct, omit_defaults=True):
    group_id: str = ""
    env_id: int | None = None
    lengths: list[int] = []
    arrays: list[tuple[str, str, int, int]] = []
    rest: dict[str, Any] = {}
    unknown: tuple[str, ...] = ()
    json: bool = False


_DECODE_ENVELOPE = msgspec.json.Decoder(_Envelope)
_DECODE_GROUP: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct("ScoredData", [], bases=(ScoredData,), kw_only=True, forbid_unknown_fields=True)
)
_DECODE_TOLERANT = msgspec.json.Decoder(ScoredData)
_DECODE_HEADER = msgspec.json.Decoder(_Header)


def decode_batch(body: bytes) -> list[ScoredGroup]:
    """Groups in the body of ``GET /batch``, in the order of the server; none for ``{"batch": null}``: "not yet". One
    that cannot be decoded is there too, with ``defect`` naming field, sequence, index and value.

    Raises:
        AtroposProtocolError: the server reported an error, or the body is not an answer to ``GET /batch``."""
    if body.startswith(MAGIC):
        return decode_packed(body)
    try:
        envelope = _DECODE_ENVELOPE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        envelope = _read_again(body)
    if envelope.status == "error":
        explanation = envelope.message or envelope.detail
        raise AtroposProtocolError(
            "the server answered GET /batch with an error: "
            f"{printable(str(explanation)[:500]) if explanation else 'no message; is the trainer registered?'}"
        )
    if envelope.batch is msgspec.UNSET:
        raise AtroposProtocolError(
            f"the answer to GET /batch has no 'batch' field; is this an Atropos API? It begins {body[:120]!r}"
        )
    return [decode_group(bytes(raw)) for raw in envelope.batch or ()]


def decode_group(raw: bytes) -> ScoredGroup:
    """One ``ScoredData`` object. Never raises for its content: ``defect`` says what is wrong with it. ``group_id``, the
    first 16 hex digits of the XXH3-128 of ``raw``, is a name and no proof."""
    group_id = xxhash.xxh3_128_hexdigest(raw)[:16]
    unknown: tuple[str, ...] = ()
    try:
        try:
            fields, unknown = read_fields(raw, _DECODE_GROUP, _DECODE_TOLERANT)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = parse_object(raw)
            fields, unknown = to_fields(found), unknown_fields(found)
        extras: dict[str, Any] = {}
        for name in EXTRAS:
            if any(rows := fields.rows(name)):
                extras[name] = tuple([float_row(row) if row else None for row in rows])
        extras["rollout_ids"], extras["weights"] = read_rollouts(fields)
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

    Raises ``DataError``: NaN or infinity, by field, sequence and index. The API checks the rest."""
    fields: dict[str, Any] = {"tokens": tokens, "masks": masks, "scores": _finite(scores, "scores")}
    for name, value in optional.items():
        if value is None:
            continue
        if name in EXTRAS:
            missing = NO_LOGPROB if name == "inference_logprobs" else None
            value = [_finite([] if row is None else row, f"{name}[{i}]", missing) for i, row in enumerate(value)]
        elif name == "overrides":
            value = [entry or {} for entry in value]
        elif name == "weights":
            value = _finite(value, name)
        fields[name] = value
    return msgspec.json.encode(fields, enc_hook=_encode_numpy)


def _read_again(body: bytes) -> _Envelope:
    """By Python's reader, which also takes NaN. Raises ``AtroposProtocolError``: no JSON object, or cut short."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise AtroposProtocolError(
            f"the answer to GET /batch is not JSON ({str(error)[:80]}); is this an Atropos API? "
            f"It is {len(body)} bytes long and begins {body[:120]!r}"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("batch"), list | None):
        raise AtroposProtocolError(
            "the answer to GET /batch is not an object with a list 'batch'; is this an Atropos API? "
            f"It begins {body[:120]!r}"
        )
    if "batch" in found:
        found["batch"] = [msgspec.Raw(json.dumps(group).encode()) for group in found["batch"] or ()]
    return _Envelope(**{name: found[name] for name in _Envelope.__struct_fields__ if name in found})


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
    raise TypeError(f"cannot send {type(value).__name__} in a scored group")


def pack_group(group: CheckedGroup) -> bytes:
    """Encodes one group for the packed wire."""
    fields = group.decoded
    blobs: list[bytes] = []
    arrays: list[tuple[str, str, int, int]] = []
    offset = 0

    def put(name: str, kind: str, values: NDArray[Any], count: int) -> None:
        nonlocal offset
        data = values.astype(_DTYPES[kind], copy=False).tobytes()
        data += b"\0" * (-len(data) % 8)
        arrays.append((name, kind, offset, count))
        blobs.append(data)
        offset += len(data)

    lengths = [len(row) for row in fields.tokens]
    ids, marks = (
        np.concatenate([int_row(row, "i", name, i) for i, row in enumerate(rows)])
        for name, rows in (("tokens", fields.tokens), ("masks", fields.masks))
    )
    put("tokens", "i4", ids, len(ids))
    trained = marks == ids
    if bool(np.all(trained | (marks == NOT_TRAINED))):
        put("masks", "m1", np.packbits(trained), len(ids))
    else:
        put("masks", "i4", marks, len(marks))
    put("scores", "f8", float_row(fields.scores), len(fields.scores))
    for name in EXTRAS:
        if any(rows := fields.rows(name)):
            found = [len(row) if row else 0 for row in rows]
            if found != lengths:
                put(f"{name}.lengths", "u4", np.array(found, np.uint32), len(found))
            values = np.concatenate([float_row(row or []) for row in rows])
            with np.errstate(over="ignore"):
                short = values.astype(np.float32)
            exact = bool(np.array_equal(short, values))
            put(name, "f4" if exact else "f8", short if exact else values, len(values))
    rollout_ids, weights = read_rollouts(fields)
    if rollout_ids is not None:
        put("rollout_ids", "i4", rollout_ids, len(rollout_ids))
    if weights is not None:
        put("weights", "f8", weights, len(weights))
    rest = {name: value for name, value in fields.free().items() if value}
    return _blob(_Header(group.digest.hex()[:16], group.env_id, lengths, arrays, rest, group.unknown), blobs)


def pack_json(raw: bytes) -> bytes:
    """A group of a packed batch that is sent as JSON."""
    return _blob(_Header(json=True), [raw, b" " * (-len(raw) % 8)])


def _blob(header: _Header, blobs: list[bytes]) -> bytes:
    head = msgspec.json.encode(header)
    head += b" " * (-(_HEAD.size + len(head)) % 8)
    return b"".join([_HEAD.pack(_U32.size + len(head) + sum(map(len, blobs)), len(head)), head, *blobs])


def join_packed(groups: Iterable[bytes]) -> list[bytes]:
    """The parts of a batch's body, to be sent one after the other: nothing is encoded again."""
    parts = list(groups)
    return [MAGIC + _U32.pack(len(parts)) + b"\0\0\0\0", *parts]


def decode_packed(body: bytes) -> list[ScoredGroup]:
    """Groups of a packed batch, in the order of the server. ``raw`` is empty where there was no JSON. Raises
    ``AtroposProtocolError``: the body is cut off, or is no packed batch."""
    try:
        return [_decode_packed_group(part) for part in _split_packed(body)]
    except (struct.error, ValueError, KeyError, IndexError, TypeError, msgspec.DecodeError, Refusal) as error:
        reason = f"the packed batch of {len(body)} bytes cannot be read: {error}; is it cut off?"
        raise AtroposProtocolError(reason) from error


def _split_packed(body: bytes) -> Iterable[memoryview]:
    if body[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it begins {body[:8]!r}, not {MAGIC!r}")
    view = memoryview(body)
    (count,) = _U32.unpack_from(body, len(MAGIC))
    position = len(MAGIC) + 8
    for _ in range(count):
        (length,) = _U32.unpack_from(body, position)
        end = position + _U32.size + length
        if end > len(body):
            raise ValueError(f"a group ends at byte {end}")
        yield view[position + _U32.size : end]
        position = end
    if position != len(body):
        raise ValueError(f"{len(body) - position} bytes follow the last group")


def _decode_packed_group(part: memoryview) -> ScoredGroup:
    (head_length,) = _U32.unpack_from(part)
    header = _DECODE_HEADER.decode(part[_U32.size : _U32.size + head_length])
    data = part[_U32.size + head_length :]
    if header.json:
        return decode_group(bytes(data).rstrip(b" "))
    fields: dict[str, NDArray[Any]] = {
        name: np.frombuffer(data, _DTYPES[kind], -(-count // 8) if kind == "m1" else count, offset)
        for name, kind, offset, count in header.arrays
    }
    ids = fields["tokens"].astype(np.int64)
    if fields["masks"].dtype == _DTYPES["m1"]:
        trained = np.unpackbits(fields["masks"], count=len(ids)).view(np.bool_)
        marks: IntArray = np.where(trained, ids, NOT_TRAINED)
    else:
        marks = fields["masks"].astype(np.int64)
    extras: dict[str, Any] = {}
    for name in EXTRAS:
        if name in fields:
            own = fields.get(f"{name}.lengths")
            rows = _cut(fields[name].astype(np.float64), header.lengths if own is None else own.tolist())
            extras[name] = tuple([row if len(row) else None for row in rows])
    for name, kind in (("rollout_ids", np.int64), ("weights", np.float64)):
        if name in fields:
            extras[name] = fields[name].astype(kind)
    return ScoredGroup(
        token_ids=_cut(ids, header.lengths),
        masks=_cut(marks, header.lengths),
        scores=fields["scores"].astype(np.float64),
        **extras,
        **free_fields(header.rest),
        env_id=header.env_id,
        group_id=header.group_id,
        unknown_fields=header.unknown,
    )


def _cut(values: NDArray[Any], lengths: Sequence[int]) -> tuple[NDArray[Any], ...]:
    ends = list(accumulate(lengths))
    if ends and ends[-1] != len(values):
        raise ValueError(f"{len(values)} values for {ends[-1]} tokens")
    return tuple([values[end - length : end] for end, length in zip(ends, lengths, strict=True)])
