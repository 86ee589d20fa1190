"""One step in numbers, for both backends: its line in ``metrics.jsonl``, the totals of a run, ``summary.json``."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from atropos_verl.storage import sync_to_disk, write_atomic
from atropos_verl.types import StepReport

logger = logging.getLogger(__name__)

NO_SIGNAL = (
    "every advantage is 0, so nothing is learnt: the scores within each group are equal, or each group has one sequence"
)
_LARGEST_WINDOW = 5
_POLL_SECONDS = 0.05

Figure = float | int | None


class Progress(Protocol):
    def phase(self, name: str) -> None: ...
    def note(self, message: str) -> None: ...
    def step(self, report: StepReport) -> None: ...


class LoggedProgress:
    """``Progress`` of a run without a terminal: everything goes to the log."""

    def phase(self, name: str) -> None:
        logger.info("%s", name)

    note = phase

    def step(self, report: StepReport) -> None:
        logger.info("step %d: loss %.4g, reward %s", report.step, report.loss, report.metrics["reward/mean"])


def keep_trackers_inside(run_dir: Path) -> None:
    """verl's trackers write below the working directory, or the user's cache, unless told otherwise."""
    os.environ.setdefault("TENSORBOARD_DIR", str(run_dir / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir / "wandb" / "cache"))
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb" / "data"))
    os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))
    os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(run_dir / "verl_tracking.jsonl"))


def step_report(
    step: int,
    policy_version: int,
    loss: float,
    *,
    scores: Sequence[tuple[int | None, float]],
    counts: Mapping[str, int],
    seconds: Mapping[str, float | None],
    figures: Mapping[str, Figure],
) -> StepReport:
    """Joins the figures of one step: environment and raw score of every rollout of its groups; ``counts`` as
    ``data/NAME`` (``trained_tokens`` among them), ``seconds`` as ``timing/NAME`` (``step``, the whole, among them), and
    all other ``figures`` under their full names, which do not replace these."""
    tokens, duration = counts["trained_tokens"], seconds["step"] or 0.0
    raw = [score for _, score in scores]
    metrics: dict[str, Figure] = {
        "reward/mean": float(np.mean(raw)) if raw else None,
        "reward/std": float(np.std(raw)) if raw else None,
        **{f"data/{name}": number for name, number in counts.items()},
        **{f"timing/{name}": number for name, number in seconds.items()},
        "perf/trained_tokens_per_second": tokens / duration if duration > 0 else 0.0,
    }
    for env_id in sorted({env_id for env_id, _ in scores if env_id is not None}):
        own = [score for env, score in scores if env == env_id]
        metrics |= {f"env/{env_id}/sequences": len(own), f"env/{env_id}/reward": float(np.mean(own))}
    return StepReport(step=step, policy_version=policy_version, loss=loss, metrics={**figures, **metrics})


@dataclass
class RunTotals:
    """Counters of the whole run; saved with checkpoints."""

    groups_used: int = 0
    groups_quarantined: int = 0
    groups_filtered: int = 0  # by ``data.filter_path``
    groups_stale: int = 0  # older than ``off_policy.max_staleness``
    sequences_trained: int = 0
    sequences_dropped_overlong: int = 0
    tokens_trained: int = 0
    tokens_looked_up: int = 0  # trained ones, in the gateway's ledger
    tokens_unmatched: int = 0  # of these, not in it
    tokens_template_tail: int = 0  # behind the policy's turns, added by a chat template: not trained
    spans_looked_up: int = 0  # trained ones
    spans_repaired: int = 0  # of these, tokenised anew: they got back the ids that were sampled
    steps_without_data: int = 0
    batches_lost_at_api: int = 0  # answers of 500 to GET /batch: an upstream API drops what it cannot encode
    batches_stale: int = 0  # given up without a step: all their groups were too old

    def count(self, counts: Mapping[str, int]) -> None:
        """Adds the ``counts`` of one step (see ``step_report``)."""
        self.groups_used += counts.get("groups", 0)
        self.groups_quarantined += counts.get("quarantined", 0)
        self.groups_filtered += counts.get("filtered", 0)
        self.groups_stale += counts.get("stale", 0)
        self.sequences_dropped_overlong += counts.get("dropped_overlong", 0)
        self.tokens_looked_up += counts.get("looked_up_tokens", 0)
        self.tokens_unmatched += counts.get("unmatched_tokens", 0)
        self.tokens_template_tail += counts.get("template_tail_tokens", 0)
        self.spans_looked_up += counts.get("spans", 0)
        self.spans_repaired += counts.get("repaired_spans", 0)
        if counts["trained_tokens"]:
            self.sequences_trained += counts["sequences"]
            self.tokens_trained += counts["trained_tokens"]
        else:
            self.steps_without_data += 1

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what a checkpoint holds; counters of another version are left out."""
        for known in fields(self):
            setattr(self, known.name, int(saved.get(known.name, 0)))


class StepLog:
    """``metrics.jsonl`` of a run that goes on at ``step``, with its rewards and the trainer's idle share. A line,
    ``{"step": 3, "policy_version": 3, "loss": 0.25, "reward/mean": 0.5, …}``, reaches the operating system before
    ``append`` returns, so it survives a ``kill -9``. A number that is not finite is null."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        # Later steps will be taken again; a line that was cut short is of no use.
        kept = [(line, value) for line in lines if (value := parse_step(line)) and value["step"] <= step]
        if len(kept) < len(lines):
            removed = len(lines) - len(kept)
            logger.info("%s: %d of %d lines are after step %d and removed", self.path, removed, len(lines), step)
            write_atomic(self.path, "".join(f"{line}\n" for line, _ in kept), durable=True)
        self.rewards: list[float] = [r for _, value in kept if isinstance(r := value.get("reward/mean"), float)]
        """``reward/mean`` of every step so far that has one, earlier processes' included."""
        self._steps = 0
        self._waited = self._total = 0.0

    def append(self, report: StepReport) -> None:
        """Writes the step's line. Raises ``OSError``."""
        own = {"step": report.step, "policy_version": report.policy_version, "loss": report.loss}
        line = {**report.metrics, **own}
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float | np.number)}
        if lost := sorted(key for key, value in numbers.items() if not math.isfinite(value)):
            named = ", ".join(f"{key} = {line[key]}" for key in lost)
            logger.warning("step %d: %s; written as null to %s", report.step, named, self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("ab") as file:
                file.write(_json(line) + b"\n")
        except OSError as error:
            error.filename = error.filename or str(self.path)  # that of a full disk names no file
            raise
        if (reward := report.metrics.get("reward/mean")) is not None:
            self.rewards.append(reward)
        self._steps += 1
        if self._steps > 1:  # the first step waited for the environment to start
            self._waited += report.metrics.get("timing/rollout") or 0.0
            self._total += report.metrics.get("timing/step") or 0.0

    def sync(self) -> None:
        """Waits until every line is on the disk. Raises ``OSError``."""
        if self.path.exists():
            sync_to_disk(self.path, self.path.parent)

    @property
    def idle_share(self) -> float | None:
        """Share of the steps' time, in [0, 1], in which the trainer waited for rollouts; None before step two."""
        return self._waited / self._total if self._total > 0 else None


class StepTail:
    """Reads the new lines of ``metrics.jsonl``. A resumed run replaces the file, which then is read anew. ``last_id``:
    where to go on."""

    def __init__(self, path: Path, last_id: str = "") -> None:
        self._path = path
        inode, _, position = last_id.partition("-")
        is_known = inode.isdecimal() and position.isdecimal()
        self._inode, self._position = (int(inode), int(position)) if is_known else (-1, 0)

    @property
    def id(self) -> str:
        return f"{self._inode}-{self._position}"

    def read(self, most: int = -1) -> tuple[bool, list[dict[str, Any]]]:
        """True: what was read before does not count; and the next lines, of about ``most`` bytes, [] where there are
        none yet."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if is_new := status.st_ino != self._inode or status.st_size < self._position:
                    self._inode, self._position = status.st_ino, 0
                file.seek(self._position)
                content = file.read(most) + file.readline()
        except OSError:
            return False, []
        content = content[: content.rfind(b"\n") + 1]
        self._position += len(content)
        return is_new, list(filter(None, map(parse_step, content.splitlines())))


class Evaluations(Protocol):
    """The processes of held-out evaluation, which the launch hands in."""

    def start_evaluation(self, label: str) -> None: ...
    def has_evaluation(self, label: str) -> bool: ...
    def is_evaluating(self, label: str) -> bool: ...
    def finish_evaluation(self, label: str) -> Mapping[str, Any]: ...


def moment_of(label: str) -> str:
    """The label of an evaluation (before, step_N, after) in words."""
    return f"at {label.replace('_', ' ')}" if label.startswith("step_") else f"{label} training"


@dataclass
class HeldOut:
    """The mean reward on held-out tasks."""

    _evaluations: Evaluations | None
    _progress: Progress
    scores: dict[str, float | None]
    """Label (before, step_N, after) → score; a checkpoint keeps it (``RunState.held_out``)."""

    def start(self, label: str) -> bool:
        """Starts an evaluation in the background. False: there is none."""
        if self._evaluations is None:
            return False
        self._evaluations.start_evaluation(label)
        return self._evaluations.has_evaluation(label)

    def is_over(self, label: str) -> bool:
        """True when ``finish`` would not wait. Raises what the evaluation raises."""
        return self._evaluations is None or not self._evaluations.is_evaluating(label)

    def finish(self, label: str, attend: Callable[[], None] = lambda: None) -> dict[str, float | None]:
        """Waits for an evaluation, calls ``attend`` meanwhile, and notes the score. Returns figures for the next line
        of ``metrics.jsonl``; {}: none was started."""
        if self._evaluations is None or not self._evaluations.has_evaluation(label):
            return {}
        if not self.is_over(label):
            self._progress.phase(f"evaluating on held-out tasks {moment_of(label)}")
        while not self.is_over(label):
            attend()
            time.sleep(_POLL_SECONDS)
        metrics = self._evaluations.finish_evaluation(label)
        score = self.scores[label] = held_out_score(metrics)
        told = "unknown" if score is None else f"{score:.3f}"
        self._progress.note(f"held-out mean reward {moment_of(label)}: {told}")
        return {"held_out/score": score, **{f"held_out/{name}": metrics[name] for name in metrics if "/" in name}}


def is_best(scores: Mapping[str, float | None], label: str) -> bool:
    """True when no score of a trained policy is above that of ``label``."""
    own = scores.get(label)
    return own is not None and all(score is None or score <= own for key, score in scores.items() if key != "before")


def held_out_score(metrics: Mapping[str, Any]) -> float | None:
    """The figure to show for an evaluation: its mean reward, or its first number. A mean over nothing (NaN) is none."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    known = ("eval/mean_reward", "mean_reward", "eval/percent_correct", "eval/accuracy")
    return next((numbers[name] for name in (*known, *numbers) if name in numbers), None)


def reward_window(rewards: Sequence[float]) -> dict[str, Any]:
    """``reward_first`` and ``reward_last``: means of the first and last ``reward_window`` steps: five, or half of all
    where there are fewer than ten, so that the two do not overlap."""
    window = max(1, min(_LARGEST_WINDOW, len(rewards) // 2))
    return {
        "reward_first": sum(rewards[:window]) / window if rewards else None,
        "reward_last": sum(rewards[-window:]) / window if rewards else None,
        "reward_window": window,
    }


def outcome(step: int, policy_version: int, rewards: Sequence[float], totals: RunTotals, **own: Any) -> dict[str, Any]:
    """The part of ``summary.json`` that the trainer knows. ``own``: figures of one backend."""
    return {
        "steps": step,
        "policy_version": policy_version,
        **reward_window(rewards),
        "rewards": list(rewards),
        **vars(totals),
        "unmatched_token_rate": totals.tokens_unmatched / totals.tokens_looked_up if totals.tokens_looked_up else None,
        **own,
    }


def write_summary(
    run_dir: Path, outcome: Mapping[str, Any], *, held_out: Mapping[str, float | None], seconds: float
) -> dict[str, Any]:
    """Writes ``summary.json``, atomically, and returns its content. ``held_out`` are ``HeldOut.scores``. Raises
    ``TypeError`` for a value that JSON cannot carry, and ``OSError``."""
    summary = {
        **outcome,
        **{f"held_out_{label}": held_out.get(label) for label in ("before", "after")},
        "held_out_steps": {int(label[5:]): score for label, score in held_out.items() if label.startswith("step_")},
        "seconds": seconds,
        "run_dir": run_dir,
    }
    write_atomic(run_dir / "summary.json", msgspec.json.format(_json(summary), indent=2) + b"\n", durable=True)
    return {**summary, "run_dir": str(run_dir)}


def parse_step(line: str | bytes) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl``; None: it is none, or was cut short."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _json(content: Mapping[str, Any]) -> bytes:
    """With null for every number that is not finite."""
    return msgspec.json.encode(content, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")
