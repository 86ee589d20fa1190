"""``BatchDesk``: hands batches out, and takes them back. At most one holder per batch, at any time.

A batch, from the moment it is formed::

    queue ──hand out──▶ outstanding ──ack in time──────────────────────▶ closed (its groups are dropped)
                          │    ▲   └──response delivered (no lease)────▶ closed
             lease ends, or    └──────handed out again (same step)──┐
             not delivered ──▶ returned ────────────────────────────┘
                                   └──late ack (nobody has it yet)─────▶ closed
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace

from atropos_verl.errors import AtroposVerlError
from atropos_verl.protocol.wire_model import Batch, Environment, Registration
from atropos_verl.server.arrival_log import ArrivalRecord
from atropos_verl.server.batcher import BatchPolicy, Candidate, QueueView, choose_batch
from atropos_verl.server.events import Closed, Handed, Renewed, Returned, Started
from atropos_verl.server.persistence import Persistence
from atropos_verl.server.state import State

__all__ = ["BatchDesk", "ConflictError", "UnknownLeaseError"]

logger = logging.getLogger(__name__)


class ConflictError(AtroposVerlError):
    """The request contradicts what has happened meanwhile (HTTP 409)."""


class UnknownLeaseError(AtroposVerlError):
    """There never was such a lease, or the server was reset (HTTP 404)."""


class BatchDesk:
    """Belongs to the event loop."""

    def __init__(self, persistence: Persistence) -> None:
        self._persistence = persistence
        self._settings = persistence.settings
        self._now = persistence.now
        self._minimum_missed: float | None = None
        self._registered_at = 0.0
        data_dir = persistence.settings.data_dir
        self._arrivals = None if data_dir is None else ArrivalRecord(data_dir)

    @property
    def _state(self) -> State:
        return self._persistence.state

    def next_batch(self, lease_seconds: float | None) -> Batch | None:
        """Hand out the next batch, or None. The step advances, but for a batch that came back.

        ``lease_seconds`` None: the batch is out until ``close`` or ``take_back``.
        """
        state, now = self._state, self._now()
        if not state.started:
            self._persistence.commit(Started(now))
        self.expire()
        lease_id = uuid.uuid4().hex
        deadline = None if lease_seconds is None else now + lease_seconds
        if state.returned:
            old = state.returned[0]
            event = Handed(lease_id, old.step, old.seqs, deadline, now, old.deliveries + 1, old.lease_id)
        else:
            chosen = self._choose()
            if chosen is None:
                return None
            event = Handed(lease_id, state.step + 1, [group.seq for group in chosen], deadline, now)
        self._persistence.commit(event)
        batch = state.outstanding[lease_id]
        if self._arrivals is not None and event.previous is None:
            self._arrivals.add(batch.step, now, state.members(batch))
        return batch

    def ack(self, lease_id: str) -> str:
        """The batch was trained on. Returns ``acked``, ``already`` (a repeated ack) or ``late`` (after the lease
        ended, but before anybody else got the batch).

        Raises:
            ConflictError: somebody else has the batch by now.
            UnknownLeaseError: no such lease.
        """
        self.expire()
        state = self._state
        if lease_id in state.closed:
            return "already"
        if lease_id in state.outstanding:
            self._persistence.commit(Closed(lease_id, self._now()))
            return "acked"
        if any(batch.lease_id == lease_id for batch in state.returned):
            self._persistence.commit(Closed(lease_id, self._now()))
            logger.warning("lease %s was acked after it had ended; nobody else had the batch, so it counts", lease_id)
            return "late"
        raise self._gone(lease_id)

    def renew(self, lease_id: str, seconds: float) -> float:
        """The lease ends ``seconds`` from now. Returns its deadline (seconds since the epoch).

        Raises:
            ConflictError: it has ended.
            UnknownLeaseError: no such lease.
        """
        self.expire()
        if lease_id not in self._state.outstanding:
            raise self._gone(lease_id)
        deadline = self._now() + seconds
        self._persistence.commit(Renewed(lease_id, deadline))
        return deadline

    def release(self, lease_id: str) -> None:
        """The holder does not want the batch: it is the next to be handed out.

        Raises:
            ConflictError: the lease has ended.
            UnknownLeaseError: no such lease.
        """
        self.expire()
        if lease_id not in self._state.outstanding:
            raise self._gone(lease_id)
        self.take_back(lease_id, "released")

    def close(self, lease_id: str) -> None:
        """A batch without a lease has arrived. Does nothing when it is not out any more."""
        if lease_id in self._state.outstanding:
            self._persistence.commit(Closed(lease_id, self._now()))

    def take_back(self, lease_id: str, reason: str) -> None:
        """Return a batch to the front of the queue. Does nothing when it is not out any more."""
        if lease_id in self._state.outstanding:
            batch = self._state.outstanding[lease_id]
            self._persistence.commit(Returned(lease_id, self._now(), reason))
            logger.warning("batch of step %d returned to the queue: %s", batch.step, reason)

    def expire(self) -> None:
        """Return the batches whose lease has ended."""
        now = self._now()
        for batch in list(self._state.outstanding.values()):
            if batch.deadline is not None and batch.deadline <= now:
                self.take_back(batch.lease_id, "its lease ended without an ack")

    def _gone(self, lease_id: str) -> ConflictError | UnknownLeaseError:
        state = self._state
        if lease_id in state.closed:
            return ConflictError(f"lease {lease_id} was acked")
        if lease_id in state.superseded:
            return ConflictError(f"lease {lease_id} ended, and its batch was handed out again: drop what came of it")
        if any(batch.lease_id == lease_id for batch in state.returned):
            return ConflictError(f"lease {lease_id} has ended")
        return UnknownLeaseError(f"no lease {lease_id!r}; was the server reset?")

    # --- who sends ---------------------------------------------------------------------------------------------------

    def trainer_registered(self) -> None:
        """A trainer came, or came again: its environments may be a while behind it."""
        self._registered_at = self._now()

    def _anyone_sending(self, alive: Sequence[Environment]) -> bool:
        """Some environment is alive, or is to be expected: those of the run that was interrupted have said goodbye, and
        new ones cannot register before the trainer has asked for a batch."""
        known = self._state.environments
        if alive or not known:
            return bool(alive)
        came_since = max(environment.heard_at for environment in known) > self._registered_at
        return not came_since and self._now() - self._registered_at < self._settings.env_timeout

    # --- which groups ------------------------------------------------------------------------------------------------

    def alive(self) -> list[Environment]:
        """Environments that are connected and were heard of lately."""
        now, timeout = self._now(), self._settings.env_timeout
        return [environment for environment in self._state.environments if environment.alive(now, timeout)]

    def _choose(self) -> Sequence[Candidate] | None:
        registration = self._state.registration
        if registration is None:
            return None
        now = self._now()
        policy = BatchPolicy(
            batch_size=registration.batch_size,
            fill=registration.batch_fill,
            fill_wait=registration.batch_fill_wait,
            tail_wait=registration.batch_tail_wait,
        )
        view = self._view(registration)
        chosen = choose_batch(view, policy, now)
        if chosen is not None or not view.minimums:
            self._minimum_missed = None
            return chosen
        without = choose_batch(replace(view, minimums={}), policy, now)
        if without is None:
            return None
        if self._minimum_missed is None:
            self._minimum_missed = now
        waited = now - self._minimum_missed
        if waited < registration.min_allocation_wait:
            return None
        logger.warning("a batch goes without the minimum of environments %s (%.0f s)", sorted(view.minimums), waited)
        return without

    def _view(self, registration: Registration) -> QueueView:
        queue, alive = self._state.queue, self.alive()
        sizes: set[int] = set()
        for environment in alive:
            sizes |= queue.sizes_of(environment.env_id) or {environment.group_size}
        if self._now() - queue.last_arrival < self._settings.env_timeout:
            sizes |= queue.sizes_of(None)
        if sizes:
            sizes |= {size for _, size in queue.classes}
        minimums = {
            environment.env_id: int(registration.batch_size * environment.min_batch_allocation)
            for environment in alive
            if environment.min_batch_allocation is not None
        }
        return QueueView(
            classes=queue.classes,
            total=queue.waiting_sequences(),
            last_arrival=queue.last_arrival,
            sizes_seen=frozenset(sizes),
            minimums={env_id: minimum for env_id, minimum in minimums.items() if minimum > 0},
            anyone_sending=self._anyone_sending(alive),
        )
