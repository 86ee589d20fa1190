"""Buckets, their order, and what happens when either side gives up. No Ray: the calls are plain coroutines."""

import asyncio
import gc
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from atropos_verl.backends.ray.weight_transfer import (
    BucketStream,
    WeightBucket,
    WeightReceiver,
    iter_buckets,
    send_weights,
)
from atropos_verl.errors import WeightSyncError

_TENSORS = [
    ("bf16", torch.randn(3, 5).to(torch.bfloat16)),
    ("scalar", torch.tensor(2.5)),
    ("empty", torch.empty(0, 4)),
    ("strided", torch.arange(24.0).reshape(4, 6).T),
    ("large", torch.randn(64, 8)),
    ("ints", torch.arange(7)),
]


def _collect(tensors: Iterator[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in tensors]


async def _buckets(limit: int) -> list[Any]:
    return [item async for item in iter_buckets(_TENSORS, limit)]


def _assert_same(got: list[tuple[str, torch.Tensor]], want: list[tuple[str, torch.Tensor]]) -> None:
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, a), (_, b) in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("error")
def test_a_bucket_is_read_from_read_only_memory_without_a_copy_or_a_warning() -> None:
    bucket = WeightBucket.pack(_TENSORS)
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(bucket, protocol=5, buffer_callback=buffers.append)
    assert len(body) < 2000  # the content travels out of band
    memory = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    arrived = pickle.loads(body, buffers=memory)
    assert not any(array.flags.writeable for *_, array in arrived.tensors if array.nbytes)
    _assert_same(list(arrived.unpack()), _TENSORS)
    for (name, tensor), (*_, array) in zip(arrived.unpack(), arrived.tensors, strict=True):
        if array.nbytes:
            assert tensor.data_ptr() == array.__array_interface__["data"][0], name


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1, 1, 1]), (150, [4, 1, 1]), (1 << 20, [6])])
async def test_an_update_arrives_whole_in_buckets_as_large_as_allowed(limit: int, sizes: list[int]) -> None:
    calls: list[Any] = []

    def receive(update_id: str, *part: Any) -> Any:
        calls.append((part, asyncio.ensure_future(receiver.receive(update_id, *part))))
        return calls[-1][1]

    receiver = WeightReceiver(_collect)
    nbytes = await send_weights(receive, _TENSORS, limit)
    _assert_same(await calls[-1][1], _TENSORS)
    last = len(sizes) - 1
    found = [(index, len(bucket.tensors), is_last) for (index, bucket, is_last), _ in calls]
    assert found == [(index, size, index == last) for index, size in enumerate(sizes)]
    assert nbytes == sum(tensor.nbytes for _, tensor in _TENSORS)


async def test_buckets_that_overtake_each_other_are_applied_in_order() -> None:
    receiver = WeightReceiver(_collect)
    last, *_ = await asyncio.gather(*(receiver.receive("u", *part) for part in reversed(await _buckets(1))))
    _assert_same(last, _TENSORS)


async def test_a_refused_tensor_ends_the_update_at_the_sender_and_the_next_update_works() -> None:
    unseen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))

    def refuse(tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        for name, _ in tensors:
            if name == "scalar" and refusing:
                raise WeightSyncError("no tensor 'scalar' here")
        return 1

    refusing = True
    receiver = WeightReceiver(refuse)
    calls: list[Any] = []

    def receive(*part: Any) -> Any:
        calls.append(asyncio.ensure_future(receiver.receive(*part)))
        return calls[-1]

    with pytest.raises(WeightSyncError, match="no tensor 'scalar'"):
        await send_weights(receive, _TENSORS, 1)
    await asyncio.wait(calls)
    calls.clear()
    gc.collect()
    assert unseen == []  # a call that nobody waited for would be reported when it is collected
    refusing = False
    await send_weights(receive, _TENSORS, 1)


async def test_a_sender_that_dies_is_named_after_the_timeout_and_gives_way_to_the_next_update() -> None:
    buckets = await _buckets(1)
    receiver = WeightReceiver(_collect, timeout=0.05)
    await receiver.receive("dead", *buckets[0])
    with pytest.raises(WeightSyncError, match=r"no weights arrived for 0\.05 s"):
        await receiver._done
    with pytest.raises(WeightSyncError, match="no weights arrived"):
        await receiver.receive("dead", *buckets[1])

    receiver = WeightReceiver(_collect, timeout=60.0)
    await receiver.receive("dead", *buckets[0])
    results = [await receiver.receive("alive", *part) for part in buckets]
    _assert_same(results[-1], _TENSORS)


@pytest.fixture
async def stream() -> AsyncIterator[BucketStream]:
    """References to two or more buckets, which become readable when they are delivered."""
    stream = BucketStream(timeout=60.0)

    async def deliver() -> None:
        for index, bucket, last in await _buckets(150):
            reference = asyncio.get_running_loop().create_future()
            reference.set_result(bucket)
            await stream.put(index, reference, last)

    delivery = asyncio.ensure_future(deliver())
    yield stream
    await delivery


async def test_references_are_passed_on_unread(stream: BucketStream) -> None:
    seen: list[Any] = []

    async def receive(_: str, index: int, item: Any, last: bool) -> None:
        seen.append((index, item, last))

    assert await send_weights(lambda *part: asyncio.ensure_future(receive(*part)), stream, 1) == 0
    want = await _buckets(150)
    assert [(index, last) for index, _, last in seen] == [(index, last) for index, _, last in want]
    assert [len(item.result().tensors) for _, item, _ in seen] == [len(bucket.tensors) for _, bucket, _ in want]


async def test_a_stream_is_read_tensor_by_tensor_where_references_are_not_known(stream: BucketStream) -> None:
    _assert_same([(name, tensor) async for name, tensor in stream], _TENSORS)
