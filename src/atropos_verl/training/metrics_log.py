"""``metrics.jsonl``, one line per optimiser step, and ``summary.json``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atropos_verl.storage import write_atomic
from atropos_verl.types import StepReport

__all__ = ["MetricsLog", "write_summary"]

logger = logging.getLogger(__name__)

_OWN_KEYS = ("step", "policy_version", "loss")


class MetricsLog:
    """Appends steps to a file of JSON lines.

    Each line is ``{"step": 3, "policy_version": 3, "loss": 0.25, "reward/mean": 0.5, …}`` and reaches the operating
    system before ``append`` returns, so it survives a ``kill -9``. A number that is not finite is written as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, report: StepReport) -> None:
        """Write one line.

        Raises:
            ValueError: a metric is called ``step``, ``policy_version`` or ``loss``.
            OSError: it cannot be written.
        """
        clash = [key for key in _OWN_KEYS if key in report.metrics]
        if clash:
            raise ValueError(f"metric {clash[0]!r} has the name of a field of StepReport; choose another name")
        line = {"step": report.step, "policy_version": report.policy_version, "loss": report.loss, **report.metrics}
        finite = _finite(line)
        lost = sorted(key for key, value in line.items() if value is not None and finite[key] is None)
        if lost:
            named = ", ".join(f"{key} = {line[key]}" for key in lost)
            logger.warning("step %d: %s; written as null to %s", report.step, named, self.path)
        text = json.dumps(finite, allow_nan=False, default=_plain)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def rewards(self) -> list[float]:
        """``reward/mean`` of every step so far that has one, earlier processes' included."""
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [line["reward/mean"] for line in lines if isinstance(line.get("reward/mean"), float)]

    def truncate_after(self, step: int) -> None:
        """Remove the lines of steps above ``step`` (0: all), and what is no step at all, such as a line cut short.

        For a run that resumes: it will take those steps again. Atomic.
        """
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        kept = [line for line in lines if _is_step_up_to(line, step)]
        if len(kept) == len(lines):
            return
        logger.info(
            "%s: %d of %d lines are after step %d and removed", self.path, len(lines) - len(kept), len(lines), step
        )
        write_atomic(self.path, "".join(f"{line}\n" for line in kept), durable=True)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary`` as indented JSON, atomically; numbers that are not finite become null, paths become text.

    Raises:
        TypeError: a value that JSON cannot carry.
        OSError: it cannot be written.
    """
    text = json.dumps(_finite(summary), indent=2, allow_nan=False, default=_plain)
    write_atomic(path, text + "\n", durable=True)


def _is_step_up_to(line: str, step: int) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("step"), int) and value["step"] <= step


def _finite(value: Any) -> Any:
    """``value`` with null for every number that is not finite, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")
