"""``atropos-verl report RUN_DIR …``: shows the results of a run, or compares several, as tables and as a page."""

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atropos_verl.config.model_checks import read_json
from atropos_verl.errors import ConfigError, DataError
from atropos_verl.report.console import summary_rows
from atropos_verl.report.format import count, decimal, duration, seconds
from atropos_verl.report.trace_reader import TraceReader, read_steps
from atropos_verl.storage import write_atomic
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.training.step import held_out_score, reward_window
from atropos_verl.training.trace import NAME

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

    def series(self, key: str) -> list[tuple[int, float]]:
        """Lists ``(step, value)`` of a metric where it is a number, of an evaluation with the step it is of."""
        step = "held_out/step" if key.startswith("held_out/") else "step"
        return [(line[step], float(line[key])) for line in self.steps if _is_number(line.get(key))]

    def metric_names(self) -> list[str]:
        """Lists every metric that is a number in some step, sorted."""
        return sorted({key for line in self.steps for key in line if _is_number(line[key])} - {"step", "held_out/step"})


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory. Raises ``ConfigError``, which names the file, when one is missing or cannot be read."""
    path = run_dir / "metrics.jsonl"
    try:
        steps = list(read_steps(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); is {run_dir} the run directory of a run?") from None
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


def _summary_so_far(run_dir: Path, steps: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [line["reward/mean"] for line in steps if _is_number(line.get("reward/mean"))]
    return {
        "steps": steps[-1]["step"],
        "policy_version": steps[-1].get("policy_version"),
        **reward_window(rewards),
        "rewards": rewards,
        **{f"held_out_{label}": _held_out(run_dir / "eval" / label) for label in ("before", "after")},
        "held_out_steps": {
            line["held_out/step"]: line.get("held_out/score") for line in steps if "held_out/step" in line
        },
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
    """The score of one environment; of several, whose weights are not known here, None."""
    found = [_json_object(path) or {} for path in _of_evaluation(directory, "metrics.json")]
    return held_out_score(found[0].get("results", {}).get("all", {})) if len(found) == 1 else None


def _of_evaluation(directory: Path, name: str) -> list[Path]:
    """A launch has a directory for each environment."""
    return [*directory.glob(name), *sorted(directory.glob(f"*/{name}"))]


def _samples(directory: Path) -> list[dict[str, Any]]:
    found: list[Any] = []
    for path in _of_evaluation(directory, "samples.jsonl"):
        with contextlib.suppress(FileNotFoundError, ValueError), path.open(encoding="utf-8", errors="replace") as file:
            found.extend(map(json.loads, itertools.islice(file, _MOST_SAMPLES)))  # a line cut short ends the list
    return [sample for sample in found if isinstance(sample, dict)][:_MOST_SAMPLES]


def _reason(path: Path) -> str:
    try:
        return parse_quarantine_file(path.read_bytes())[0]
    except (DataError, OSError) as error:
        return str(error)


def _json_object(path: Path) -> dict[str, Any] | None:
    value, problem = read_json(path)
    if problem and path.exists():
        raise ConfigError(problem)
    return None if problem else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory; several: compared")
    parser.add_argument("--survivors", action="store_true", help="begun rollouts against those that were trained on")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page that opens without internet")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Shows the runs. Raises ``ConfigError`` when one cannot be read, or the page cannot be written."""
    console = console or Console()
    runs = [load_run(directory) for directory in options.run_dirs]
    if len(runs) == 1:
        _show_one(runs[0], console)
    else:
        _compare(runs, console)
    if options.survivors:
        for data in runs:
            _show_survivors(TraceReader(data.run_dir), console)
    if options.html is not None:
        try:
            write_atomic(options.html, render_page(runs))
        except OSError as error:
            raise ConfigError(f"cannot write {options.html}: {error.strerror}", "--html") from None
        console.print(f"page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _show_one(data: RunData, console: Console) -> None:
    ascii_only = not console.encoding.lower().startswith("utf")
    state = "finished" if data.is_finished else "not finished: figures so far"
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{data.run_dir} ({state})")
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
        say(f"refused: quarantine/{name}: {reason}")
    if data.quarantined_total > 5:
        console.print(f"... and {data.quarantined_total - 5} more in {data.run_dir / 'quarantine'}", markup=False)


def _show_survivors(reader: TraceReader, console: Console) -> None:
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if not reader.has_index:
        say(f"{reader.run_dir}: no {NAME} here: the run is of an older version, or has fetched nothing yet")
        return
    found = reader.survivors()
    ends = ", ".join(f"{name} {count(number)}" for name, number in sorted(found["ends"].items()))
    say(f"rollouts of {reader.run_dir}: {count(found['begun'])} begun, {count(found['trained'])} trained ({ends})")
    table = _plain_table()
    for name in ("by", "mean begun", "mean trained", "distance"):
        table.add_column(name, justify="left" if name == "by" else "right")
    for name, by in found["by"].items():
        means = (decimal(by.get("begun_mean")), decimal(by.get("trained_mean")))
        table.add_row(name, *means, decimal(by["distance"]))
    console.print(table)


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
            data.run_dir.name + ("" if data.is_finished else " (not finished)"),
            count(get("steps")),
            *(decimal(get(key)) for key in ("reward_first", "reward_last", "held_out_before", "held_out_after")),
            seconds(statistics.median(step_seconds)) if step_seconds else "-",
            count(statistics.median(speed)) if speed else "-",
            count(get("tokens_trained")),
            duration(get("seconds")),
        )
    console.print(table)


Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_COLOURS = ("#2f6fdb", "#d9642c", "#2a9d50", "#9a4fc4", "#b8860b", "#c2385a", "#1797a6", "#777777")
_MOST_POINTS = 1000
"""A long run is averaged to this many points per curve: more cannot be seen, and would make a page of megabytes."""
# Metrics that a reader looks for first, and that belong into one picture. The others follow, one chart each.
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean",)),
    ("held-out score", ("held_out/score",)),
    ("loss", ("loss",)),
    ("gradient norm", ("actor/grad_norm",)),
    ("seconds per step", ("timing/step", "timing/rollout", "timing/wait", "timing/train", "timing/sync")),
    ("trained tokens per second", ("perf/trained_tokens_per_second",)),
    ("largest logprob difference of trainer and engine after the sync", ("sync/canary_max_abs_logprob_diff",)),
    ("groups and sequences refused", ("data/quarantined", "data/dropped_overlong", "data/truncated")),
)


def render_page(runs: Sequence[RunData]) -> str:
    """Renders the page of ``runs`` (at least one). Several runs share every chart, one curve each."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("atropos_verl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = [run.run_dir.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.run_dir.absolute()) for run in runs]
    named = dict(zip(names, runs, strict=True))
    keys = sorted({key for run in runs for key in run.metric_names()})
    charts = [(title, _chart(named, of_chart)) for title, of_chart in _CHARTS]
    environments = [key for key in keys if key.startswith("env/") and key.endswith("/reward")]
    if len(environments) > 1:
        charts.insert(1, ("reward per environment", _chart(named, environments)))
    shown = {"policy_version", *itertools.chain(*(of_chart for _, of_chart in _CHARTS))}
    return environment.get_template("run_page.html.j2").render(
        runs=named,
        rows={name: summary_rows(run.summary, ascii_only=False) for name, run in named.items()},
        charts=[(title, svg) for title, svg in charts if svg],
        more=[(key, svg) for key in keys if key not in shown and (svg := _chart(named, [key]))],
        as_json=json.dumps,
    )


def _chart(runs: Mapping[str, RunData], keys: Sequence[str]) -> str:
    series = {}
    for name, run in runs.items():
        for key in keys:
            label = " ".join(part for part in (name if len(runs) > 1 else "", key if len(keys) > 1 else "") if part)
            series[label or key] = run.series(key)
    return line_chart(series)


def line_chart(series: Mapping[str, Points]) -> str:
    """Draws one ``<svg>``, escaped, with a curve of ``(step, value)`` per name, and a legend where there are several.

    Returns "" when there is nothing to draw. Values must be finite.
    """
    drawn = [(name, _thinned(points)) for name, points in series.items() if points]
    if not drawn:
        return ""
    xs, ys = zip(*itertools.chain(*(points for _, points in drawn)), strict=True)
    marks = ticks(min(ys), max(ys))
    low, high = marks[0], marks[-1]
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(place(first, y)[1], y) for y in marks]
    parts += [_step_label(place(x, low)[0], x) for x in sorted({first, last})]
    legend = ""
    for (name, points), colour in zip(drawn, itertools.cycle(_COLOURS), strict=False):
        parts.append(_curve([place(x, y) for x, y in points], colour))
        legend += f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return svg + (f'<div class="legend">{legend}</div>' if len(drawn) > 1 else "")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns two to ``most + 1`` round values that enclose ``[low, high]``."""
    if max(abs(low), abs(high)) < 1e-300:  # counts of what never happened
        return [0.0, 1.0]
    if high - low <= max(abs(low), abs(high)) * 1e-12:  # a constant, but for rounding: it is drawn in the middle
        room = abs(low) / 10
        return [low - room, low, low + room]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999999)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(begin, end + 1)]


def _thinned(points: Points) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MOST_POINTS)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in bucket), statistics.fmean(y for _, y in bucket)) for bucket in buckets]


def _grid(y: float, value: float) -> str:
    text = count(value) if abs(value) >= 1e4 else f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else decimal(value)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _step_label(x: float, step: float) -> str:
    anchor = "start" if x <= _LEFT else "end" if x >= _WIDTH - _RIGHT else "middle"
    return f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {step:.0f}</text>'


def _curve(points: Sequence[tuple[float, float]], colour: str) -> str:
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'
