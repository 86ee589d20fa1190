"""The training worker's hand on its ``transformers`` replica: memory, and the newest weights."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout

from atropos_verl.backends.ray.weight_transfer import TransferReport, send_weights

__all__ = ["TransformersServerAdapter"]

logger = logging.getLogger(__name__)


class TransformersServerAdapter(BaseRollout):  # type: ignore[misc]
    """One per training worker (or per ``CheckpointEngineWorker``); the replica's leader rank talks to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        world_size = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        self.replica_rank = rank // world_size if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % world_size == 0
        self.last_transfer: TransferReport | None = None
        """What the last update moved; None on ranks that send nothing."""
        self._server: Any = None

    @property
    def server(self) -> Any:
        """The replica's actor, which is started after this adapter."""
        if self._server is None:
            self._server = ray.get_actor(f"{self.config.name}_server_{self.replica_rank}_0")
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Take memory again: ``weights`` before an update, ``kv_cache`` after it (generation goes on then)."""
        if self.is_leader_rank:
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Stop at a token boundary and give memory back."""
        if self.is_leader_rank:
            await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Any,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = True,
        **_: Any,
    ) -> None:
        """Send ``weights`` (or, with ``peft_config``, an adapter's) into the replica as policy ``global_steps``.

        Every rank consumes ``weights``: gathering a sharded tensor is a collective.
        Raises ``WeightSyncError`` naming what does not fit.
        """
        if wire_format != "named_tensors":
            raise NotImplementedError(f"rollout.name={self.config.name} takes named tensors, not {wire_format!r}")
        if not self.is_leader_rank:
            async for _name, _tensor in _ensure_async(weights):
                pass
            return
        started = time.perf_counter()
        settings = {
            "global_steps": global_steps,
            "peft_config": None if peft_config is None else _plain(peft_config),
            "base_sync": peft_config is not None and not base_sync_done,
        }
        self.last_transfer = await send_weights(
            lambda *part: self.server.receive_weights.remote(*part, settings),
            weights,
            self.config.checkpoint_engine.update_weights_bucket_megabytes << 20,
        )
        logger.info(
            "weights of step %s into replica %d: %d tensors, %.1f MB in %d bucket(s), %.3f s",
            global_steps,
            self.replica_rank,
            len(self.last_transfer.names),
            self.last_transfer.nbytes / 1e6,
            self.last_transfer.buckets,
            time.perf_counter() - started,
        )


async def _ensure_async(items: Any) -> Any:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _plain(peft_config: dict[str, Any]) -> dict[str, Any]:
    """Without peft's own classes: the server needs numbers and strings only."""
    simple = (bool, int, float, str, type(None))
    return {
        key: value if isinstance(value, simple) else dict(value) if isinstance(value, dict) else list(value)
        for key, value in peft_config.items()
        if isinstance(value, (*simple, dict, list, tuple, set))
    }
