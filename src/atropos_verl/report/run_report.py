"""``atropos-verl report RUN_DIR …``: shows the results of a run, or compares several, on the terminal and as a page.

A run directory is only read, whether the run is over, going on, or dead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atropos_verl.errors import ConfigError, DataError
from atropos_verl.report.console import summary_rows
from atropos_verl.report.format import count, decimal, duration, seconds
from atropos_verl.storage import write_atomic
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.training.step import reward_window

__all__ = ["RunData", "add_arguments", "load_run", "run"]

_PHASES = ("rollout", "wait", "train", "sync", "step")
_MOST_SAMPLES = 50
_MOST_REASONS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run. Everything but ``run_dir`` and ``steps`` may be missing when the run has not come that far."""

    run_dir: Path
    steps: list[dict[str, Any]]
    """Lines of ``metrics.jsonl``, ascending by step, without the last one where it is cut short."""
    summary: dict[str, Any]
    """``summary.json``; of a run that has not finished, the figures so far by its metrics."""
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
        """Lists ``(step, value)`` of a metric where it is a number."""
        return [(line["step"], float(line[key])) for line in self.steps if _is_number(line.get(key))]

    def metric_names(self) -> list[str]:
        """Lists every metric that is a number in some step, sorted."""
        return sorted({key for line in self.steps for key in line if _is_number(line[key])} - {"step"})


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory.

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
    return {
        "steps": steps[-1]["step"],
        "policy_version": steps[-1].get("policy_version"),
        **reward_window(rewards),
        "rewards": rewards,
        **{f"held_out_{label}": _held_out(run_dir / "eval" / label) for label in ("before", "after")},
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
    found: list[dict[str, Any]] = []
    path = directory / "samples.jsonl"
    with contextlib.suppress(FileNotFoundError, ValueError), path.open(encoding="utf-8", errors="replace") as file:
        for line in itertools.islice(file, _MOST_SAMPLES):
            found.append(json.loads(line))  # noqa: PERF401 - a line cut short ends the list and keeps what it has
    return [sample for sample in found if isinstance(sample, dict)]


def _reason(path: Path) -> str:
    try:
        return parse_quarantine_file(path.read_bytes()).reason
    except (DataError, OSError) as error:
        return str(error)


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory; several: compared")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page that opens without internet")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Shows the runs. Returns the exit code.

    Raises:
        ConfigError: a directory is no run directory, or the page cannot be written.
    """
    console = console or Console()
    runs = [load_run(directory) for directory in options.run_dirs]
    if len(runs) == 1:
        _show_one(runs[0], console)
    else:
        _compare(runs, console)
    if options.html is not None:
        from atropos_verl.report.run_page import render_page

        try:
            write_atomic(options.html, render_page(runs))
        except OSError as error:
            raise ConfigError(f"cannot write {options.html}: {error.strerror}", "--html") from None
        console.print(f"page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _show_one(data: RunData, console: Console) -> None:
    ascii_only = not console.encoding.lower().startswith("utf")
    state = "finished" if data.is_finished else "not finished: figures so far"
    console.print(f"{data.run_dir} ({state})", markup=False, highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for label, text in summary_rows(data.summary, ascii_only=ascii_only):
        table.add_row(label, text)
    console.print(table)
    phases = _plain_table()
    for name in ("seconds per step", "median", "largest", "sum"):
        phases.add_column(name, justify="left" if name == "seconds per step" else "right")
    for phase in _PHASES:
        values = [value for _, value in data.series(f"timing/{phase}")]
        if values:
            phases.add_row(phase, seconds(statistics.median(values)), seconds(max(values)), duration(sum(values)))
    console.print(phases)
    for name, reason in data.quarantined[:5]:
        console.print(f"refused: quarantine/{name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if data.quarantined_total > 5:
        console.print(f"... and {data.quarantined_total - 5} more in {data.run_dir / 'quarantine'}", markup=False)


def _plain_table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def _compare(runs: Sequence[RunData], console: Console) -> None:
    table = _plain_table()
    table.add_column("run", overflow="fold")
    for name in ("steps", "reward first", "last", "held-out before", "after", "s/step", "tok/s", "tokens", "time"):
        table.add_column(name, justify="right")
    for data in runs:
        get = data.summary.get
        step_seconds = [value for _, value in data.series("timing/step")]
        speed = [value for _, value in data.series("perf/trained_tokens_per_second")]
        table.add_row(
            data.name + ("" if data.is_finished else " (not finished)"),
            count(get("steps")),
            *(decimal(get(key)) for key in ("reward_first", "reward_last", "held_out_before", "held_out_after")),
            seconds(statistics.median(step_seconds)) if step_seconds else "-",
            count(statistics.median(speed)) if speed else "-",
            count(get("tokens_trained")),
            duration(get("seconds")),
        )
    console.print(table)
