"""The index of rollouts: what writing it costs a run, and how long a look into it takes at size.

    python benchmarks/bench_trace.py [--steps 85] [--sequences 100000] [key=value ...]

The first part trains the demo (or what ``--config-name`` names, with the settings given) and notes ten steps, not the
next ten, and so on: the processor time of a step with and without, and what the writing thread takes of it. The second
part writes that many sequences of 64 to 256 tokens with the writer of a run, in batches of 16 groups of 8, and prints
the processor time of the writing thread for each, and the medians of opening a random sequence and of each filter (20
looks each, in turn).
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.report.trace_reader import RolloutFilter, TraceReader
from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import Applied
from atropos_verl.training.trace import TraceWriter
from atropos_verl.types import NOT_TRAINED, UNKNOWN_VERSION, ScoredGroup, SequenceMatch

GROUPS, SIZE, LOOKS = 16, 8, 20


def make_group(rng: np.random.Generator, number: int) -> ScoredGroup:
    rows = [rng.integers(32, 94, int(rng.integers(64, 257))) for _ in range(SIZE)]
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


def match(group: ScoredGroup, i: int) -> SequenceMatch:
    found, nothing = group.trained(i), np.full(len(group.token_ids[i]), np.nan)
    versions = np.where(found, int(group.group_id), UNKNOWN_VERSION)
    return SequenceMatch(found=found, versions=versions, logprobs=nothing, records=(int(group.group_id) * SIZE + i,))


class InBlocks(TraceWriter):
    """Notes a part of the steps. Keeps the processor time of this process in each."""

    def __init__(self, run_dir: Path, most_bytes: int) -> None:
        super().__init__(run_dir, most_bytes)
        WRITERS.append(self)
        self.steps: list[float] = []
        self.last = 0.0

    @property
    def is_on(self) -> bool:
        return is_noted(len(self.steps))

    def _put(self, job: Callable[[], None], weight: int) -> None:
        if self.is_on:
            super()._put(job, weight)

    def ended(self, *about: Any, **named: Any) -> None:
        super().ended(*about, **named)
        now = time.process_time()
        self.steps.append(now - self.last)
        self.last = now


def is_noted(step: int) -> bool:
    """Two blocks are, two are not: what changes steadily in the course of the run falls on both sides."""
    return step // BLOCK % 4 < 2


BLOCK = 5
WRITERS: list[InBlocks] = []


def overhead(words: list[str], steps: int, config_name: str) -> None:
    from atropos_verl.launch import train
    from atropos_verl.training import batch_source

    batch_source.TraceWriter = InBlocks  # type: ignore[misc]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as name:
        fixed = [f"run_dir={name}/run", f"steps={steps}", "eval.before=false", "eval.after=false", "save_freq=-1"]
        if train.main([*fixed, *words], config_name=config_name) != 0:
            raise SystemExit("the run failed")
    [writer] = WRITERS
    # Without the first block, which has the start of the run, and the first of each: writing of the one before.
    kept = [(is_noted(n), taken) for n, taken in enumerate(writer.steps) if n >= BLOCK and n % BLOCK]
    sides = [[taken for on, taken in kept if on == side] for side in (True, False)]
    noted, without = (statistics.median(side) for side in sides)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / steps
    share = writer.seconds / sum(map(is_noted, range(steps)))
    print(
        f"processor time of a step in the trainer's process: median {noted:.4f} s with the trace, {without:.4f} s "
        f"without, ratio {noted / without:.4f} ({len(sides[0])} and {len(sides[1])} steps in turn)\n"
        f"the writing thread: {share * 1e3:.2f} ms a step, {share / without:.2%} of that, "
        f"{share / (without + others):.2%} of a step in all processes of the run ({without + others:.4f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=85, help="of the run, 0: no run")
    parser.add_argument("--sequences", type=int, default=100_000, help="of the index, 0: none")
    parser.add_argument("--config-name", default="atropos", help="of the run")
    options, words = parser.parse_known_args()
    if options.steps:
        overhead(words, options.steps, options.config_name)
    if options.sequences:
        looks_at_size(options.sequences)


def looks_at_size(wanted: int) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        (run_dir / "config.json").write_text('{"model": {"path": null}}')
        writer = TraceWriter(run_dir, 1 << 40)
        writer.begin(None)
        batches = wanted // (GROUPS * SIZE)
        for batch in range(1, batches + 1):
            groups = [make_group(rng, batch * GROUPS + i) for i in range(GROUPS)]
            places = [(batch, i) for i in range(GROUPS)]
            matches = [[match(group, i) for i in range(SIZE)] for group in groups]
            for row in matches:
                writer.request([(m.records[0], int(m.found.sum()), batch) for m in row], batch, 32, time.time(), 1.0)
            writer.arrived(batch, groups)
            applied = Applied(groups, list(range(GROUPS)), {})
            writer.collected(places, groups, matches, applied, build_samples(groups))
            writer.ended(places, batch)
            while writer._waiting > 4000:
                time.sleep(0.01)
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
            "version": {"version": batches * GROUPS // 2},
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
