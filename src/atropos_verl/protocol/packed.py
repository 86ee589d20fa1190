"""The packed wire: groups as arrays, which a trainer takes as they are instead of parsing numbers out of text.

A client asks for it with ``Accept: application/vnd.atropos+packed, application/json``; a server that does not know it
answers in JSON. All integers are little-endian::

    batch   = "ATRPACK1" · u32 number of groups · groups
    group   = u32 length of what follows · u32 length of header · header (JSON) · padding · arrays
    header  = {"group_id", "env_id", "lengths": [T_g], "arrays": [[field, kind, offset, count]], "rest": {...}}

``offset`` counts bytes from the start of the arrays, which begin at the next multiple of 8 bytes of the group.
``lengths`` are the tokens of each sequence; an array holds the rows of its field one after the other. Kinds:

====== ==========================================================================================================
``i4``  32-bit integers: ``tokens``; ``masks`` when they are not what follows
``m1``  one bit per token, most significant first: 1 = ``masks`` repeats the token id, 0 = -100
``f4``  32-bit floats, when every value is one exactly (what inference engines compute); otherwise
``f8``  64-bit floats: ``scores``, ``advantages``, logprobs
``u4``  32-bit unsigned integers: ``FIELD.lengths``, the length of each row of FIELD where it differs from ``lengths``
====== ==========================================================================================================

``rest`` holds the fields that are no arrays (messages, overrides, images, …) in their JSON form; a field that is
absent or null is left out. ``group_id`` is that of the group's JSON, so a group has one name in both wires. A group
that does not fit (a field of an unexpected type, an unknown name) has ``"json": true`` and nothing else in its header;
its JSON follows, padded with spaces.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_verl.errors import AtroposProtocolError
from atropos_verl.protocol.schema import (
    EXTRAS,
    CheckedGroup,
    Refusal,
    ScoredData,
    float_row,
    free_fields,
    int_row,
)
from atropos_verl.types import NOT_TRAINED, FloatArray, IntArray, ScoredGroup

__all__ = ["MAGIC", "MEDIA_TYPE", "decode_packed", "join_packed", "pack_group"]

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


class _Header(msgspec.Struct, omit_defaults=True):
    group_id: str = ""
    env_id: int | None = None
    lengths: list[int] = []
    arrays: list[tuple[str, str, int, int]] = []
    rest: dict[str, Any] = {}
    json: bool = False


# --- encoding --------------------------------------------------------------------------------------------------------


def pack_group(group: CheckedGroup) -> bytes:
    """One group of the packed wire."""
    fields = group.fields
    if group.unknown or not _fits(fields):
        raw = group.complete()
        return _blob(_Header(json=True), [raw, b" " * (-len(raw) % 8)])
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
        rows = fields.rows(name)
        if any(rows):
            found = [len(row) if row else 0 for row in rows]
            if found != lengths:
                put(f"{name}.lengths", "u4", np.array(found, np.uint32), len(found))
            values = np.concatenate([float_row(row or []) for row in rows])
            with np.errstate(over="ignore"):
                short = values.astype(np.float32)
            exact = bool(np.array_equal(short, values))
            put(name, "f4" if exact else "f8", short if exact else values, len(values))
    rest = {name: value for name, value in fields.free().items() if value}
    return _blob(_Header(group.digest.hex()[:16], group.env_id, lengths, arrays, rest), blobs)


def _fits(fields: ScoredData) -> bool:
    """True when a reader of the arrays and ``rest`` finds what a reader of the JSON does."""
    try:
        free_fields(fields.free())
    except Refusal:
        return False
    return True


def _blob(header: _Header, blobs: list[bytes]) -> bytes:
    head = msgspec.json.encode(header)
    head += b" " * (-(_HEAD.size + len(head)) % 8)
    return b"".join([_HEAD.pack(_U32.size + len(head) + sum(map(len, blobs)), len(head)), head, *blobs])


def join_packed(groups: Iterable[bytes]) -> list[bytes]:
    """The parts of a batch's body, to be sent one after the other: nothing is encoded again."""
    parts = list(groups)
    return [MAGIC + _U32.pack(len(parts)) + b"\0\0\0\0", *parts]


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_packed(body: bytes, decode_json: Callable[[bytes], ScoredGroup]) -> list[ScoredGroup]:
    """Groups of a packed batch, in the order of the server. ``raw`` is empty where there was no JSON.

    Args:
        decode_json: decodes the groups that came as JSON (``wire.decode_group``).

    Raises:
        AtroposProtocolError: the body is cut off, or is no packed batch.
    """
    try:
        return [_decode_group(part, decode_json) for part in _split(body)]
    except (struct.error, ValueError, KeyError, IndexError, TypeError, msgspec.DecodeError, Refusal) as error:
        reason = f"the packed batch of {len(body)} bytes cannot be read: {error}; is it cut off?"
        raise AtroposProtocolError(reason) from error


def _split(body: bytes) -> Iterable[memoryview]:
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


def _decode_group(part: memoryview, decode_json: Callable[[bytes], ScoredGroup]) -> ScoredGroup:
    (head_length,) = _U32.unpack_from(part)
    header = _HEADERS.decode(part[_U32.size : _U32.size + head_length])
    data = part[_U32.size + head_length :]
    if header.json:
        return decode_json(bytes(data).rstrip(b" "))
    fields = {name: _array(data, kind, offset, count) for name, kind, offset, count in header.arrays}
    packed_masks = any(name == "masks" and kind == "m1" for name, kind, _, _ in header.arrays)
    ids = fields["tokens"].astype(np.int64)
    if packed_masks:
        trained = np.unpackbits(fields["masks"], count=len(ids)).view(np.bool_)
        marks: IntArray = np.where(trained, ids, NOT_TRAINED)
    else:
        marks = fields["masks"].astype(np.int64)
    extras: dict[str, Any] = {name: _float_rows(fields, name, header.lengths) for name in EXTRAS}
    return ScoredGroup(
        token_ids=_rows(ids, header.lengths),
        masks=_rows(marks, header.lengths),
        scores=fields["scores"].astype(np.float64),
        **extras,
        **free_fields(header.rest),
        env_id=header.env_id,
        group_id=header.group_id,
    )


def _array(data: memoryview, kind: str, offset: int, count: int) -> NDArray[Any]:
    stored = -(-count // 8) if kind == "m1" else count
    found: NDArray[Any] = np.frombuffer(data, _DTYPES[kind], stored, offset)
    return found


def _rows(values: NDArray[Any], lengths: Sequence[int]) -> tuple[NDArray[Any], ...]:
    ends = list(accumulate(lengths))
    if ends and ends[-1] != len(values):
        raise ValueError(f"{len(values)} values for {ends[-1]} tokens")
    return tuple([values[end - length : end] for end, length in zip(ends, lengths, strict=True)])


def _float_rows(
    fields: Mapping[str, NDArray[Any]], name: str, lengths: Sequence[int]
) -> tuple[FloatArray | None, ...] | None:
    values = fields.get(name)
    if values is None:
        return None
    own = fields.get(f"{name}.lengths")
    rows = _rows(values.astype(np.float64), lengths if own is None else own.tolist())
    return tuple([row if len(row) else None for row in rows])


_HEADERS = msgspec.json.Decoder(_Header)
