"""verl's replicas and our gateway's gate, as ``AtroposShardingManager`` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from atropos_verl.backends.ray.gateway import ClusterGateway

__all__ = ["ModeGate", "Replicas"]


class Replicas:
    """verl's rollout replicas as the engine of ``AtroposShardingManager``; verl's own hooks do the work."""

    def __init__(self, sync: Callable[[], Any], release: Callable[[], Any]) -> None:
        self._sync, self._release = sync, release

    def update_weights_from_tensor(self, named_tensors: Any) -> None:
        """verl moves the tensors between its workers and replicas itself, and wakes the replicas for it."""
        del named_tensors
        self._sync()

    def resume_memory_occupation(self) -> None:
        """Part of verl's weight update."""

    def release_memory_occupation(self) -> None:
        self._release()


class _Trainer(Protocol):
    """What the gate needs to know of a trainer."""

    gateway: ClusterGateway | None
    drains: bool

    @property
    def policy_version(self) -> int: ...


class ModeGate:
    """The gateway's gate, shut as the trainer's mode wants it: after the requests in flight, or at once."""

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer

    def pause(self, timeout: float) -> None:
        if self._trainer.gateway is not None:
            self._trainer.gateway.hold(drain=self._trainer.drains, timeout=timeout)

    def resume(self) -> None:
        if self._trainer.gateway is not None:
            self._trainer.gateway.release(self._trainer.policy_version)
