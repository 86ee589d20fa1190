"""What tests plug into runs on Ray by its path: the processes of a run import it from ``tests/``."""

from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

LAST_SYNC = 3
"""The last step whose weights reach the replicas."""


class SkipSyncs(CheckpointCallback):  # type: ignore[misc]
    """From step 3 on the replicas get no weights, while everything says that they did.

    verl makes it in the task runner's process. Needs ``rollout.free_cache_engine=false``: an engine that has released
    its weights generates nothing until it gets new ones.
    """

    def __init__(self, config: Any) -> None:
        from atropos_verl.backends.ray.trainer import AtroposSyncTrainer

        sync = AtroposSyncTrainer.update_weights_from_tensor

        def sync_or_not(trainer: Any, tensors: Any) -> None:
            if trainer.global_steps <= LAST_SYNC:
                sync(trainer, tensors)

        AtroposSyncTrainer.update_weights_from_tensor = sync_or_not  # type: ignore[method-assign]


def constant_loss(logprobs: Any, *_: Any, **__: Any) -> Any:
    return logprobs.new_tensor(2.5), {"of_the_user": 7.0}


def two_or_minus_two(scores: Any, group: Any) -> Any:
    return [2.0 if score > 1.5 else -2.0 for score in scores]


def numbered(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(i) for i in range(len(completions))]
