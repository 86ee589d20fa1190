"""Held-out evaluation: the launch plans it, the trainer asks for it, the supervisor shows it."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.schema import RunConfig
from atropos_verl.launch.environments import environment_spec, evaluation_directory
from atropos_verl.launch.process import ManagedProcess, ServiceSpec, blot_out, stop_all
from atropos_verl.storage import write_atomic
from atropos_verl.training.step import held_out_score, moment_of

logger = logging.getLogger(__name__)

_DURING = "during"
"""Label of the plan for evaluations between steps, whose own are ``step_N``."""


@dataclass(frozen=True, slots=True)
class PlannedEvaluation:
    environment: str
    weight: float
    spec: ServiceSpec
    result: Path


def plan_evaluations(
    config: RunConfig, launch: LaunchConfig, *, of_training: bool
) -> dict[str, list[PlannedEvaluation]]:
    """Label (before, during, after) → evaluations. Empty: there is nothing to evaluate, or nobody to do it."""
    chosen = {name: settings for name, settings in launch.chosen.items() if settings.evaluate}
    if not (launch.starts("trainer") and launch.starts("environments") and chosen):
        return {}
    wanted = {"before": config.eval.before, _DURING: config.eval.every is not None, "after": config.eval.after}

    def planned(name: str, settings: EnvironmentConfig, label: str) -> PlannedEvaluation:
        spec = environment_spec(config, name, settings, of_training=of_training, evaluation=label)
        result = evaluation_directory(config, name, label, of_training) / "metrics.json"
        return PlannedEvaluation(name, settings.weight, spec, result)

    return {label: [planned(*item, label) for item in chosen.items()] for label in wanted if wanted[label]}


EVALUATIONS = TypeAdapter(dict[str, list[PlannedEvaluation]])
"""The content of ``evaluations.json``."""


class EvaluationProcesses:
    """Runs what was planned. An evaluation that fails is noted and does not end the run: many environments have none.
    ``timeout``: seconds for those of one label together; ``check``, called while waiting, raises what ends the run."""

    def __init__(
        self,
        plan: Mapping[str, list[PlannedEvaluation]],
        run_dir: Path,
        *,
        timeout: float,
        note: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self._plan, self._timeout, self._note, self._check = plan, timeout, note, check
        self._running: dict[str, list[tuple[PlannedEvaluation, ManagedProcess]]] = {}
        self._begun: dict[str, float] = {}
        """Label → when the evaluation was first waited for: one may have been started long before."""
        self._directory = run_dir / "eval"
        self._scores: dict[str, dict[str, float | None]] = {}
        self._report(None)

    def start_evaluation(self, label: str) -> None:
        """Start those of ``label`` (before, step_N, after) in the background; ``finish_evaluation`` collects them."""
        started = self._running[label] = []
        for planned in self._plan.get(label if label in self._plan else _DURING, ()):
            planned.result.unlink(missing_ok=True)
            process = ManagedProcess(planned.spec)
            process.start()
            started.append((planned, process))

    def has_evaluation(self, label: str) -> bool:
        """True between ``start_evaluation`` and ``finish_evaluation``, if there is any."""
        return bool(self._running.get(label))

    def is_evaluating(self, label: str) -> bool:
        """True while those of ``label`` run and ``eval.timeout`` is not over. Raises what ends the run."""
        if label not in self._begun:
            self._begun[label] = time.monotonic()
            self._report(label)
        is_late = time.monotonic() - self._begun[label] > self._timeout
        if is_late or not any(process.is_running() for _, process in self._running[label]):
            return False
        self._check()
        return True

    def finish_evaluation(self, label: str) -> dict[str, Any]:
        """End those that still run; the mean of the scores by the environments' weights, and each of several, or {}."""
        started = self._running.pop(label)
        self._begun.pop(label, None)
        try:
            scores = {planned.environment: self._score(planned, process) for planned, process in started}
            self._scores[label] = scores
            if label not in self._plan:
                shutil.rmtree(self._directory / label, ignore_errors=True)  # of a step that was taken again
                with suppress(OSError):
                    (self._directory / _DURING).rename(self._directory / label)
        finally:
            stop_all([process for _, process in started])
            self._report(None)
        weights = {
            planned.environment: planned.weight for planned, _ in started if scores[planned.environment] is not None
        }
        if (total := sum(weights.values())) <= 0:
            return {}
        each = {f"{name}/score": score for name, score in scores.items() if len(scores) > 1}
        return {"mean_reward": sum(weight * (scores[name] or 0.0) for name, weight in weights.items()) / total, **each}

    def stop(self) -> None:
        stop_all([process for started in self._running.values() for _, process in started])
        self._running.clear()

    def _score(self, planned: PlannedEvaluation, process: ManagedProcess) -> float | None:
        spec = planned.spec
        for path in planned.result.parent.glob("*.yaml"):
            blot_out(path, spec.secrets)
        if process.is_running():
            text = f"{spec.name} took longer than eval.timeout={self._timeout:g} s; its log {spec.log_path}"
            self._note(f"{text} ends: {process.log_tail(1)}")
            return None
        try:
            return held_out_score(json.loads(planned.result.read_text())["results"]["all"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{spec.name} (exit code {process.returncode}) gave no score: {error}; its log is {spec.log_path}"
            self._note(f"{text}. Without evaluation: eval.before=false eval.after=false")
            return None

    def _report(self, running: str | None) -> None:
        path = self._directory / "progress.json"
        try:
            # Private: Atropos writes its configuration, with the gateway's key, beside the scores.
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"running": running, "scores": self._scores}), private=True)
        except OSError as error:  # of use to those that look on only
            logger.warning("%s cannot be written: %s", path, error)


class EvaluationWatch:
    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "eval" / "progress.json"
        self._told: set[str] = set()
        self._stamp = 0
        with suppress(OSError):  # what an earlier run has left is no news
            self._stamp = self._path.stat().st_mtime_ns
        self.running: str | None = None
        """The label of the evaluation that the trainer waits for; None: of none."""

    def poll(self) -> list[str]:
        try:
            if (stamp := self._path.stat().st_mtime_ns) == self._stamp:
                return []
            content, self._stamp = json.loads(self._path.read_text()), stamp
        except (OSError, ValueError):
            return []
        running, lines = content["running"], []
        if running and running != self.running:
            lines.append(f"evaluating on held-out tasks {moment_of(running)}")
        self.running = running
        for label, scores in content["scores"].items():
            if label not in self._told:
                listed = (f"{name} {'unknown' if score is None else f'{score:.3f}'}" for name, score in scores.items())
                lines.append(f"held-out mean reward {moment_of(label)}: {', '.join(listed)}")
        self._told |= content["scores"].keys()
        return lines
