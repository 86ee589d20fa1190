"""What is simulated: how long things take, drawn from distributions or read from a recorded run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from atropos_verl.errors import ConfigError

__all__ = ["Layout", "Recording", "Workload", "read_recording"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that does not depend on who waits for whom. Times in seconds, lengths in tokens.

    Lengths and latencies are log-normal: ``spread`` is the standard deviation of the logarithm (0: all alike; 0.6: the
    longest tenth is about five times the shortest tenth).
    """

    environments: int = 1
    workers: int = 8
    """Groups that one environment makes at a time (``max_num_workers_per_node``)."""
    group_size: int = 8
    """Sequences of a group."""
    batch_size: int = 64
    """Sequences of a step."""
    steps: int = 100
    mean_tokens: float = 1000.0
    """Of one sequence's answer."""
    token_spread: float = 0.6
    max_tokens: int = 16384
    latency: float = 0.0
    """Mean seconds from the end of a group's generation to its arrival: tools, verifiers, reward models."""
    latency_spread: float = 0.0
    step_overhead: float = 0.0
    """Of a step, beside training and sync: decoding, logging, checkpoints."""
    sync_seconds: float = 0.0
    swap_pause: float = 0.0
    """Seconds that generation stands still while weights are swapped (``mode=overlap``)."""
    environment_poll: float = 0.1
    """atroposlib's environments look at the queue this often before they start groups."""
    poll_delay: float = 0.3
    poll_attempts: int = 8
    """``batch_retry_delay`` and ``batch_retry_attempts``: the trainer's polls of GET /batch."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Machines and rules of one configuration."""

    overlap: bool
    gen_capacity: float
    """Tokens per second of all generation together, at full load."""
    sequence_rate: float
    """Tokens per second of one sequence when it has the machine to itself."""
    slots: int
    """Sequences that are generated at a time; more wait in line."""
    train_rate: float
    """Tokens per second of all training together."""
    max_staleness: int | None = None
    max_batches_offpolicy: int = 1
    """Batches that may wait in the queue before environments stop (``env.max_batches_offpolicy``)."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Figures of a real run, one entry a step; they are used in turn, and again from the first."""

    train: tuple[float, ...]
    sync: tuple[float, ...]
    other: tuple[float, ...]
    """Seconds of a step beside waiting, training and sync."""
    rollout: tuple[float, ...]
    """Seconds that the trainer waited."""
    idle_share: float
    """Waiting over all of the time, as measured."""
    groups_per_second: float
    staleness: dict[int, int] = field(default_factory=dict)
    """Staleness in policy versions → groups."""
    sequences: int
    groups: int
    """Of a step (median)."""


def read_recording(path: Path, skip: int = 3) -> Recording:
    """From ``metrics.jsonl`` (or the run directory it lies in), without the first ``skip`` steps (cold caches).

    Raises:
        ConfigError: no such file, a line that is no step, or too few steps.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        if not all(isinstance(line["timing/step"], (int, float)) for line in lines):
            raise TypeError("timing/step is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not the metrics.jsonl of a run: {error}", "--replay") from None
    steps = lines[skip:]
    if len(steps) < 3:
        raise ConfigError(f"{file} holds {len(lines)} steps; at least {skip + 3} are needed", "--replay")

    def column(name: str) -> tuple[float, ...]:
        return tuple(float(step.get(name) or 0.0) for step in steps)

    train, sync, rollout, whole = (column(f"timing/{name}") for name in ("train", "sync", "rollout", "step"))
    prefix = "off_policy/groups_at_staleness/"
    staleness: dict[int, int] = {}
    for step in steps:
        for key, count in step.items():
            if key.startswith(prefix) and count:
                age = int(key.removeprefix(prefix))
                staleness[age] = staleness.get(age, 0) + int(count)
    groups = column("data/groups")
    return Recording(
        train=train,
        sync=sync,
        rollout=rollout,
        other=tuple(max(w - t - s - r, 0.0) for w, t, s, r in zip(whole, train, sync, rollout, strict=True)),
        idle_share=sum(rollout) / sum(whole),
        groups_per_second=sum(groups) / sum(whole),
        staleness=staleness,
        sequences=int(np.median(column("data/sequences"))),
        groups=int(np.median(groups)),
    )
