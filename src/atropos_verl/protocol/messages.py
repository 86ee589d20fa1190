"""What the trajectory API is told and what it answers, as frozen values. Field names are those of the wire."""

from __future__ import annotations

from dataclasses import dataclass

from atropos_verl.errors import ConfigError

__all__ = [
    "ApiInfo",
    "ApiStatus",
    "EnvRegistration",
    "EnvRegistrationResult",
    "EnvStatus",
    "FetchedBatch",
    "PostReceipt",
    "TrainerRegistration",
    "WandbInfo",
]


@dataclass(frozen=True, slots=True)
class ApiStatus:
    """Answer of ``/status``."""

    current_step: int
    """Batches the API has formed, plus the ``starting_step`` of the registration."""
    queue_size: int
    """Groups that are in no batch yet."""
    environments: int = 0
    """Registered so far, those that are gone included; 0 from an upstream API, which does not tell."""


@dataclass(frozen=True, slots=True)
class ApiInfo:
    """Answer of ``/info``; both are -1 while no trainer has registered."""

    batch_size: int
    """Sequences per batch."""
    max_token_len: int
    """Exclusive: environments drop sequences of this many tokens or more."""


@dataclass(frozen=True, slots=True)
class WandbInfo:
    """Answer of ``/wandb_info``; None while no trainer has registered."""

    group: str | None
    project: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRegistration:
    """Body of ``/register``.

    Atropos's ``max_token_len`` is exclusive: an environment drops a group when any of its sequences has
    ``max_token_len`` tokens or more. ``with_inclusive_max_token_len`` takes the longest sequence you want to train.
    """

    wandb_group: str
    wandb_project: str
    batch_size: int
    """Sequences (not groups) per batch."""
    max_token_len: int
    """Tokens, exclusive."""
    checkpoint_dir: str
    save_checkpoint_interval: int
    """Steps; 0 or less: none are saved."""
    starting_step: int
    """The step that the run goes on from; 0 for a new one."""
    num_steps: int
    """Steps of the whole run; environments end by themselves beyond it."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_token_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} must be at least 1", name)

    @classmethod
    def with_inclusive_max_token_len(
        cls,
        max_token_len: int,
        *,
        wandb_group: str,
        wandb_project: str,
        batch_size: int,
        checkpoint_dir: str,
        save_checkpoint_interval: int,
        starting_step: int,
        num_steps: int,
    ) -> TrainerRegistration:
        """The registration under which a sequence of exactly ``max_token_len`` tokens is still sent (one is added)."""
        return cls(
            wandb_group=wandb_group,
            wandb_project=wandb_project,
            batch_size=batch_size,
            max_token_len=max_token_len + 1,
            checkpoint_dir=checkpoint_dir,
            save_checkpoint_interval=save_checkpoint_interval,
            starting_step=starting_step,
            num_steps=num_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvRegistration:
    """Body of ``/register-env``."""

    max_token_length: int
    desired_name: str
    weight: float = 1.0
    """Share of the rollouts, relative to the other environments."""
    group_size: int
    min_batch_allocation: float | None = None
    """Least share of each batch, 0 to 1; None: no minimum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvRegistrationResult:
    """Answer of ``/register-env``. While ``waiting``, no trainer has asked for a batch yet: try again in a second."""

    status: str
    env_id: int | None = None
    """None while waiting."""
    wandb_name: str | None = None
    checkpoint_dir: str | None = None
    starting_step: int | None = None
    checkpoint_interval: int | None = None
    num_steps: int | None = None

    @property
    def waiting(self) -> bool:
        return self.env_id is None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvStatus:
    """Answer of ``/status-env``; queue sizes are in groups of the asking environment's size."""

    current_step: int
    queue_size: int
    env_weight: float
    self_queue_size: int = 0
    max_group_size: int = 1
    unallocated_fraction: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PostReceipt:
    """Answer of ``/scored_data`` and ``/scored_data_list``."""

    groups: int
    """Groups the API took."""
    buffered: int
    """Of these, groups whose size is not the environment's: they wait until others fill them up to it."""


@dataclass(frozen=True, slots=True)
class FetchedBatch:
    """A batch, and what it took to get it."""

    body: bytes
    """The answer of ``GET /batch``, decompressed and not decoded: ``decode_batch`` does that."""
    attempts: int
    """Times ``GET /batch`` was answered, the last one with a batch."""
    waited: float
    """Seconds."""
    lease_id: str | None = None
    """To be given to ``ack`` once the optimiser step is durable; None at an upstream API, which has no leases."""
    earlier_lease_ids: tuple[str, ...] = ()
    """Leases under which the same batch was out before, and which ended."""
