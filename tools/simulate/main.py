"""``atropos-verl simulate``."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atropos_verl.errors import ConfigError
from simulate.arrivals import read_arrivals
from simulate.calibrate import Calibration, calibrate
from simulate.outcome import Outcome, averaged, table
from simulate.recording import SKIPPED_STEPS, Recording, read_recording
from simulate.replay import recorded_groups, recorded_times, replay
from simulate.run import simulate
from simulate.workload import Layout, Workload

_STEPS = 200
_BATCH_SIZE = 1024
_NUMBERS: tuple[tuple[str, type, float, str], ...] = (
    ("environments", int, 512, "environment processes"),
    ("workers", int, 1, "groups that each makes at a time (max_num_workers_per_node)"),
    ("group-size", int, 8, "sequences of a group"),
    ("mean-tokens", float, 2000, "tokens of an answer, mean"),
    ("token-spread", float, 0.6, "standard deviation of the logarithm of its length (0: all alike)"),
    ("max-tokens", int, 16384, "longest answer"),
    ("latency", float, 0, "seconds from the end of a group's generation to its arrival (tools, verifier), mean"),
    ("latency-spread", float, 0.5, "standard deviation of its logarithm"),
    ("step-overhead", float, 0, "seconds of a step beside training and sync"),
    ("sync-seconds", float, 2, "seconds of a weight sync"),
    ("swap-pause", float, 0, "seconds that generation stands still in one (overlap)"),
    ("take-seconds", float, 0, "seconds from a batch's hand-out until it is ready to be trained on"),
    ("poll-delay", float, 0.3, "batch_retry_delay: seconds to the trainer's second look at the queue"),
    ("post-seconds", float, 0.005, "seconds that an environment is busy with posting one group"),
    (
        "answer-seconds",
        float,
        0,
        "seconds during which a posted group is counted twice: an upstream API's, about 0.001",
    ),
    ("gpus", int, 128, "in sync mode they generate and train in turn"),
    ("generation-rate", float, 4000, "tokens per second of one GPU that generates, at full load"),
    ("sequence-rate", float, 80, "tokens per second of one sequence, at most"),
    ("slots", int, 256, "sequences that one GPU generates at a time"),
    ("train-rate", float, 1500, "tokens per second of one GPU that trains"),
    ("skip", int, SKIPPED_STEPS, "steps at the beginning that the figures leave out: the queue is empty then"),
    ("seed", int, 0, "equal seeds give equal results"),
    ("seeds", int, 1, "figures are means over so many seeds, from --seed on"),
)
_MAY_BE_ZERO = (
    *("token-spread", "latency", "latency-spread", "step-overhead", "sync-seconds", "swap-pause", "take-seconds"),
    *("poll-delay", "post-seconds", "answer-seconds", "skip", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    modes = ["compare", "sync", "overlap"]
    parser.add_argument("--mode", choices=modes, default="compare", help="what to simulate (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, help=f"optimiser steps (default: {_STEPS}; with --replay, as many as were recorded)"
    )
    parser.add_argument(
        "--batch-size", type=int, help=f"sequences of a step (default: {_BATCH_SIZE}; with --replay, the run's)"
    )
    for name, kind, default, text in _NUMBERS:
        parser.add_argument(f"--{name}", type=kind, default=kind(default), help=f"{text} (default: %(default)s)")
    parser.add_argument("--train-gpus", type=int, help="of the GPUs, those that train in overlap mode (default: half)")
    parser.add_argument("--max-staleness", type=int, help="off_policy.max_staleness (default: no bound)")
    parser.add_argument(
        "--max-batches-offpolicy", type=int, help="env.max_batches_offpolicy (default: 1 in sync, 2 in overlap)"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="RUN",
        help="a run directory or metrics.jsonl: its seconds of training and sync, its batch and group size, its polls",
    )
    parser.add_argument(
        "--generation-from",
        type=Path,
        metavar="RUN",
        help="a sync run with the same environments, whose arrivals say how long generation and posting take",
    )
    parser.add_argument(
        "--generation-latency", type=float, help="--latency in the run of --generation-from (default: the same)"
    )
    parser.add_argument(
        "--arrivals",
        type=Path,
        metavar="RUN",
        help="replay the groups of a recorded run as they came, through the trainer's settings given here: --mode, "
        "--batch-size, --max-staleness, --max-batches-offpolicy; seconds of training and sync are the run's",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    started = time.perf_counter()
    try:
        overlaps = [False, True] if options.mode == "compare" else [options.mode == "overlap"]
        recording: Recording | None
        calibration: Calibration | None = None
        if options.arrivals is not None:
            workload, recording, runs = _replay(options, overlaps)
        else:
            workload, recording, calibration = _workload(options)
            runs = [_simulate(options, workload, recording, calibration, overlap=overlap) for overlap in overlaps]
    except ConfigError as error:
        sys.stderr.write(f"atropos-verl simulate: {error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"atropos-verl simulate: {error}\n")
        return 1
    took = time.perf_counter() - started
    outcomes = [averaged(outcomes) for outcomes in runs]
    if options.json:
        found = _as_json(runs, recording, calibration)
        sys.stdout.write(json.dumps({"took_seconds": round(took, 2), **found}, indent=2) + "\n")
        return 0
    lines = [table(outcomes)]
    if recording is not None:
        lines.append(
            f"the recorded run: trainer idle {recording.idle_share:.1%}, {recording.groups_per_second:.3g} groups/s"
        )
    events = sum(outcome.events for outcomes in runs for outcome in outcomes)
    steps = " and ".join(str(outcome.steps) for outcome in outcomes) if options.arrivals else workload.steps
    lines.append(f"{steps} steps, {events:,} events in {took:.1f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _as_json(
    runs: list[list[Outcome]], recording: Recording | None, calibration: Calibration | None
) -> dict[str, object]:
    found: dict[str, object] = {
        "runs": [
            {
                **averaged(outcomes).as_json(),
                "trainer_idle_share_by_seed": [round(outcome.trainer_idle_share, 4) for outcome in outcomes],
            }
            for outcomes in runs
        ]
    }
    if recording is not None:
        found["recorded"] = {
            "trainer_idle_share": recording.idle_share,
            "groups_per_second": recording.groups_per_second,
            "staleness": {str(age): count for age, count in recording.groups_of_staleness.items()},
        }
    if calibration is not None:
        found["calibration"] = calibration.as_json()
    return found


def _check_numbers(options: argparse.Namespace) -> None:
    """Raises ``ConfigError``."""
    for name in [*(name for name, _, _, _ in _NUMBERS), "batch-size"]:
        lowest = 0 if name in _MAY_BE_ZERO else 1e-9
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < lowest:
            raise ConfigError(f"{value}: must be {'at least 0' if lowest == 0 else 'above 0'}", f"--{name}")


def _replay(options: argparse.Namespace, overlaps: Sequence[bool]) -> tuple[Workload, Recording, list[list[Outcome]]]:
    """Recorded arrivals. Raises ``ConfigError``."""
    for name in ("replay", "generation_from"):
        if getattr(options, name) is not None:
            raise ConfigError("--arrivals has its groups and its seconds from one run", f"--{name.replace('_', '-')}")
    _check_numbers(options)
    recording = read_recording(options.arrivals, options.skip, option="--arrivals")
    batches = read_arrivals(options.arrivals, option="--arrivals")
    groups = recorded_groups(recording, batches)
    batch_size = options.batch_size or recording.sequences
    steps = options.steps or sum(group.size for group in groups) // batch_size
    workload = replace(recording.applied(Workload()), batch_size=batch_size, steps=max(steps, 1))
    times = recorded_times(recording, batches, batch_size)
    runs = [[replay(groups, workload, _layout(options, overlap), times, options.skip)] for overlap in overlaps]
    return workload, recording, runs


def _workload(options: argparse.Namespace) -> tuple[Workload, Recording | None, Calibration | None]:
    """Raises ``ConfigError``."""
    _check_numbers(options)
    recording = None if options.replay is None else read_recording(options.replay, options.skip)
    if options.steps is None:
        options.steps = _STEPS if recording is None else recording.steps
    if options.steps <= options.skip:
        raise ConfigError(f"{options.steps}: must be above --skip ({options.skip})", "--steps")
    if options.batch_size is None:
        options.batch_size = _BATCH_SIZE
    fields = Workload.__dataclass_fields__
    workload = Workload(**{key: value for key, value in vars(options).items() if key in fields})
    if recording is not None:
        workload = recording.applied(workload)
    calibration = None
    if options.generation_from is not None:
        source = read_recording(options.generation_from, options.skip, option="--generation-from")
        arrivals = read_arrivals(options.generation_from, option="--generation-from")
        latency = options.latency if options.generation_latency is None else options.generation_latency
        calibration = calibrate(source, arrivals, latency, workload.environment_period)
    if workload.batch_size % workload.group_size:
        raise ConfigError(f"{workload.batch_size}: must be a multiple of --group-size", "--batch-size")
    if options.train_gpus is not None and not 0 < options.train_gpus < options.gpus:
        raise ConfigError(f"{options.train_gpus}: must be between 1 and --gpus - 1", "--train-gpus")
    return workload, recording, calibration


def _simulate(
    options: argparse.Namespace,
    workload: Workload,
    recording: Recording | None,
    calibration: Calibration | None,
    *,
    overlap: bool,
) -> list[Outcome]:
    """One for each seed."""
    layout = _layout(options, overlap)
    if calibration is not None:
        workload, layout = calibration.applied(workload, layout)
    times = None if recording is None else recording.times
    return [
        simulate(workload, layout, seed=options.seed + number, times=times, skip=options.skip)
        for number in range(options.seeds)
    ]


def _layout(options: argparse.Namespace, overlap: bool) -> Layout:
    train_gpus = (options.train_gpus or max(options.gpus // 2, 1)) if overlap else options.gpus
    gen_gpus = max(options.gpus - train_gpus, 1) if overlap else options.gpus
    return Layout(
        overlap=overlap,
        gen_capacity=gen_gpus * options.generation_rate,
        sequence_rate=options.sequence_rate,
        slots=gen_gpus * options.slots,
        train_rate=train_gpus * options.train_rate,
        max_staleness=options.max_staleness,
        max_batches_offpolicy=options.max_batches_offpolicy or (2 if overlap else 1),
    )
