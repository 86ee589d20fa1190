"""Seeded training samples for tests of worker and trainer, and samples made of groups as they are posted."""

from typing import Any

import numpy as np

from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.samples import build_samples
from atropos_verl.types import SampleReport, SampleSettings, TrainingSample
from support.scripted_api import batch_of


def built(*groups: dict[str, Any], running: RunningMoments | None = None, **settings: Any) -> SampleReport:
    """Of groups as environments post them."""
    return build_samples(decode_batch(batch_of(groups)), SampleSettings(**settings), running=running)


def random_samples(count: int, *, vocab_size: int, seed: int = 0, longest: int = 24) -> list[TrainingSample]:
    """``count`` samples of 4..longest tokens with two trained spans, random advantages and two temperatures.

    Two of three begin as the one before them, up to the middle of the shorter one: a trained span may be shared.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(4, longest + 1))
        mask = np.zeros(length, dtype=np.bool_)
        mask[length // 4 + 1 : length // 2 + 1] = True
        mask[length - 1] = True  # a tool turn in between is not trained
        token_ids = rng.integers(0, vocab_size, length)
        if index % 3:
            common = min(length, len(samples[-1])) // 2
            token_ids[:common] = samples[-1].token_ids[:common]
        samples.append(
            TrainingSample(
                token_ids=token_ids,
                loss_mask=mask,
                advantages=np.where(mask, rng.normal(size=length), 0.0),
                rollout_logprobs=np.where(mask, -rng.random(length), np.nan),
                temperature=1.0 if index % 2 else 0.7,
                sequence_index=index,
                rollout_id=index,  # else all would be in one mini-batch
            )
        )
    return samples


def branching_samples(seed: int, count: int = 12, longest: int = 40) -> list[TrainingSample]:
    """Samples each of which begins as one of those before it, up to somewhere."""
    samples = random_samples(count, vocab_size=200, seed=seed, longest=longest)
    rng = np.random.default_rng(seed)
    for index, sample in enumerate(samples[1:], 1):
        other = samples[rng.integers(index)].token_ids
        at = int(rng.integers(min(len(other), len(sample)) + 1))
        sample.token_ids[:at] = other[:at]
    return samples
