"""The trajectory API's part of a simulation: its own queue and its own choice of batches."""

from atropos_verl.protocol.messages import BatchPolicy
from atropos_verl.server.batcher import GroupQueue, QueueView, StoredGroup, choose_batch
from simulate.generation import Group


class TrajectoryQueue:
    """Groups wait here until they are part of a batch.

    Args:
        batch_size: sequences.
        sizes: those that groups can have.
    """

    def __init__(self, batch_size: int, sizes: frozenset[int]) -> None:
        self._policy = BatchPolicy(batch_size=batch_size)
        self._sizes = sizes
        self._queue = GroupQueue()
        self._groups: dict[int, Group] = {}
        """Arrival number → the group."""
        self._arrivals = 0

    @property
    def groups(self) -> int:
        """Groups that wait."""
        return self._queue.groups

    @property
    def sequences(self) -> int:
        """Of the groups that wait."""
        return self._queue.sequences

    def add(self, group: Group, now: float) -> None:
        """A group arrives."""
        group.accepted = True
        self._arrivals += 1
        self._groups[self._arrivals] = group
        self._queue.add(
            StoredGroup(
                seq=self._arrivals,
                env_id=group.environment,
                size=len(group.lengths),
                tokens=int(sum(group.lengths)),
                arrived=now,
                digest=b"",
                raw=b"",
            )
        )

    def next_batch(self, now: float) -> list[Group] | None:
        """Answers GET /batch."""
        queue = self._queue
        view = QueueView(
            classes=queue.classes,
            total=queue.in_classes,
            last_arrival=queue.last_arrival,
            sizes_seen=self._sizes,
        )
        chosen = choose_batch(view, self._policy, now)
        if chosen is None:
            return None
        seqs = {candidate.seq for candidate in chosen}
        queue.take([group for members in queue.classes.values() for group in members if group.seq in seqs])
        return [self._groups.pop(seq) for seq in sorted(seqs)]
