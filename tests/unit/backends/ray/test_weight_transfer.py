"""Buckets, their order, and what happens when either side gives up. No Ray: the calls are plain coroutines."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.backends.ray.weight_transfer import (
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
    return [item async for item in iter_buckets(ensure_async_iterator(_TENSORS), limit)]


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
    found: list[Any] = []

    async def receive(update: str, bucket: WeightBucket, last: bool) -> None:
        found.append((len(bucket.tensors), last, await receiver.receive(update, bucket, last)))

    receiver = WeightReceiver(_collect)
    nbytes = await send_weights(receive, _TENSORS, limit)
    _assert_same(found[-1][-1], _TENSORS)
    assert [(size, last) for size, last, _ in found] == list(
        zip(sizes, [False] * (len(sizes) - 1) + [True], strict=True)
    )
    assert nbytes == sum(tensor.nbytes for _, tensor in _TENSORS)


async def test_a_refused_tensor_ends_the_update_at_the_sender_which_gathers_all_and_the_next_update_works() -> None:
    gathered: list[str] = []

    def refuse(tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        for name, _ in tensors:
            if name == "scalar" and refusing:
                raise WeightSyncError("no tensor 'scalar' here")
        return 1

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _TENSORS:
            gathered.append(name)
            yield name, tensor

    refusing = True
    receiver = WeightReceiver(refuse)
    with pytest.raises(WeightSyncError, match="no tensor 'scalar'"):
        await send_weights(receiver.receive, gather(), 1)
    assert gathered == [name for name, _ in _TENSORS], "every rank takes part in every gather"
    refusing = False
    await send_weights(receiver.receive, _TENSORS, 1)


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
