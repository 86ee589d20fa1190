"""What the API is sent and what it keeps. Wire structs bear upstream's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

__all__ = [
    "AckRequest",
    "Batch",
    "EnvIdentifier",
    "EnvRegistration",
    "Environment",
    "Registration",
    "StoredGroup",
]

_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Registration(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Body of ``POST /register``: upstream's eight fields, then ours."""

    wandb_group: str
    wandb_project: str
    batch_size: _Positive
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int
    batch_fill: str = "auto"
    """``auto`` | ``exact`` | ``at_most`` | ``at_least``."""
    batch_fill_wait: _Seconds = 5.0
    """Seconds that a batch's worth of sequences may wait for an exact fit (``auto``)."""
    batch_tail_wait: _Seconds | None = None
    """Seconds without a new group after which less than a batch is handed out. None: only when nobody is sending."""
    min_allocation_wait: _Seconds = 300.0
    """Seconds that a batch waits for an environment's minimum share before it goes without."""
    vocab_size: _Positive | None = None
    """Token ids must be below it. None: only negative ids are refused."""

    def same_run(self, other: Registration) -> bool:
        return (self.wandb_group, self.wandb_project, self.checkpoint_dir) == (
            other.wandb_group,
            other.wandb_project,
            other.checkpoint_dir,
        )


class EnvRegistration(msgspec.Struct, kw_only=True):
    """Body of ``POST /register-env``."""

    max_token_length: int
    group_size: _Positive
    desired_name: str | None = None
    """atroposlib sends null when no wandb name is set."""
    weight: Annotated[float, msgspec.Meta(ge=0)] | None = None
    min_batch_allocation: Annotated[float, msgspec.Meta(ge=0)] | None = None


class EnvIdentifier(msgspec.Struct):
    env_id: int


class AckRequest(msgspec.Struct):
    """Body of ``/batch/ack``, ``/batch/release`` and ``/batch/renew`` (which alone reads ``seconds``)."""

    lease_id: str
    seconds: float | None = None


class Environment(msgspec.Struct, kw_only=True):
    """A registered environment. ``env_id`` is its index."""

    env_id: int
    real_name: str
    desired_name: str
    max_context_len: int
    weight: float
    group_size: int
    min_batch_allocation: float | None
    connected: bool = True
    heard_at: float = 0.0
    """Seconds since the epoch; not in the log: after a restart every environment counts as just heard."""
    groups: int = 0
    sequences: int = 0
    duplicates: int = 0
    refused: int = 0

    def alive(self, now: float, timeout: float) -> bool:
        return self.connected and now - self.heard_at < timeout


@dataclass(slots=True)
class StoredGroup:
    """An accepted group."""

    seq: int
    env_id: int | None
    size: int
    """Sequences."""
    tokens: int
    arrived: float
    digest: bytes
    """XXH3-128 of its JSON with every key."""
    raw: bytes
    """Its JSON as received."""
    suffix: bytes = b""
    """Replaces the closing brace of ``raw`` so that every key is there (upstream's trainers read them all)."""
    packed: bytes | None = None
    """Its binary form; None until somebody wants it."""
    passed_over: int = 0

    def json_parts(self) -> list[bytes | memoryview]:
        """Its JSON with every key, in pieces: it may be long, and copying it takes time."""
        return [memoryview(self.raw)[:-1], self.suffix] if self.suffix else [self.raw]

    @property
    def held_bytes(self) -> int:
        return len(self.raw) + (len(self.packed) if self.packed is not None else 0)


@dataclass(slots=True)
class Batch:
    """Groups handed out together, until they are acked, confirmed or returned."""

    lease_id: str
    step: int
    seqs: list[int]
    deadline: float | None
    """Seconds since the epoch; None: handed out without a lease, waiting for the response to arrive."""
    deliveries: int = 1
    earlier: list[str] = field(default_factory=list)
    """The latest leases under which it was out before, told to whoever gets it: one of them may have been its own."""
