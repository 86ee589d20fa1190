"""A training step with every shared prefix computed once, against one that computes each sequence whole.

    python benchmarks/bench_prefixes.py [--model smollm2-135m] [--repeats 3] [--shapes group-55-16,group-400-60,tree]

``group-P-A``: prompts of P tokens with 8 answers of A (two prompts where P is below 100). ``tree``: four turns of 60
tokens, each an answer of 30 (trained) and 30 of the environment, with two branches at every turn: 16 sequences.
Tokens are random; the optimiser has learning rate 0. One process holds the model; the two ways take turns, and the
order alternates.
Processor seconds and seconds by the clock, medians; ``ratio``: whole over shared; ``tokens``: all over distinct ones.
Memory is measured in a process for each way: what the largest of its steps adds to the resident set, in MB.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = {"whole": False, "shared": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", default="group-55-16,group-400-60,tree")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory(options))
        return
    from atropos_verl.verl_plugin.prefix_forest import build_forest

    worker = _worker(options.model)
    results: dict[str, Any] = {}
    for shape in options.shapes.split(","):
        samples = make(shape)
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        losses: dict[str, float] = {}
        for repeat in range(options.repeats + 1):  # the first warms up
            for way in WAYS if repeat % 2 else reversed(WAYS):
                clock, processor = time.perf_counter(), time.process_time()
                losses[way] = _step(worker, samples, way)
                taken[way].append((time.perf_counter() - clock, time.process_time() - processor))
        figures: dict[str, Any] = {}
        for index, unit in enumerate(("seconds", "processor_seconds")):
            medians = {way: statistics.median(pair[index] for pair in pairs[1:]) for way, pairs in taken.items()}
            figures[unit] = medians | {"ratio": medians["whole"] / medians["shared"]}
        rows = [sample.token_ids for sample in samples]
        total, distinct = sum(map(len, rows)), len(build_forest(rows).first)
        figures["tokens"] = {"whole": total, "shared": distinct, "ratio": total / distinct}
        grown = {way: _memory_of(way, shape, options.model) for way in WAYS}
        figures["memory_mb"] = grown | {"shared_over_whole": grown["shared"] / grown["whole"]}
        figures["loss_difference"] = abs(losses["whole"] - losses["shared"])
        results[shape] = figures
    print(json.dumps(results, indent=2))


def make(shape: str) -> list[Any]:
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(10, 250, count).tolist()

    rows: list[tuple[list[int], list[bool]]] = []
    if shape == "tree":
        branches = [(draw(60), [False] * 60)]
        for _ in range(4):
            branches = [
                ([*ids, *draw(60)], [*mask, *[True] * 30, *[False] * 30])
                for (ids, mask), _ in itertools.product(branches, range(2))
            ]
        rows = branches
    else:
        prompt, answer = map(int, shape.split("-")[1:])
        for _ in range(2 if prompt < 100 else 1):
            shared = draw(prompt)
            rows += [([*shared, *draw(answer)], [False] * prompt + [True] * answer) for _ in range(8)]
    from atropos_verl.types import TrainingSample

    samples = []
    for ids, trained in rows:
        mask = np.array(trained)
        samples.append(
            TrainingSample(token_ids=np.array(ids), loss_mask=mask, advantages=np.where(mask, rng.normal(), 0.0))
        )
    return samples


def memory(options: argparse.Namespace) -> float:
    """MB that the resident set grows by in three steps, at most, over what it is before them."""
    worker, samples = _worker(options.model), make(options.shapes)
    _step(worker, samples[:1], options.memory_of)  # gradients and moments are there
    before, largest, done = _resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        _step(worker, samples, options.memory_of)
    done.set()
    watcher.join()
    return largest - before


def _memory_of(way: str, shape: str, model: str) -> float:
    command = [sys.executable, __file__, "--memory-of", way, "--shapes", shape, "--model", model]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _worker(model: str) -> Any:
    from atropos_verl.backends.local.worker import PolicyWorker
    from atropos_verl.config.schema import RunConfig

    values = {"model": {"path": model}, "optim": {"lr": 0.0}, "trainer": {"device": "cpu"}}
    config = RunConfig.from_mapping(values)
    return PolicyWorker(config, config.resolve_model_path())


def _step(worker: Any, samples: list[Any], way: str) -> float:
    worker.config = worker.config.with_values(trainer={"share_prefixes": WAYS[way]})
    return float(worker.train(samples)["loss"])


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    main()
