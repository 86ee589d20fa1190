"""Held-out evaluation of a launch: the launcher plans it, the trainer runs it, the launcher shows it.

Only the trainer knows when the policy stands still and is served: before the first step, and after the last. So the
launcher writes the commands (``ENV evaluate`` of each environment) to ``run_dir/launch/evaluations.json`` and names
that file in the trainer's ``eval.commands_file``; the trainer runs them and reports to ``run_dir/eval/progress.json``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.environments import Site, evaluation_spec
from atropos_verl.launch.process import ManagedProcess, ServiceSpec
from atropos_verl.storage import write_atomic
from atropos_verl.training.step import held_out_score

__all__ = ["EvaluationWatch", "LaunchedEvaluations", "evaluations_text"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_LABELS = ("before", "after")


def evaluations_text(config: RunConfig, launch: LaunchConfig, site: Site) -> str | None:
    """The content of ``evaluations.json``; None: there is nothing to evaluate, or nobody to do it."""
    if not (launch.starts("trainer") and launch.starts("environments")):
        return None
    wanted = {"before": config.eval.before, "after": config.eval.after}
    chosen = {name: settings for name, settings in launch.chosen.items() if settings.evaluate}
    plan: dict[str, list[dict[str, Any]]] = {}
    for label in (label for label in _LABELS if wanted[label] and chosen):
        plan[label] = []
        for name, settings in chosen.items():
            spec, result = evaluation_spec(config, name, settings, site=site, label=label)
            plan[label].append(
                {
                    "environment": name,
                    "weight": settings.weight,
                    "command": list(spec.command),
                    "env": dict(spec.env),
                    "cwd": str(spec.cwd),
                    "log": str(spec.log_path),
                    "files": {str(path): text for path, text in spec.files.items()},
                    "result": str(result),
                }
            )
    return json.dumps(plan, indent=1) + "\n" if plan else None


@dataclass(frozen=True, slots=True)
class _Planned:
    environment: str
    weight: float
    spec: ServiceSpec
    result: Path


class LaunchedEvaluations:
    """Runs, in the trainer, what the launcher planned. An evaluation that fails is told and does not end the run:
    many environments have none.

    Args:
        commands_file: ``evaluations.json``. Raises ``ConfigError`` when it cannot be read.
        timeout: seconds for all evaluations of one label together.
        note: called with what the user should know.
    """

    def __init__(
        self, commands_file: Path, run_dir: Path, *, timeout: float, note: Callable[[str], None] = logger.warning
    ) -> None:
        self._plan = _read_plan(commands_file)
        self._timeout = timeout
        self._note = note
        self._running: dict[str, list[tuple[_Planned, ManagedProcess]]] = {}
        self._progress = run_dir / "eval" / "progress.json"
        self._scores: dict[str, dict[str, float | None]] = {}
        self._say(None)

    def start_evaluation(self, label: str) -> None:
        """Start those of ``label`` (before, after) in the background; ``finish_evaluation`` collects them."""
        started = []
        for planned in self._plan.get(label, ()):
            planned.result.unlink(missing_ok=True)
            process = ManagedProcess(planned.spec)
            process.start()
            started.append((planned, process))
        self._running[label] = started

    def has_evaluation(self, label: str) -> bool:
        """True between ``start_evaluation`` and ``finish_evaluation``, if there is any."""
        return bool(self._running.get(label))

    def finish_evaluation(self, label: str) -> dict[str, Any]:
        """Wait, and give the mean of the scores by the environments' weights; {} when none has a score."""
        started = self._running.pop(label)
        self._say(label)
        deadline = time.monotonic() + self._timeout
        try:
            while any(process.is_running() for _, process in started) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            scores = {planned.environment: self._score(planned, process) for planned, process in started}
        finally:
            for _, process in started:
                process.stop()
            self._say(None)
        self._scores[label] = scores
        self._say(None)
        known = [
            (planned.weight, score) for planned, _ in started if (score := scores[planned.environment]) is not None
        ]
        total = sum(weight for weight, _ in known)
        return {"mean_reward": sum(weight * score for weight, score in known) / total} if total > 0 else {}

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """label → environment → score."""
        return {label: dict(scores) for label, scores in self._scores.items()}

    def stop(self) -> None:
        """End those that still run."""
        for started in self._running.values():
            for _, process in started:
                process.stop()
        self._running.clear()

    def _score(self, planned: _Planned, process: ManagedProcess) -> float | None:
        name = planned.spec.name
        if process.is_running():
            self._note(f"{name} took longer than eval.timeout={self._timeout:g} s; its log is {planned.spec.log_path}")
            return None
        try:
            metrics = json.loads(planned.result.read_text())["results"]["all"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._note(
                f"{name} (exit code {process.returncode}) gave no score: {error}; its log is {planned.spec.log_path}. "
                f"An environment without evaluation: environments.{planned.environment}.evaluate=false"
            )
            return None
        return held_out_score(metrics)

    def _say(self, running: str | None) -> None:
        self._progress.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._progress, json.dumps({"running": running, "scores": self._scores}), private=True)


class EvaluationWatch:
    """The launcher's look at the trainer's evaluations."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "eval" / "progress.json"
        self._told: set[str] = set()
        self._stamp = 0
        self.running: str | None = None
        """The label of the evaluation that the trainer waits for; None: of none."""

    def poll(self) -> list[str]:
        """What is new, in words."""
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp == self._stamp:
                return []
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return []
        self._stamp = stamp
        running, scores = content.get("running"), content.get("scores") or {}
        lines = []
        if running and running != self.running:
            lines.append(f"evaluating on held-out tasks {running} training")
        self.running = running
        for label, found in scores.items():
            if label not in self._told:
                self._told.add(label)
                lines.append(f"held-out mean reward {label} training: {_listed(found.items())}")
        return lines


def _listed(scores: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{name} {'unknown' if score is None else f'{score:.3f}'}" for name, score in scores)


def _read_plan(path: Path) -> dict[str, list[_Planned]]:
    try:
        content = json.loads(path.read_text())
        return {label: [_planned(item) for item in items] for label, items in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "eval.commands_file") from error


def _planned(item: Mapping[str, Any]) -> _Planned:
    log = Path(item["log"])
    spec = ServiceSpec(
        name=log.name.removesuffix(".1.log"),
        command=tuple(item["command"]),
        env=item["env"],
        cwd=Path(item["cwd"]),
        log_path=log,
        files={Path(path): text for path, text in item["files"].items()},
    )
    return _Planned(item["environment"], float(item["weight"]), spec, Path(item["result"]))
