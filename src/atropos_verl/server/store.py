"""``Store``: who is registered, and which groups are taken. What happens to batches: ``batches.py``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from atropos_verl.errors import AtroposVerlError
from atropos_verl.protocol.schema import CheckedGroup, Refusal
from atropos_verl.protocol.wire_model import Environment, EnvRegistration, Registration
from atropos_verl.server.batcher import BATCH_FILLS
from atropos_verl.server.batches import BatchDesk, ConflictError
from atropos_verl.server.events import Accepted, EnvDisconnected, EnvRegistered, GroupMeta, Registered, Reset
from atropos_verl.server.persistence import Persistence
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.state import State

__all__ = ["QueueFullError", "Store"]

logger = logging.getLogger(__name__)


class QueueFullError(AtroposVerlError):
    """No room for the groups; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Store:
    """Belongs to the event loop. ``now``: seconds since the epoch, for tests."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float] = time.time) -> None:
        """Open the data directory, if there is one, and go on where the last process ended.

        Raises:
            LogDamagedError, LogWriteError: the data directory cannot be used.
        """
        self.settings = settings
        self.now = now
        self.persistence = Persistence(settings, now)
        self.batches = BatchDesk(self.persistence)
        self.trainer_heard = now() if self.state.registration is not None else 0.0
        self.wants_packed = False
        """The trainer takes the packed wire: groups are packed when they come."""

    @property
    def state(self) -> State:
        return self.persistence.state

    # --- who is there ------------------------------------------------------------------------------------------------

    def register(self, registration: Registration) -> str:
        """Register a trainer. Returns ``new``, ``resumed`` (the same run again: its new settings hold) or ``shared``.

        Raises:
            Refusal: a setting is unknown.
            ConflictError: another run's trainer is active, and it is not shared.
        """
        if registration.batch_fill not in BATCH_FILLS:
            message = f"batch_fill = {registration.batch_fill!r} must be one of {', '.join(BATCH_FILLS)}"
            raise Refusal("value", message, "batch_fill", value=registration.batch_fill)
        current = self.state.registration
        kind = "new"
        if current is not None and self.trainer_active():
            if self.settings.second_trainer == "share":
                self.trainer_heard = self.now()
                return "shared"
            if not registration.same_run(current):
                ago = self.now() - self.trainer_heard
                raise ConflictError(
                    f"the trainer of run {current.wandb_project!r}/{current.wandb_group!r} is registered and was heard "
                    f"{ago:.0f} s ago; wait until it is silent for {self.settings.trainer_timeout:g} s and its leases "
                    "have ended, reset the server (/reset_data), or start it with --second-trainer share"
                )
        if current is not None and registration.same_run(current):
            kind = "resumed"
        self.persistence.commit(Registered(registration, self.now(), kind == "resumed"))
        self.trainer_heard = self.now()
        self.batches.trainer_registered()
        logger.info("trainer registered (%s): %d sequences per batch", kind, registration.batch_size)
        return kind

    def trainer_active(self) -> bool:
        if self.now() - self.trainer_heard < self.settings.trainer_timeout:
            return True
        return any(batch.deadline is not None for batch in self.state.outstanding.values())

    def register_env(self, request: EnvRegistration) -> Environment | None:
        """Register an environment; None while no trainer has asked for a batch."""
        if not self.state.started or self.state.registration is None:
            return None
        name = request.desired_name or "env"
        namesakes = sum(other.desired_name == name for other in self.state.environments)
        environment = Environment(
            env_id=len(self.state.environments),
            real_name=f"{name}_{namesakes}",
            desired_name=name,
            max_context_len=request.max_token_length,
            weight=1.0 if request.weight is None else request.weight,
            group_size=request.group_size,
            min_batch_allocation=request.min_batch_allocation,
            heard_at=self.now(),
        )
        self.persistence.commit(EnvRegistered(environment))
        logger.info("environment %d registered: %s", environment.env_id, environment.real_name)
        return environment

    def disconnect_env(self, env_id: int) -> bool:
        """False when there is no such environment."""
        if not 0 <= env_id < len(self.state.environments):
            return False
        if self.state.environments[env_id].connected:
            self.persistence.commit(EnvDisconnected(env_id))
            logger.info("environment %d disconnected", env_id)
        return True

    def hear_trainer(self) -> None:
        self.trainer_heard = self.now()

    def hear_env(self, env_id: int | None) -> None:
        if env_id is not None and 0 <= env_id < len(self.state.environments):
            self.state.environments[env_id].heard_at = self.now()

    def reset(self) -> None:
        """Forget registrations, environments, groups, batches and keys."""
        self.persistence.commit(Reset(self.now()))
        self.trainer_heard = 0.0
        self.wants_packed = False
        logger.warning("reset: everything was forgotten")

    # --- groups ------------------------------------------------------------------------------------------------------

    def accept(
        self, groups: Sequence[CheckedGroup], reply: Callable[[int], bytes], key: str | None = None, digest: bytes = b""
    ) -> bytes:
        """Store the groups of one POST, all or none, and return what is to be answered.

        Args:
            reply: makes the answer from the number of duplicates, after the groups are queued.
            key: Idempotency-Key; ``digest`` is that of the request it came with.

        Raises:
            Refusal: the key was used for another request.
            QueueFullError: the queue is full.
        """
        known = self.state.keys.get(key) if key is not None else None
        if known is not None:
            if known[0] != digest:
                raise Refusal("idempotency", f"Idempotency-Key {key!r} was used for another body", value=key)
            return known[1]
        fresh = [group for group in groups if not self._is_duplicate(group)]
        self._check_room(fresh)
        now = self.now()
        metas = [
            GroupMeta(self.state.next_seq + i, g.env_id, g.size, g.tokens, now, g.digest, suffix=g.suffix)
            for i, g in enumerate(fresh)
        ]
        duplicates = len(groups) - len(fresh)
        answer = reply(duplicates)
        self.persistence.commit(Accepted(metas, [group.raw for group in fresh], key, digest, answer, duplicates))
        return answer

    def replied(self, key: str | None, digest: bytes) -> bytes | None:
        """The answer that was given to this very request before; lets it be answered without decoding it."""
        known = self.state.keys.get(key) if key is not None else None
        return known[1] if known is not None and known[0] == digest else None

    def _is_duplicate(self, group: CheckedGroup) -> bool:
        window, recent = self.settings.dedupe_window, self.state.recent
        if window == 0:
            return False
        while recent and self.now() - next(iter(recent.values())) > window:
            recent.popitem(last=False)
        if group.env_id is None or (group.env_id, group.digest) not in recent:
            return False
        self.state.environments[group.env_id].duplicates += 1
        logger.info("environment %d sent a group again: stored once", group.env_id)
        return True

    def _check_room(self, groups: Sequence[CheckedGroup]) -> None:
        waiting, held = self.state.queue.groups, self.state.held_bytes
        size = sum(len(group.raw) for group in groups)
        if groups and waiting + len(groups) > self.settings.max_queue_groups:
            bound = self.settings.max_queue_groups
            raise QueueFullError(f"the queue is full: {waiting} groups wait, max_queue_groups is {bound}")
        if groups and held + size > self.settings.max_queue_bytes:
            bound = self.settings.max_queue_bytes
            raise QueueFullError(f"the queue is full: {held} bytes are held, max_queue_bytes is {bound}")

    def nearly_full(self) -> bool:
        """Beyond the soft limit: environments are told to pause."""
        settings, state = self.settings, self.state
        return (
            state.queue.groups >= settings.soft_limit * settings.max_queue_groups
            or state.held_bytes >= settings.soft_limit * settings.max_queue_bytes
        )
