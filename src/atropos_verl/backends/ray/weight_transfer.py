"""Moves weights from a training worker into a replica's process: buckets in Ray's object store, applied as they arrive.

docs/internals.md ("Weights on Ray") draws the ways of a bucket."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.ray import RayClassWithInitArgs
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.errors import WeightSyncError

logger = logging.getLogger(__name__)

_TIMEOUT = 300.0  # seconds a receiver waits for the next bucket


@dataclass(slots=True)
class WeightBucket:
    """Some tensors as numpy bytes: Ray stores those out of band, without pickling their content."""

    tensors: list[tuple[str, torch.dtype, torch.Size, np.ndarray[Any, np.dtype[np.uint8]]]]
    """Name, dtype, shape and flat bytes of each."""

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> Self:
        flat = ((n, t, t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()) for n, t in tensors)
        return cls([(name, tensor.dtype, tensor.shape, array) for name, tensor, array in flat])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for *_, array in self.tensors)

    def unpack(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield views of the bytes, which must not be written to (the store is read-only)."""
        for name, dtype, shape, array in self.tensors:
            if array.nbytes == 0:
                yield name, torch.empty(shape, dtype=dtype)
                continue
            if not array.flags.writeable:
                # Call the same memory writable, so that torch takes it without a warning; ``owner`` keeps it alive.
                interface = array.__array_interface__ | {"data": (array.__array_interface__["data"][0], False)}
                array = np.asarray(SimpleNamespace(__array_interface__=interface, owner=array))
            yield name, torch.from_numpy(array).view(dtype).reshape(shape)


async def iter_buckets(weights: Any, bucket_bytes: int) -> AsyncIterator[tuple[WeightBucket, bool]]:
    """Buckets of up to ``bucket_bytes`` (or one tensor), and which is the last: empty when there are no weights."""
    held, size = list[tuple[str, torch.Tensor]](), 0
    async for name, tensor in weights:
        if held and size + tensor.nbytes > bucket_bytes:
            yield WeightBucket.pack(held), False
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    yield WeightBucket.pack(held), True


async def send_weights(
    receive: Callable[[str, WeightBucket, bool], Awaitable[Any]], weights: Any, bucket_bytes: int
) -> int:
    """Send every tensor of ``weights``, (name, tensor) pairs, sync or async, consumed one bucket at a time.

    ``receive`` makes a remote call with (update, bucket, last) and returns what to wait for. Returns the bytes when all
    have been taken; raises whatever the receiver raised (``WeightSyncError`` names the tensor)."""
    update_id, nbytes = uuid.uuid4().hex, 0
    weights = ensure_async_iterator(weights)
    try:
        async for bucket, last in iter_buckets(weights, bucket_bytes):
            nbytes += bucket.nbytes
            await receive(update_id, bucket, last)
    except Exception:
        async for _ in weights:  # every rank takes part in the gather of every tensor, whoever refused one
            pass
        raise
    return nbytes


class BucketQueue(asyncio.Queue[tuple[WeightBucket, bool] | None]):
    """Buckets of one update, one ahead of the reader; None: another update takes its place."""

    def __init__(self, timeout: float = _TIMEOUT) -> None:
        super().__init__(1)
        self._timeout = timeout

    async def take(self) -> tuple[WeightBucket, bool]:
        """The next bucket, and whether it is the last. Raises ``WeightSyncError`` when none comes."""
        try:
            item = await asyncio.wait_for(self.get(), self._timeout)
        except TimeoutError as error:
            text = f"no weights arrived for {self._timeout:g} s: the training worker died or hangs in a gather"
            raise WeightSyncError(text) from error
        if item is None:
            raise WeightSyncError("another weight update began before this one had ended")
        return item


class WeightReceiver:
    """The server's side. Runs ``apply``, which copies the tensors of an iterator or raises to refuse them, in a thread.
    After ``timeout`` seconds without a bucket the sender is taken for dead, and the update fails."""

    def __init__(self, apply: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], timeout: float = _TIMEOUT) -> None:
        self._apply, self._timeout = apply, timeout
        self._update_id = ""
        self._queue: BucketQueue
        self._done: asyncio.Future[Any] | None = None

    async def receive(self, update_id: str, bucket: WeightBucket, last: bool) -> Any:
        """Take a bucket of an update. The last one returns what ``apply`` returned, or raises its error. An update that
        has not ended when another begins fails with ``WeightSyncError``: its sender is gone."""
        if self._update_id != update_id:
            await self._begin(update_id)
        done = self._done
        assert done is not None
        # The engine may refuse a tensor while more are on their way: then nobody reads the queue any more.
        put = asyncio.ensure_future(self._queue.put((bucket, last)))
        await asyncio.wait({put, done}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()
        return await asyncio.shield(done) if last or done.done() else None

    async def _begin(self, update_id: str) -> None:
        """End the update before this one, if it has not ended, and start to apply this one."""
        if self._done is not None:
            if self._queue.full():
                self._queue.get_nowait()
            self._queue.put_nowait(None)
            await asyncio.wait({self._done})
            if (error := self._done.exception()) is not None:
                logger.warning("the weight update before this one had failed: %s", error)
        self._update_id = update_id
        self._queue = queue = BucketQueue(self._timeout)
        loop = asyncio.get_running_loop()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            last = False
            while not last:
                bucket, last = asyncio.run_coroutine_threadsafe(queue.take(), loop).result()
                yield from bucket.unpack()

        self._done = asyncio.ensure_future(asyncio.to_thread(lambda: self._apply(tensors())))


@CheckpointEngineRegistry.register("ray_object_store")
class RayObjectStoreCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """verl's ``CheckpointEngine``, on both sides. ``is_master`` None: a receiver; True: trainer rank 0."""

    queue: BucketQueue | None = None

    def __init__(self, bucket_size: int, is_master: bool | None = None) -> None:
        self.bucket_size, self.is_master = bucket_size, is_master
        self._receivers: list[Any] = []

    def prepare(self) -> Any:
        """Return the actor of a receiver, which is ready for buckets from now on."""
        if self.is_master is not None:
            return None
        self.queue = BucketQueue()
        return ray.get_runtime_context().current_actor

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        receivers = metadata[trainer_world_size:]
        return {"receivers": [receivers] * trainer_world_size}, {"receivers": [[]] * rollout_world_size}

    def init_process_group(self, receivers: list[Any]) -> None:
        self._receivers = receivers

    def finalize(self) -> None:
        self._receivers, self.queue = [], None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Every rank gathers; rank 0 sends. Returns ``{"weight_sync/bytes": …}`` on rank 0."""
        del global_steps  # the receivers get it from verl
        if not self.is_master:
            async for _name, _tensor in ensure_async_iterator(weights):
                pass
            return {}

        def deliver(_: str, bucket: WeightBucket, last: bool) -> Awaitable[Any]:
            reference = ray.put(bucket)
            return asyncio.gather(*(r.deliver_weights.remote(reference, last) for r in self._receivers))

        return {"weight_sync/bytes": float(await send_weights(deliver, weights, self.bucket_size))}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Every tensor of an update."""
        del global_steps
        if self.queue is None:
            raise WeightSyncError("weights arrived at a replica that was not prepared for an update")
        last = False
        while not last:
            bucket, last = await self.queue.take()
            for pair in bucket.unpack():
                yield pair


class AtroposCheckpointEngineWorker(CheckpointEngineWorker):  # type: ignore[misc]
    """verl's worker of a standalone replica, which can be called by the trainer's rank 0."""

    async def deliver_weights(self, bucket: WeightBucket, last: bool) -> None:
        """Take a bucket. Returns when the one before it has been read."""
        await self.checkpoint_engine.queue.put((bucket, last))


def standalone_worker(replica: Any) -> Any:
    """For ``RolloutReplica.get_ray_class_with_init_args``: verl's worker of a standalone replica, replaced by ours."""
    return RayClassWithInitArgs(
        cls=ray.remote(AtroposCheckpointEngineWorker),
        rollout_config=replica.config,
        model_config=replica.model_config,
        replica_rank=replica.replica_rank,
    )
