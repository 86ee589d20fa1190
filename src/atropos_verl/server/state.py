"""``State``: what the events of the log add up to. Applying an event is the only way it changes, so a restart that
applies the same events ends in the same state.
"""

from __future__ import annotations

import bisect
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from atropos_verl.protocol.wire_model import Batch, Environment, Registration, StoredGroup
from atropos_verl.server.events import (
    Accepted,
    Bodies,
    Closed,
    EnvDisconnected,
    EnvRegistered,
    Event,
    GroupMeta,
    Handed,
    Registered,
    Renewed,
    Reset,
    Returned,
    SavedBatch,
    Snapshot,
    Started,
)
from atropos_verl.server.queue import GroupQueue

__all__ = ["State"]

logger = logging.getLogger(__name__)

_REMEMBERED_LEASES = 65_536
_EARLIER_LEASES = 8
_REMEMBERED_KEYS = 100_000


class State:
    """Belongs to the event loop. ``apply`` changes it; everything else reads."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        """Since the data directory was made: groups, sequences, tokens, duplicates, batches, acks, returns."""
        self.next_seq = 0
        """Never starts again, so that a number means one group for as long as the log lives."""
        self._clear()

    def _clear(self) -> None:
        self.step = 0
        self.started = False
        self.registration: Registration | None = None
        self.environments: list[Environment] = []
        self.groups: dict[int, StoredGroup] = {}
        """Every group that is not acked: waiting, handed out, returned."""
        self.queue = GroupQueue()
        self.outstanding: dict[str, Batch] = {}
        """Handed out, by lease id."""
        self.returned: list[Batch] = []
        """Came back: the next to be handed out, the lowest step first."""
        self.closed: OrderedDict[str, None] = OrderedDict()
        self.superseded: OrderedDict[str, None] = OrderedDict()
        """Leases that ran out and whose batch somebody else has by now."""
        self.keys: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        """Idempotency-Key → (digest of the request, reply)."""
        self.recent: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        """(env_id, digest) → when it came."""
        self.held_bytes = 0
        self.held_tokens = 0
        self.dropped: list[int] = []
        """Groups that are no longer needed; the store empties it."""
        self.packed_bytes = 0
        """Of ``held_bytes``, those of binary forms."""
        self.latest: StoredGroup | None = None

    # --- events ------------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        match event:
            case Accepted():
                self._accepted(event)
            case Handed():
                self._handed(event)
            case Closed():
                self._closed(event.lease_id)
            case Returned():
                self._returned(event.lease_id)
            case Renewed():
                self.outstanding[event.lease_id].deadline = event.deadline
            case Registered():
                self._registered(event)
            case Started():
                self.started = True
            case EnvRegistered():
                self.environments.append(event.environment)
            case EnvDisconnected():
                self.environments[event.env_id].connected = False
            case Reset():
                self.dropped.extend(self.groups)
                dropped = self.dropped
                self._clear()
                self.dropped = dropped
            case Snapshot() | Bodies():
                raise ValueError(f"{type(event).__name__} is read by load(), not applied")

    def _accepted(self, event: Accepted) -> None:
        for meta, raw in zip(event.groups, event.bodies, strict=True):
            group = _stored(meta, raw)
            self.groups[group.seq] = group
            self.queue.add(group)
            self._count_held(group, 1)
            self.next_seq = group.seq + 1
            self.latest = group
            self._remember(group)
        self.totals["groups"] += len(event.groups)
        self.totals["sequences"] += sum(meta.size for meta in event.groups)
        self.totals["tokens"] += sum(meta.tokens for meta in event.groups)
        self.totals["duplicates"] += event.duplicates
        if event.key is not None:
            self.keys[event.key] = (event.request_digest, event.reply)
            _forget_oldest(self.keys, _REMEMBERED_KEYS)

    def _remember(self, group: StoredGroup) -> None:
        if group.env_id is not None:
            self.recent[group.env_id, group.digest] = group.arrived
            self.recent.move_to_end((group.env_id, group.digest))
            if group.env_id < len(self.environments):
                environment = self.environments[group.env_id]
                environment.groups += 1
                environment.sequences += group.size

    def _handed(self, event: Handed) -> None:
        batch = Batch(event.lease_id, event.step, list(event.seqs), event.deadline, event.deliveries)
        if event.previous is not None:
            for other in self.returned:
                if other.lease_id == event.previous:
                    batch.earlier = [*other.earlier, event.previous][-_EARLIER_LEASES:]
            self.returned = [other for other in self.returned if other.lease_id != event.previous]
            self.queue.count(self.members(batch), -1)
            self.superseded[event.previous] = None
            _forget_oldest(self.superseded, _REMEMBERED_LEASES)
        else:
            self.queue.take(self.members(batch))
            self.step = event.step
            self.totals["batches"] += 1
        self.outstanding[event.lease_id] = batch

    def _closed(self, lease_id: str) -> None:
        batch = self.outstanding.pop(lease_id, None)
        if batch is None:  # acked late, before anybody else got it
            batch = next(other for other in self.returned if other.lease_id == lease_id)
            self.returned.remove(batch)
            self.queue.count(self.members(batch), -1)
        for group in self.members(batch):
            del self.groups[group.seq]
            self._count_held(group, -1)
            self.dropped.append(group.seq)
        self.closed[lease_id] = None
        _forget_oldest(self.closed, _REMEMBERED_LEASES)
        self.totals["acks"] += 1

    def _returned(self, lease_id: str) -> None:
        batch = self.outstanding.pop(lease_id)
        bisect.insort(self.returned, batch, key=lambda other: other.step)
        self.queue.count(self.members(batch), 1)
        self.totals["returns"] += 1

    def _registered(self, event: Registered) -> None:
        before = self.registration
        self.registration = event.registration
        self.step = event.registration.starting_step
        if before is None:
            return
        # Batches that were formed for other settings fall apart into their groups, each to its old place.
        for batch in self.returned:
            members = self.members(batch)
            self.queue.count(members, -1)
            self.queue.restore(members)
            self.superseded[batch.lease_id] = None
        self.returned = []

    def members(self, batch: Batch) -> list[StoredGroup]:
        return [self.groups[seq] for seq in batch.seqs]

    def keep_packed(self, group: StoredGroup, packed: bytes) -> None:
        """Keep the binary form of a group; not an event, since it can be made again."""
        added = len(packed) - (len(group.packed) if group.packed is not None else 0)
        self.held_bytes += added
        self.packed_bytes += added
        group.packed = packed

    def _count_held(self, group: StoredGroup, sign: int) -> None:
        self.held_bytes += sign * group.held_bytes
        self.packed_bytes += sign * (len(group.packed) if group.packed is not None else 0)
        self.held_tokens += sign * group.tokens

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot(
            next_seq=self.next_seq,
            step=self.step,
            started=self.started,
            registration=self.registration,
            environments=self.environments,
            groups=[_meta(group) for group in self.groups.values()],
            outstanding=[_saved(batch) for batch in self.outstanding.values()],
            returned=[_saved(batch) for batch in self.returned],
            closed=list(self.closed),
            superseded=list(self.superseded),
            keys=[(key, digest, reply) for key, (digest, reply) in self.keys.items()],
            recent=[(env_id, digest, at) for (env_id, digest), at in self.recent.items()],
            totals=dict(self.totals),
        )

    def load(self, saved: Snapshot, bodies: Mapping[int, bytes]) -> None:
        """Become ``saved``. ``bodies``: seq → JSON; one that is missing was dropped later, and its file deleted."""
        self._clear()
        self.next_seq, self.step, self.started = saved.next_seq, saved.step, saved.started
        self.registration, self.environments = saved.registration, saved.environments
        self.totals = Counter(saved.totals)
        for meta in saved.groups:
            self.groups[meta.seq] = group = _stored(meta, bodies.get(meta.seq, b""))
            self._count_held(group, 1)
        self.outstanding = {batch.lease_id: _batch(batch) for batch in saved.outstanding}
        self.returned = [_batch(batch) for batch in saved.returned]
        away = {seq for batch in self.outstanding.values() for seq in batch.seqs}
        back = {seq for batch in self.returned for seq in batch.seqs}
        for group in sorted(self.groups.values(), key=lambda group: group.seq):
            if group.seq not in away and group.seq not in back:
                self.queue.add(group)
        for batch in self.returned:
            self.queue.count(self.members(batch), 1)
        self.closed = OrderedDict.fromkeys(saved.closed)
        self.superseded = OrderedDict.fromkeys(saved.superseded)
        self.keys = OrderedDict((key, (digest, reply)) for key, digest, reply in saved.keys)
        self.recent = OrderedDict(((env_id, digest), at) for env_id, digest, at in saved.recent)
        self.latest = next((group for group in reversed(self.groups.values()) if group.raw), None)


def _stored(meta: GroupMeta, raw: bytes) -> StoredGroup:
    return StoredGroup(
        seq=meta.seq,
        env_id=meta.env_id,
        size=meta.size,
        tokens=meta.tokens,
        arrived=meta.arrived,
        digest=meta.digest,
        raw=raw,
        passed_over=meta.passed_over,
        suffix=meta.suffix,
    )


def _meta(group: StoredGroup) -> GroupMeta:
    return GroupMeta(
        group.seq,
        group.env_id,
        group.size,
        group.tokens,
        group.arrived,
        group.digest,
        group.passed_over,
        group.suffix,
    )


def _saved(batch: Batch) -> SavedBatch:
    return SavedBatch(batch.lease_id, batch.step, batch.seqs, batch.deadline, batch.deliveries, batch.earlier)


def _batch(saved: SavedBatch) -> Batch:
    return Batch(saved.lease_id, saved.step, list(saved.seqs), saved.deadline, saved.deliveries, list(saved.earlier))


def _forget_oldest(entries: OrderedDict[str, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)
