"""``ServerSettings``: what the operator of a trajectory API decides. The trainer's wishes come with ``/register``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from atropos_verl.errors import ConfigError

SECOND_TRAINER = ("refuse", "share", "replace")
COMPRESSIONS = ("auto", "always", "never")
_MAY_BE_ZERO = ("trainer_timeout", "dedupe_window", "delivery_grace")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Checked at construction; ``ConfigError`` names the field."""

    data_dir: Path | None = None
    """Directory of the store. None: memory only, a restart forgets everything."""
    fsync: bool = False
    """Wait for the disk before each 200: a power cut loses nothing either. Without: safe against process death."""
    token: str | None = None  # bearer token that every data route demands
    allow_get_reset: bool = True
    """Upstream's clients reset by ``GET /reset_data``; False leaves only the POST."""
    cors_origins: Sequence[str] = ()
    """Origins of other sites whose pages may call the API. Empty: none."""
    allowed_hosts: Sequence[str] = ()
    """Names that a request's ``Host`` may have; empty: any. ``serve`` fills it for a loopback address."""

    max_body_bytes: int = 256 * 2**20
    max_inflated_bytes: int = 512 * 2**20
    max_bytes_at_once: int = 2**30  # bytes of all requests that are being read or checked
    max_queue_groups: int = 200_000  # groups waiting (handed-out ones not counted)
    max_queue_bytes: int = 8 * 2**30
    """Bytes of JSON held, handed-out batches that wait for their ack included."""
    strict: bool = False
    """Check lengths of per-token extras in groups that name no environment, too (upstream's own tests post such)."""
    soft_limit: float = 0.8
    """Share of either bound from which ``/status-env`` tells environments to pause."""
    body_timeout: float = 60.0  # seconds of silence in a request's body before it is given up (408)

    env_timeout: float = 120.0
    """Seconds without a word from an environment before it counts as gone. They poll every 0.1 to 1 s."""
    trainer_timeout: float = 60.0
    """Seconds without a word from the trainer (and no open lease) before another run may take over."""
    second_trainer: str = "refuse"
    """``refuse``: another run's trainer gets 409 while the first is active; ``share``: it draws from the same queue;
    ``replace``: it takes its place."""
    dedupe_window: float = 60.0
    """Seconds in which the same group from the same environment is stored once. 0: never compared."""
    max_lease: float = 86_400.0
    delivery_grace: float = 60.0
    """Seconds after which a batch sent without a lease counts as delivered when its connection is still open."""

    compression: str = "auto"
    """``auto``: compress answers, except to this machine; ``always``, ``never``."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_zero = isinstance(value, bool) or field.name in _MAY_BE_ZERO
            if isinstance(value, int | float) and not (value > 0 or (may_be_zero and value == 0)):
                raise ConfigError(f"{value} must be a number {'of at least' if may_be_zero else 'above'} 0", field.name)
        if self.soft_limit > 1:
            raise ConfigError(f"{self.soft_limit} must be at most 1", "soft_limit")
        for name, known in (("second_trainer", SECOND_TRAINER), ("compression", COMPRESSIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{getattr(self, name)!r} must be one of {', '.join(known)}", name)
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ConfigError("must be printable ASCII and not empty", "token")
