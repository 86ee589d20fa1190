"""A recorded run: what ``metrics.jsonl`` says of every step, and ``config.json`` of its settings."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.errors import ConfigError
from simulate.workload import Workload

SKIPPED_STEPS = 3
"""At the beginning of a run: environments start, caches are cold, and the queue is empty."""
_STALENESS = "off_policy/groups_at_staleness/"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Figures of a real run, one entry a step. Seconds."""

    train: tuple[float, ...]
    sync: tuple[float, ...]
    other: tuple[float, ...]
    """Of a step beside waiting, training and sync."""
    rollout: tuple[float, ...]
    """Seconds that the trainer waited for its batch, until it was ready to be trained on."""
    waited: tuple[float, ...]
    """Seconds that the API was asked for it, until it was sent."""
    whole: tuple[float, ...]
    """Of a step."""
    groups: tuple[int, ...]
    staleness: tuple[Counter[int], ...]
    """Of a step: policy versions behind → groups."""
    sequences: int
    """Of a step (median)."""
    skip: int
    """Steps that the figures leave out."""
    config: dict[str, Any]
    """Settings of the run; empty where there is no ``config.json``."""

    @property
    def steps(self) -> int:
        return len(self.whole)

    @property
    def idle_share(self) -> float:
        """Waiting over all of the time, from step ``skip`` on."""
        return sum(self.rollout[self.skip :]) / max(sum(self.whole[self.skip :]), 1e-9)

    @property
    def groups_per_second(self) -> float:
        """Trained on, from step ``skip`` on."""
        return sum(self.groups[self.skip :]) / max(sum(self.whole[self.skip :]), 1e-9)

    @property
    def groups_of_staleness(self) -> dict[int, int]:
        """Staleness in policy versions → groups, from step ``skip`` on."""
        return dict(sorted(sum(self.staleness[self.skip :], Counter()).items()))

    @property
    def batch_groups(self) -> int:
        """Groups of a step (median)."""
        return max(int(np.median(self.groups)), 1)

    def applied(self, workload: Workload) -> Workload:
        """``workload`` with the run's batch and group size, and its polls of GET /batch."""
        group_size = max(self.sequences // max(self.batch_groups, 1), 1)
        return replace(
            workload,
            group_size=group_size,
            batch_size=group_size * self.batch_groups,
            poll_delay=self.setting("batch_retry_delay", workload.poll_delay),
            poll_attempts=self.setting("batch_retry_attempts", workload.poll_attempts),
            poll_seconds=self.setting("batch_max_wait_time", workload.poll_seconds),
        )

    def times(self, step: int, tokens: float) -> tuple[float, float, float]:
        """Seconds of training, sync and the rest of step ``step`` (from 0), whatever its tokens. A longer run has those
        of the steps after the skipped ones again and again."""
        del tokens
        if step >= self.steps:
            step = self.skip + (step - self.skip) % (self.steps - self.skip)
        return self.train[step], self.sync[step], self.other[step]

    def setting(self, name: str, otherwise: Any) -> Any:
        """A setting of the run by its dotted name; ``otherwise`` where it is not recorded or null."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return otherwise if value is None else value


def read_recording(path: Path, skip: int = SKIPPED_STEPS, *, option: str = "--replay") -> Recording:
    """From a run directory, or its ``metrics.jsonl``.

    Raises:
        ConfigError: no such file, a line that is no step, or too few steps; names ``option``.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        steps = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        if not all(isinstance(step["timing/step"], (int, float)) for step in steps):
            raise TypeError("timing/step is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not the metrics.jsonl of a run: {error}", option) from None
    if len(steps) < skip + 3:
        raise ConfigError(f"{file} holds {len(steps)} steps; at least {skip + 3} are needed", option)

    def column(name: str) -> tuple[float, ...]:
        return tuple(float(step.get(name) or 0.0) for step in steps)

    train, sync, rollout, whole = (column(f"timing/{name}") for name in ("train", "sync", "rollout", "step"))
    return Recording(
        train=train,
        sync=sync,
        rollout=rollout,
        waited=tuple(float(step.get("timing/wait", r)) for step, r in zip(steps, rollout, strict=True)),
        whole=whole,
        other=tuple(max(w - t - s - r, 0.0) for w, t, s, r in zip(whole, train, sync, rollout, strict=True)),
        groups=tuple(int(count) for count in column("data/groups")),
        staleness=tuple(_staleness(step) for step in steps),
        sequences=int(np.median(column("data/sequences"))),
        skip=skip,
        config=_config(file.parent / "config.json"),
    )


def _staleness(step: dict[str, Any]) -> Counter[int]:
    counts = {key.removeprefix(_STALENESS): int(n) for key, n in step.items() if key.startswith(_STALENESS) and n}
    return Counter({int(age): count for age, count in counts.items()})


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
