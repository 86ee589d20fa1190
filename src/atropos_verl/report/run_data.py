"""What a run directory says about its run: read only, whether the run is over, going on, or dead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_verl.errors import ConfigError, DataError
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.training.step import reward_window

__all__ = ["RunData", "load_run"]

_MOST_SAMPLES = 50
_MOST_REASONS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run. Everything but ``run_dir`` and ``steps`` may be missing: the run has not come that far."""

    run_dir: Path
    steps: list[dict[str, Any]]
    """Lines of ``metrics.jsonl``, ascending by step, without the last one where it is cut short."""
    summary: dict[str, Any]
    """``summary.json``; of a run that has not finished, what the metrics say."""
    is_finished: bool
    config: dict[str, Any] | None
    samples: dict[str, list[dict[str, Any]]]
    """Held-out samples by label (``before``, ``after``), the first of each."""
    quarantined: list[tuple[str, str]]
    """(file name, reason) of refused groups, the first of them."""
    quarantined_total: int

    @property
    def name(self) -> str:
        return self.run_dir.name

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, where it has a number."""
        return [(line["step"], float(line[key])) for line in self.steps if _is_number(line.get(key))]

    def metric_names(self) -> list[str]:
        """Every metric that is a number in some step, sorted."""
        names = {key for line in self.steps for key, value in line.items() if _is_number(value)}
        return sorted(names - {"step"})


def load_run(run_dir: Path) -> RunData:
    """Read a run directory.

    Raises:
        ConfigError: it is no run directory, has no step yet, or one of its files cannot be read; names the file.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); is {run_dir} the run directory of a run?") from None
    steps = list(_steps(path, lines))
    if not steps:
        raise ConfigError(f"{path} holds no step yet; the first one is written after the first optimiser step")
    summary = _json_object(run_dir / "summary.json")
    quarantine = sorted((run_dir / "quarantine").glob("*.json"))
    # After a resume the summary of the shorter run lies there until the longer one ends.
    is_finished = summary is not None and summary.get("steps") == steps[-1]["step"]
    return RunData(
        run_dir=run_dir,
        steps=steps,
        summary=summary if summary is not None and is_finished else _summary_so_far(run_dir, steps),
        is_finished=is_finished,
        config=_json_object(run_dir / "config.json"),
        samples={label: found for label in ("before", "after") if (found := _samples(run_dir / "eval" / label))},
        quarantined=[(file.name, _reason(file)) for file in quarantine[:_MOST_REASONS]],
        quarantined_total=len(quarantine),
    )


def _steps(path: Path, lines: list[str]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):  # being written at this moment, or the machine stopped in the middle of it
                return
            raise ConfigError(f"{path}:{number} is not JSON: {line[:80]!r}") from None
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise ConfigError(f"{path}:{number} is no step: {line[:80]!r}")
        yield value


def _summary_so_far(run_dir: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [line["reward/mean"] for line in steps if _is_number(line.get("reward/mean"))]
    held_out = {label: _held_out(run_dir / "eval" / label) for label in ("before", "after")}
    return {
        "steps": steps[-1]["step"],
        "policy_version": steps[-1].get("policy_version"),
        **reward_window(rewards),
        "rewards": rewards,
        "held_out_before": held_out["before"],
        "held_out_after": held_out["after"],
        "groups_used": _total(steps, "data/groups"),
        "groups_quarantined": _total(steps, "data/quarantined"),
        "sequences_trained": _total(steps, "data/sequences"),
        "sequences_dropped_overlong": _total(steps, "data/dropped_overlong"),
        "tokens_trained": _total(steps, "data/trained_tokens"),
        "seconds": sum(line["timing/step"] for line in steps if _is_number(line.get("timing/step"))),
    }


def _total(steps: list[dict[str, Any]], key: str) -> int | None:
    values = [line[key] for line in steps if _is_number(line.get(key))]
    return int(sum(values)) if values else None


def _held_out(directory: Path) -> float | None:
    metrics = _json_object(directory / "metrics.json") or {}
    score = metrics.get("results", {}).get("all", {}).get("eval/mean_reward")
    return float(score) if _is_number(score) else None


def _samples(directory: Path) -> list[dict[str, Any]]:
    path = directory / "samples.jsonl"
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                break
            if isinstance(value, dict):
                found.append(value)
            if len(found) == _MOST_SAMPLES:
                break
    return found


def _reason(path: Path) -> str:
    try:
        return parse_quarantine_file(path.read_bytes()).reason
    except (DataError, OSError) as error:
        return str(error)


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
