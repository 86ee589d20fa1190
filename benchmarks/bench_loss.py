"""Advantage-weighted loss at the LM head: full [T, V] logits against ``linear_token_logprobs`` on trained rows.

    python benchmarks/bench_loss.py [--hidden 896] [--vocabulary 32000] [--tokens 1024] [--dtypes float32 bfloat16]
                                    [--trained 0.5] [--repeats 3] [--full]

``naive`` runs the head on every position and keeps the logits for the backward; ``naive_rows`` does that for trained
rows only, which separates what skipping masked rows gains from what tiling gains. All sides run in one process, in
turn, on the same tensors, after their losses and gradients were compared. Peak memory: the growth of the resident set
above what it was before, watched from a thread every 2 ms; it holds the head's gradient on every side. ``--full``:
vocabulary 151 936, 4096 tokens (naive needs about 8 GB).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch

from atropos_verl.losses import advantage_weighted_sft_loss, linear_token_logprobs

Side = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class PeakMemory:
    """Growth of this process's resident set, in bytes, while the block runs."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._highest = max(self._highest, self._process.memory_info().rss)
        self._stop.set()
        self._thread.join(timeout=5)
        self.bytes = self._highest - self._before


def make_sides(hidden_size: int, vocabulary: int, tokens: int, trained: float, dtype: torch.dtype) -> dict[str, Side]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 0.03).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    mask = torch.rand(tokens, generator=generator) < trained
    rows = mask.nonzero().squeeze(1)

    def run(logprobs_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Side:
        def side() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            leaf, head = hidden.clone().requires_grad_(), weight.detach().requires_grad_()
            loss = advantage_weighted_sft_loss(logprobs_of(leaf, head), advantages, mask).loss
            grads = torch.autograd.grad(loss, (leaf, head))
            return loss.detach(), *grads

        return side

    def full(states: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (states @ head.t()).float().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tokens).index_copy(0, rows, values)

    return {
        "naive": run(lambda states, head: full(states, head, labels)),
        "naive_rows": run(lambda states, head: spread(full(states[rows], head, labels[rows]))),
        "ours": run(lambda states, head: spread(linear_token_logprobs(states[rows], head, labels[rows]))),
    }


def compare(sides: dict[str, Side], dtype: torch.dtype) -> dict[str, float]:
    """Relative error (norm) of our gradients against the naive ones, which are themselves rounded to ``dtype``."""
    expected, found = sides["naive"](), sides["ours"]()
    errors = [float((f.float() - e.float()).norm() / e.float().norm()) for e, f in zip(expected, found, strict=True)]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    if max(errors) > limit:
        raise SystemExit(f"the sides disagree: relative errors {errors}")
    return dict(zip(("loss", "grad_hidden", "grad_weight"), errors, strict=True))


def measure(sides: dict[str, Side], repeats: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            with PeakMemory() as memory:
                started = time.perf_counter()
                result = side()
                seconds[name].append(time.perf_counter() - started)
                del result
            peaks[name].append(memory.bytes)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peak = {name: max(values) for name, values in peaks.items()}
    return {
        "median_seconds": median,
        "min_seconds": {name: min(values) for name, values in seconds.items()},
        "peak_rss_growth_bytes": peak,
        "speedup_over_naive": median["naive"] / median["ours"],
        "speedup_over_naive_rows": median["naive_rows"] / median["ours"],
        "memory_ratio": peak["naive"] / max(peak["ours"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--trained", type=float, default=0.5, help="share of positions that are trained")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="vocabulary 151936, 4096 tokens")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.vocabulary, arguments.tokens = 151_936, 4096
    results: dict[str, object] = {}
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        sides = make_sides(arguments.hidden, arguments.vocabulary, arguments.tokens, arguments.trained, dtype)
        errors = compare(sides, dtype)
        results[name] = {**measure(sides, arguments.repeats), "relative_error": errors}
    sizes = {key: getattr(arguments, key) for key in ("hidden", "vocabulary", "tokens", "trained", "repeats")}
    print(json.dumps({**sizes, "threads": torch.get_num_threads(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
