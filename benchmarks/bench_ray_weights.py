"""Weights into a replica's process on one host: our buckets, one call per tensor, and one call with everything.

Each round runs all three, in turn, into the same actor, which copies every tensor into a model of its own. Prints
medians in seconds and the ratios as JSON. ``--megabytes`` is the size of the model.

    python benchmarks/bench_ray_weights.py
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import torch

from atropos_verl import verl_plugin


def _model(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of the sizes of a transformer's: per layer, seven matrices and five vectors."""
    width = 512
    layer = [(width, width)] * 4 + [(2 * width, width)] * 3 + [(width,)] * 5
    per_layer = sum(4 * torch.Size(shape).numel() for shape in layer)
    layers = max(1, (megabytes << 20) // per_layer)
    return {f"layers.{i}.{j}": torch.randn(shape) for i in range(layers) for j, shape in enumerate(layer)}


class Receiver:
    """A replica's process, reduced to its weights."""

    def __init__(self, megabytes: int) -> None:
        from atropos_verl.backends.ray.weight_transfer import WeightReceiver

        torch.set_num_threads(1)
        self.own = _model(megabytes)
        self._receiver = WeightReceiver(self._copy)

    def _copy(self, tensors: Any) -> int:
        return sum(self.own[name].copy_(tensor).nbytes for name, tensor in tensors)

    async def buckets(self, *part: Any) -> Any:
        return await self._receiver.receive(*part)

    async def one(self, name: str, tensor: torch.Tensor) -> None:
        self._copy([(name, tensor)])

    async def everything(self, tensors: dict[str, torch.Tensor]) -> None:
        self._copy(tensors.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the model (default 256)")
    parser.add_argument("--bucket-megabytes", type=int, default=64, help="size of a bucket (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7; the first is not counted")
    args = parser.parse_args()
    import os

    import ray

    from atropos_verl.backends.ray.weight_transfer import send_weights

    environment = verl_plugin.ray_environment("cpu")
    os.environ.update(environment)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=(3 * args.megabytes + 256) << 20,
        runtime_env={"env_vars": environment},
    )
    torch.set_num_threads(1)
    weights = _model(args.megabytes)
    actor = ray.remote(Receiver).options(max_concurrency=100, num_cpus=0).remote(args.megabytes)

    def per_tensor() -> None:
        for name, tensor in weights.items():
            ray.get(actor.one.remote(name, tensor))

    variants = {
        "buckets": lambda: asyncio.run(
            send_weights(lambda *part: actor.buckets.remote(*part), weights.items(), args.bucket_megabytes << 20)
        ),
        "one call per tensor": per_tensor,
        "one call": lambda: ray.get(actor.everything.remote(weights)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(args.rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    ray.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    result = {
        "tensors": len(weights),
        "megabytes": round(nbytes / 2**20, 1),
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "gigabytes_per_second": {name: round(nbytes / 1e9 / value, 2) for name, value in medians.items()},
        "times_as_fast_as": {
            name: round(value / medians["buckets"], 2) for name, value in medians.items() if name != "buckets"
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
