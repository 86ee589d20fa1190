"""Padding that the trainer computes: micro-batches in order of arrival, verl's, and ours, on a 10x spread of lengths.

    python benchmarks/bench_packing.py [--sequences 48] [--shortest 64] [--longest 640] [--budget 4096] [--repeats 5]

Every side is the real ``PolicyWorker``: forward, backward and optimiser step of a random Qwen2 in float32, over the
same samples, in one process, in turn.

* ``arrival_order``: as many sequences as fit the token budget at full length, in order of arrival, padded to the
  longest;
* ``verl_padded``: verl's balanced micro-batches by token budget, each padded to its longest (verl without flash
  attention);
* ``ours``: the same micro-batches, joined end to end.

``waste``: share of the tokens that went through the model that are padding, counted at its embedding.
``attention_waste``: the same of the pairs of tokens in the attention. The floor is no padding at all; the distance is
what ``waste`` says. Prints JSON: median real tokens per second, wall and processor time, ratios.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from atropos_verl.types import TrainingSample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=640)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    samples = make_samples(options.sequences, options.shortest, options.longest)
    with tempfile.TemporaryDirectory() as directory:
        worker = make_worker(Path(directory), options)
        results = measure(worker, samples, options)
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), **results}, indent=2))


def make_samples(count: int, shortest: int, longest: int) -> list[TrainingSample]:
    """Lengths spread evenly over the logarithm; the second half of each sequence is trained."""
    rng = np.random.default_rng(0)
    lengths = np.exp(np.linspace(np.log(shortest), np.log(longest), count)).astype(int)
    samples = []
    for length in rng.permutation(lengths):
        mask = np.arange(length) >= length // 2
        advantages = np.where(mask, rng.normal(), 0.0)
        samples.append(TrainingSample(token_ids=rng.integers(0, 250, length), loss_mask=mask, advantages=advantages))
    return samples


def make_worker(directory: Path, options: argparse.Namespace) -> Any:
    from support.tiny_model import build_tiny_model

    from atropos_verl.backends.local.worker import PolicyWorker
    from atropos_verl.config.schema import RunConfig

    sizes = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden}
    layers = {"num_hidden_layers": options.layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    build_tiny_model(directory, **sizes, **layers)
    trainer = {"device": "cpu", "max_token_len_per_gpu": options.budget}
    return PolicyWorker(RunConfig.from_mapping({"optim": {"lr": 0.0}, "trainer": trainer}), directory)


def measure(worker: Any, samples: list[TrainingSample], options: argparse.Namespace) -> dict[str, Any]:
    from verl.utils import tensordict_utils as tu

    engine = worker._worker.engine
    shapes: list[tuple[int, int]] = []
    engine.module.get_input_embeddings().register_forward_hook(lambda _m, args, _o: shapes.append(tuple(args[0].shape)))

    def step(*, packs: bool, in_order: bool) -> float:
        engine._packs = packs
        data, _ = worker._to_tensordict(samples, None)
        if in_order:
            rows = max(options.budget // options.longest, 1)
            while len(samples) % rows:  # verl wants equal parts
                rows -= 1
            tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=rows)
        tu.assign_non_tensor(data, update_lr_scheduler=False)
        worker.loss_function.start()
        metrics = dict(tu.get(worker._worker.train_batch(data), "metrics"))
        return float(metrics["grad_norm"])

    sides: dict[str, Callable[[], float]] = {
        "arrival_order": lambda: step(packs=False, in_order=True),
        "verl_padded": lambda: step(packs=False, in_order=False),
        "ours": lambda: step(packs=True, in_order=False),
    }
    worker.compute_logprobs(samples[:1])  # the engine's probe, before anything is timed
    if not engine._packs:
        raise SystemExit("the engine does not pack this model")
    norms = {name: side() for name, side in sides.items()}
    if max(norms.values()) > min(norms.values()) * (1 + 1e-4):
        raise SystemExit(f"the sides disagree about the gradient norm: {norms}")
    lengths = np.array([len(sample) for sample in samples])
    report: dict[str, Any] = {"real_tokens": int(lengths.sum()), "grad_norm": norms, "sides": {}}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    computed: dict[str, list[tuple[int, int]]] = {}
    for _ in range(options.repeats):
        for name, side in sides.items():
            shapes.clear()
            started, used = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - used)
            computed[name] = list(shapes)
    for name in sides:
        tokens = sum(rows * width for rows, width in computed[name])
        # Joined sequences are attended to one by one: the pairs are those of each sequence.
        squares = (lengths**2).sum() if name == "ours" else sum(rows * width**2 for rows, width in computed[name])
        report["sides"][name] = {
            "micro_batches": len(computed[name]),
            "waste": 1 - report["real_tokens"] / tokens,
            "attention_waste": 1 - float((lengths**2).sum() / squares),
            "median_seconds": statistics.median(wall[name]),
            "median_processor_seconds": statistics.median(busy[name]),
            "tokens_per_second": report["real_tokens"] / statistics.median(wall[name]),
        }
    ours = report["sides"]["ours"]
    report["speedup"] = {n: report["sides"][n]["median_seconds"] / ours["median_seconds"] for n in sides}
    report["speedup_by_processor_seconds"] = {
        n: report["sides"][n]["median_processor_seconds"] / ours["median_processor_seconds"] for n in sides
    }
    return report


if __name__ == "__main__":
    main()
