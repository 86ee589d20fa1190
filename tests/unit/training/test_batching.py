"""Padding, packing and sharing out: which value lands where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atropos_verl.errors import DataError
from atropos_verl.training.batching import make_packed_batch, make_training_batch, split_for_ranks
from atropos_verl.types import TrainingSample

NAN = float("nan")


def sample(
    tokens: list[int], mask: list[int], logprobs: list[float] | None = None, temperature: float = 1.0
) -> TrainingSample:
    trained = np.array(mask, dtype=bool)
    return TrainingSample(
        token_ids=np.array(tokens, dtype=np.int64),
        loss_mask=trained,
        advantages=np.where(trained, 0.5, 0.0),
        rollout_logprobs=None if logprobs is None else np.array(logprobs),
        temperature=temperature,
    )


SAMPLES = [sample([5, 6, 7], [0, 0, 1], [NAN, NAN, -0.25], 0.7), sample([5, 8], [0, 1])]


def test_padded() -> None:
    batch = make_training_batch(SAMPLES, pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [5, 8, 3]]
    assert batch.loss_mask.tolist() == [[False, False, True], [False, True, False]]
    assert batch.advantages.tolist() == [[0.0, 0.0, 0.5], [0.0, 0.5, 0.0]]
    np.testing.assert_array_equal(batch.rollout_logprobs.numpy(), [[NAN, NAN, -0.25], [NAN, NAN, NAN]])
    assert batch.temperature.tolist() == pytest.approx([0.7, 1.0])
    assert batch.lengths.tolist() == [3, 2]
    assert batch.num_loss_tokens == 2
    assert [t.dtype for t in (batch.input_ids, batch.loss_mask, batch.advantages, batch.rollout_logprobs)] == [
        torch.int64,
        torch.bool,
        torch.float32,
        torch.float32,
    ]


def test_packed() -> None:
    batch = make_packed_batch(SAMPLES)
    assert batch.input_ids.tolist() == [5, 6, 7, 5, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.loss_mask.tolist() == [False, False, True, False, True]
    assert batch.advantages.tolist() == [0.0, 0.0, 0.5, 0.0, 0.5]
    np.testing.assert_array_equal(batch.rollout_logprobs.numpy(), [NAN, NAN, -0.25, NAN, NAN])
    assert (batch.max_seqlen, batch.num_loss_tokens) == (3, 2)
    assert (batch.advantages.dtype, batch.rollout_logprobs.dtype) == (torch.float32, torch.float32)
    nested = torch.nested.nested_tensor_from_jagged(batch.input_ids, batch.cu_seqlens)
    assert [row.tolist() for row in nested.unbind()] == [[5, 6, 7], [5, 8]]


def test_changing_a_batch_leaves_the_samples_alone() -> None:
    for batch in (make_training_batch(SAMPLES[:1]), make_packed_batch(SAMPLES[:1])):
        batch.input_ids.fill_(9)
        batch.loss_mask.fill_(True)
    assert SAMPLES[0].token_ids.tolist() == [5, 6, 7]
    assert SAMPLES[0].loss_mask.tolist() == [False, False, True]


@pytest.mark.parametrize("make", [make_training_batch, make_packed_batch])
def test_no_sample_is_an_error_that_says_why(make: object) -> None:
    with pytest.raises(DataError, match="every group was quarantined, or every sequence was overlong"):
        make([])  # type: ignore[operator]


def of_length(length: int) -> TrainingSample:
    return sample([1] * length, [0] * length)


def test_split_by_hand() -> None:
    # Longest first: 9 → rank 0, 7 → rank 1, 6 → rank 1 (7 < 9) = 13, 5 → rank 0 = 14, 2 → rank 1 = 15.
    samples = [of_length(n) for n in (5, 9, 2, 7, 6)]
    shares = split_for_ranks(samples, 2)
    assert [[len(s) for s in share] for share in shares] == [[5, 9], [2, 7, 6]]


def test_more_ranks_than_samples_leaves_ranks_empty() -> None:
    assert [len(share) for share in split_for_ranks([of_length(3)], 3)] == [1, 0, 0]
    assert split_for_ranks([], 2) == [[], []]
    with pytest.raises(ValueError, match="world_size = 0"):
        split_for_ranks([], 0)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 6))
def test_every_sample_exactly_once_and_balanced(lengths: list[int], world_size: int) -> None:
    samples = [of_length(n) for n in lengths]
    shares = split_for_ranks(samples, world_size)
    assert len(shares) == world_size
    assert sorted(id(s) for share in shares for s in share) == sorted(id(s) for s in samples)
    loads = [sum(len(s) for s in share) for share in shares]
    # Greedy: the heaviest rank was the lightest when it got its last sample.
    assert max(loads) - min(loads) <= max(lengths, default=0)
    again = split_for_ranks(samples, world_size)
    assert [[id(s) for s in share] for share in again] == [[id(s) for s in share] for share in shares]
