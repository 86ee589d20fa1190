"""Run under torchrun: two training steps on fixed samples; and random forests with shared prefixes and without, loss,
logprobs and every gradient against each other.

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
        "weights": {name: float(tensor.double().abs().sum()) for name, tensor in worker.named_tensors()},
    }


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
        samples = branching_samples(seed, 2 + 5 * seed % 13, 60)
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


def _serve(worker: PolicyWorker, calls: int) -> None:
    for _ in range(calls):
        message: list[Any] = [None]
        torch.distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        name, arguments = message[0]
        getattr(worker, name)(*arguments)


if __name__ == "__main__":
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = results(model, out.parent / "ranks") | {"forests": compare(model, int(sys.argv[3]) // 8)}
    if found["forests"]:  # of rank 0
        out.write_text(json.dumps(found))
