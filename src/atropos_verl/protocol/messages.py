"""Bodies of requests to the trajectory API, the same for client and server. Field names are upstream's."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class BatchPolicy(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Which groups make a batch: the wishes of the trainer."""

    batch_size: _Positive
    """Sequences (not groups) per batch."""
    batch_fill: str = "auto"
    """``auto`` | ``exact`` | ``at_most`` | ``at_least``."""
    batch_fill_wait: _Seconds = 5.0
    """Seconds that a batch's worth of sequences may wait for an exact fit (``auto``)."""
    batch_tail_wait: _Seconds | None = None
    """Seconds without a new group after which less than a batch is handed out. None: only when nobody is sending."""


class TrainerRegistration(BatchPolicy, kw_only=True, omit_defaults=True):
    """Body of ``POST /register``: upstream's eight fields, then ours."""

    wandb_group: str
    wandb_project: str
    max_token_len: int
    """Exclusive: an environment drops a group when any of its sequences has this many tokens or more."""
    checkpoint_dir: str
    save_checkpoint_interval: int
    """Steps; 0 or less: none are saved."""
    starting_step: int
    """The step that the run goes on from; 0 for a new one."""
    num_steps: int
    """Steps of the whole run; environments end by themselves beyond it."""
    min_allocation_wait: _Seconds = 300.0
    """Seconds that a batch waits for an environment's minimum share before it goes without."""
    vocab_size: _Positive | None = None
    """Token ids must be below it. None: only negative ids are refused."""

    def same_run(self, other: TrainerRegistration) -> bool:
        return all(
            getattr(self, name) == getattr(other, name) for name in ("wandb_group", "wandb_project", "checkpoint_dir")
        )


class EnvRegistration(msgspec.Struct, kw_only=True):
    """Body of ``POST /register-env``."""

    max_token_length: int
    group_size: int
    desired_name: str | None = None
    """atroposlib sends null when no wandb name is set."""
    weight: float | None = 1.0
    """Share of the rollouts, relative to the other environments; None: 1 (upstream takes no null here); below 0: 0."""
    min_batch_allocation: float | None = None
    """Least share of each batch, 0 to 1 (what is outside counts as the nearer one); None: no minimum."""


class EnvIdentifier(msgspec.Struct):
    """Body of ``POST /disconnect-env`` and ``GET /status-env``."""

    env_id: int


class AckRequest(msgspec.Struct):
    """Body of ``/batch/ack``, ``/batch/release`` and ``/batch/renew`` (which alone reads ``seconds``)."""

    lease_id: str
    seconds: float | None = None
