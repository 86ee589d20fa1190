"""Random forests with shared prefixes and without: loss, logprobs and every gradient against each other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from atropos_verl.backends.local.worker import PolicyWorker
from atropos_verl.config.schema import RunConfig
from support.samples import random_samples


def compare(model: Path, count: int) -> list[list[float]]:
    """Loss and gradient norm of each forest, to be compared with those of another number of ranks."""
    trainer = {"device": "cpu", "max_token_len_per_gpu": 96}
    config = RunConfig.from_mapping({"trainer": trainer, "optim": {"lr": 0.0, "clip_grad": 1e9}})
    worker = PolicyWorker(config, model)
    gradients: list[torch.Tensor] = []
    engine = worker._worker.engine

    def keep(*_: Any) -> None:
        parts = [parameter.grad.full_tensor().flatten() for parameter in engine.module.parameters()]
        gradients.append(torch.cat(parts))

    engine.optimizer.register_step_pre_hook(keep)
    results = []
    for seed in range(count):
        samples = _forest(seed)
        found = []
        for shares in (False, True):
            # Every rank reads it, so every rank changes it.
            worker.config = config.with_values(trainer={**trainer, "share_prefixes": shares})
            if worker.rank:
                _serve(worker, 2)
                continue
            output = worker.train(samples)
            found.append((output["loss"], output["grad_norm"], worker.compute_logprobs(samples)))
        flat, shared = gradients[-2:]
        assert (shared - flat).norm() <= 1e-5 * flat.norm(), (seed, (shared - flat).norm() / flat.norm())
        if found:
            (loss, norm, before), (other_loss, other_norm, after) = found
            assert np.isclose(other_loss, loss, rtol=1e-5, atol=1e-6), seed
            assert np.isclose(other_norm, norm, rtol=1e-5), seed
            for row, other in zip(before, after, strict=True):
                assert np.allclose(other, row, rtol=1e-5, atol=1e-5), seed
            results.append([loss, norm])
    return results


def _forest(seed: int) -> list[Any]:
    """Up to 14 samples; each begins as one of those before it, up to somewhere."""
    rng = np.random.default_rng(seed)
    samples = random_samples(int(rng.integers(2, 15)), vocab_size=200, seed=seed, longest=60)
    for index, sample in enumerate(samples[1:], 1):
        other = samples[rng.integers(index)].token_ids
        at = int(rng.integers(min(len(other), len(sample)) + 1))
        sample.token_ids[:at] = other[:at]
    return samples


def _serve(worker: PolicyWorker, calls: int) -> None:
    for _ in range(calls):
        message: list[Any] = [None]
        torch.distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        name, arguments = message[0]
        getattr(worker, name)(*arguments)
