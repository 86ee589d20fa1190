"""The index of rollouts at size: how long a look into it takes, and what writing it costs.

``python benchmarks/bench_trace.py [SEQUENCES]`` writes that many sequences (default 100,000) of 64 to 256 tokens with
the writer of a run, in batches of 16 groups of 8. It prints the processor time of the writing thread for each sequence,
and the medians of opening a random sequence and of each filter (20 looks each, in turn).
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.assets import demo_model_path
from atropos_verl.report.trace_reader import RolloutFilter, TraceReader, load_decoder
from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import Applied
from atropos_verl.training.trace import TraceWriter
from atropos_verl.types import NOT_TRAINED, ScoredGroup

GROUPS, SIZE, LOOKS = 16, 8, 20


def make_group(rng: np.random.Generator, number: int) -> ScoredGroup:
    rows = [rng.integers(64, 250, int(rng.integers(64, 257))) for _ in range(SIZE)]
    masks = [np.where(np.arange(len(row)) < 32, NOT_TRAINED, row) for row in rows]
    logprobs = [np.where(mask == NOT_TRAINED, 1.0, -rng.random(len(mask))) for mask in masks]
    return ScoredGroup(
        token_ids=tuple(rows),
        masks=tuple(masks),
        scores=rng.random(SIZE),
        inference_logprobs=tuple(logprobs),
        env_id=number % 3,
        group_id=str(number),
    )


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        (run_dir / "config.json").write_text('{"model": {"path": null}}')
        writer = TraceWriter(run_dir, 1 << 40)
        writer.decode = load_decoder(str(demo_model_path())).decode
        writer.begin(None)
        batches = wanted // (GROUPS * SIZE)
        for batch in range(1, batches + 1):
            groups = [make_group(rng, batch * GROUPS + i) for i in range(GROUPS)]
            places = [(batch, i) for i in range(GROUPS)]
            writer.arrived(batch, groups)
            applied = Applied(groups, list(range(GROUPS)), 0, {})
            writer.collected(places, groups, [[None] * SIZE] * GROUPS, applied, build_samples(groups))
            writer.ended(places, batch)
            while writer._jobs.qsize() > 64:
                time.sleep(0.01)
        while not writer._jobs.empty():
            time.sleep(0.1)
        writer.close()
        count = batches * GROUPS * SIZE
        size = writer.path.stat().st_size
        print(f"{count:,} sequences, {size / 2**20:.0f} MiB, {writer.seconds / count * 1e6:.0f} us of writing each")
        reader = TraceReader(run_dir)
        ids = [
            (batch << 16 | g) << 16 | i for batch in range(1, batches + 1) for g in range(GROUPS) for i in range(SIZE)
        ]
        looks: dict[str, Callable[[], Any]] = {"open": lambda: reader.sequence(random.choice(ids))}
        filters: dict[str, dict[str, Any]] = {
            "all": {},
            "step": {"step": batches // 2},
            "environment": {"environment": 1},
            "state, none": {"state": "stale"},
            "reason, none": {"reason": "older"},
            "reward": {"reward_min": 0.999},
            "length": {"length_min": 256},
            "version, none": {"version": 7},
            "text": {"text": "abc"},
            "text, none": {"text": "zebra crossing"},
        }
        for label, given in filters.items():
            looks[label] = lambda given=given: reader.rollouts(RolloutFilter(**given))
        looks["counts"] = reader.counts
        times: dict[str, list[float]] = {label: [] for label in looks}
        for _ in range(LOOKS):
            for label, look in looks.items():
                started = time.perf_counter()
                look()
                times[label].append(time.perf_counter() - started)
        for label, taken in times.items():
            print(f"{label:16} median {statistics.median(taken) * 1e3:7.1f} ms, most {max(taken) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
