"""How many torch threads engine and trainer get when both compute at the same time on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

from atropos_verl.config import RunConfig

__all__ = ["Threads", "share_cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """None: as torch would have it."""

    engine: int | None
    trainer: int | None


def share_cores(config: RunConfig, device: str, cores: int | None = None) -> Threads:
    """With ``mode=overlap`` on a CPU half the cores each, unless the settings or ``OMP_NUM_THREADS`` say otherwise.

    Two pools that each expect every core wait for each other at every barrier: on two cores a training step beside a
    generating engine took 1.2 s with two threads each, 0.7 s with one (``benchmarks/bench_engine_placement.py``).

    Args:
        cores: of this process; None: those it may run on.
    """
    engine, trainer = config.inference.num_threads, config.trainer.num_threads
    if config.is_overlapped and device == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        cores = cores or len(os.sched_getaffinity(0))
        engine = engine or max(1, cores // 2)
        trainer = trainer or max(1, cores - engine)
    return Threads(engine=engine, trainer=trainer)
