"""``atropos-verl report RUN_DIR …``: what came of a run, on the terminal and as a page."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atropos_verl.errors import ConfigError
from atropos_verl.report.console import summary_rows
from atropos_verl.report.format import count, decimal, duration, seconds
from atropos_verl.report.run_data import RunData, load_run
from atropos_verl.storage import write_atomic

__all__ = ["add_arguments", "run"]

_PHASES = ("rollout", "wait", "train", "sync", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory; several: compared")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page that opens without internet")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Show the runs. Returns the exit code.

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
    phases = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
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


def _compare(runs: Sequence[RunData], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
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
