"""``Persistence``: state and log kept together. Every change is in the log before it is made, and answered after."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from atropos_verl.protocol.wire_model import StoredGroup
from atropos_verl.segment_log import LogDamagedError, LogWriteError, SegmentLog
from atropos_verl.server.events import Accepted, Bodies, Body, Event, Returned, Snapshot, decode_event, encode_event
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.state import State

__all__ = ["Persistence"]

logger = logging.getLogger(__name__)

_COMPACT_BELOW = 0.25
"""Share of an old file that is still needed, below which the rest is copied so that the file can go."""


class Persistence:
    """Belongs to the event loop. ``now``: seconds since the epoch, for tests."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float] = time.time) -> None:
        """Open the data directory, if there is one, and go on where the last process ended.

        Raises:
            LogDamagedError, LogWriteError: the data directory cannot be used.
        """
        self.settings = settings
        self.now = now
        self.state = State()
        self.recovered_groups = 0
        self._segment_of: dict[int, int] = {}
        self._live: Counter[int] = Counter()
        self._rotate_at = settings.segment_bytes
        self._log: SegmentLog | None = None
        if settings.data_dir is not None:
            self._log = SegmentLog(settings.data_dir, fsync=settings.fsync)
            self._recover(self._log)

    @property
    def durable(self) -> bool:
        return self._log is not None

    @property
    def log_bytes(self) -> int:
        return 0 if self._log is None else self._log.size + sum(self._log.sizes.values())

    async def synced(self) -> None:
        """With ``fsync``: everything committed so far is on the disk."""
        if self._log is not None:
            await self._log.sync()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def commit(self, event: Event) -> None:
        """Log, then apply. Raises ``LogWriteError`` with nothing changed."""
        if self._log is None:
            self.state.apply(event)
            self.state.dropped.clear()
            return
        self._log.append(encode_event(event))
        self.state.apply(event)
        if isinstance(event, Accepted):
            for meta in event.groups:
                self._place(meta.seq, self._log.segment)
        self._release(self._log)
        if self._log.size > self._rotate_at:
            self._try_rotate(self._log)

    # --- files -------------------------------------------------------------------------------------------------------

    def _place(self, seq: int, segment: int) -> None:
        """Note that the body of group ``seq`` lies in ``segment``."""
        before = self._segment_of.get(seq)
        if before is not None:
            self._live[before] -= 1
        self._segment_of[seq] = segment
        self._live[segment] += 1

    def _release(self, log: SegmentLog) -> None:
        """Delete the older files whose last group was dropped."""
        emptied = set()
        for seq in self.state.dropped:
            segment = self._segment_of.pop(seq)
            self._live[segment] -= 1
            if not self._live[segment] and segment != log.segment:
                emptied.add(segment)
        self.state.dropped.clear()
        for segment in emptied:
            log.delete(segment)

    def _try_rotate(self, log: SegmentLog) -> None:
        try:
            self._rotate(log)
        except LogWriteError as error:
            # The event that brought us here is in the log: its sender must not hear of this.
            self._rotate_at = log.size + self.settings.segment_bytes
            logger.error("%s; going on with the current file", error)

    def _rotate(self, log: SegmentLog) -> None:
        """Begin a new file, move what little is left of old ones into it, and delete those that are empty then."""
        log.rotate(encode_event(self.state.snapshot()))
        # A snapshot of a long queue takes room, too.
        self._rotate_at = log.size + self.settings.segment_bytes
        needed: dict[int, list[StoredGroup]] = {segment: [] for segment in log.sizes}
        for seq, segment in self._segment_of.items():
            if segment in needed:
                needed[segment].append(self.state.groups[seq])
        for segment, groups in needed.items():
            if groups and sum(len(group.raw) for group in groups) < _COMPACT_BELOW * log.sizes[segment]:
                log.append(encode_event(Bodies([Body(group.seq, group.raw) for group in groups])))
                for group in groups:
                    self._place(group.seq, log.segment)
            if not self._live[segment]:
                log.delete(segment)

    # --- restart -----------------------------------------------------------------------------------------------------

    def _recover(self, log: SegmentLog) -> None:
        """State is the last snapshot and what follows it; older files only hold bodies."""
        bodies: dict[int, bytes] = {}
        places: dict[int, int] = {}
        events: list[Event] = []
        for segment, payload in log.read():
            try:
                event = decode_event(payload)
            except msgspec.DecodeError as error:
                reason = f"segment {segment} of {log.directory} holds a record that this version cannot read: {error}"
                raise LogDamagedError(reason) from error
            if isinstance(event, Snapshot):
                events = [event]
                # A group that is not in this snapshot was dropped before it: its body is not needed any more.
                bodies = {meta.seq: bodies[meta.seq] for meta in event.groups if meta.seq in bodies}
                continue
            for seq, raw in _bodies_of(event):
                bodies[seq] = raw
                places[seq] = segment
            events.append(event)
        self._replay(events, bodies)
        missing = [seq for seq, group in self.state.groups.items() if not group.raw]
        if missing:
            reason = f"{log.directory} lacks the bodies of {len(missing)} groups; was a segment-*.log removed by hand?"
            raise LogDamagedError(f"{reason} Restore it, or move the directory away to start anew")
        for seq in self.state.groups:
            self._place(seq, places[seq])
        self._rotate(log)
        self._after_restart()

    def _replay(self, events: Sequence[Event], bodies: dict[int, bytes]) -> None:
        for event in events:
            if isinstance(event, Snapshot):
                self.state.load(event, bodies)
            elif not isinstance(event, Bodies):
                self.state.apply(event)
        self.state.dropped.clear()

    def _after_restart(self) -> None:
        """Nobody is blamed for the time the server was away, and responses it may not have finished come back."""
        state, now = self.state, self.now()
        for environment in state.environments:
            environment.heard_at = now
        for batch in [batch for batch in state.outstanding.values() if batch.deadline is None]:
            self.commit(Returned(batch.lease_id, now, "restart"))
        self.recovered_groups = len(state.groups)
        if state.registration is not None or state.groups:
            waiting, away = state.queue.groups, len(state.outstanding)
            logger.info("resumed at step %d: %d groups waiting, %d leases open", state.step, waiting, away)


def _bodies_of(event: Event) -> list[tuple[int, bytes]]:
    if isinstance(event, Accepted):
        return [(meta.seq, raw) for meta, raw in zip(event.groups, event.bodies, strict=True)]
    if isinstance(event, Bodies):
        return [(body.seq, body.raw) for body in event.bodies]
    return []
