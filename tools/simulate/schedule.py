"""The schedule of a run's ``mode``: who waits for whom."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One mode."""

    fetch_ahead: int
    """Batches fetched and prepared while one is trained on. Never more than 1: what waits longer grows stale."""
    generates_while_training: bool
    """The gate stays open during an optimiser step; new weights are swapped in at a token boundary."""


def schedule_of(mode: str) -> Schedule:
    """``sync``: rollouts and training take turns, every batch is of the newest weights. ``overlap``: both go on."""
    overlap = {"sync": False, "overlap": True}[mode]
    return Schedule(fetch_ahead=int(overlap), generates_while_training=overlap)
