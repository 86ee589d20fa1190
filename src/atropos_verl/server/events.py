"""What can happen to the API's state, as records of the log. State is what its events made of it, in order.

::

    Registered · Started · EnvRegistered · EnvDisconnected          who is there
    Accepted                                                        groups came (with their bodies)
    Handed ─▶ Closed                                                a batch was handed out, and acked or delivered
       └────▶ Returned ─▶ Handed …                                  … or came back, and went out again
    Renewed · Reset · Snapshot · Bodies
"""

from __future__ import annotations

from typing import Any

import msgspec

from atropos_verl.protocol.wire_model import Environment, Registration

__all__ = [
    "Accepted",
    "Bodies",
    "Body",
    "Closed",
    "EnvDisconnected",
    "EnvRegistered",
    "Event",
    "GroupMeta",
    "Handed",
    "Registered",
    "Renewed",
    "Reset",
    "Returned",
    "SavedBatch",
    "Snapshot",
    "Started",
    "decode_event",
    "encode_event",
]


class GroupMeta(msgspec.Struct, array_like=True):
    """A group without its body."""

    seq: int
    env_id: int | None
    size: int
    tokens: int
    arrived: float
    digest: bytes
    passed_over: int = 0
    suffix: bytes = b""


class Body(msgspec.Struct, array_like=True):
    seq: int
    raw: bytes


class Registered(msgspec.Struct, tag="reg"):
    registration: Registration
    at: float
    resumed: bool = False


class Started(msgspec.Struct, tag="start"):
    """The trainer asked for its first batch: environments may register."""

    at: float


class EnvRegistered(msgspec.Struct, tag="env"):
    environment: Environment


class EnvDisconnected(msgspec.Struct, tag="bye"):
    env_id: int


class Accepted(msgspec.Struct, tag="acc"):
    """One POST: all of its groups, or (torn) none."""

    groups: list[GroupMeta]
    bodies: list[bytes]
    key: str | None = None
    """Idempotency-Key."""
    request_digest: bytes = b""
    reply: bytes = b""
    """The JSON that was answered."""
    duplicates: int = 0


class Handed(msgspec.Struct, tag="hand"):
    lease_id: str
    step: int
    seqs: list[int]
    deadline: float | None
    at: float
    deliveries: int = 1
    previous: str | None = None
    """The lease under which the same batch was out before."""


class Closed(msgspec.Struct, tag="ack"):
    lease_id: str
    at: float


class Returned(msgspec.Struct, tag="ret"):
    lease_id: str
    at: float
    reason: str


class Renewed(msgspec.Struct, tag="renew"):
    lease_id: str
    deadline: float


class Reset(msgspec.Struct, tag="reset"):
    at: float


class Bodies(msgspec.Struct, tag="bodies"):
    """Bodies copied from an old file, so that it can be deleted."""

    bodies: list[Body]


class SavedBatch(msgspec.Struct, array_like=True):
    lease_id: str
    step: int
    seqs: list[int]
    deadline: float | None
    deliveries: int
    earlier: list[str] = []


class Snapshot(msgspec.Struct, tag="snap"):
    """Everything but the bodies."""

    next_seq: int
    step: int
    started: bool
    registration: Registration | None
    environments: list[Environment]
    groups: list[GroupMeta]
    outstanding: list[SavedBatch]
    returned: list[SavedBatch]
    closed: list[str]
    superseded: list[str]
    keys: list[tuple[str, bytes, bytes]]
    recent: list[tuple[int, bytes, float]]
    totals: dict[str, int]


Event = (
    Registered
    | Started
    | EnvRegistered
    | EnvDisconnected
    | Accepted
    | Handed
    | Closed
    | Returned
    | Renewed
    | Reset
    | Bodies
    | Snapshot
)


def encode_event(event: Event) -> bytes:
    return msgspec.msgpack.encode(event)


def decode_event(payload: bytes | memoryview) -> Event:
    """Raises ``msgspec.DecodeError`` for a record of another version."""
    event: Event = _DECODER.decode(payload)
    return event


_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Event)
