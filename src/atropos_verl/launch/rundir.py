"""What a launch keeps in its run directory: ``plan.json``, the trainer's settings, ``state.json``."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from atropos_verl.errors import ConfigError
from atropos_verl.launch.probes import Seen
from atropos_verl.launch.progress import StepTail
from atropos_verl.launch.spec import LaunchPlan, evaluations_path, trainer_settings_path, trainer_settings_text
from atropos_verl.storage import write_atomic

__all__ = ["DISK_FULL_BYTES", "compose_state", "prepare_run_dir", "write_state"]

DISK_FULL_BYTES = 1 << 20
"""With less than this free, a service that died has died of it."""


def prepare_run_dir(plan: LaunchPlan) -> None:
    """Make the run directory, ``plan.json`` and the trainer's settings (0600: keys are in them).

    Raises:
        ConfigError: it cannot be written, or its disk is full.
    """
    run_dir = plan.run_dir
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "launch").mkdir(exist_ok=True)
        write_atomic(run_dir / "plan.json", json.dumps(plan.describe(), indent=1) + "\n", private=True)
        if plan.settings_file:
            write_atomic(trainer_settings_path(run_dir), trainer_settings_text(plan.config), private=True)
        if plan.evaluations is not None:
            write_atomic(evaluations_path(run_dir), plan.evaluations, private=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {run_dir}: {error.strerror or error}", "run_dir") from error
    if (free := shutil.disk_usage(run_dir).free) < DISK_FULL_BYTES:
        raise ConfigError(f"the disk of {run_dir} is full ({free} bytes free)", "run_dir")


def compose_state(
    plan: LaunchPlan,
    *,
    services: list[dict[str, Any]],
    seen: Seen,
    steps: StepTail,
    notes: Iterable[str],
    ending: str,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """What a view shows, ``attach`` reads and a diagnosis rests on."""
    return {
        "time": time.time(),
        "pid": os.getpid(),
        "run_dir": str(plan.run_dir),
        "seconds": round(seconds, 1),
        "steps": plan.config.steps,
        "batch_size": plan.config.batch_size,
        "services": services,
        "api_url": plan.addresses.api_url,
        "gateway_url": plan.addresses.gateway_url,
        "api": seen.api,
        "gateway": seen.gateway,
        "rates": {"tokens_per_second": seen.tokens_per_second, "requests_per_second": seen.requests_per_second},
        "refused": int((seen.counters or {}).get("refused_total", 0)),
        "step": steps.step,
        "recent": list(steps.recent),
        "rewards": list(steps.rewards),
        "seconds_since_step": None if steps.last_at is None else round(clock() - steps.last_at, 1),
        "notes": list(notes),
        "ending": ending,
    }


def write_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Replace ``state.json``; a reader sees the old one or the new one. Raises ``OSError``."""
    write_atomic(run_dir / "state.json", json.dumps(state, default=str), private=True)
