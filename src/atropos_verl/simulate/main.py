"""``atropos-verl simulate``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from atropos_verl.errors import ConfigError
from atropos_verl.simulate.outcome import Outcome, table
from atropos_verl.simulate.run import simulate
from atropos_verl.simulate.workload import Layout, Recording, Workload, read_recording

__all__ = ["add_arguments", "run"]

_NUMBERS: tuple[tuple[str, type, float, str], ...] = (
    ("environments", int, 512, "environment processes"),
    ("workers", int, 1, "groups that each makes at a time (max_num_workers_per_node)"),
    ("group-size", int, 8, "sequences of a group"),
    ("batch-size", int, 1024, "sequences of a step"),
    ("steps", int, 200, "optimiser steps"),
    ("mean-tokens", float, 2000, "tokens of an answer, mean"),
    ("token-spread", float, 0.6, "standard deviation of the logarithm of its length (0: all alike)"),
    ("max-tokens", int, 16384, "longest answer"),
    ("latency", float, 0, "seconds from the end of a group's generation to its arrival (tools, verifier), mean"),
    ("latency-spread", float, 0.5, "standard deviation of its logarithm"),
    ("step-overhead", float, 0, "seconds of a step beside training and sync"),
    ("sync-seconds", float, 2, "seconds of a weight sync"),
    ("swap-pause", float, 0, "seconds that generation stands still in one (overlap)"),
    ("poll-delay", float, 0.3, "batch_retry_delay: seconds to the trainer's second look at the queue"),
    ("gpus", int, 128, "in sync mode they generate and train in turn"),
    ("generation-rate", float, 4000, "tokens per second of one GPU that generates, at full load"),
    ("sequence-rate", float, 80, "tokens per second of one sequence, at most"),
    ("slots", int, 256, "sequences that one GPU generates at a time"),
    ("train-rate", float, 1500, "tokens per second of one GPU that trains"),
    ("seed", int, 0, "equal seeds give equal results"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--mode", choices=["compare", "sync", "overlap"], default="compare", help="what to simulate")
    for name, kind, default, text in _NUMBERS:
        parser.add_argument(f"--{name}", type=kind, default=kind(default), help=text)
    parser.add_argument("--train-gpus", type=int, help="of the GPUs, those that train in overlap mode; None: half")
    parser.add_argument("--max-staleness", type=int, help="off_policy.max_staleness; None: no bound")
    parser.add_argument(
        "--max-batches-offpolicy", type=int, help="env.max_batches_offpolicy; None: 1 in sync, 2 in overlap"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="RUN",
        help="a run directory or metrics.jsonl: its seconds of training and sync, its batch and group size",
    )
    parser.add_argument(
        "--generation-from",
        type=Path,
        metavar="RUN",
        help="with --replay: a sync run whose waiting, without --latency, is how long a group's generation takes",
    )
    parser.add_argument(
        "--generation-latency", type=float, help="what --latency was in the run of --generation-from; None: the same"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    started = time.perf_counter()
    try:
        workload, recording = _workload(options)
        modes = ["sync", "overlap"] if options.mode == "compare" else [options.mode]
        outcomes = [_simulate(options, workload, recording, overlap=mode == "overlap") for mode in modes]
    except ConfigError as error:
        sys.stderr.write(f"atropos-verl simulate: {error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"atropos-verl simulate: {error}\n")
        return 1
    took = time.perf_counter() - started
    if options.json:
        found: dict[str, object] = {"took_seconds": round(took, 2), "runs": [o.as_json() for o in outcomes]}
        if recording is not None:
            found["recorded"] = {
                "trainer_idle_share": recording.idle_share,
                "groups_per_second": recording.groups_per_second,
                "staleness": {str(age): n for age, n in sorted(recording.staleness.items())},
            }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    lines = [table(outcomes)]
    if recording is not None:
        lines.append(
            f"the recorded run: trainer idle {recording.idle_share:.1%}, {recording.groups_per_second:.3g} groups/s"
        )
    events = sum(outcome.events for outcome in outcomes)
    lines.append(f"{workload.steps} steps, {events:,} events in {took:.1f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _workload(options: argparse.Namespace) -> tuple[Workload, Recording | None]:
    """Raises ``ConfigError``."""
    for name, _, _, _ in _NUMBERS:
        lowest = 0 if name in _MAY_BE_ZERO else 1e-9
        value = getattr(options, name.replace("-", "_"))
        if value < lowest:
            raise ConfigError(f"{value}: must be {'at least 0' if lowest == 0 else 'above 0'}", f"--{name}")
    fields = Workload.__dataclass_fields__
    workload = Workload(**{key: value for key, value in vars(options).items() if key in fields})
    recording = None
    if options.replay is not None:
        recording = read_recording(options.replay)
        group_size = max(recording.sequences // max(recording.groups, 1), 1)
        workload = replace(workload, group_size=group_size, batch_size=group_size * recording.groups)
    if options.generation_from is not None:
        source = read_recording(options.generation_from)
        latency = options.latency if options.generation_latency is None else options.generation_latency
        seconds = [max(wait - latency, 1e-3) for wait in source.rollout]
        mean = sum(seconds) / len(seconds)
        workload = replace(workload, mean_tokens=mean, token_spread=0.0, max_tokens=10**9)
        options.sequence_rate, options.generation_rate, options.slots = 1.0, 1e12, 10**9
    if workload.batch_size % workload.group_size:
        raise ConfigError(f"{workload.batch_size}: must be a multiple of --group-size", "--batch-size")
    if options.train_gpus is not None and not 0 < options.train_gpus < options.gpus:
        raise ConfigError(f"{options.train_gpus}: must be between 1 and --gpus - 1", "--train-gpus")
    return workload, recording


_MAY_BE_ZERO = (
    *("token-spread", "latency", "latency-spread", "step-overhead", "sync-seconds", "swap-pause", "poll-delay", "seed"),
)


def _simulate(
    options: argparse.Namespace, workload: Workload, recording: Recording | None, *, overlap: bool
) -> Outcome:
    train_gpus = (options.train_gpus or max(options.gpus // 2, 1)) if overlap else options.gpus
    gen_gpus = max(options.gpus - train_gpus, 1) if overlap else options.gpus
    layout = Layout(
        overlap=overlap,
        gen_capacity=gen_gpus * options.generation_rate,
        sequence_rate=options.sequence_rate,
        slots=gen_gpus * options.slots,
        train_rate=train_gpus * options.train_rate,
        max_staleness=options.max_staleness,
        max_batches_offpolicy=options.max_batches_offpolicy or (2 if overlap else 1),
    )
    return simulate(workload, layout, seed=options.seed, recording=recording)
