"""Moves weights from a training worker into a replica's process: buckets in Ray's object store, applied as they arrive.

docs/internals.md ("Weights on Ray") draws the ways of a bucket.
"""

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
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.errors import WeightSyncError

logger = logging.getLogger(__name__)

_IN_FLIGHT = 2
_TIMEOUT = 300.0
"""Seconds a receiver waits for the next bucket."""

Part = tuple[int, Any, bool]
"""Index of a bucket, the bucket or a reference to it, and whether it is the last of its update."""


@dataclass(slots=True)
class WeightBucket:
    """Some tensors as numpy bytes: Ray stores those out of band, without pickling their content."""

    tensors: list[tuple[str, torch.dtype, torch.Size, np.ndarray[Any, np.dtype[np.uint8]]]]
    """Name, dtype, shape and flat bytes of each."""

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> Self:
        bucket = cls([])
        for name, tensor in tensors:
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            bucket.tensors.append((name, tensor.dtype, tensor.shape, flat.numpy()))
        return bucket

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


async def iter_buckets(weights: Any, bucket_bytes: int) -> AsyncIterator[tuple[int, WeightBucket, bool]]:
    """``(index, bucket, last)``. A bucket is full when the next tensor would take it beyond ``bucket_bytes``.

    A larger tensor goes alone. There is always a last bucket, empty when there are no weights.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = index = 0
    async for name, tensor in ensure_async_iterator(weights):
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > bucket_bytes:
            yield index, WeightBucket.pack(held), False
            held, size, index = [], 0, index + 1
        held.append((name, tensor))
        size += nbytes
    yield index, WeightBucket.pack(held), True


async def send_weights(
    receive: Callable[[str, int, Any, bool], Awaitable[Any]], weights: Any, bucket_bytes: int
) -> int:
    """Send every tensor of ``weights``; returns their bytes when all of them have been taken.

    Args:
        receive: starts a remote call with (update, index, bucket, last) and returns what to wait for.
        weights: (name, tensor) pairs, sync or async, consumed one bucket at a time, so that about three buckets exist
            at once; or a ``BucketStream``, whose buckets are passed on without being read.
        bucket_bytes: see ``iter_buckets``.

    Raises whatever the receiver raised (``WeightSyncError`` names the tensor).
    """
    update_id = uuid.uuid4().hex
    pending: list[Awaitable[Any]] = []
    nbytes = 0
    buckets = weights.parts() if isinstance(weights, BucketStream) else iter_buckets(weights, bucket_bytes)
    try:
        async for index, bucket, last in buckets:
            nbytes += getattr(bucket, "nbytes", 0)  # of a reference nothing is known
            while len(pending) >= _IN_FLIGHT:
                await pending.pop(0)
            pending.append(receive(update_id, index, bucket, last))
        while pending:
            await pending.pop(0)
    except Exception:
        # The other calls fail as well, and asyncio logs an exception that nobody has looked at.
        await asyncio.gather(*pending, return_exceptions=True)
        async for _ in buckets:  # every rank takes part in the gather of every tensor, whoever refused one
            pass
        raise
    return nbytes


class BucketStream:
    """Buckets (or references to them) of one update, in order, at most one ahead of the reader.

    Args:
        timeout: seconds to wait for the next bucket; ``WeightSyncError`` then.
    """

    def __init__(self, timeout: float = _TIMEOUT) -> None:
        self._timeout = timeout
        self._turn = asyncio.Condition()
        self._held: Part | None = None
        self._next = 0
        self._failure: Exception | None = None

    async def put(self, index: int, item: Any, last: bool) -> None:
        """Add bucket ``index``. Waits for those before it, which may arrive later, to be added and read."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._next == index and self._held is None)
            self._held, self._next = (index, item, last), index + 1
            self._turn.notify_all()

    async def fail(self, error: Exception) -> None:
        """Give the reader ``error`` instead of the next bucket."""
        async with self._turn:
            self._failure = error
            self._turn.notify_all()

    async def next_part(self) -> Part:
        """Waits for the next bucket and takes it."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._turn.wait_for(lambda: self._held is not None or self._failure is not None)
            except TimeoutError as error:
                raise WeightSyncError(
                    f"no weights arrived for {self._timeout:g} s: the training worker died or hangs in a gather"
                ) from error
            if self._failure is not None:
                raise self._failure
            assert self._held is not None
            part, self._held = self._held, None
            self._turn.notify_all()
            return part

    async def parts(self) -> AsyncIterator[Part]:
        """Yield every bucket as it was put."""
        last = False
        while not last:
            part = await self.next_part()
            last = part[-1]
            yield part

    async def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of every bucket, read from the object store."""
        async for _, reference, _ in self.parts():
            for pair in (await reference).unpack():
                yield pair


class WeightReceiver:
    """The server's side. Runs ``apply`` in a thread and feeds it the tensors as the buckets arrive.

    Args:
        apply: takes an iterator of tensors, copies them in and returns a result; raises to refuse them.
        timeout: seconds to wait for the next bucket; the sender is then taken for dead and the update fails.
    """

    def __init__(self, apply: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], timeout: float = _TIMEOUT) -> None:
        self._apply = apply
        self._timeout = timeout
        self._update_id = ""
        self._stream: BucketStream
        self._done: asyncio.Future[Any] | None = None
        self._lock = asyncio.Lock()

    async def receive(self, update_id: str, index: int, bucket: WeightBucket, last: bool) -> Any:
        """Take bucket ``index`` of an update. The last one returns what ``apply`` returned, or raises its error.

        An update that has not ended when another begins fails with ``WeightSyncError``: its sender is gone.
        """
        async with self._lock:
            if self._update_id != update_id:
                await self._begin(update_id)
            stream, done = self._stream, self._done
        assert done is not None
        # The engine may refuse a tensor while more are on their way: then nobody reads the stream any more.
        put = asyncio.ensure_future(stream.put(index, bucket, last))
        await asyncio.wait({put, done}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()
        if last or done.done():
            return await asyncio.shield(done)
        return None

    async def _begin(self, update_id: str) -> None:
        """End the update before this one, if it has not ended, and start to apply this one."""
        if self._done is not None:
            await self._stream.fail(WeightSyncError("another weight update began before this one had ended"))
            await asyncio.wait({self._done})
            if (error := self._done.exception()) is not None:
                logger.warning("the weight update before this one had failed: %s", error)
        self._update_id = update_id
        self._stream = stream = BucketStream(self._timeout)
        loop = asyncio.get_running_loop()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            last = False
            while not last:
                _, bucket, last = asyncio.run_coroutine_threadsafe(stream.next_part(), loop).result()
                yield from bucket.unpack()

        self._done = asyncio.ensure_future(asyncio.to_thread(lambda: self._apply(tensors())))


@CheckpointEngineRegistry.register("ray_object_store")
class RayObjectStoreCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """verl's ``CheckpointEngine``, on both sides. ``is_master`` None: a receiver; True: trainer rank 0."""

    def __init__(self, bucket_size: int, is_master: bool | None = None) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._receivers: list[Any] = []
        self._stream: BucketStream | None = None

    def prepare(self) -> Any:
        """Return the actor of a receiver, which is ready for buckets from now on."""
        if self.is_master is not None:
            return None
        self._stream = BucketStream()
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

        def deliver(_: str, index: int, bucket: WeightBucket, last: bool) -> Awaitable[Any]:
            # In a list, so that the worker gets the reference and passes it on without reading the bucket.
            reference = [ray.put(bucket)]
            return asyncio.gather(*(r.deliver_weights.remote(index, reference, last) for r in self._receivers))

        return {"weight_sync/bytes": float(await send_weights(deliver, weights, self.bucket_size))}

    def receive_weights(self, global_steps: int | None = None) -> BucketStream:
        """Return the stream of an update. Our adapter passes its references on; others iterate over its tensors."""
        del global_steps
        if self._stream is None:
            raise WeightSyncError("weights arrived at a replica that was not prepared for an update")
        return self._stream


class AtroposCheckpointEngineWorker(CheckpointEngineWorker):  # type: ignore[misc]
    """verl's worker of a standalone replica, which can be called by the trainer's rank 0."""

    async def deliver_weights(self, index: int, reference: list[Any], last: bool) -> None:
        """Take bucket ``index``. Returns when the one before it has been read."""
        await self.checkpoint_engine.receive_weights().put(index, reference[0], last)


def standalone_worker(replica: Any) -> Any:
    """For ``RolloutReplica.get_ray_class_with_init_args``: verl's worker of a standalone replica, replaced by ours."""
    from verl.single_controller.ray import RayClassWithInitArgs

    return RayClassWithInitArgs(
        cls=ray.remote(AtroposCheckpointEngineWorker),
        rollout_config=replica.config,
        model_config=replica.model_config,
        replica_rank=replica.replica_rank,
    )
