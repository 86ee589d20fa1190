"""Bodies of requests to the trajectory API, the same for client and server. Field names are upstream's."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Float = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class BatchPolicy(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Which groups make a batch: the wishes of the trainer."""

    batch_size: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    """Sequences (not groups) per batch."""
    batch_fill: str = "auto"  # ``auto`` | ``exact`` | ``at_most`` | ``at_least``
    batch_fill_wait: _Seconds = 5.0
    """Seconds that a batch's worth of sequences may wait for an exact fit (``auto``)."""
    batch_tail_wait: _Seconds | None = None
    """Seconds without a new group after which less than a batch is handed out. None: only when nobody is sending."""


class TrainerRegistration(BatchPolicy, kw_only=True, omit_defaults=True):
    """Body of ``POST /register``: upstream's eight fields, then ours."""

    wandb_group: str
    wandb_project: str
    max_token_len: _Int
    """Exclusive: an environment drops a group when any of its sequences has this many tokens or more."""
    checkpoint_dir: str
    save_checkpoint_interval: _Int  # steps; 0 or less: none are saved
    starting_step: _Int
    num_steps: _Int  # of the whole run; environments end by themselves beyond it
    min_allocation_wait: _Seconds = 300.0
    """Seconds that a batch waits for an environment's minimum share before it goes without."""
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    """Token ids must be below it. None: only negative ids are refused."""

    @property
    def run(self) -> tuple[str, str, str]:
        return self.wandb_project, self.wandb_group, self.checkpoint_dir


class EnvRegistration(msgspec.Struct, kw_only=True):
    """Body of ``POST /register-env``."""

    max_token_length: _Int
    group_size: _Int
    desired_name: str | None = None  # atroposlib sends null when no wandb name is set
    weight: _Float | None = 1.0
    """Share of the rollouts, relative to the other environments; None: 1 (upstream takes no null here); below 0: 0."""
    min_batch_allocation: _Float | None = None
    """Least share of each batch, 0 to 1 (what is outside counts as the nearer one); None: no minimum."""


class EnvIdentifier(msgspec.Struct):
    """Body of ``POST /disconnect-env`` and ``GET /status-env``."""

    env_id: _Int


class AckRequest(msgspec.Struct):
    """Body of ``/batch/ack``, ``/batch/release`` and ``/batch/renew`` (which alone reads ``seconds``)."""

    lease_id: str
    seconds: _Float | None = None
