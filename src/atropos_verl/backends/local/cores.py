"""How many torch threads engine and trainer get on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.runner import engine_threads

__all__ = ["Threads", "share_cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """None: as torch would have it."""

    engine: int | None
    trainer: int | None


def share_cores(config: RunConfig, device: str, model: Any, cores: int | None = None) -> Threads:
    """On a CPU, unless the settings or ``OMP_NUM_THREADS`` say otherwise: with ``mode=overlap`` half the cores each.

    The engine of a model so small that a second thread only costs time gets one (``inference.threads``).

    Two pools that each expect every core wait for each other at every barrier: on two cores a training step beside a
    generating engine took 1.2 s with two threads each, 0.7 s with one.

    Args:
        model: the Hugging Face configuration of the policy.
        cores: of this process; None: those it may run on.
    """
    engine, trainer = config.inference.num_threads, config.trainer.num_threads
    if device == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        cores = cores or len(os.sched_getaffinity(0))
        rows = config.inference.max_running
        if config.is_overlapped:
            engine = engine or engine_threads(model, rows, max(1, cores // 2))
            trainer = trainer or max(1, cores - (engine or 1))
        else:
            engine = engine or engine_threads(model, rows, None)
    return Threads(engine=engine, trainer=trainer)
