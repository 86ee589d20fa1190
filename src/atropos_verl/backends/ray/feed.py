"""``TrajectoryFeed``: batches of the trajectory API, leased, validated and put into TransferQueue, slot by slot.

It runs in a thread of the task runner. The trainer asks for slots; each is filled with one batch of the API, or with
several where groups were too old to be trained on (``off_policy.max_staleness``). What is above the size of a slot
waits for the next one. A batch is acked when the trainer says that a step consumed it, or part of it: which groups that
was, and in which step, is kept beside the journalled batch (``batch_N.parts.json``) until all of it is consumed.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from atropos_verl.backends.ray.step_batches import Collected, Member, Slot
from atropos_verl.backends.ray.transfer import Rows, has_rollout_logprobs, make_rows, versions_of
from atropos_verl.errors import AtroposHTTPStatusError, AtroposProtocolError, AtroposTimeoutError, DataError
from atropos_verl.protocol.journal import JournalEntry
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.schema import validated
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.off_policy_book import OffPolicyBook
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.training.rollout_flow import RolloutFlow
from atropos_verl.training.samples import collect_samples
from atropos_verl.training.staleness import staleness_metrics
from atropos_verl.types import QuarantinedGroup, SampleSettings, ScoredGroup, TrainingSample

__all__ = ["FeedSettings", "SlotStore", "TrajectoryFeed"]

logger = logging.getLogger(__name__)

_MOST_LOST_BATCHES = 5
"""Answers of 500 to GET /batch in a row after which the API is taken to be broken."""
_PARTS = "parts.json"
"""Beside a batch: place of a group in it → step that consumed it."""


class SlotStore(Protocol):
    """Where filled slots go: TransferQueue, or a list in a test."""

    def running(self, uid: str) -> None: ...

    def put(self, uid: str, rows: Rows) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """What the feed needs to know of a run."""

    samples: SampleSettings
    batch_size: int
    """Sequences that a full batch holds."""
    temperature: float
    """verl computes logprobs of a step at one temperature: ``rollout.temperature``."""
    needs_logprobs: bool
    """Rollout correction is on: a group without ``inference_logprobs`` cannot be trained on."""
    first_batch_timeout: float
    """Seconds until an environment that was started here must have sent its first batch."""
    rollout_timeout: float
    max_wait_time: float


class TrajectoryFeed:
    """Fills slots in the order in which they were asked for.

    Args:
        batches: journal and leases; ``replay`` puts what an earlier process left in front.
        store: where rows go.
        book: who wrote what, by the gateway's ledger.
        served_version: the policy version that is being served now.
        flow: is told how many batches are in hand.
        should_stop: called while waiting for a batch; what it raises ends the feed.
    """

    def __init__(
        self,
        settings: FeedSettings,
        batches: LeasedBatches,
        quarantine: QuarantineStore,
        store: SlotStore,
        book: OffPolicyBook,
        *,
        served_version: Callable[[], int],
        flow: RolloutFlow,
        should_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.batches = batches
        self.quarantine = quarantine
        self.store = store
        self.book = book
        self.served_version = served_version
        self.failure: BaseException | None = None
        self.slots: dict[str, Slot] = {}
        self._flow = flow
        self._carried: list[Member] = []
        """Groups that were above the size of the last slot."""
        self._parts: dict[int, dict[int, int]] = {}
        """Of batches (by number in the journal) that are consumed in part: place of a group → step."""
        self._lock = threading.Lock()
        """Held where ``slots``, ``_carried`` and ``_parts`` are read or changed together."""
        self._early: list[HeldBatch] = []
        self._wanted: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._settled: queue.SimpleQueue[tuple[list[JournalEntry], int]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._outside = should_stop
        self._thread = threading.Thread(target=self._run, name="trajectory-feed", daemon=True)
        self._had_batch = False

    # ------------------------------------------------------------------ the trainer's side

    def start(self) -> None:
        self._thread.start()

    def replay(self, held: Sequence[HeldBatch]) -> None:
        """Put batches in front of what the API delivers. Before ``start``."""
        self._early.extend(held)

    def request(self, uid: str, global_steps: int) -> None:
        """Fill a slot; returns at once."""
        self._wanted.put(Slot(uid, global_steps))

    def check(self) -> None:
        """Raise what ended the feed."""
        if self.failure is not None:
            raise self.failure

    def trained(self, uids: Sequence[str], step: int) -> list[Slot]:
        """Durably note that ``step`` consumed these slots. Returns them; ``acknowledge`` follows the weight sync."""
        # No longer among those that go back to the API when this ends, whether or not their ack gets through.
        with self._lock:
            done = [self.slots.pop(uid) for uid in uids]
            self._note_consumed(done, step)
        return done

    def _note_consumed(self, done: Sequence[Slot], step: int) -> None:
        entries = {entry.sequence: entry for slot in done for entry in slot.entries}
        members = [member for slot in done for member in slot.members]
        for number, entry in entries.items():
            waits = any(member.entry.sequence == number for member in self._carried)
            if waits or any(slot.holds(entry) for slot in self.slots.values()):
                parts = self._parts.setdefault(number, {})
                parts |= {member.index: step for member in members if member.entry.sequence == number}
                self._keep_parts(entry, parts)
            else:
                self.batches.trained(entry, step)
                self._parts.pop(number, None)
        self.book.consumed([member.matches for member in members])

    def _keep_parts(self, entry: JournalEntry, parts: dict[int, int]) -> None:
        self.batches.journal.attach(entry, _PARTS, json.dumps(parts).encode(), durable=True)

    def acknowledge(self, slots: Sequence[Slot], covered_step: int = 0) -> None:
        """The API may forget these batches, and the journal those that steps up to ``covered_step`` consumed (a
        checkpoint holds their effect). Done by the feed's thread, which owns the connection."""
        for _ in slots:
            self._flow.done()
        self._settled.put(([entry for slot in slots for entry in slot.entries], covered_step))
        self._wake()

    def evicted(self, uids: set[str]) -> None:
        """verl dropped these slots as too old: nobody will train on them, and the API need not keep them."""
        with self._lock:
            slots = [self.slots.pop(uid) for uid in uids if uid in self.slots]
            for slot in slots:
                logger.warning(
                    "a batch of %d sequences is left out: older than trainer.v1.sampler.max_off_policy_threshold",
                    slot.counts.get("sequences", 0),
                )
                self._note_consumed([slot], slot.global_steps)
        self.acknowledge(slots)

    def stop(self, timeout: float = 30.0) -> None:
        """End the thread; untrained batches go back to an API that can take them. Idempotent."""
        self._stopping.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ------------------------------------------------------------------ the thread

    def _wake(self) -> None:
        self._wanted.put(None)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                slot = self._wanted.get()
                self._settle()
                if slot is not None and not self._stopping.is_set():
                    self._fill(slot)
            self._settle()
            self._give_back()
        except _StoppedError:
            self._settle()
            self._give_back()
        except BaseException as error:
            self.failure = error
            logger.exception("the trajectory feed has ended")

    def _settle(self) -> None:
        while not self._settled.empty():
            entries, covered_step = self._settled.get()
            for entry in entries:
                self.batches.ack(entry)
            self.batches.discard_through(covered_step)

    def _give_back(self) -> None:
        with self._lock:
            untrained = [entry for slot in self.slots.values() for entry in slot.entries]
            untrained += [member.entry for member in self._carried]
            untrained += [held.entry for held in self._early]
            # What is consumed in part is this run's: the rest of it is trained on after a resume.
            back = {entry.sequence: entry for entry in untrained if entry.sequence not in self._parts}
            self.slots.clear()
            self._carried.clear()
            self._early.clear()
        for entry in back.values():
            if entry.step is None:
                self.batches.release(entry)

    def _while_waiting(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError
        self._settle()
        self._outside()

    def _fill(self, slot: Slot) -> None:
        self.store.running(slot.uid)
        started = time.monotonic()
        found = Collected()
        with self._lock:
            self.slots[slot.uid] = slot
            members, self._carried = self._carried, []
            slot.entries = _entries_of(members)
        self._collect(members, slot, found)
        is_next = False
        while found.sequences < self.settings.batch_size:
            if is_next:
                self._flow.done()  # not a batch in hand yet: what begins now may still become part of it
            held, is_replay = self._next()
            self._flow.fetched()
            is_next = True
            with self._lock:
                slot.entries.append(held.entry)
            self._collect(self._members(held, is_replay), slot, found)
            if self.book.config.max_staleness is None and found.trained_sequences and not members:
                break  # the API's batches are whole; a smaller one is trained as it is
        with self._lock:
            self._carried = found.trim(self.settings.batch_size, slot)
            later = {id(member) for member in self._carried}
            slot.members = [member for member in slot.members if id(member) not in later]
        slot.wait_seconds = time.monotonic() - started
        served = self.served_version()
        slot.off_policy |= staleness_metrics(found.samples, served)
        rows = make_rows(
            slot.uid,
            found.samples,
            found.advantages,
            [versions_of(sample, served) for sample in found.samples],
            global_steps=slot.global_steps,
            group_sizes=found.group_sizes,
        )
        slot.add("sequences", len(rows.rows))
        slot.add("untrained", rows.untrained)
        slot.add("trained_tokens", rows.trained_tokens)
        self.store.put(slot.uid, rows)

    def _next(self) -> tuple[HeldBatch, bool]:
        """The next batch, and whether an earlier process had it."""
        if self._early:
            return self._early.pop(0), True
        settings = self.settings
        limit = settings.rollout_timeout if self._had_batch else settings.first_batch_timeout
        deadline = time.monotonic() + limit
        lost = 0
        while True:
            try:
                held = self.batches.fetch(settings.max_wait_time, self._while_waiting)
            except AtroposTimeoutError as error:
                if time.monotonic() >= deadline:
                    raise
                logger.info("%s", error.reason)
            except AtroposHTTPStatusError as error:
                # Upstream encodes a batch after taking it off its queue: one NaN in it gives 500, and it is gone.
                lost += 1
                if error.status_code != 500 or lost > _MOST_LOST_BATCHES or time.monotonic() >= deadline:
                    raise
                logger.warning("%s: the API lost a batch; going on", error.reason)
            else:
                self._had_batch = True
                return held, False

    def _decode(self, held: HeldBatch) -> list[ScoredGroup]:
        try:
            return validated(decode_batch(held.body), self.settings.samples.vocab_size)
        except AtroposProtocolError as error:
            group = ScoredGroup(
                token_ids=(), masks=(), scores=np.zeros(0), group_id=held.entry.path.stem, raw=held.body
            )
            self._put_away(QuarantinedGroup(group=group, reason=error.reason))
            return []

    def _members(self, held: HeldBatch, is_replay: bool) -> list[Member]:
        groups, entry, journal = self._decode(held), held.entry, self.batches.journal
        matches = (self.book.recall if is_replay else self.book.look_up_and_keep)(groups, journal, entry)
        consumed = self._consumed_before(entry) if is_replay else {}
        return [
            Member(entry, index, group, row)
            for index, (group, row) in enumerate(zip(groups, matches, strict=True))
            if index not in consumed
        ]

    def _consumed_before(self, entry: JournalEntry) -> dict[int, int]:
        """Groups of a replayed batch that the checkpoint holds the effect of: place → step."""
        content = self.batches.journal.attachment(entry, _PARTS)
        if content is None:
            return {}
        noted = {int(index): int(step) for index, step in json.loads(content).items()}
        covered = {index: step for index, step in noted.items() if step <= (self.book.resumed_at or 0)}
        if covered != noted:
            self._keep_parts(entry, covered)  # the others are taken again, in steps of another number
        if covered:
            with self._lock:
                self._parts[entry.sequence] = dict(covered)
        return covered

    def _put_away(self, bad: QuarantinedGroup) -> None:
        path = self.quarantine.put(bad)
        logger.warning("group quarantined: %s (%s)", bad.reason, path)

    def _collect(self, members: Sequence[Member], slot: Slot, into: Collected) -> None:
        """Make samples of groups, all of one batch or left over from one."""
        slot.members += members
        applied = self.book.apply([m.group for m in members], [m.matches for m in members], self.served_version())
        if members:
            slot.off_policy |= applied.figures
        slot.add("stale", applied.stale_groups)
        report, advantages = collect_samples(applied.groups, self.settings.samples)
        bad = {found.group.group_id for found in report.quarantined}
        for found in report.quarantined:
            self._put_away(found)
        for group, place in zip(applied.groups, applied.kept, strict=True):
            if group.group_id in bad:
                continue
            rows = [i for i, sample in enumerate(report.samples) if sample.group_id == group.group_id]
            reason = self._refuses(report.samples, rows)
            if reason is None:
                into.add(group, [report.samples[i] for i in rows], [advantages[i] for i in rows], members[place])
            elif self.settings.samples.on_bad_group == "error":
                raise DataError(reason)
            else:
                bad.add(group.group_id)
                self._put_away(QuarantinedGroup(group=group, reason=reason))
        slot.add("quarantined", len(bad))
        slot.add("dropped_overlong", report.dropped_overlong)
        slot.add("truncated", report.truncated)

    def _refuses(self, samples: Sequence[TrainingSample], rows: Sequence[int]) -> str | None:
        for i in rows:
            sample = samples[i]
            if sample.temperature != self.settings.temperature:
                return (
                    f"group {sample.group_id} was sampled at temperature {sample.temperature:g}, but verl computes "
                    f"logprobs at actor_rollout_ref.rollout.temperature={self.settings.temperature:g}; make them equal"
                )
            if self.settings.needs_logprobs and not has_rollout_logprobs(sample):
                return (
                    f"group {sample.group_id} has no inference_logprobs for every trained token, which "
                    "algorithm.rollout_correction needs; switch it off, or have the environment send them"
                )
        return None


def _entries_of(members: Iterable[Member]) -> list[JournalEntry]:
    return list({member.entry.sequence: member.entry for member in members}.values())


class _StoppedError(Exception):
    """The feed was stopped while it waited."""
