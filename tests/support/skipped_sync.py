"""A fault for a Ray run: from step 3 on the replicas get no weights, while everything says that they did.

``trainer.checkpoint_callback_class=support.skipped_sync.SkipSyncs``: verl makes it in the task runner's process. Needs
``rollout.free_cache_engine=false``: an engine that has released its weights generates nothing until it gets new ones.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

LAST_SYNC = 3
"""The last step whose weights reach the replicas."""


class SkipSyncs(CheckpointCallback):  # type: ignore[misc]
    """Replaces the trainer's weight update with one that does nothing."""

    def __init__(self, config: Any) -> None:
        from atropos_verl.backends.ray.trainer import AtroposSyncTrainer

        sync = AtroposSyncTrainer._verl_sync

        def sync_or_not(trainer: Any) -> None:
            if trainer.global_steps <= LAST_SYNC:
                sync(trainer)

        AtroposSyncTrainer._verl_sync = sync_or_not  # type: ignore[method-assign]
