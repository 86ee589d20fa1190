"""Weights from the trainer to standalone replicas without an accelerator: verl's ``separate_async`` on CPU.

verl ships checkpoint engines over NCCL, NIXL and the like. This one needs Ray alone::

    rollout.checkpoint_engine.backend: ray_object_store
    rollout.checkpoint_engine.custom_backend_module: atropos_verl.backends.ray.checkpoint_engine

::

    trainer rank 0 ──put each bucket once──▶ object store ◀──reads, no copy── server actor of every replica
          └──────────reference──▶ CheckpointEngineWorker ──reference──▶──┘

The trainer gathers one bucket while the replicas copy another. Between hosts Ray moves each bucket once per host.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.backends.ray.weight_transfer import BucketStream, iter_buckets
from atropos_verl.errors import WeightSyncError

__all__ = ["AtroposCheckpointEngineWorker", "RayObjectStoreCheckpointEngine", "standalone_worker"]

_IN_FLIGHT = 2
_DELIVERY_TIMEOUT = 300.0
"""Seconds a receiver waits for the next bucket."""


@CheckpointEngineRegistry.register("ray_object_store")
class RayObjectStoreCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """verl's ``CheckpointEngine``, on both sides. ``is_master`` None: a receiver; True: trainer rank 0."""

    def __init__(self, bucket_size: int, is_master: bool | None = None) -> None:
        self.bucket_size = bucket_size
        self.is_receiver = is_master is None
        self.is_master = bool(is_master)
        self._receivers: list[Any] = []
        self._stream: BucketStream | None = None

    def prepare(self) -> Any:
        """A receiver names its actor, and is ready for buckets from now on."""
        if not self.is_receiver:
            return None
        self._stream = BucketStream(_DELIVERY_TIMEOUT)
        return ray.get_runtime_context().current_actor

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        receivers = metadata[trainer_world_size:]
        return {"receivers": [receivers] * trainer_world_size}, {"receivers": [[]] * rollout_world_size}

    def init_process_group(self, receivers: list[Any]) -> None:
        self._receivers = receivers if self.is_master else []

    def finalize(self) -> None:
        self._receivers = []
        self._stream = None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Every rank gathers; rank 0 sends. Returns ``{"weight_sync/bytes": …}`` on rank 0."""
        del global_steps  # the receivers get it from verl
        if not self.is_master:
            async for _name, _tensor in ensure_async_iterator(weights):
                pass
            return {}
        pending: list[list[Any]] = []
        total = 0
        async for index, bucket, last in iter_buckets(weights, self.bucket_size):
            total += bucket.nbytes
            while len(pending) >= _IN_FLIGHT:
                await asyncio.gather(*pending.pop(0))
            # In a list, so that the worker gets the reference and passes it on without reading the bucket.
            reference = [ray.put(bucket)]
            pending.append([r.deliver_weights.remote(index, reference, last) for r in self._receivers])
        for calls in pending:
            await asyncio.gather(*calls)
        return {"weight_sync/bytes": float(total)}

    def receive_weights(self, global_steps: int | None = None) -> BucketStream:
        """The stream of an update. Our adapter passes its references on; others iterate over its tensors."""
        del global_steps
        return self._require_stream()

    async def deliver(self, index: int, reference: list[Any], last: bool) -> None:
        """Called for rank 0: bucket ``index``. Returns when the one before it has been taken."""
        await self._require_stream().put(index, reference[0], last)

    def _require_stream(self) -> BucketStream:
        if self._stream is None:
            raise WeightSyncError("weights arrived at a replica that was not prepared for an update")
        return self._stream


class AtroposCheckpointEngineWorker(CheckpointEngineWorker):  # type: ignore[misc]
    """verl's worker of a standalone replica, which can be called by the trainer's rank 0."""

    async def deliver_weights(self, index: int, reference: list[Any], last: bool) -> None:
        await self.checkpoint_engine.deliver(index, reference, last)


def standalone_worker(replica: Any) -> Any:
    """For ``RolloutReplica.get_ray_class_with_init_args``: verl's worker of a standalone replica, replaced by ours."""
    from verl.single_controller.ray import RayClassWithInitArgs

    return RayClassWithInitArgs(
        cls=ray.remote(AtroposCheckpointEngineWorker),
        rollout_config=replica.config,
        model_config=replica.model_config,
        replica_rank=replica.replica_rank,
    )
