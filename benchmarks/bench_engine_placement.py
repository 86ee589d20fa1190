"""Engine beside the trainer: in a thread of its process or in a process of its own, by threads per side.

    python benchmarks/bench_engine_placement.py [--seconds 6] [--rounds 3] [--batch 256] [--threads 1,2]

A trainer makes optimiser steps of the demo model (verl's worker, ``--batch`` sequences a step) while an engine
(``TransformersEngine`` or ``ProcessEngine``), asked by a thread of the trainer's process, keeps 64 sequences in
generation. Every setting runs in turn in each round. ``duty`` below 1 lets the engine rest in between, as an
environment that waits for tools does: generation is then busy for about that share of the time. Printed: medians of
seconds per training step and of generated tokens per second, and both as shares of what each does alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, SEQUENCES = 24, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="sequences of one training step")
    parser.add_argument("--duty", type=float, default=1.0, help="share of the time in which the engine has work")
    parser.add_argument("--threads", default="1,2", help="torch threads per side that are tried")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    counts = [int(count) for count in options.threads.split(",")]
    found: dict[str, list[tuple[float, float]]] = {}
    train = _trainer(options.batch)
    for _ in range(options.rounds):
        for trainer_threads in counts:
            key = f"trainer alone, {trainer_threads} threads"
            found.setdefault(key, []).append((_steps(train, trainer_threads, options.seconds), 0.0))
            for engine_threads in counts:
                for name in ("thread", "process"):
                    with _generating(name, engine_threads, options.duty) as tokens:
                        before, started = tokens(), time.perf_counter()
                        step = _steps(train, trainer_threads, options.seconds)
                        rate = (tokens() - before) / (time.perf_counter() - started)
                    key = f"{name}, trainer {trainer_threads} threads, engine {engine_threads}"
                    found.setdefault(key, []).append((step, rate))
        for engine_threads in counts:
            with _generating("process", engine_threads, options.duty) as tokens:
                before = tokens()
                time.sleep(options.seconds)
                rate = (tokens() - before) / options.seconds
            found.setdefault(f"engine alone, {engine_threads} threads", []).append((0.0, rate))
    medians = {key: [statistics.median(column) for column in zip(*pairs, strict=True)] for key, pairs in found.items()}
    fastest_step = min(step for key, (step, _) in medians.items() if key.startswith("trainer alone"))
    fastest_rate = max(rate for key, (_, rate) in medians.items() if key.startswith("engine alone"))
    return {
        "rounds": options.rounds,
        "batch": options.batch,
        "duty": options.duty,
        "medians": {
            key: {
                "seconds_per_step": round(step, 4),
                "tokens_per_second": round(rate, 1),
                "training_share": round(fastest_step / step, 3) if step else None,
                "generation_share": round(rate / fastest_rate, 3),
            }
            for key, (step, rate) in medians.items()
        },
    }


def _trainer(batch: int) -> Callable[[], None]:
    import numpy as np

    from atropos_verl.assets import demo_model_path
    from atropos_verl.backends.local.worker import PolicyWorker
    from atropos_verl.config.schema import RunConfig
    from atropos_verl.types import TrainingSample

    worker = PolicyWorker(RunConfig(steps=10**6), demo_model_path())
    rng = np.random.default_rng(0)
    length = PROMPT_TOKENS + NEW_TOKENS
    samples = [
        TrainingSample(
            token_ids=rng.integers(3, 60, length),
            loss_mask=np.arange(length) >= PROMPT_TOKENS,
            advantages=rng.normal(size=length) * 1e-3,
        )
        for _ in range(batch)
    ]
    return lambda: (worker.train(samples), None)[1]


def _steps(train: Callable[[], None], threads: int, seconds: float) -> float:
    """Median seconds of one step."""
    import torch

    torch.set_num_threads(threads)
    train()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        train()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _engine(name: str, threads: int) -> Any:
    from atropos_verl.assets import demo_model_path

    if name == "process":
        from atropos_verl.engine.process_engine.engine import ProcessEngine

        return ProcessEngine(demo_model_path(), num_threads=threads).wait_ready()
    from atropos_verl.engine.embedded import TransformersEngine

    return TransformersEngine.from_pretrained(demo_model_path(), num_threads=threads)


def _generate(engine: Any, duty: float, stop: Callable[[], bool]) -> None:
    import torch

    from atropos_verl.types import GenerationRequest

    generator = torch.Generator().manual_seed(0)
    while not stop():
        prompts = torch.randint(3, 60, (SEQUENCES // 8, PROMPT_TOKENS), generator=generator).tolist()
        started = time.perf_counter()
        engine.generate(
            [
                GenerationRequest(prompt_token_ids=tuple(prompt), n=8, max_tokens=NEW_TOKENS, ignore_eos=True)
                for prompt in prompts
            ]
        )
        time.sleep((time.perf_counter() - started) * (1 / duty - 1))


@contextmanager
def _generating(name: str, threads: int, duty: float) -> Iterator[Callable[[], float]]:
    """An engine that is asked by a thread of this process, as the gateway does. Yields how many tokens it has made."""
    stop = threading.Event()
    with _engine(name, threads) as engine:
        thread = threading.Thread(target=_generate, args=(engine, duty, stop.is_set))
        thread.start()
        try:
            yield lambda: float(engine.stats().generated_tokens)
        finally:
            stop.set()
            thread.join()


if __name__ == "__main__":
    main()
