"""verl's training workers for CPU: the same classes, with a process group that torch accepts.

Importing this module also registers the CPU engines (``verl_plugin.engines``) in the worker's process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.utils.device import get_device_name
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from atropos_verl.verl_plugin import engines  # noqa: F401  registers

__all__ = [
    "AtroposActorRolloutRefWorker",
    "AtroposDetachActorWorker",
    "AtroposTrainingWorker",
    "worker_class",
]


def _init_process_group() -> None:
    """verl asks for the backends "cpu:gloo,cpu:gloo" on a CPU platform, which torch refuses.

    It asks only where no group exists. Remove when ``initialize_global_process_group_ray`` (verl 0.9.1,
    utils/distributed.py) names each device once.
    """
    if get_device_name() == "cpu" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="cpu:gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


class AtroposTrainingWorker(TrainingWorker):  # type: ignore[misc]
    """verl's ``TrainingWorker`` (the critic)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _init_process_group()
        super().__init__(*args, **kwargs)


class AtroposActorRolloutRefWorker(ActorRolloutRefWorker):  # type: ignore[misc]
    """verl's ``ActorRolloutRefWorker``: sync and colocate_async."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _init_process_group()
        super().__init__(*args, **kwargs)


class AtroposDetachActorWorker(DetachActorWorker):  # type: ignore[misc]
    """verl's ``DetachActorWorker``: separate_async."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _init_process_group()
        super().__init__(*args, **kwargs)

    @property
    def copy_handler(self) -> Any:
        """verl's ``fsdp2_sharded_save_to_cpu`` keeps ``tensor.cpu()``, which on CPU is the live weight and no copy: the
        old policy that log-probabilities are computed with would be the new one. Remove when it clones (verl 0.9.1,
        utils/fsdp_utils.py:1180).
        """
        save = super().copy_handler
        return own_copies(save) if get_device_name() == "cpu" else save


def own_copies(save: Any) -> Any:
    """``save`` (module → ``(state, spec)``, state: name → ``(tensor, spec)``) with tensors of its own."""

    def save_copies(module: torch.nn.Module) -> Any:
        state, spec = save(module)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    return save_copies


_CLASSES = {
    TrainingWorker: AtroposTrainingWorker,
    ActorRolloutRefWorker: AtroposActorRolloutRefWorker,
    DetachActorWorker: AtroposDetachActorWorker,
}


def worker_class(verl_class: type) -> type:
    """Ours for one of verl's worker classes. Raises ``KeyError`` naming a class that has none.

    For a trainer's ``_init_resource_pool_mgr``, whose ``role_worker_mapping`` holds Ray classes::

        for role, remote in self.role_worker_mapping.items():
            self.role_worker_mapping[role] = ray.remote(worker_class(remote.__ray_metadata__.modified_class))
    """
    for known, ours in _CLASSES.items():
        # Ray wraps the class it is given in a subclass of the same name.
        if verl_class is known or (verl_class.__name__ == known.__name__ and issubclass(verl_class, known)):
            return ours
    raise KeyError(f"no worker for {verl_class.__name__}; known: {', '.join(cls.__name__ for cls in _CLASSES)}")
