"""Advantage-weighted loss at the LM head: full [T, V] logits against ``linear_token_logprobs`` on trained rows.

    python benchmarks/bench_loss.py [--hidden 896] [--vocabulary 32000] [--tokens 1024] [--dtypes float32 bfloat16]
                                    [--trained 0.5] [--repeats 3] [--full] [--bars] [--sweep]

``naive`` runs the head on every position and keeps the logits for the backward; ``naive_rows`` does that for trained
rows only, which separates what skipping masked rows gains from the rest; ``floor`` is nothing but the three matrix
products of the trained rows, into buffers that exist already. All sides run in one process, in turn, on the same
tensors, after their losses and gradients were compared with float64. Times are wall and processor seconds: on a
shared machine the second says more. Peak memory: the growth of the resident set above what it was before, watched
from a thread every 2 ms; it holds the head's gradient on every side. ``--full``: vocabulary 151 936, 4096 tokens (naive
needs about 8 GB). ``--bars``: at those sizes, of every dtype only the sides that a bar compares, and beside each bar
whether it is met (bfloat16 against naive in time and memory, float32 against naive on trained rows in time), by the
clock and by processor time. ``--sweep``: ours with other bounds on what is kept for the backward, and other slices.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch

from atropos_verl.training import lm_head
from atropos_verl.training.lm_head import linear_token_logprobs
from atropos_verl.training.losses import advantage_weighted_sft_loss

Side = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


BARS = {
    "bfloat16": [("time_over_naive", "naive", 0.35), ("memory_over_naive", "naive", 0.12)],
    "float32": [("time_over_naive_on_trained_rows", "naive_rows", 1.10)],
}
"""By dtype: (name, the other side, most that ours may take of it)."""


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


def make_sides(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Side]:
    hidden_size, vocabulary, tokens = arguments.hidden, arguments.vocabulary, arguments.tokens
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 0.03).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    mask = torch.rand(tokens, generator=generator) < arguments.trained
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

    def ours(keep: int | None = None, piece: int | None = None) -> Side:
        def logprobs_of(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return spread(linear_token_logprobs(states[rows], head, labels[rows], keep_bytes=keep))

        def side() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            before = lm_head.SLICE_BYTES["cpu"]
            lm_head.SLICE_BYTES["cpu"] = piece or before
            try:
                return run(logprobs_of)()
            finally:
                lm_head.SLICE_BYTES["cpu"] = before

        return side

    if arguments.sweep:
        sides = {f"keep {2**power >> 20} MiB": ours(2**power) for power in (27, 28, 29, 30, 31)}
        return {**sides, **{f"slice {2**power >> 10} KiB": ours(None, 2**power) for power in (18, 20, 22, 24)}}
    return {
        "naive": run(lambda states, head: full(states, head, labels)),
        "naive_rows": run(lambda states, head: spread(full(states[rows], head, labels[rows]))),
        "ours": ours(),
        "floor": _floor(hidden[rows], weight),
    }


def _floor(states: torch.Tensor, weight: torch.Tensor) -> Side:
    """Three products of the trained rows. The buffers are made here, once: the floor pays for no page of memory."""
    dtype = lm_head._product_dtype(states)
    states, weight = states.to(dtype), weight.to(dtype)
    chunk = min(512, states.shape[0])
    logits = torch.zeros(chunk, weight.shape[0], dtype=dtype)
    grad_hidden, grad_weight = torch.zeros_like(states), torch.zeros_like(weight)

    def side() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for at in range(0, states.shape[0], chunk):
            part = states[at : at + chunk]
            tile = logits[: part.shape[0]]
            torch.mm(part, weight.t(), out=tile)
            torch.mm(tile, weight, out=grad_hidden[at : at + chunk])
            grad_weight.addmm_(tile.t(), part)
        return grad_weight, grad_hidden, grad_weight

    return side


def compare(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Relative error (norm) of both sides' loss and gradients against float64, at an eighth of the sizes."""
    small = argparse.Namespace(**{**vars(arguments), "sweep": False})
    small.vocabulary, small.tokens = arguments.vocabulary // 8, arguments.tokens // 8
    exact = make_sides(small, torch.float64)["naive"]()
    sides = make_sides(small, dtype)
    results = {name: sides[name]() for name in ("naive", "ours")}
    errors = {
        name: dict(
            zip(
                ("loss", "grad_hidden", "grad_weight"),
                (float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)),
                strict=True,
            )
        )
        for name, found in results.items()
    }
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    if max(errors["ours"].values()) > limit:
        raise SystemExit(f"ours disagrees with float64: relative errors {errors['ours']}")
    return errors


def measure(sides: dict[str, Side], repeats: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            with PeakMemory() as memory:
                started, used = time.perf_counter(), time.process_time()
                result = side()
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
                del result
            peaks[name].append(memory.bytes)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    busy = {name: statistics.median(values) for name, values in processor.items()}
    peak = {name: max(values) for name, values in peaks.items()}
    print(f"measured: {', '.join(f'{name} {value:.2f} s' for name, value in median.items())}", file=sys.stderr)
    report: dict[str, object] = {
        "median_seconds": median,
        "min_seconds": {name: min(values) for name, values in seconds.items()},
        "median_processor_seconds": busy,
        "peak_rss_growth_bytes": peak,
    }
    if "ours" in sides:
        others = [name for name in sides if name != "ours"]
        report["ours_over"] = {name: median["ours"] / median[name] for name in others}
        report["ours_over_by_processor_seconds"] = {name: busy["ours"] / busy[name] for name in others}
        if "naive" in sides:
            report["memory_over_naive"] = peak["ours"] / max(peak["naive"], 1)
    return report


def judge(name: str, figures: dict[str, object]) -> list[dict[str, object]]:
    """Every bar of a dtype: the ratios measured, and whether the bar is met by each."""
    verdicts = []
    for bar, other, limit in BARS[name]:
        if bar.startswith("memory"):
            ratios = {"resident_set": figures["memory_over_naive"]}
        else:
            ratios = {
                "clock": figures["ours_over"][other],  # type: ignore[index]
                "processor": figures["ours_over_by_processor_seconds"][other],  # type: ignore[index]
            }
        verdicts.append(
            {"bar": bar, "at_most": limit, **ratios, "met": {key: value <= limit for key, value in ratios.items()}}
        )
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--trained", type=float, default=0.5, help="share of positions that are trained")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="vocabulary 151936, 4096 tokens")
    parser.add_argument("--bars", action="store_true", help="those sizes, only what the bars compare, and a verdict")
    parser.add_argument("--sweep", action="store_true", help="other settings of ours instead of the other sides")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.bars and arguments.sweep:
        parser.error("--bars compares sides that --sweep leaves out: give one of the two")
    if arguments.full or arguments.bars:
        arguments.vocabulary, arguments.tokens = 151_936, 4096
    results: dict[str, object] = {}
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        errors = compare(arguments, dtype)
        sides = make_sides(arguments, dtype)
        if arguments.bars:
            wanted = {"ours", *(other for _, other, _ in BARS[name])}
            sides = {key: side for key, side in sides.items() if key in wanted}
        figures = measure(sides, arguments.repeats)
        results[name] = {**figures, "relative_error_to_float64": errors}
        if arguments.bars:
            results[name]["bars"] = judge(name, figures)  # type: ignore[index]
        del sides
    sizes = {key: getattr(arguments, key) for key in ("hidden", "vocabulary", "tokens", "trained", "repeats")}
    took = {"threads": torch.get_num_threads(), "benchmark_seconds": time.perf_counter() - started}
    print(json.dumps({**sizes, **took, "results": results}, indent=2))


if __name__ == "__main__":
    main()
