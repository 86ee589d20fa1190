"""What an answer of a trajectory API says: a JSON object, integers in it, a batch or not yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atropos_verl.errors import AtroposProtocolError
from atropos_verl.protocol.exchange import Answer, Call, not_atropos, what_is_lost
from atropos_verl.protocol.packed import MAGIC

__all__ = ["answered_object", "holds_batch", "integers"]

_SMALL_BODY = 4096
"""Bytes. Answers without a batch are shorter; longer ones are left to ``decode_batch``, after they were journalled."""


def answered_object(call: Call, answer: Answer) -> dict[str, Any]:
    """The answer's JSON object. Raises ``AtroposProtocolError`` for anything else, and for a status of failure."""
    try:
        fields = json.loads(answer.body)
    except (ValueError, RecursionError):
        raise not_atropos(call, f"{call.name} gave {answer.body[:120]!r}, which is not JSON") from None
    if not isinstance(fields, dict):
        raise not_atropos(call, f"{call.name} gave {answer.body[:120]!r}, which is not a JSON object")
    if fields.get("status") in ("error", "failure"):
        why = fields.get("message") or fields.get("error") or fields.get("detail") or "no explanation"
        reason = f"Atropos API at {call.base_url} answered {call.name} with status {fields['status']!r}: {why}"
        raise AtroposProtocolError(reason, call.base_url)
    return fields


def integers(call: Call, fields: Mapping[str, Any], *names: str) -> list[int]:
    """The values of ``names``. Raises ``AtroposProtocolError`` when one of them is no integer."""
    for name in names:
        if not isinstance(fields.get(name), int) or isinstance(fields[name], bool):
            raise not_atropos(call, f"{call.name} gave no integer {name!r} but {str(dict(fields))[:120]}")
    return [fields[name] for name in names]


def holds_batch(call: Call, answer: Answer) -> bool:
    """Whether the answer to ``GET /batch`` is a batch; False: there is none yet.

    Raises:
        AtroposProtocolError: it is neither, or is cut off.
    """
    body = answer.body
    if body.startswith(MAGIC):  # complete: its length was announced, or it was sent in chunks with an end
        return True
    if not body[:64].lstrip().startswith(b"{"):
        raise not_atropos(call, f"{call.name} gave {body[:120]!r}, which is not a JSON object")
    if not body[-64:].rstrip().endswith(b"}"):
        reason = f"Atropos API at {call.base_url} - the answer to {call.name} is cut off after {len(body)} bytes"
        raise AtroposProtocolError(reason + what_is_lost(call), call.base_url)
    if len(body) > _SMALL_BODY:
        return True
    fields = answered_object(call, answer)
    if "batch" not in fields:
        raise not_atropos(call, f"{call.name} gave {body[:120]!r}, which has no 'batch'")
    return bool(fields["batch"])
