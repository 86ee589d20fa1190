"""``TrajectoryFeed``: batches of the batch source → TransferQueue, slot by slot, in a thread of the task runner.

A slot is filled with one batch of the API, or with several where groups were too stale (``off_policy.max_staleness``).
Groups above its size wait for the next one. A batch is acked when steps consumed it; until they consumed all of it, the
step of each consumed group is kept beside the journalled batch (``batch_N.parts.json``).
"""

import json
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from atropos_verl.backends.ray.transfer import TransferQueueStore, has_rollout_logprobs, make_rows
from atropos_verl.errors import DataError
from atropos_verl.protocol.journal import JournalEntry
from atropos_verl.training.advantages import SequenceAdvantage
from atropos_verl.training.batch_source import BatchSource
from atropos_verl.training.samples import collect_samples
from atropos_verl.training.staleness import BatchProvenance, look_up_counts, staleness_metrics
from atropos_verl.types import FloatArray, QuarantinedGroup, ScoredGroup, SequenceMatch, TrainingSample

logger = logging.getLogger(__name__)

_PARTS = "parts.json"
"""Beside a batch: index of a group in it → step that consumed it."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One group of a batch, as it came: its batch, its index in that, and the ledger's matches of its sequences."""

    entry: JournalEntry
    index: int
    group: ScoredGroup
    matches: list[SequenceMatch | None]

    @property
    def place(self) -> tuple[int, int]:
        """Number of the batch in the journal, index in it."""
        return self.entry.sequence, self.index


@dataclass
class Slot:
    """One batch on its way through a step."""

    uid: str
    global_steps: int
    entries: list[JournalEntry] = field(default_factory=list)
    """Batches that groups of it came from."""
    members: list[Member] = field(default_factory=list)
    """Groups that are over when its step is done: those it holds, and those that it left out."""
    scores: list[tuple[int | None, float]] = field(default_factory=list)
    """Environment and score of every rollout."""
    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, tuple[TrainingSample, tuple[int, int, int]]] = field(default_factory=dict)
    """Key of a row → its sample, and where it came from: batch, index of the group in it, position."""
    figures: dict[str, dict[tuple[int, int, int], FloatArray]] = field(default_factory=dict)
    """``advantages`` and ``trainer_logprobs`` (before the update) [T] of its rows, once its step has them."""
    off_policy: dict[str, float | int | None] = field(default_factory=dict)
    """Figures of the ledger's look-up, and of staleness."""
    wait_seconds: float = 0.0

    def add_scores(self, group: ScoredGroup) -> None:
        self.scores += [(group.env_id, float(score)) for score in group.rollout_scores]


class _Collected(NamedTuple):
    """A group of a slot as it came, and the samples of it as the ledger completed it."""

    member: Member
    samples: list[TrainingSample]
    advantages: list[SequenceAdvantage]


def _rollouts(found: Sequence[_Collected]) -> int:
    """Counts them as the environments sent them, overlong ones included."""
    return sum(len(one.member.group.rollout_scores) for one in found)


class TrajectoryFeed:
    """Fills slots in the order in which they were asked for. ``needs_logprobs``: rollout correction is on, so a group
    without ``inference_logprobs`` cannot be trained on."""

    def __init__(
        self,
        source: BatchSource,
        store: TransferQueueStore,
        provenance: BatchProvenance,
        *,
        served_version: Callable[[], int],
        needs_logprobs: bool = False,
    ) -> None:
        self.source = source
        self.store = store
        self.provenance = provenance
        self.served_version = served_version
        self.needs_logprobs = needs_logprobs
        self.batch_size = source.config.batch_size
        """Rollouts that a full slot holds."""
        self.temperature = source.config.temperature
        """verl computes logprobs of a step at one temperature: ``rollout.temperature``."""
        self.failure: BaseException | None = None
        self.slots: dict[str, Slot] = {}
        self._carried: list[Member] = []
        """Groups that were above the size of the last slot."""
        self._parts: dict[int, dict[int, int]] = {}
        """Batches (by number in the journal) that are consumed in part: index of a group → step."""
        self._lock = threading.Lock()
        """Of ``slots``, ``_carried`` and ``_parts``."""
        self._wanted: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trajectory-feed", daemon=True)
        self.start = self._thread.start

    def request(self, uid: str, global_steps: int) -> None:
        """Asks for a slot to be filled; returns at once."""
        self._wanted.put(Slot(uid, global_steps))

    def check(self) -> None:
        """Raises what ended the feed."""
        if self.failure is not None:
            raise self.failure

    def trained(self, uids: Sequence[str], step: int) -> list[Slot]:
        """Durably notes that ``step`` consumed these slots. Returns them; ``acknowledge`` follows the weight sync."""
        # No longer among those that go back to the API when this ends, whether or not their ack gets through.
        with self._lock:
            done = [self.slots.pop(uid) for uid in uids]
            self._note_consumed(done, step)
        for slot in done:
            figures: dict[str, Any] = {**slot.figures}
            self.source.trace.ended([member.place for member in slot.members], step, **figures)
        return done

    def _note_consumed(self, done: Sequence[Slot], step: int) -> None:
        entries = {entry.sequence: entry for slot in done for entry in slot.entries}
        members = [member for slot in done for member in slot.members]
        waiting = {member.entry.sequence for member in self._carried}
        waiting |= {entry.sequence for slot in self.slots.values() for entry in slot.entries}
        for number, entry in entries.items():
            if number in waiting:
                parts = self._parts.setdefault(number, {})
                parts |= {member.index: step for member in members if member.entry.sequence == number}
                self._keep_parts(entry, parts)
            else:
                self.source.batches.trained(entry, step)
                self._parts.pop(number, None)
        self.provenance.consumed([member.matches for member in members])

    def _keep_parts(self, entry: JournalEntry, parts: dict[int, int]) -> None:
        self.source.journal.attach(entry, _PARTS, json.dumps(parts).encode(), durable=True)

    def acknowledge(self, slots: Sequence[Slot], covered_step: int = 0) -> None:
        """Lets the API forget these batches, and the journal those that steps up to ``covered_step`` consumed (a
        checkpoint holds their effect)."""
        for slot in slots:
            self.source.done(slot.counts["stale"])
            for entry in slot.entries:
                self.source.batches.ack(entry)
        self.source.batches.discard_through(covered_step)

    def figures_of(self, keys: Sequence[str], figures: Mapping[str, Sequence[FloatArray]]) -> None:
        """What a step computed for rows, from the first trained token on: ``advantages``, ``trainer_logprobs``."""
        with self._lock:
            for name, values in figures.items():
                for key, row in zip(keys, values, strict=True):
                    slot = self.slots.get(key.split("_")[0])
                    if slot is not None and key in slot.rows:
                        sample, place = slot.rows[key]
                        whole = np.zeros(len(sample))
                        whole[len(sample) - len(row) :] = row
                        slot.figures.setdefault(name, {})[place] = whole

    def evicted(self, uids: set[str]) -> None:
        """Settles slots that verl dropped as too stale: nobody will train on them, and the API need not keep them."""
        with self._lock:
            slots = [self.slots.pop(uid) for uid in uids if uid in self.slots]
            for slot in slots:
                reason = "trainer.v1.sampler.max_off_policy_threshold"
                logger.warning("%d sequences are left out: too stale (%s)", slot.counts["sequences"], reason)
                self._note_consumed([slot], slot.global_steps)
                places = [member.place for member in slot.members]
                self.source.trace.ended(places, slot.global_steps, "stale", reason=reason)
        self.acknowledge(slots)

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread; untrained batches go back to an API that can take them. Idempotent."""
        self._stopping.set()
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                slot = self._wanted.get()
                if slot is not None and not self._stopping.is_set():
                    self._fill(slot)
        except _StoppedError:
            pass
        except BaseException as error:
            self.failure = error
            logger.exception("the trajectory feed has ended")
            return
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            untrained = [entry for slot in self.slots.values() for entry in slot.entries]
            untrained += [member.entry for member in self._carried]
            # A batch that is consumed in part is this run's: the rest of it is trained on after a resume.
            back = {entry.sequence: entry for entry in untrained if entry.sequence not in self._parts}
            self.slots.clear()
            self._carried.clear()
        for entry in back.values():
            if entry.step is None:
                self.source.batches.release(entry)
        self.source.give_back()

    def _while_waiting(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def _fill(self, slot: Slot) -> None:
        self.store.running(slot.uid)
        started = time.monotonic()
        found: list[_Collected] = []
        with self._lock:
            self.slots[slot.uid] = slot
            members, self._carried = self._carried, []
            slot.entries = list({member.entry.sequence: member.entry for member in members}.values())
        self._collect(members, slot, found)
        batches = 0
        while _rollouts(found) < self.batch_size:
            if batches:
                self.source.done()  # several batches make one slot, which the throttle counts as one
            data = self.source.next(self._while_waiting)
            batches += 1
            assert data.entry is not None
            with self._lock:
                slot.entries.append(data.entry)
            consumed = self._consumed_before(data.entry)
            pairs = enumerate(zip(data.groups, data.matches or [], strict=True))
            fresh = [Member(data.entry, i, group, row) for i, (group, row) in pairs if i not in consumed]
            self._collect(fresh, slot, found)
            if self.provenance.config.max_staleness is None and found and not members:
                break  # the API's batches are whole; a smaller one is trained as it is
        with self._lock:
            # Of whole groups above the size verl would make a second optimiser step: they wait for the next slot.
            while _rollouts(found) > self.batch_size and len(found) > 1:
                self._carried.insert(0, found.pop().member)
            later = {id(member) for member in self._carried}
            slot.members = [member for member in slot.members if id(member) not in later]
        slot.wait_seconds = time.monotonic() - started
        served = self.served_version()
        samples = [sample for one in found for sample in one.samples]
        slot.off_policy |= staleness_metrics(samples, served)
        for one in found:
            slot.add_scores(one.member.group)
        sizes = {one.member.group.group_id: len(one.member.group.rollout_scores) for one in found}
        advantages = [advantage for one in found for advantage in one.advantages]
        known = {"served": served, "global_steps": slot.global_steps}
        rows = make_rows(slot.uid, samples, advantages, **known, group_sizes=sizes)
        placed = [(s, (*one.member.place, s.sequence_index)) for one in found for s in one.samples]
        trained = [(sample, place) for sample, place in placed if sample.loss_mask.any()]
        slot.rows = {row.key: of_row for row, of_row in zip(rows, trained, strict=True)}
        slot.counts.update(
            groups=len(found),
            carried=len(self._carried),
            sequences=len(rows),
            rollouts=len({row.key.rpartition("_")[0] for row in rows}),
            untrained=len(samples) - len(rows),
            trained_tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
        )
        self.store.put(slot.uid, rows)

    def _consumed_before(self, entry: JournalEntry) -> dict[int, int]:
        """Groups of a replayed batch whose effect the checkpoint holds: index → step."""
        content = self.source.journal.attachment(entry, _PARTS)
        if content is None:
            return {}
        noted = {int(index): int(step) for index, step in json.loads(content).items()}
        covered = {index: step for index, step in noted.items() if step <= (self.provenance.resumed_at or 0)}
        if covered != noted:
            self._keep_parts(entry, covered)  # the others are taken again, in steps of another number
        if covered:
            with self._lock:
                self._parts[entry.sequence] = dict(covered)
        return covered

    def _collect(self, members: Sequence[Member], slot: Slot, into: list[_Collected]) -> None:
        """Makes samples of groups, all of one batch or left over from one."""
        slot.members += members
        before = slot.counts["untrained"]
        groups, matches = [m.group for m in members], [m.matches for m in members]
        applied = self.provenance.apply(groups, matches, self.served_version())
        if members:
            slot.off_policy |= applied.figures
        report, advantages = collect_samples(applied.groups, self.provenance.settings)
        places = [member.place for member in members]
        self.source.trace.collected(places, groups, matches, applied, report)
        refused = list(report.quarantined)
        left_out = {group.group_id for group in (*(found.group for found in refused), *report.filtered)}
        rows: defaultdict[str, list[tuple[TrainingSample, SequenceAdvantage]]] = defaultdict(list)
        for sample, advantage in zip(report.samples, advantages, strict=True):
            rows[sample.group_id].append((sample, advantage))
        for group, place in zip(applied.groups, applied.kept, strict=True):
            if group.group_id in left_out:
                continue
            own = rows[group.group_id]
            one = _Collected(members[place], [sample for sample, _ in own], [advantage for _, advantage in own])
            reason = self._refuses(one.samples)
            if not any(sample.loss_mask.any() for sample in one.samples):
                # verl has no step without rows, so a slot needs groups that have something to train on.
                slot.counts.update(groups=1, untrained=len(one.samples))
                slot.add_scores(group)
            elif reason is None:
                into.append(one)
            elif self.provenance.settings.on_bad_group == "error":
                raise DataError(reason)
            else:
                refused.append(QuarantinedGroup(group=group, reason=reason))
                self.source.trace.ended([members[place].place], slot.global_steps, "quarantined", reason=reason)
        for found in refused:
            self.source.quarantine.put(found)
        if untrained := slot.counts["untrained"] - before:
            logger.warning("%d sequences of groups without a token to train on are left out", untrained)
        slot.counts.update(
            look_up_counts(applied.figures),
            stale=applied.stale_groups,
            quarantined=len(refused),
            filtered=len(report.filtered),
            dropped_overlong=report.dropped_overlong,
            truncated=report.truncated,
        )

    def _refuses(self, samples: Sequence[TrainingSample]) -> str | None:
        for sample in samples:
            if sample.temperature != self.temperature:
                return (
                    f"group {sample.group_id} was sampled at temperature {sample.temperature:g}, but verl computes "
                    f"logprobs at actor_rollout_ref.rollout.temperature={self.temperature:g}; make them equal"
                )
            if self.needs_logprobs and not has_rollout_logprobs(sample):
                return (
                    f"group {sample.group_id} has no inference_logprobs for every trained token, which "
                    "algorithm.rollout_correction needs; switch it off, or have the environment send them"
                )
        return None


class _StoppedError(Exception):
    """The feed was stopped while it waited."""
