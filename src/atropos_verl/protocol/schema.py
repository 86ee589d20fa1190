"""``ScoredData``, the group of scored sequences that an environment posts: its fields, and the one validator.

Field names and types are those of upstream's ``ScoredData`` (``atroposlib/api/server.py``, atroposlib 0.4.0). Each side
of the wire validates a group once: the server when it is posted (``check_group``), the trainer when it is decoded
(``validated``). The server lets in what upstream's own tests post: extras of another length in an anonymous group, and
masks that do not repeat the token ids. The trainer quarantines both.

A typed msgspec decoder reads a group. What it refuses (NaN, lone surrogates, a wrong type) is read again with Python's
``json``: numbers are converted as upstream's server does, and the place of what is left is found."""

import contextlib
import json
import logging
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from operator import getitem
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from atropos_verl.errors import UnsupportedFieldError
from atropos_verl.types import GREEDY_BELOW, NO_LOGPROB, NOT_TRAINED, FloatArray, IntArray, ScoredGroup

logger = logging.getLogger(__name__)

TOO_DEEP = "group: nested too deeply to be read"
_MAX_DEPTH = 64
"""Lists and objects inside each other in a field that is free: readers of a batch have a limit, too."""
LOGPROB_TOLERANCE = 1e-6
"""Engines that round in float32 report logprobs a hair above 0; those are read as 0."""
_MASS_TOLERANCE = 0.01
"""Of a teacher's probabilities, which an engine in bf16 may have summed up to a little more than 1."""
MAX_MAGNITUDE = 1e30
"""Scores and advantages beyond this overflow float32, in which the loss is computed."""
_SHOWN = 80  # characters of a value in a reason

_MAX_TOKEN = 2**31 - 1
_Empty: TypeAlias = Annotated[dict[str, Any], msgspec.Meta(max_length=0)]
_Rows: TypeAlias = list[list[float] | _Empty | None] | _Empty | msgspec.UnsetType | None
_Free: TypeAlias = Any | msgspec.UnsetType
_TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN)]
_Logprob: TypeAlias = Annotated[float, msgspec.Meta(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
_TeacherIds: TypeAlias = list[list[list[_TokenId] | _Empty | None] | _Empty | None]
_TeacherLogprobs: TypeAlias = list[list[list[_Logprob] | _Empty | None] | _Empty | None]


class ScoredData(msgspec.Struct, kw_only=True):
    """A group as JSON. UNSET, null, ``[]`` and ``{}`` all mean that a field is absent."""

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float]
    advantages: _Rows = msgspec.UNSET
    ref_logprobs: _Rows = msgspec.UNSET
    messages: _Free = msgspec.UNSET
    generation_params: _Free = msgspec.UNSET
    inference_logprobs: _Rows = msgspec.UNSET
    overrides: _Free = msgspec.UNSET
    group_overrides: _Free = msgspec.UNSET
    images: _Free = msgspec.UNSET
    env_id: int | msgspec.UnsetType | None = msgspec.UNSET
    distill_token_ids: _TeacherIds | _Empty | msgspec.UnsetType | None = msgspec.UNSET
    distill_logprobs: _TeacherLogprobs | _Empty | msgspec.UnsetType | None = msgspec.UNSET
    # Ours. Per sequence: which rollout it is a row of, and its factor in the loss.
    rollout_ids: list[int] | _Empty | msgspec.UnsetType | None = msgspec.UNSET
    weights: list[float] | _Empty | msgspec.UnsetType | None = msgspec.UNSET

    def rows(self, name: str) -> list[list[float] | None]:
        """The rows of one of ``EXTRAS``, None for an absent one; none for an absent field."""
        found = getattr(self, name)
        return [row or None for row in found] if isinstance(found, list) else []

    def free(self) -> dict[str, Any]:
        """The ``FREE_FIELDS`` that were sent."""
        return {name: value for name in FREE_FIELDS if (value := getattr(self, name)) is not msgspec.UNSET}


FIELD_NAMES = frozenset(ScoredData.__struct_fields__)
EXTRAS = ("advantages", "ref_logprobs", "inference_logprobs")  # fields with a float per token
TEACHER = ("distill_token_ids", "distill_logprobs")
"""Fields with a row of ids, and of their logprobs, per token."""
_OURS = ("rollout_ids", "weights")
"""Fields that upstream does not have: where they are absent, nobody looks for a null."""
FREE_FIELDS = tuple(sorted(FIELD_NAMES - {"tokens", "masks", "scores", "env_id", *EXTRAS, *_OURS}))
"""Fields that are no numbers per sequence or per token: those that are packed as JSON."""

_WORDS = {"array": "a list", "int": "an integer", "float": "a number"}
"""msgspec's names of types."""
_NUMBERS = {
    **dict.fromkeys(("tokens", "masks", "env_id", "rollout_ids"), int),
    **dict.fromkeys(("scores", "weights", *EXTRAS), float),
}
_WARNED: set[str] = set()  # unknown names that were logged


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 - a verdict on the sender's data, not an error of this program
    """Says why a group is refused."""

    reason: str  # a short code for the counters
    message: str
    field: str = ""
    sequence: int | None = None
    index: int | None = None
    value: Any = None
    group: int | None = None  # index in a posted list
    env_id: int | None = None  # the sender, when that could be read

    def __str__(self) -> str:
        return self.message

    def as_fields(self) -> dict[str, Any]:
        """FastAPI's shape of a 422, and the parts by name."""
        named = {"group": self.group, "field": self.field, "sequence": self.sequence, "index": self.index}
        place = {name: value for name, value in named.items() if value not in (None, "")}
        detail = {"type": self.reason, "loc": ["body", *place.values()], "msg": self.message}
        about = {"message": self.message, "reason": self.reason, "value": json_value(self.value)}
        return {"detail": [detail], **about, **place}


@dataclass(slots=True)
class CheckedGroup:
    """A group that may be stored."""

    raw: bytes  # as received
    suffix: bytes
    """Replaces the closing brace of ``raw``, unless empty, so that every key is there, absent ones as null. (Upstream's
    server adds them, and trainers written for it read them.)"""
    env_id: int | None
    size: int  # rollouts: sequences, or fewer where several are rows of one
    tokens: int
    digest: bytes
    """XXH3-128 of its JSON with every key, so that either wire gives the group one name (``wire.decode_group``)."""
    fields: ScoredData | None  # None once nobody needs them any more
    unknown: tuple[str, ...] = ()  # names of fields that this version does not know
    packed: bytes | None = None  # its binary form (``wire.pack_group``), where it was made already
    glimpse: dict[str, Any] = field(default_factory=dict)  # what the server's live page shows

    @property
    def decoded(self) -> ScoredData:
        assert self.fields is not None
        return self.fields


class SlowPathError(Exception):
    """Only Python's reader can tell what is wrong, or take it."""


def check_group(
    raw: bytes,
    *,
    vocab_size: int | None = None,
    environments: int | None = None,
    strict: bool = False,
    quick: bool = False,
) -> CheckedGroup:
    """Decode and check one ``ScoredData`` object. Raises ``Refusal`` where it cannot be stored. ``vocab_size``: token
    ids must be below it; ``environments``: ``env_id`` must be; ``strict``: check the lengths of extras of anonymous
    groups, too; ``quick``: raise ``SlowPathError`` instead of reading it a second time."""
    raw = raw.strip(b" \t\r\n")
    is_slow = False
    try:
        if not raw.isascii():
            _as_text(raw)
        fields, unknown = read_fields(raw, _decoder(vocab_size, forbid=True), _decoder(vocab_size, forbid=False))
    except (msgspec.DecodeError, RecursionError):
        if quick:
            raise SlowPathError from None
        try:
            raw, fields, unknown = _read_again(raw)
        except RecursionError:
            raise Refusal("malformed_json", TOO_DEEP) from None
        is_slow = True
    env_id = fields.env_id if isinstance(fields.env_id, int) else None
    strict = strict or env_id is not None
    sent = fields.free()
    _check_depth(sent)
    free = free_fields(sent)
    extras = {name: fields.rows(name) for name in EXTRAS} if strict else {}
    if strict and isinstance(fields.overrides, list):
        extras["overrides"] = fields.overrides
    _check_lengths(fields.tokens, fields.masks, fields.scores, {name: row for name, row in extras.items() if row})
    if strict:
        _check_teacher(fields.tokens, free[TEACHER[0]], free[TEACHER[1]], vocab_size)
    if is_slow:  # which leaves the ranges to us
        for sequence, (tokens, masks) in enumerate(zip(fields.tokens, fields.masks, strict=True)):
            _check_ids(int_row(tokens, "i", "tokens", sequence), sequence, vocab_size)
            int_row(masks, "i", "masks", sequence)
    rollout_ids, _ = read_rollouts(fields)
    _check_messages(fields.messages)
    if env_id is not None and environments is not None and not 0 <= env_id < environments:
        known = f"0 to {environments - 1}" if environments else "none is registered"
        message = f"env_id = {_show(env_id)} is not a registered environment ({known}); POST /register-env first"
        raise Refusal("unknown_env", message, "env_id", value=env_id)
    absent = [name for name in ScoredData.__struct_fields__ if getattr(fields, name) is msgspec.UNSET]
    suffix = _suffix(tuple([name for name in absent if name not in _OURS]))
    digest = xxhash.xxh3_128(memoryview(raw)[:-1] if suffix else raw)
    digest.update(suffix)
    tokens_in_all = sum(map(len, fields.tokens))
    size = len(fields.tokens) if rollout_ids is None else int(rollout_ids.max()) + 1
    return CheckedGroup(raw, suffix, env_id, size, tokens_in_all, digest.digest(), fields, unknown)


def split_list(body: bytes, *, quick: bool = False) -> list[bytes]:
    """The groups of a ``/scored_data_list`` body, undecoded. Raises as ``check_group``."""
    try:
        return [bytes(part) for part in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, RecursionError) as error:
        if quick:
            raise SlowPathError from None
        why = error
    try:
        found = json.loads(_as_text(body))
        if not isinstance(found, list):
            raise Refusal("type", f"the body is not a list of groups ({why})")
        return [json.dumps(entry).encode() for entry in found]
    except (ValueError, RecursionError) as error:
        raise Refusal("malformed_json", f"the body is not JSON: {error}") from None


def _as_text(raw: bytes) -> str:
    """Strictly UTF-8 without a mark: a batch joins the groups as they came. Raises ``Refusal``."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Refusal("encoding", f"group: not UTF-8 (byte {error.start})") from None
    if text[:1] == "\ufeff":
        raise Refusal("encoding", "group: it begins with a byte order mark; send UTF-8 without one")
    return text


def _check_depth(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        level, nesting = [value] if isinstance(value, dict | list) else [], (dict, list)
        for _ in range(_MAX_DEPTH):
            children = (found.values() if isinstance(found, dict) else found for found in level)
            level = [child for found in children for child in found if isinstance(child, nesting)]
        if level:
            text = f"{_cut(name)}: nested too deeply to be read (lists and objects in more than {_MAX_DEPTH} others)"
            raise Refusal("malformed_json", text, _cut(name))


@lru_cache(maxsize=16)
def _decoder(vocab_size: int | None, *, forbid: bool) -> msgspec.json.Decoder[ScoredData]:
    """Reads and checks at once, ranges of token ids included: a second pass over them took a fifth of a POST."""
    token = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN if vocab_size is None else vocab_size - 1)]
    mask = Annotated[int, msgspec.Meta(ge=-_MAX_TOKEN - 1, le=_MAX_TOKEN)]
    rows: list[tuple[str, Any]] = [("tokens", list[list[token]]), ("masks", list[list[mask]])]
    bounded = msgspec.defstruct("ScoredData", rows, bases=(ScoredData,), kw_only=True, forbid_unknown_fields=forbid)
    return msgspec.json.Decoder(bounded)


@lru_cache(maxsize=256)
def _suffix(absent: tuple[str, ...]) -> bytes:
    """One object for all groups that lack the same keys."""
    return "".join([f',"{name}":null' for name in absent]).encode() + b"}" if absent else b""


def _check_messages(messages: Any) -> None:
    if not messages or messages is msgspec.UNSET:
        return
    if not isinstance(messages, list):
        raise Refusal("type", "messages is not a list of lists of messages", "messages", value=messages)
    for sequence, conversation in enumerate(messages):
        if conversation is not None and not isinstance(conversation, list):
            raise Refusal("type", f"messages[{sequence}] is not a list", "messages", sequence, value=conversation)
        for index, message in enumerate(conversation or ()):
            if not (isinstance(message, dict) and "role" in message and "content" in message):
                text = f"messages[{sequence}][{index}]: Message must have 'role' and 'content' fields"
                raise Refusal("message", text, "messages", sequence, index, message)


def _read_again(raw: bytes) -> tuple[bytes, ScoredData, tuple[str, ...]]:
    """The JSON to store, its fields, and the names of unknown ones. Raises ``Refusal`` with the place."""
    constants: list[str] = []
    found = parse_object(raw, constants)
    for name in found.keys() & _NUMBERS.keys():
        found[name] = _converted(found[name], _NUMBERS[name])
    # A lone surrogate, which neither UTF-8 nor msgspec can hold, becomes a question mark.
    fields = to_fields(json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")))
    _check_floats(np.array(fields.scores), "scores", None, sys.float_info.max)
    for name in EXTRAS:
        for sequence, row in enumerate(fields.rows(name)):
            _check_floats(np.array(row or ()), name, sequence, sys.float_info.max)
    unknown = unknown_fields(found)
    _check_depth({name: found[name] for name in unknown})
    if constants:
        raise Refusal("not_finite", f"group: {constants[0]} is not JSON; a trainer could not read the batch")
    return json.dumps(found).encode(), fields, unknown


def parse_object(raw: bytes, constants: list[str] | None = None) -> dict[str, Any]:
    """A JSON object as Python's ``json`` reads it. Names like ``NaN`` are added to ``constants``. Raises ``Refusal``
    where it is none, ``RecursionError`` where it is nested too deeply."""

    def constant(name: str) -> float:
        if constants is not None:
            constants.append(name)
        return float(name.replace("Infinity", "inf"))

    try:
        found = json.loads(_as_text(raw), parse_constant=constant)
    except ValueError as error:  # also an integer of more than 4300 digits
        raise Refusal("malformed_json", f"group: not JSON ({_cut(str(error))})") from None
    if not isinstance(found, dict):
        raise Refusal("type", f"group: expected an object, got {_show(found)}", value=found)
    return found


def to_fields(found: Mapping[str, Any]) -> ScoredData:
    """The known fields of a JSON object. Raises ``Refusal`` with the place of a wrong type."""
    missing = next((name for name in ("tokens", "masks", "scores") if name not in found), None)
    if missing is not None:
        raise Refusal("missing", f"{missing}: the field is missing", missing)
    known = {name: value for name, value in found.items() if name in FIELD_NAMES}
    try:
        return msgspec.convert(known, ScoredData)
    except msgspec.ValidationError as error:
        message = str(error)
    # msgspec says: Expected `int`, got `str` - at `$.tokens[0][1]`
    path = message.rpartition("`$.")[2]
    field = path.partition("[")[0].rstrip("`")
    numbers = [int(number) for number in re.findall(r"\[(\d+)\]", path)]
    value = reduce(getitem, numbers, found[field])
    problem = "too large for a 64-bit float"
    if "out of range" not in message:
        kinds = re.findall(r"\w+", message.partition(",")[0].partition("`")[2])
        problem = f"expected {next((_WORDS[kind] for kind in kinds if kind in _WORDS), 'a list')}"
        problem += " of at least 0" if ">= 0" in message else ""
    place = field + "".join([f"[{number}]" for number in numbers])
    sequence, index = [*numbers, None, None][:2]
    raise Refusal("type", f"{place} = {_show(value)}: {problem}", field, sequence, index, value)


Decoder: TypeAlias = msgspec.json.Decoder[ScoredData]


def read_fields(raw: bytes, forbidding: Decoder, tolerant: Decoder) -> tuple[ScoredData, tuple[str, ...]]:
    """The fields of a group, and the unknown names that hold something. Only ``forbidding`` refuses such. Raises
    ``msgspec.DecodeError`` or ``RecursionError`` (it is no group), ``Refusal`` (an unknown field is nested too
    deeply)."""
    try:
        return forbidding.decode(raw), ()
    except msgspec.ValidationError as error:
        if not str(error).startswith("Object contains unknown field"):
            raise
    values = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    unknown = {name: msgspec.json.decode(values[name]) for name in values.keys() - FIELD_NAMES}
    _check_depth(unknown)
    return tolerant.decode(raw), unknown_fields(unknown)


def unknown_fields(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that ``ScoredData`` does not know and that hold something."""
    return tuple(sorted(name for name in found if name not in FIELD_NAMES and found[name] not in (None, [], {})))


def _converted(found: Any, kind: type) -> Any:
    """The numbers that pydantic makes of values and of lists of them at upstream's server: true is 1, "5" and 5.0 are
    5. What is none stays, to be refused with its place."""
    if isinstance(found, list):
        return [_converted(entry, kind) for entry in found]
    if isinstance(found, bool | str) or (kind is int and isinstance(found, float) and found.is_integer()):
        with contextlib.suppress(ValueError):
            return kind(found)
    return found


def int_row(row: list[int], typecode: Literal["i", "q"], field: str, sequence: int) -> NDArray[Any]:
    """Integers as an array of 32 (``i``) or 64 bits (``q``). ``array`` reads a list faster than numpy (20 ns a token,
    35), and checks the range. Raises ``Refusal`` for what does not fit."""
    bits, dtype = (32, np.int32) if typecode == "i" else (64, np.int64)
    try:
        return np.frombuffer(array(typecode, row), dtype) if row else np.zeros(0, dtype)
    except OverflowError:
        index = next(i for i, value in enumerate(row) if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1))
        message = f"{field}[{sequence}][{index}] = {_show(row[index])}: does not fit in {bits} bits"
        raise Refusal("vocabulary", message, field, sequence, index, row[index]) from None


def float_row(row: list[float]) -> FloatArray:
    """[T]. ``fromiter`` takes two thirds of the time of ``np.array``."""
    return np.fromiter(row, np.float64, len(row))


def free_fields(found: Mapping[str, Any]) -> dict[str, Any]:
    """``FREE_FIELDS`` as ``ScoredGroup`` holds them, absent ones as None. Raises ``Refusal`` for a wrong type."""
    overrides = found.get("overrides")
    if not isinstance(overrides, list) and overrides not in (None, {}):
        raise Refusal("type", f"overrides = {_show(overrides)}: expected a list", "overrides", value=overrides)
    entries = tuple([_object(entry, f"overrides[{i}]") or {} for i, entry in enumerate(overrides or ())])
    objects = {name: _object(found.get(name), name) for name in ("group_overrides", "generation_params")}
    present = {name: None if _is_empty(found.get(name)) else found[name] for name in ("messages", "images")}
    rows = {name: _teacher_rows(name, found.get(name)) for name in TEACHER}
    return {"overrides": entries if any(entries) else None, **objects, **present, **rows}


def _teacher_rows(name: str, value: Any) -> tuple[NDArray[Any] | None, ...] | None:
    """[G][T, K] of a field of ``TEACHER``; shorter rows are filled up with id -1, logprob -inf."""
    if _is_empty(value):
        return None
    found: list[NDArray[Any] | None] = []
    for sequence in value:
        rows = [row or () for row in sequence or ()]
        lengths = np.array([len(row) for row in rows], np.int64)
        shape = len(rows), int(lengths.max(initial=0))
        filled = np.full(shape, -1, np.int64) if name == TEACHER[0] else np.full(shape, -np.inf)
        filled[np.arange(shape[1]) < lengths[:, None]] = [entry for row in rows for entry in row]
        found.append(filled if filled.size else None)
    return tuple(found)


def _object(value: Any, where: str) -> dict[str, Any] | None:
    if value in (None, [], {}):
        return None
    if not isinstance(value, dict):
        raise Refusal("type", f"{where} = {_show(value)}: expected an object", where.partition("[")[0], value=value)
    return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_empty(entry) for entry in value)
    return value is None or value == {}


def read_rollouts(fields: ScoredData) -> tuple[IntArray | None, FloatArray | None]:
    """``rollout_ids`` and ``weights`` as ``ScoredGroup`` holds them. Raises ``Refusal``: not one of each per sequence,
    two scores of one rollout, a weight below 0."""
    ids, weights = fields.rollout_ids or None, fields.weights or None
    for name, row in (("rollout_ids", ids), ("weights", weights)):
        if isinstance(row, list):
            _check_length(name, row, len(fields.tokens))
    numbers, factors = None, None
    if isinstance(ids, list):
        first: dict[int, int] = {}
        for i, (own, score) in enumerate(zip(ids, fields.scores, strict=False)):
            other = first.setdefault(own, i)
            if other != i and score != fields.scores[other]:
                message = f"scores[{i}] = {score}, but scores[{other}] = {fields.scores[other]}: both are of rollout "
                message += f"{_show(own)} (rollout_ids), and a rollout has one score"
                raise Refusal("rollout", message, "scores", i, value=score)
        if len(first) < len(ids) == len(fields.scores):
            number = {own: i for i, own in enumerate(first)}
            numbers = np.array([number[own] for own in ids], np.int64)
    if isinstance(weights, list):
        factors = float_row(weights)
        _check_floats(factors, "weights", None)
        if (bad := _first(factors < 0)) is not None:
            message = f"weights[{bad}] = {factors[bad]}: a weight is at least 0"
            raise Refusal("weight", message, "weights", bad, value=float(factors[bad]))
    return numbers, factors


def validated(groups: Iterable[ScoredGroup], vocab_size: int | None) -> list[ScoredGroup]:
    """``groups`` with their ``defect`` found, so that nobody after this looks for it again. The id is a hash of the
    content: a group that is in the batch once more gets a number behind it, for its rollouts are others."""
    found: list[ScoredGroup] = []
    seen: Counter[str] = Counter()
    for group in groups:
        seen[group.group_id] += 1
        name = group.group_id if (count := seen[group.group_id]) == 1 else f"{group.group_id}-{count}"
        found.append(replace(group, defect=find_defect(group, vocab_size), validated=True, group_id=name))
    return found


def without_fields(groups: Iterable[ScoredGroup], names: Sequence[str]) -> list[ScoredGroup]:
    """``groups`` without those of a teacher and of a reference policy that are named: what is in them is no defect."""
    ignored: dict[str, Any] = dict.fromkeys({"ref_logprobs"}.intersection(names))
    if not {*TEACHER}.isdisjoint(names):
        ignored |= dict.fromkeys(TEACHER)  # one without the other would be a defect
    return [replace(group, **ignored) if ignored else group for group in groups]


def find_defect(group: ScoredGroup, vocab_size: int | None) -> str | None:
    """The first thing that is wrong with a group, or None. Costs nothing for a group that was ``validated``."""
    if group.validated or group.defect is not None:
        return group.defect
    try:
        _check_arrays(group, vocab_size)
    except Refusal as refusal:
        return refusal.message
    return None


def _check_arrays(group: ScoredGroup, vocab_size: int | None) -> None:
    extras = {name: getattr(group, name) for name in (*EXTRAS, "overrides")}
    present = {name: rows for name, rows in extras.items() if rows is not None}
    _check_lengths(group.token_ids, group.masks, group.scores, present)
    for i, (tokens, masks) in enumerate(zip(group.token_ids, group.masks, strict=True)):
        _check_ids(tokens, i, vocab_size)
        _check_masks(masks, tokens, i)
    _check_floats(group.scores, "scores", None)
    for name in EXTRAS:
        for i, row in enumerate(present.get(name, ())):
            if row is not None:
                _check_floats(row, name, i)
                if name != "advantages":
                    _check_logprobs(row, name, i)
    _check_teacher(group.token_ids, group.distill_token_ids, group.distill_logprobs, vocab_size)
    for i in range(len(group)):
        _check_overrides(group, i)


def _check_lengths(
    tokens: Sequence[Sequence[int] | IntArray],
    masks: Sequence[Sequence[int] | IntArray],
    scores: Sequence[float] | FloatArray,
    extras: Mapping[str, Sequence[Any]],
) -> None:
    """One mask and score per sequence, one mask entry per token; the same for ``extras``, whose rows may be absent."""
    size = len(tokens)
    if size == 0:
        raise Refusal("empty", "tokens: the group is empty (no sequence)", "tokens", value=[])
    for name, rows in {"masks": masks, "scores": scores, **extras}.items():
        _check_length(name, rows, size)
    for sequence, row in enumerate(tokens):
        if len(row) == 0:
            raise Refusal("empty", f"tokens[{sequence}]: the sequence is empty", "tokens", sequence, value=[])
    for name, rows in {"masks": masks, **extras}.items():
        if name == "overrides":
            continue
        for sequence, (row, expected) in enumerate(zip(rows, tokens, strict=True)):
            if row is not None and len(row) != len(expected):
                message = f"{name}[{sequence}]: {len(row)} entries, but tokens[{sequence}] has {len(expected)}"
                raise Refusal("length", f"{message}; one per token is needed", name, sequence, value=len(row))


def _check_length(name: str, rows: Sequence[Any] | FloatArray, size: int) -> None:
    if len(rows) != size:
        message = f"{name}: {len(rows)} entries, but tokens has {size}; one per sequence is needed"
        raise Refusal("length", message, name, value=len(rows))


def _first(bad: NDArray[np.bool_]) -> int | None:
    return int(np.argmax(bad)) if bad.any() else None


def _check_ids(tokens: NDArray[Any], sequence: int, vocab_size: int | None) -> None:
    index = _first(tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size))
    if index is None:
        return
    problem = "a token id is never negative"
    if vocab_size is not None:
        problem = f"outside the vocabulary [0, {vocab_size}); does the environment use the trained model's tokenizer?"
    place = f"tokens[{sequence}][{index}] = {tokens[index]}"
    raise Refusal("vocabulary", f"{place}: {problem}", "tokens", sequence, index, int(tokens[index]))


def _check_masks(masks: IntArray, tokens: IntArray, i: int) -> None:
    t = _first((masks != NOT_TRAINED) & (masks != tokens))
    if t is None:
        return
    hint = ""
    if ((masks == 0) | (masks == 1)).all():
        hint = "; a 0/1 mask is not Atropos's format, put the token id where the token is trained and -100 elsewhere"
    problem = f"must be {NOT_TRAINED} (not trained) or the token id {tokens[t]}{hint}"
    raise Refusal("mask", f"masks[{i}][{t}] = {masks[t]}: {problem}", "masks", i, t, int(masks[t]))


def _check_floats(row: FloatArray, field: str, sequence: int | None, limit: float = MAX_MAGNITUDE) -> None:
    t = _first(~(np.abs(row) <= limit))  # NaN too
    if t is None:
        return
    problem = f"beyond ±{limit:g}, which float32 cannot be trained with" if math.isfinite(row[t]) else "must be finite"
    place, index = (f"{field}[{t}]", None) if sequence is None else (f"{field}[{sequence}][{t}]", t)
    sequence = t if sequence is None else sequence
    raise Refusal("not_finite", f"{place} = {row[t]}: {problem}", field, sequence, index, float(row[t]))


def _check_teacher(
    tokens: Sequence[Sequence[int] | IntArray],
    ids: tuple[IntArray | None, ...] | None,
    logprobs: tuple[FloatArray | None, ...] | None,
    vocab_size: int | None,
) -> None:
    """Row t of a teacher is its distribution of token t, given those before it, at temperature 1."""
    if ids is None and logprobs is None:
        return
    for name, rows in zip(TEACHER, (ids or (), logprobs or ()), strict=True):
        _check_length(name, rows, len(tokens))
    for i, (sequence, own, values) in enumerate(zip(tokens, ids or (), logprobs or (), strict=True)):
        if own is None and values is None:
            continue
        for name, row in ((TEACHER[0], own), (TEACHER[1], values)):
            if (count := 0 if row is None else len(row)) != len(sequence):
                message = f"{name}[{i}]: {count} rows, but tokens[{i}] has {len(sequence)}; row t is of token t"
                raise Refusal("length", message, name, i, value=count)
        assert own is not None
        assert values is not None
        ordered, known = np.sort(own, 1), values > -np.inf
        problems = {
            "as many logprobs as ids are needed": (own >= 0).sum(1) != known.sum(1),
            "row t is of token t, given those before it, so row 0 is empty; are the rows one too early?": (
                (np.arange(len(own)) == 0) & (own[:, 0] >= 0)
            ),
            f"outside the vocabulary [0, {vocab_size}); has the teacher another tokenizer?": (
                ordered[:, -1] >= (vocab_size or _MAX_TOKEN + 1)
            ),
            "an id is there twice": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1),
            "a logprob is at most 0; are these probabilities?": (values > LOGPROB_TOLERANCE).any(1),
            "the probabilities add up to more than 1": np.exp(np.minimum(values, 1.0)).sum(1) > 1 + _MASS_TOLERANCE,
        }
        for problem, bad in problems.items():
            if (t := _first(bad)) is not None:
                which = int("prob" in problem)
                name, row = TEACHER[which], (own[t][own[t] >= 0], values[t][known[t]])[which].tolist()
                raise Refusal("teacher", f"{name}[{i}][{t}] = {_show(row)}: {problem}", name, i, t, row)


def _check_logprobs(row: FloatArray, name: str, i: int) -> None:
    t = _first((row > LOGPROB_TOLERANCE) & (row != NO_LOGPROB))
    if t is None:
        return
    problem = f"a logprob is at most 0 ({NO_LOGPROB} means no value); are these probabilities?"
    raise Refusal("logprob", f"{name}[{i}][{t}] = {row[t]}: {problem}", name, i, t, float(row[t]))


def _check_overrides(group: ScoredGroup, i: int) -> None:
    for name in ("set_advantage_to_zero", "sft", "temperature", "distill_weight"):
        for where, value in _stated(group, i, name):
            must = None
            if name in ("set_advantage_to_zero", "sft"):
                must = None if isinstance(value, bool) else "true or false"
            elif not _is_number(value):
                must = "a number"
            elif not 0 <= value <= MAX_MAGNITUDE:
                must = "finite and at least 0"
            if must is not None:
                raise Refusal("value", f"{where} = {_cut(repr(value))}: must be {must}", value=value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_supported(groups: Sequence[ScoredGroup], ignored: Sequence[str]) -> None:
    """Refuse images, which this trainer does not use: ``UnsupportedFieldError`` names the setting that ignores them.
    Warn of names that ``ScoredData`` does not have, once of each: upstream's server drops them."""
    for name in {name for group in groups for name in group.unknown_fields} - {*ignored, *_WARNED}:
        _WARNED.add(name)
        logger.warning("an environment sends %s, which is no field of ScoredData: it is ignored", _show(name))
    sender = next((group.env_id for group in groups if group.images is not None), -1)
    if sender != -1 and "images" not in ignored:
        who = "" if sender is None else f"with env_id {sender} "
        raise UnsupportedFieldError(
            f"images: the environment {who}sends this ScoredData field, which is not used by this trainer. "
            "Set data.ignore_fields=[images] to train without"
        )


def stated_temperature(group: ScoredGroup, index: int) -> float | None:
    """The temperature that the environment names for sequence ``index``; None: none, or nothing that is a number."""
    return next((float(value) for _, value in _stated(group, index, "temperature") if _is_number(value)), None)


def sampling_temperature(group: ScoredGroup, index: int, default: float) -> float:
    """Temperature that sequence ``index`` was sampled with: overrides > generation_params > group_overrides > default.
    0 (greedy, anything below 1e-5) becomes 1, of which engines report the logprobs of greedy tokens. The group must be
    free of defects."""
    found = overridden(group, index, "temperature", default)
    return float(found) if found >= GREEDY_BELOW else 1.0


def overridden(group: ScoredGroup, i: int, name: str, default: Any) -> Any:
    """An override of sequence ``i``: its own, else its group's, else ``default``. The group must be free of defects."""
    return next((value for _, value in _stated(group, i, name)), default)


def _stated(group: ScoredGroup, i: int, name: str) -> Iterator[tuple[str, Any]]:
    """Where a setting of sequence ``i`` stands, and its value; strongest first."""
    places = {f"overrides[{i}]": group.overrides and group.overrides[i]}
    if name == "temperature":
        places["generation_params"] = group.generation_params
    for place, fields in {**places, "group_overrides": group.group_overrides}.items():
        if fields and (value := fields.get(name)) is not None:
            yield f"{place}.{name}", value


def _show(value: Any) -> str:
    """JSON of a value, cut to a length that a log line can hold."""
    try:
        return _cut(json.dumps(value))
    except ValueError:
        return "an integer of more than 4300 digits"
    except RecursionError:
        return "a deep structure"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def json_value(value: Any) -> Any:
    """A value short enough, and JSON enough, for an answer."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**63 and math.isfinite(value) else _show(value)
    text = value[:100] if isinstance(value, str) else _show(value)
    return text.encode("utf-8", "replace").decode()
