"""verl's replay buffers; they end the run when its source of batches has failed, and look oftener than every 2 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

__all__ = ["AtroposReplayBuffer", "AtroposReplayBufferAsync"]


class _Watching:
    """Mixin: ``check`` runs between two looks, ``on_evicted`` hears of slots that verl dropped as too old."""

    check: Callable[[], None]
    on_evicted: Callable[[set[str]], None]

    def watch(self, check: Callable[[], None], on_evicted: Callable[[set[str]], None], poll_interval: float) -> None:
        self.check, self.on_evicted, self.poll_interval = check, on_evicted, poll_interval

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        self.check()
        waited: float = super()._wait_for_next_poll(partition_id, last_debug_time)  # type: ignore[misc]
        return waited

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)  # type: ignore[misc]
        if partition_id == "train":
            self.on_evicted(set(uids))

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        # A slot of the training partition is a whole batch (see transfer.py); verl counts prompts.
        wanted = 1 if partition_id == "train" else batch_size
        return super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=wanted)  # type: ignore[misc]


class AtroposReplayBuffer(_Watching, ReplayBuffer):  # type: ignore[misc]
    """Synchronous sampling."""


class AtroposReplayBufferAsync(_Watching, ReplayBufferAsync):  # type: ignore[misc]
    """Sampling with prefetched batches and a bound on their age."""
