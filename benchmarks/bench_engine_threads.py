"""Compares numbers of torch threads for the engine: one decode step of models of several sizes.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/bench_engine_threads.py [--hidden 64 128 256 512 1024] [--rows 64 8 1]

Random Qwen2 models of four layers (vocabulary 32,000; the smallest also with the demo's 259), ``rows`` sequences of 128
tokens each, float32. The numbers of threads are measured in turn, step by step, in one process; ``OMP_WAIT_POLICY`` is
set as the training command sets it. Prints JSON, one entry per size: multiply-adds per layer in millions, milliseconds
per step (median, least), their ratio (above 1: more threads are slower), what ``inference.threads`` chooses, and how
much slower that is than the better of the two (medians).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import argparse
import json
import statistics
import time
from typing import Any

import torch

from atropos_verl.engine.runner import ModelRunner, engine_threads, multiply_adds_per_layer

CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4.0, help="per size and number of rows")
    options = parser.parse_args()
    sizes = [(options.hidden[0], 259), *((hidden, 32_000) for hidden in options.hidden)]
    results = []
    for hidden, vocabulary in sizes:
        model = build_model(hidden, vocabulary)
        results += [measure(model, rows, options.threads, options.seconds) for rows in options.rows]
    print(json.dumps({"threads": options.threads, "context": CONTEXT, "results": results}, indent=2))


def build_model(hidden: int, vocabulary: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def measure(model: Any, rows: int, threads: int, seconds: float) -> dict[str, Any]:
    runner = ModelRunner(model, max_context_len=1024)
    torch.manual_seed(0)
    runner.prefill([tuple(row) for row in torch.randint(0, 256, (rows, CONTEXT)).tolist()], 0, rows)
    tokens, lengths = [1] * rows, [CONTEXT] * rows
    times: dict[int, list[float]] = {1: [], threads: []}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(times[threads]) < 8:
        for count, found in times.items():
            torch.set_num_threads(count)
            runner.decode(tokens, lengths)  # threads wake up, buffers are in this core's cache
            started = time.perf_counter()
            runner.decode(tokens, lengths)
            found.append(1e3 * (time.perf_counter() - started))
    median = {count: statistics.median(found) for count, found in times.items()}
    least = {count: min(found) for count, found in times.items()}
    chosen = engine_threads(model.config, rows, threads)
    assert chosen is not None
    return {
        "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "rows": rows,
        "million_multiply_adds_per_layer": multiply_adds_per_layer(model.config, rows) / 1e6,
        "median_ms": median,
        "least_ms": least,
        "more_threads_over_one_median": median[threads] / median[1],
        "more_threads_over_one_least": least[threads] / least[1],
        "chosen": chosen,
        "chosen_over_better": median[chosen] / min(median.values()),
    }


if __name__ == "__main__":
    main()
