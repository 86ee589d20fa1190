"""Slots of a step, and the groups that fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from atropos_verl.protocol.journal import JournalEntry
from atropos_verl.training.advantages import SequenceAdvantage
from atropos_verl.types import ScoredGroup, SequenceMatch, TrainingSample

__all__ = ["Collected", "Member", "Slot"]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One group of a batch, as it came."""

    entry: JournalEntry
    """The batch."""
    index: int
    """Its place in it."""
    group: ScoredGroup
    matches: list[SequenceMatch | None]
    """What the ledger knows of its sequences."""


@dataclass
class Slot:
    """One batch on its way through a step."""

    uid: str
    global_steps: int
    entries: list[JournalEntry] = field(default_factory=list)
    """Batches of the API that groups of it came from."""
    members: list[Member] = field(default_factory=list)
    """Groups that nobody needs when its step is done: those it holds, and those that it left out."""
    scores: list[float] = field(default_factory=list)
    env_scores: dict[int, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """groups, sequences, quarantined, dropped_overlong, truncated, stale, carried (to the next slot), untrained,
    trained_tokens."""
    off_policy: dict[str, float | int | None] = field(default_factory=dict)
    """Figures of the ledger's look-up, and of staleness."""
    wait_seconds: float = 0.0

    def add(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def holds(self, entry: JournalEntry) -> bool:
        return any(own.sequence == entry.sequence for own in self.entries)


@dataclass
class Collected:
    """Groups of one slot so far."""

    samples: list[TrainingSample] = field(default_factory=list)
    advantages: list[SequenceAdvantage] = field(default_factory=list)
    groups: list[tuple[ScoredGroup, int, Member]] = field(default_factory=list)
    """Each with the number of its samples, and as it came."""
    sequences: int = 0
    """As the environments sent them, overlong ones included."""

    @property
    def trained_sequences(self) -> int:
        return sum(bool(sample.loss_mask.any()) for sample in self.samples)

    @property
    def group_sizes(self) -> dict[str, int]:
        return {group.group_id: len(group) for group, *_ in self.groups}

    def add(
        self,
        group: ScoredGroup,
        samples: Sequence[TrainingSample],
        advantages: Sequence[SequenceAdvantage],
        member: Member,
    ) -> None:
        self.groups.append((group, len(samples), member))
        self.sequences += len(group)
        self.samples += samples
        self.advantages += advantages

    def trim(self, batch_size: int, slot: Slot) -> list[Member]:
        """Leave whole groups above ``batch_size`` sequences, of which verl would make a second optimiser step, to the
        next slot. Returns them in order."""
        left: list[Member] = []
        while self.sequences > batch_size and len(self.groups) > 1:
            group, count, member = self.groups.pop()
            self.sequences -= len(group)
            keep = len(self.samples) - count
            del self.samples[keep:], self.advantages[keep:]
            left.insert(0, member)
        for group, *_ in self.groups:
            slot.scores += [float(score) for score in group.scores]
            if group.env_id is not None:
                slot.env_scores.setdefault(group.env_id, []).extend(float(score) for score in group.scores)
        slot.add("groups", len(self.groups))
        slot.add("carried", len(left))
        return left
