"""Where the memory of a local run goes: the resident set of one process, phase by phase, and what is known to be in it.

    python benchmarks/bench_memory.py [--model smollm2-135m] [--groups 8] [--prompt 60] [--answer 20] [--steps 3]

The process holds trainer and engine, as a local run does. A step samples ``--groups`` groups of 8 answers, trains on
them (float32, AdamW) and gives the engine the new weights. ``peaks``: the largest resident set of each phase of the
last step, in MB; ``known``: sizes of what is there by count of its numbers; ``forward``: what the graph of the largest
micro-batch adds. ``after``: the resident set when the phase is over. ``--arenas N``, ``--keep-weights`` and
``--token-budget N`` (tokens of a micro-batch), ``--checkpointing`` and ``--bf16`` show what they change. ``predicted``:
growth over ``imports`` as ``doctor --memory`` predicts it, beside the measured growth. They compare with
``MALLOC_MMAP_THRESHOLD_=65536`` in the environment, with which the C library keeps nothing of freed memory.
"""

import argparse
import contextlib
import ctypes
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@contextlib.contextmanager
def watched(phase: str, peaks: dict[str, float], after: dict[str, float]) -> Iterator[None]:
    done, largest = threading.Event(), resident()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks[phase], after[phase] = round(largest), round(resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--answer", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--keep-weights", action="store_true", help="inference.release_weights=false")
    parser.add_argument("--arenas", type=int, help="malloc arenas at most (glibc's M_ARENA_MAX)")
    parser.add_argument("--checkpointing", action="store_true", help="model.enable_gradient_checkpointing=true")
    parser.add_argument("--bf16", action="store_true", help="model.compute_dtype=bf16")
    options = parser.parse_args()
    if options.arenas:
        ctypes.CDLL(None).mallopt(-8, options.arenas)
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from atropos_verl.backends.local.worker import PolicyWorker
    from atropos_verl.config.schema import RunConfig
    from atropos_verl.engine.embedded import TransformersEngine
    from atropos_verl.launch.doctor import Plan, predict, shape_of
    from atropos_verl.types import GenerationRequest, TrainingSample

    trainer = {"device": "cpu", "max_token_len_per_gpu": options.token_budget}
    compute, dtype = ("bf16", torch.bfloat16) if options.bf16 else ("fp32", torch.float32)
    model = {"path": options.model, "compute_dtype": compute}
    model["enable_gradient_checkpointing"] = options.checkpointing
    config = RunConfig.from_mapping({"model": model, "optim": {"lr": 1e-6}, "trainer": trainer})
    path, start = config.resolve_model_path(), {"imports": round(resident())}
    worker = PolicyWorker(config, path)
    start["trainer"] = round(resident())
    settings = {"max_context_len": options.prompt + options.answer, "release_weights": not options.keep_weights}
    engine = TransformersEngine.from_pretrained(path, dtype=dtype, **settings)
    start["engine"] = round(resident())
    engine.gate.pause(60.0)
    engine.release_memory_occupation()
    start["engine asleep"] = round(resident())
    module = worker._worker.engine.module
    weights = sum(parameter.numel() for parameter in module.parameters()) * 4 / 1e6
    rng, forward = np.random.default_rng(0), []
    loss_function = worker.loss_function.__call__
    seconds: list[float] = []
    peaks: dict[str, float] = {}
    after: dict[str, float] = {}
    before = 0.0

    def loss(*arguments: Any, **keywords: Any) -> Any:
        forward.append(resident() - before)
        return loss_function(*arguments, **keywords)

    worker._worker.set_loss_fn(loss)
    for step in range(options.steps):
        with watched("weights to the engine", peaks, after):
            engine.resume_memory_occupation()
            engine.update_weights_from_tensor(worker.named_tensors(), policy_version=step)
            engine.gate.resume()
        with watched("rollout", peaks, after):
            prompts = [rng.integers(10, 250, options.prompt).tolist() for _ in range(options.groups)]
            asked = [
                GenerationRequest(prompt_token_ids=tuple(ids), n=8, max_tokens=options.answer, ignore_eos=True)
                for ids in prompts
            ]
            answers = engine.generate(asked)
        with watched("engine to sleep", peaks, after):
            engine.gate.pause(60.0)
            engine.release_memory_occupation()
        samples = []
        for ids, generations in zip(prompts, answers, strict=True):
            for generation in generations:
                tokens = np.array([*ids, *generation.token_ids])
                mask = np.arange(len(tokens)) >= len(ids)
                advantages = np.where(mask, rng.normal(), 0.0)
                samples.append(TrainingSample(token_ids=tokens, loss_mask=mask, advantages=advantages))
        before = resident()
        forward.clear()
        with watched("training", peaks, after):
            started = time.perf_counter()
            worker.train(samples)
            seconds.append(round(time.perf_counter() - started, 2))
    from atropos_verl.verl_plugin.prefix_forest import build_forest

    rows = [sample.token_ids for sample in samples]
    trained = sum(int(sample.loss_mask.sum()) for sample in samples)
    vocabulary, distinct = module.config.vocab_size, len(build_forest(rows).first)
    plan = Plan(
        tokens=min(-(-distinct // -(-distinct // options.token_budget)), distinct),
        trained=trained / distinct,
        compute=dtype.itemsize,
        checkpointing=options.checkpointing,
        on_cpu=True,
        keeps_engine=options.keep_weights,
        running=8 * options.groups,
        context=options.prompt + options.answer,
    )
    phases = predict(shape_of(path, plan.compute), plan)
    sums = {phase: sum(parts.values()) / 1e6 for phase, parts in phases.items()}
    predicted = {
        "rollout": sums["rollout"],
        "training": max(sums["forward and backward"], sums["optimiser step"]),
        "weights to the engine": sums["weight sync"],
    }
    grown = {phase: peaks[phase] - start["imports"] for phase in predicted}
    return {
        "predicted": {
            phase: {"MB": round(size), "measured": grown[phase], "predicted / measured": round(size / grown[phase], 3)}
            for phase, size in predicted.items()
        },
        "parts": {phase: {name: round(size / 1e6) for name, size in parts.items()} for phase, parts in phases.items()},
        "tokens": {"all": sum(map(len, rows)), "distinct": distinct, "trained": trained},
        "start": start,
        "known": {
            "weights": round(weights),
            "gradients": round(weights),
            "moments": round(2 * weights),
            "engine copy": round(weights),
            "head, kept for the backward": round(trained * vocabulary * 4 / 1e6),
        },
        "forward": round(max(forward)),
        "peaks": peaks,
        "after": after,
        "training seconds": seconds,
        "peak": max(peaks.values()),
    }


if __name__ == "__main__":
    main()
