"""What is wrong with a posted group, found once, at the door: field, sequence, index and value.

A typed msgspec decoder reads the fields that training needs, and refuses NaN, Infinity and numbers out of range. What
it refuses is read again with Python's ``json``, which either finds what the fast reader is too strict for (5.0 as a
token id, lone surrogates in a message), or names the place. Fields and types are those of upstream's ``ScoredData``
(``atroposlib/api/server.py``, atroposlib 0.4.0).

Lengths of per-token extras (``advantages``, logprobs) are checked for groups that name their environment. Upstream's
own tests post anonymous ones that do not fit, and expect 200: those are taken, and our trainer quarantines them.
``masks`` need not repeat the token ids for the same reason.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NoReturn

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["CheckedGroup", "Fields", "KnownFields", "Refusal", "check_group", "split_list"]

_EXTRAS = ("advantages", "ref_logprobs", "inference_logprobs")
_MAX_TOKEN = 2**31 - 1

_Rows = list[list[float] | dict[str, Any] | None] | dict[str, Any] | None


class Fields(msgspec.Struct):
    """``ScoredData``. Free-form fields are only checked to be JSON; ``[]`` and ``{}`` mean absent."""

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float]
    advantages: _Rows | msgspec.UnsetType = msgspec.UNSET
    ref_logprobs: _Rows | msgspec.UnsetType = msgspec.UNSET
    messages: Any | msgspec.UnsetType = msgspec.UNSET
    generation_params: Any | msgspec.UnsetType = msgspec.UNSET
    inference_logprobs: _Rows | msgspec.UnsetType = msgspec.UNSET
    overrides: Any | msgspec.UnsetType = msgspec.UNSET
    group_overrides: Any | msgspec.UnsetType = msgspec.UNSET
    images: Any | msgspec.UnsetType = msgspec.UNSET
    env_id: int | msgspec.UnsetType | None = msgspec.UNSET
    distill_token_ids: Any | msgspec.UnsetType = msgspec.UNSET
    distill_logprobs: Any | msgspec.UnsetType = msgspec.UNSET


class KnownFields(Fields, kw_only=True, forbid_unknown_fields=True):
    """Refuses unknown names: their values would be skipped unchecked, so Python's ``json`` has to read them."""


@lru_cache(maxsize=16)
def _decoder(vocab_size: int | None) -> msgspec.json.Decoder[Fields]:
    """Reads and checks at once, ranges of token ids included: a second pass over them took a fifth of a POST."""
    token = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN if vocab_size is None else vocab_size - 1)]
    mask = Annotated[int, msgspec.Meta(ge=-_MAX_TOKEN - 1, le=_MAX_TOKEN)]
    rows: list[tuple[str, Any]] = [("tokens", list[list[token]]), ("masks", list[list[mask]])]
    bounded = msgspec.defstruct("KnownFields", rows, bases=(KnownFields,), kw_only=True, forbid_unknown_fields=True)
    return msgspec.json.Decoder(bounded)


@dataclass(slots=True)
class CheckedGroup:
    """A group that may be stored."""

    raw: bytes
    """As received."""
    suffix: bytes
    """Replaces the closing brace of ``raw`` so that every key is there, absent ones as null; empty: nothing is absent.
    (Upstream's server adds them, and trainers written for it read them.)"""
    env_id: int | None
    size: int
    tokens: int
    digest: bytes
    """SHA-256 of its JSON with every key, truncated."""
    fields: Fields

    def complete(self) -> bytes:
        """Its JSON with every key: what trainers get."""
        return self.raw[:-1] + self.suffix if self.suffix else self.raw

    def arrays(self) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
        """``tokens`` and ``masks``, [G][T_g] each. (``array`` reads a list of ints faster than numpy does.)"""
        tokens, masks = self.fields.tokens, self.fields.masks
        return _int32(tokens), _int32(masks)


class Refusal(Exception):  # noqa: N818 - a verdict on the sender's data, not an error of this program
    """Why a group is refused; ``reason`` is a short code for the counters."""

    def __init__(
        self,
        reason: str,
        message: str,
        field: str = "",
        sequence: int | None = None,
        index: int | None = None,
        value: Any = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.sequence = sequence
        self.index = index
        self.value = value
        self.group: int | None = None
        """Index in a posted list."""
        self.env_id: int | None = None
        """Who sent it, when that could be read."""

    def as_fields(self) -> dict[str, Any]:
        """FastAPI's shape of a 422, and the parts by name."""
        place = [part for part in (self.group, self.field or None, self.sequence, self.index) if part is not None]
        named = {"group": self.group, "field": self.field, "sequence": self.sequence, "index": self.index}
        return {
            "detail": [{"type": self.reason, "loc": ["body", *place], "msg": self.message}],
            "message": self.message,
            "reason": self.reason,
            **{name: value for name, value in named.items() if value not in (None, "")},
            "value": _shown(self.value),
        }


def check_group(
    raw: bytes, *, vocab_size: int | None = None, environments: int | None = None, strict: bool = False
) -> CheckedGroup:
    """Decode and check one ``ScoredData`` object.

    Args:
        vocab_size: token ids must be below it.
        environments: ``env_id`` must be below it; None: not checked.
        strict: check the lengths of per-token extras of anonymous groups, too.

    Raises:
        Refusal: it cannot be stored.
    """
    raw = raw.strip(b" \t\r\n")
    try:
        fields, in_range = _decoder(vocab_size).decode(raw), True
        if not raw.isascii():
            raw.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        (raw, fields), in_range = _read_again(raw, error), False
    env_id = fields.env_id if isinstance(fields.env_id, int) else None
    try:
        _check_shape(fields, strict=strict or env_id is not None)
        if not in_range:
            _check_ranges(fields, vocab_size)
        _check_messages(fields.messages)
    except Refusal as refusal:
        refusal.env_id = env_id
        raise
    if env_id is not None and environments is not None and not 0 <= env_id < environments:
        known = f"0 to {environments - 1}" if environments else "none is registered"
        message = f"env_id = {env_id} is not a registered environment ({known}); POST /register-env first"
        raise Refusal("unknown_env", message, "env_id", value=env_id)
    tokens = sum(map(len, fields.tokens))
    suffix = _suffix(fields)
    digest = _digest(raw, suffix)
    return CheckedGroup(raw, suffix, env_id, len(fields.tokens), tokens, digest, fields)


def split_list(body: bytes) -> list[bytes]:
    """The groups of a ``/scored_data_list`` body, undecoded.

    Raises:
        Refusal: it is not a JSON list.
    """
    try:
        return [bytes(part) for part in _DECODE_LIST.decode(body)]
    except (msgspec.DecodeError, RecursionError) as error:
        fast = error
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal("malformed_json", f"the body is not JSON: {error}") from None
    if not isinstance(found, list):
        raise Refusal("type", f"the body is not a list of groups ({fast})")
    return [json.dumps(entry).encode() for entry in found]


# --- shape -----------------------------------------------------------------------------------------------------------


def _check_shape(fields: Fields, *, strict: bool) -> None:
    size = len(fields.tokens)
    if size == 0:
        raise Refusal("empty", "tokens is empty: a group has at least one sequence", "tokens", value=[])
    for name, rows in (("masks", fields.masks), ("scores", fields.scores)):
        if len(rows) != size:
            raise Refusal("length", f"{name} has {len(rows)} entries, but tokens has {size}", name, value=len(rows))
    for sequence, (tokens, mask) in enumerate(zip(fields.tokens, fields.masks, strict=True)):
        if not tokens:
            raise Refusal("empty", f"tokens[{sequence}] is empty", "tokens", sequence, value=[])
        if len(mask) != len(tokens):
            message = f"masks[{sequence}] has {len(mask)} entries, but tokens[{sequence}] has {len(tokens)}"
            raise Refusal("length", message, "masks", sequence, value=len(mask))
    for name in _EXTRAS:
        _check_extra(name, getattr(fields, name), fields.tokens, strict=strict)
    if strict and isinstance(fields.overrides, list) and fields.overrides and len(fields.overrides) != size:
        found = len(fields.overrides)
        raise Refusal("length", f"overrides has {found} entries, but tokens has {size}", "overrides", value=found)


def _check_extra(name: str, rows: Any, tokens: list[list[int]], *, strict: bool) -> None:
    if not rows or rows is msgspec.UNSET:
        return
    if isinstance(rows, dict):
        raise Refusal("type", f"{name} is an object, not a list of lists", name, value=rows)
    for sequence, row in enumerate(rows):
        if isinstance(row, dict) and row:
            raise Refusal("type", f"{name}[{sequence}] is an object, not a list", name, sequence, value=row)
        if strict and row and sequence < len(tokens) and len(row) != len(tokens[sequence]):
            message = f"{name}[{sequence}] has {len(row)} entries, but tokens[{sequence}] has {len(tokens[sequence])}"
            raise Refusal("length", message, name, sequence, value=len(row))
    if strict and len(rows) != len(tokens):
        raise Refusal("length", f"{name} has {len(rows)} entries, but tokens has {len(tokens)}", name, value=len(rows))


def _check_ranges(fields: Fields, vocab_size: int | None) -> None:
    """All ``tokens`` in the vocabulary, all ``masks`` -100 or something like a token id."""
    limit = _MAX_TOKEN + 1 if vocab_size is None else vocab_size
    of = f"of the vocabulary (0 to {limit - 1})" if vocab_size is not None else "of any vocabulary"
    for sequence, row in enumerate(fields.tokens):
        for index, token in enumerate(row):
            if not 0 <= token < limit:
                message = f"tokens[{sequence}][{index}] = {token} is out {of}"
                raise Refusal("vocabulary", message, "tokens", sequence, index, token)
    for sequence, row in enumerate(fields.masks):
        for index, entry in enumerate(row):
            if not -_MAX_TOKEN - 1 <= entry <= _MAX_TOKEN:
                message = f"masks[{sequence}][{index}] = {entry} is neither -100 nor a token id"
                raise Refusal("vocabulary", message, "masks", sequence, index, entry)


def _int32(rows: list[list[int]]) -> list[NDArray[np.int32]]:
    return [np.frombuffer(array("i", row), np.int32) for row in rows]


def _name_first_bad(name: str, sequence: int | None, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if isinstance(value, float) and not math.isfinite(value):
            place = f"{name}[{index}]" if sequence is None else f"{name}[{sequence}][{index}]"
            text = f"{place} = {value} is not finite"
            if sequence is None:
                raise Refusal("not_finite", text, name, index, value=value)
            raise Refusal("not_finite", text, name, sequence, index, value)


def _check_messages(messages: Any) -> None:
    if not messages or messages is msgspec.UNSET:
        return
    if not isinstance(messages, list):
        raise Refusal("type", "messages is not a list of lists of messages", "messages", value=messages)
    for sequence, conversation in enumerate(messages):
        if conversation is None:
            continue
        if not isinstance(conversation, list):
            raise Refusal("type", f"messages[{sequence}] is not a list", "messages", sequence, value=conversation)
        for index, message in enumerate(conversation):
            if not (isinstance(message, dict) and "role" in message and "content" in message):
                text = f"messages[{sequence}][{index}]: Message must have 'role' and 'content' fields"
                raise Refusal("message", text, "messages", sequence, index, message)


def _digest(raw: bytes, suffix: bytes) -> bytes:
    """Of the JSON that trainers get, so that either wire names the group alike; see ``api.wire.decode_group``."""
    hashed = xxhash.xxh3_128(memoryview(raw)[:-1] if suffix else raw)
    hashed.update(suffix)
    return hashed.digest()


def _suffix(fields: Fields) -> bytes:
    absent = tuple([name for name in Fields.__struct_fields__ if getattr(fields, name) is msgspec.UNSET])
    return _suffix_of(absent) if absent else b""


@lru_cache(maxsize=256)
def _suffix_of(absent: tuple[str, ...]) -> bytes:
    """One object for all groups that lack the same keys."""
    return "".join([f',"{name}":null' for name in absent]).encode() + b"}"


# --- the second reader -----------------------------------------------------------------------------------------------


def _read_again(raw: bytes, why: Exception) -> tuple[bytes, Fields]:
    """What the fast reader is too strict for, as JSON it reads; or a ``Refusal`` that names the place."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name.replace("Infinity", "inf"))

    try:
        found = json.loads(raw, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise Refusal("encoding", f"the group is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise Refusal("malformed_json", "the group is nested too deeply") from None
    except ValueError as error:
        raise Refusal("malformed_json", f"the group is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refusal("type", f"a group is a JSON object, not {type(found).__name__}", value=found)
    _name_not_finite(found)
    if constants:
        raise Refusal("not_finite", f"{constants[0]} is not JSON; a trainer could not read the batch")
    changed = _integers(found, "tokens") | _integers(found, "masks")
    try:
        # Re-encoded only when it had to be changed: what was received stays as it was.
        text = json.dumps(found).encode() if changed else raw
        return text, _DECODE_ANY.decode(json.dumps(_without_surrogates(found)).encode())
    except RecursionError:
        raise Refusal("malformed_json", "the group is nested too deeply") from None
    except msgspec.DecodeError as error:
        _name_place(found, str(error))
        raise Refusal("type", str(error)) from why


def _name_not_finite(found: dict[str, Any]) -> None:
    for name in ("scores", *_EXTRAS):
        rows = found.get(name)
        if not isinstance(rows, list):
            continue
        _name_first_bad(name, None, rows)
        for sequence, row in enumerate(rows):
            if isinstance(row, list):
                _name_first_bad(name, sequence, row)


def _integers(found: dict[str, Any], name: str) -> bool:
    """Make 5.0 and True integers, as upstream's server does. True when anything was changed."""
    rows = found.get(name)
    changed = False
    for row in rows if isinstance(rows, list) else ():
        for index, value in enumerate(row if isinstance(row, list) else ()):
            if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
                row[index] = int(value)
                changed = True
    return changed


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return value if value and isinstance(value[0], int | float) else [_without_surrogates(entry) for entry in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(entry) for key, entry in value.items()}
    return value


_PATH = re.compile(r"`\$((?:\.\w+|\[\d+\]|\[\.\.\.\])*)`")


def _name_place(found: dict[str, Any], message: str) -> NoReturn:
    """A ``Refusal`` from msgspec's message (``Expected `int`, got `str` - at `$.tokens[0][1]```)."""
    match = _PATH.search(message)
    parts = re.findall(r"\w+", match.group(1)) if match else []
    field = parts[0] if parts and not parts[0].isdigit() else ""
    numbers = [int(part) for part in parts[1:] if part.isdigit()]
    if not field:
        missing = re.search(r"required field `(\w+)`", message)
        field = missing.group(1) if missing else ""
        raise Refusal("missing" if missing else "type", message, field)
    value: Any = found.get(field)
    for number in numbers:
        value = value[number] if isinstance(value, list) and number < len(value) else None
    place = field + "".join([f"[{number}]" for number in numbers])
    text = f"{place} = {_shown(value)!r}: {message.split(' - at')[0]}"
    sequence, position = [*numbers, None, None][:2]
    raise Refusal("type", text, field, sequence, position, value)


def _shown(value: Any) -> Any:
    """A value short enough, and JSON enough, for an answer."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**63 and math.isfinite(value) else str(value)
    return str(value)[:100].encode("utf-8", "replace").decode()


_DECODE_ANY = msgspec.json.Decoder(Fields)
_DECODE_LIST = msgspec.json.Decoder(list[msgspec.Raw])
