"""Where the loop's batches come from: fetched when they are wanted, or one ahead while the trainer trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from atropos_verl.backends.local.prefetch import Prefetcher

if TYPE_CHECKING:
    from atropos_verl.backends.local.rollout_data import RolloutData
    from atropos_verl.backends.local.trainer import AtroposTrainer

__all__ = ["BatchFeed", "OverlapFeed", "SyncFeed", "make_feed"]

Check = Callable[[], None]
Wait = Callable[[Check | None], "RolloutData"]
"""Waits for the next batch, calling its argument meanwhile; raises what that raises."""


class BatchFeed(Protocol):
    """Batches, one after the other."""

    def take(self, *, more: bool) -> RolloutData:
        """The next batch. ``more``: another one will be wanted after it."""

    def close(self) -> None:
        """End what was started. Idempotent."""


class SyncFeed:
    """One batch at a time, when it is wanted: all of it was made with the newest weights."""

    def __init__(self, wait: Wait, check: Check | None) -> None:
        self._wait = wait
        self._check = check

    def take(self, *, more: bool) -> RolloutData:
        del more
        return self._wait(self._check)

    def close(self) -> None:
        """Nothing was started."""


class OverlapFeed:
    """One batch ahead: fetched, journalled, decoded and made into samples while the trainer trains on the one before.

    A batch that is left at the end goes back to the trainer as its next one; the journal holds it.
    """

    def __init__(self, trainer: AtroposTrainer, wait: Wait, check: Check | None) -> None:
        self._trainer = trainer
        self._wait = wait
        self._prefetcher: Prefetcher[RolloutData] = Prefetcher(self._fetch, check=check)

    def take(self, *, more: bool) -> RolloutData:
        batch = self._prefetcher.take()
        if more:
            self._prefetcher.start()
        return batch

    def close(self) -> None:
        self._trainer.in_hand.put_back(self._prefetcher.close())

    def _fetch(self, check: Check) -> RolloutData:
        started = time.perf_counter()
        batch = self._wait(check)
        self._trainer.prepare(batch)
        batch.timings["prefetch"] = time.perf_counter() - started
        return batch


def make_feed(trainer: AtroposTrainer, wait: Wait, check: Check | None) -> BatchFeed:
    """The feed that the run's ``mode`` asks for. ``check`` raises when a process of the run has died."""
    ahead = trainer.config.is_overlapped
    return OverlapFeed(trainer, wait, check) if ahead else SyncFeed(wait, check)
