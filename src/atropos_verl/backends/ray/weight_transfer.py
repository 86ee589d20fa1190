"""Weights from a training worker into a replica's process: buckets in Ray's object store, applied while more arrive.

::

    worker (leader rank)                                     server actor
    tensors ─▶ WeightBucket ──object store (shared memory)──▶ WeightReceiver ─▶ engine.update_weights_from_tensor(...)
              one copy                                        zero-copy view     one copy

One call per bucket, two on their way at a time: the engine copies one while the next is gathered. Within a host the
store is shared memory; between hosts Ray moves the bucket.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atropos_verl.errors import WeightSyncError

__all__ = ["BucketStream", "TransferReport", "WeightBucket", "WeightReceiver", "iter_buckets", "send_weights"]

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]
_IN_FLIGHT = 2


@dataclass(slots=True)
class WeightBucket:
    """Some tensors as numpy bytes: Ray stores those out of band, without pickling their content."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[tuple[int, ...]]
    data: list[np.ndarray[Any, np.dtype[np.uint8]]]
    """Flat bytes of each tensor."""

    @classmethod
    def pack(cls, tensors: NamedTensors) -> WeightBucket:
        bucket = cls([], [], [], [])
        for name, tensor in tensors:
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            bucket.names.append(name)
            bucket.dtypes.append(tensor.dtype)
            bucket.shapes.append(tuple(tensor.shape))
            bucket.data.append(flat.numpy())
        return bucket

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.data)

    def unpack(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the bytes, not to be written to (the store is read-only)."""
        for name, dtype, shape, array in zip(self.names, self.dtypes, self.shapes, self.data, strict=True):
            if array.nbytes == 0:
                yield name, torch.empty(shape, dtype=dtype)
                continue
            array = array if array.flags.writeable else _writable_view(array)
            yield name, torch.from_numpy(array).view(dtype).reshape(shape)


def _writable_view(array: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The same memory, called writable so that torch takes it without a warning. Nobody writes to it."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return np.asarray(_Interface(interface, array))


class _Interface:
    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = interface
        self._owner = owner


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What one update moved."""

    names: tuple[str, ...]
    """Tensors sent, in order."""
    nbytes: int
    buckets: int


async def iter_buckets(weights: Any, bucket_bytes: int) -> AsyncIterator[tuple[int, WeightBucket, bool]]:
    """``(index, bucket, last)``. A bucket is full when the next tensor would take it beyond ``bucket_bytes``.

    A larger tensor goes alone. There is always a last bucket, empty when there are no weights.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = index = 0
    async for name, tensor in _aiter(weights):
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > bucket_bytes:
            yield index, WeightBucket.pack(held), False
            held, size, index = [], 0, index + 1
        held.append((name, tensor))
        size += nbytes
    yield index, WeightBucket.pack(held), True


async def send_weights(receive: Callable[..., Any], weights: Any, bucket_bytes: int) -> TransferReport:
    """Send every tensor of ``weights``; returns when the engine has taken them all.

    Args:
        receive: starts the remote ``WeightReceiver.receive`` and returns an awaitable.
        weights: (name, tensor) pairs, sync or async, consumed one bucket at a time, so that about three buckets exist
            at once; or a ``BucketStream``, whose buckets are passed on without being read.
        bucket_bytes: see ``iter_buckets``.

    Raises whatever the engine raised (``WeightSyncError`` names the tensor).
    """
    update_id = uuid.uuid4().hex
    names: list[str] = []
    pending: list[Any] = []
    nbytes = count = 0
    buckets = weights.references() if isinstance(weights, BucketStream) else iter_buckets(weights, bucket_bytes)
    async for index, bucket, last in buckets:
        if isinstance(bucket, WeightBucket):
            names += bucket.names
            nbytes += bucket.nbytes
        while len(pending) >= _IN_FLIGHT:
            await pending.pop(0)
        pending.append(receive(update_id, index, bucket, last))
        count += 1
    for call in pending:
        await call
    return TransferReport(names=tuple(names), nbytes=nbytes, buckets=count)


async def _aiter(items: Any) -> AsyncIterator[tuple[str, torch.Tensor]]:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class BucketStream:
    """Buckets (or references to them) of one update, in order, at most one ahead of who reads them.

    Args:
        timeout: seconds to wait for the next bucket; ``WeightSyncError`` then.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._queue: asyncio.Queue[tuple[int, Any, bool]] = asyncio.Queue(maxsize=1)
        self._turn = asyncio.Condition()
        self._next = 0

    async def put(self, index: int, item: Any, last: bool) -> None:
        """Bucket ``index``; waits for those before it, which may arrive later."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._next == index)
            await self._queue.put((index, item, last))
            self._next = index + 1
            self._turn.notify_all()

    async def references(self) -> AsyncIterator[tuple[int, Any, bool]]:
        """``(index, item, last)`` as they were put."""
        last = False
        while not last:
            try:
                async with asyncio.timeout(self._timeout):
                    index, item, last = await self._queue.get()
            except TimeoutError as error:
                raise WeightSyncError(
                    f"no weights arrived for {self._timeout:g} s: the training worker died or hangs in a gather"
                ) from error
            yield index, item, last

    async def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Every tensor of every bucket, read from the object store."""
        async for _, item, _ in self.references():
            bucket = item if isinstance(item, WeightBucket) else await item
            for pair in bucket.unpack():
                yield pair


class WeightReceiver:
    """The server's side. Runs ``apply`` in a thread and feeds it the tensors as the buckets arrive.

    Args:
        apply: takes an iterator of tensors, copies them in and returns a result; raises to refuse them.
        timeout: seconds to wait for the next bucket; the sender is then taken for dead and the update fails.
    """

    def __init__(self, apply: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], timeout: float = 300.0) -> None:
        self._apply = apply
        self._timeout = timeout
        self._update: _Update | None = None
        self._lock = asyncio.Lock()

    async def receive(self, update_id: str, index: int, bucket: WeightBucket, last: bool) -> Any:
        """Take bucket ``index`` of an update. The last one returns what ``apply`` returned, or raises its error.

        An update that has not ended when another begins fails with ``WeightSyncError``: its sender is gone.
        """
        async with self._lock:
            update = self._update
            if update is None or update.update_id != update_id:
                if update is not None:
                    await update.abandon()
                update = self._update = _Update(update_id, self._apply, self._timeout)
        return await update.put(index, bucket, last)


class _Update:
    """One update on its way: a stream, and the thread that applies it."""

    def __init__(self, update_id: str, apply: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], timeout: float):
        self.update_id = update_id
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._stream = BucketStream(timeout)
        self._buckets = self._stream.references()
        self._abandoned = False
        self._done = asyncio.ensure_future(asyncio.to_thread(lambda: apply(self._tensors())))

    async def put(self, index: int, bucket: WeightBucket, last: bool) -> Any:
        # The engine may refuse a tensor while more are on their way: then nobody reads the stream any more.
        put = asyncio.ensure_future(self._stream.put(index, bucket, last))
        await asyncio.wait({put, self._done}, return_when=asyncio.FIRST_COMPLETED)
        if not put.done():
            put.cancel()
        if last or self._done.done():
            return await asyncio.shield(self._done)
        return None

    async def abandon(self) -> None:
        """End it if it has not ended."""
        self._abandoned = True
        await asyncio.wait({self._done})
        if not self._done.cancelled() and (error := self._done.exception()) is not None:
            logger.warning("the weight update before this one had failed: %s", error)

    async def _next_bucket(self) -> tuple[int, WeightBucket, bool]:
        return await anext(self._buckets)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the thread: the tensors, as the buckets arrive."""
        last = False
        while not last:
            item = asyncio.run_coroutine_threadsafe(self._next_bucket(), self._loop)
            while True:
                try:
                    _, bucket, last = item.result(0.2)
                    break
                except TimeoutError:
                    if item.done():  # the stream's own time-out
                        raise
                    if self._abandoned:
                        item.cancel()
                        raise WeightSyncError("another weight update began before this one had ended") from None
            yield from bucket.unpack()
