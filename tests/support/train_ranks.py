"""Run under torchrun: training steps on fixed samples; and random forests with shared prefixes and without.

Arguments: a model, the file into which rank 0 writes what it saw as JSON, eight times the number of forests.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atropos_verl.backends.local.worker import PolicyWorker
from atropos_verl.config.schema import RunConfig
from atropos_verl.types import TrainingSample
from support.samples import branching_samples, random_samples


def results(model: Path, directory: Path) -> dict[str, dict[str, object]]:
    """What rank 0 saw, by kind of loss; {} on other ranks."""
    found = {}
    for kind in ("advantage_weighted_sft", "grpo"):
        config = RunConfig.from_mapping(
            {"optim": {"lr": 1e-2}, "loss": {"type": kind}, "trainer": {"max_token_len_per_gpu": 64, "device": "cpu"}}
        )
        worker = PolicyWorker(config, model)
        if worker.rank > 0:
            worker.serve()
        else:
            found[kind] = _train(worker, directory / kind)
            worker.close()
    return found


def _uneven() -> list[TrainingSample]:
    """One rank gets ten of a common prefix and one more, 124 distinct tokens; the other two rows that fill two of the
    three micro-batches that each rank has to make."""
    samples = random_samples(13, vocab_size=200, seed=8, longest=44)
    mask = np.arange(44) >= 40
    rng = np.random.default_rng(8)
    rows = [np.concatenate([np.arange(40), rng.integers(0, 200, 4)]) for _ in range(10)]
    rows += [rng.integers(100, 200, 44) for _ in range(3)]
    columns = {"loss_mask": mask, "advantages": mask * 0.5, "rollout_logprobs": None}
    return [replace(sample, token_ids=row, **columns) for sample, row in zip(samples, rows, strict=True)]


def _train(worker: PolicyWorker, checkpoint: Path) -> dict[str, object]:
    samples = random_samples(11, vocab_size=200)
    outputs = [worker.train(samples) for _ in range(2)]
    outputs.append(worker.train(samples[:1]))  # fewer samples than ranks
    first, second = sorted(samples[:2], key=len, reverse=True)
    untrained = replace(first, loss_mask=np.zeros_like(first.loss_mask))
    outputs.append(worker.train([untrained, second]))  # rank 0, which has the longest, has nothing to train on
    outputs.append(worker.train(_uneven()))
    worker.save_checkpoint(checkpoint, 3)
    logprobs = worker.compute_logprobs(samples)
    worker.load_checkpoint(checkpoint)
    after_load = worker.compute_logprobs(samples)
    return {
        "world_size": worker.world_size,
        "grad_norm": [o.pop("grad_norm") for o in outputs],
        "figures": outputs,
        "logprobs": [row.tolist() for row in logprobs],
        "after_load": [row.tolist() for row in after_load],
        # Softmax does not see a bias of the keys: its gradient is rounding, of which AdamW makes a step.
        "weights": {
            name: float(tensor.double().abs().sum())
            for name, tensor in worker.named_tensors()
            if not name.endswith("k_proj.bias")
        },
    }


def compare(model: Path, count: int) -> None:
    """Checks that every gradient of random forests is the same with shared prefixes and without."""
    kept: list[list[torch.Tensor]] = []
    for shares in (False, True):
        trainer = {"device": "cpu", "max_token_len_per_gpu": 96, "share_prefixes": shares}
        config = RunConfig.from_mapping({"trainer": trainer, "optim": {"lr": 0.0, "clip_grad": 1e9}})
        worker = PolicyWorker(config, model)
        kept.append(gradients := [])
        parameters = list(worker._worker.engine.module.parameters())

        def keep(*_: Any, gradients: Any = gradients, parameters: Any = parameters) -> None:
            gradients.append(torch.cat([parameter.grad.full_tensor().flatten() for parameter in parameters]))

        worker._worker.engine.optimizer.register_step_pre_hook(keep)
        if worker.rank > 0:
            worker.serve()
            continue
        for seed in range(count):
            worker.train(branching_samples(seed, 2 + 5 * seed % 13, 60))
        worker.close()
    assert len(kept[0]) == count
    for seed, (one, other) in enumerate(zip(*kept, strict=True)):
        assert (other - one).norm() <= 1e-5 * one.norm(), seed


if __name__ == "__main__":
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    compare(model, int(sys.argv[3]) // 8)
    if found := results(model, out.parent / "ranks"):  # of rank 0
        out.write_text(json.dumps(found))
