"""``atropos-verl report RUN_DIR …``: shows the results of runs as tables."""

import argparse
import functools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atropos_verl.config.model_checks import read_json
from atropos_verl.errors import ConfigError
from atropos_verl.report.console import count, decimal, duration, seconds, summary_rows
from atropos_verl.report.trace_reader import TraceReader, read_steps, settings_of_run
from atropos_verl.training.step import reward_window
from atropos_verl.training.trace import NAME

_PHASES = ("rollout", "wait", "train", "sync", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run."""

    run_dir: Path
    steps: list[dict[str, Any]]
    """Lines of ``metrics.jsonl``, ascending by step, without the last one where it is cut short."""
    summary: dict[str, Any]
    """``summary.json``; of a run that has not finished, the figures so far by its metrics."""
    is_finished: bool

    def series(self, key: str) -> list[tuple[int, float]]:
        """Lists ``(step, value)`` of a metric where it is a number, of an evaluation with the step it is of."""
        step = "held_out/step" if key.startswith("held_out/") else "step"
        return [(line[step], float(line[key])) for line in self.steps if _is_number(line.get(key))]


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory. Raises ``ConfigError``, which names the file, when one is missing or cannot be read."""
    path = run_dir / "metrics.jsonl"
    try:
        steps = list(read_steps(path))
    except OSError as error:
        if path.exists() or settings_of_run(run_dir) is None:
            text = f"cannot read {path} ({error.strerror}); is {run_dir} the run directory of a run?"
            raise ConfigError(text) from None
        steps = []
    if not steps:
        raise ConfigError(f"{run_dir}: no step is done yet")
    summary, problem = read_json(run_dir / "summary.json")
    if problem and (run_dir / "summary.json").exists():
        raise ConfigError(problem)
    # After a resume the summary of the shorter run lies there until the longer one ends.
    is_finished = summary.get("steps") == steps[-1]["step"]
    return RunData(
        run_dir=run_dir,
        steps=steps,
        summary=summary if is_finished else _summary_so_far(steps),
        is_finished=is_finished,
    )


def _summary_so_far(steps: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [line["reward/mean"] for line in steps if _is_number(line.get("reward/mean"))]
    return {
        "steps": steps[-1]["step"],
        "policy_version": steps[-1].get("policy_version"),
        **reward_window(rewards),
        "rewards": rewards,
        "held_out_steps": {
            line["held_out/step"]: line.get("held_out/score") for line in steps if "held_out/step" in line
        },
        "tokens_trained": sum(line.get("data/trained_tokens") or 0 for line in steps),
        "seconds": sum(line.get("timing/step") or 0.0 for line in steps),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--survivors", action="store_true", help="begun rollouts against those that were trained on")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Shows the runs. Raises ``ConfigError`` when one cannot be read."""
    console = console or Console()
    for data in [load_run(directory) for directory in options.run_dirs]:
        _show(data, console)
        if options.survivors:
            show_survivors(TraceReader(data.run_dir), console)
    return 0


def _show(data: RunData, console: Console) -> None:
    state = "finished" if data.is_finished else "not finished: figures so far"
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{data.run_dir} ({state})")
    table = Table.grid(padding=(0, 2))
    for row in summary_rows(data.summary, ascii_only=not console.encoding.lower().startswith("utf")):
        table.add_row(*row)
    console.print(table)
    phases = _plain_table("seconds per step", "median", "largest", "sum")
    for phase in _PHASES:
        values = [value for _, value in data.series(f"timing/{phase}")]
        if values:
            phases.add_row(phase, seconds(statistics.median(values)), seconds(max(values)), duration(sum(values)))
    console.print(phases)


def show_survivors(reader: TraceReader, console: Console) -> None:
    """Shows how many rollouts ended in which way, and what was begun against what was trained."""
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if not reader.has_index:
        say(f"{reader.run_dir}: no {NAME} here: the run is of an older version, or has fetched nothing yet")
        return
    found = reader.survivors()
    under_way = found["ends"].pop("under_way", 0)
    ends = ", ".join(f"{name} {count(number)}" for name, number in sorted(found["ends"].items()))
    text = f"rollouts of {reader.run_dir}: {count(found['begun'])} begun, {count(found['trained'])} trained ({ends})"
    say(text + (f"; under way, not counted: {count(under_way)}" if under_way else ""))
    table = _plain_table("by", "mean begun", "mean trained", "distance")
    for name, by in found["by"].items():
        table.add_row(name, *(decimal(by.get(key)) for key in ("begun_mean", "trained_mean", "distance")))
    console.print(table)


def _plain_table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
