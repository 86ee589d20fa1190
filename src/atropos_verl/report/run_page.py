"""Renders a run, or several side by side, as one HTML file that needs neither internet nor a script."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from atropos_verl.report.console import summary_rows
from atropos_verl.report.format import count, decimal
from atropos_verl.report.run_report import RunData

__all__ = ["line_chart", "render_page", "ticks"]

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_COLOURS = ("#2f6fdb", "#d9642c", "#2a9d50", "#9a4fc4", "#b8860b", "#c2385a", "#1797a6", "#777777")
_MOST_POINTS = 1000
"""A long run is averaged to this many points per curve: more cannot be seen, and would make a page of megabytes."""
# Metrics that a reader looks for first, and that belong into one picture. The others follow, one chart each.
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean",)),
    ("loss", ("loss",)),
    ("gradient norm", ("actor/grad_norm",)),
    ("seconds per step", ("timing/step", "timing/rollout", "timing/wait", "timing/train", "timing/sync")),
    ("trained tokens per second", ("perf/trained_tokens_per_second",)),
    ("largest logprob difference of trainer and engine after the sync", ("sync/canary_max_abs_logprob_diff",)),
    ("groups and sequences refused", ("data/quarantined", "data/dropped_overlong", "data/truncated")),
)


class _Chart(NamedTuple):
    title: str
    svg: Markup


def render_page(runs: Sequence[RunData]) -> str:
    """Renders the page of ``runs`` (at least one). Several runs share every chart, one curve each."""
    environment = Environment(
        loader=PackageLoader("atropos_verl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = _distinct_names(runs)
    return environment.get_template("run_page.html.j2").render(
        runs=[
            {
                "name": name,
                "path": str(run.run_dir),
                "is_finished": run.is_finished,
                "rows": [(label, text) for label, text in summary_rows(run.summary, ascii_only=False) if label],
                "samples": run.samples,
                "quarantined": run.quarantined,
                "quarantined_total": run.quarantined_total,
                "config": json.dumps(run.config, indent=2) if run.config is not None else None,
            }
            for name, run in zip(names, runs, strict=True)
        ],
        charts=_curated(names, runs),
        more=_others(names, runs),
    )


def _curated(names: Sequence[str], runs: Sequence[RunData]) -> list[_Chart]:
    charts = [_chart(title, names, runs, keys) for title, keys in _CHARTS]
    environments = sorted({key for run in runs for key in run.metric_names() if _is_environment_reward(key)})
    if len(environments) > 1:
        charts.insert(1, _chart("reward per environment", names, runs, environments))
    return [chart for chart in charts if chart.svg]


def _others(names: Sequence[str], runs: Sequence[RunData]) -> list[_Chart]:
    shown = {key for _, keys in _CHARTS for key in keys} | {"policy_version"}
    keys = sorted({key for run in runs for key in run.metric_names()} - shown)
    return [chart for key in keys if (chart := _chart(key, names, runs, [key])).svg]


def _chart(title: str, names: Sequence[str], runs: Sequence[RunData], keys: Sequence[str]) -> _Chart:
    series = {}
    for name, run in zip(names, runs, strict=True):
        for key in keys:
            label = " ".join(part for part in (name if len(runs) > 1 else "", key if len(keys) > 1 else "") if part)
            series[label or key] = run.series(key)
    return _Chart(title, Markup(line_chart(series)))  # line_chart escapes what it is given


def _is_environment_reward(key: str) -> bool:
    return key.startswith("env/") and key.endswith("/reward")


def _distinct_names(runs: Sequence[RunData]) -> list[str]:
    """Returns directory names; whole paths where two are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(Path(run.run_dir).absolute()) for run in runs]


# ---------------------------------------------------------------------- charts


def line_chart(series: Mapping[str, Points]) -> str:
    """Draws one ``<svg>`` with a curve of ``(step, value)`` per name, and a legend where there are several.

    Returns "" when there is nothing to draw. Values must be finite.
    """
    drawn = {name: _thinned(points) for name, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    marks = ticks(min(ys), max(ys))
    low, high = marks[0], marks[-1]
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(place(first, y)[1], y) for y in marks]
    parts += [_step_label(place(x, low)[0], x) for x in sorted({first, last})]
    for index, points in enumerate(drawn.values()):
        parts.append(_curve([place(x, y) for x, y in points], _COLOURS[index % len(_COLOURS)]))
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return svg + (_legend(list(drawn)) if len(drawn) > 1 else "")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns two to ``most + 1`` round values that enclose ``[low, high]``.

    Example: ``ticks(0.23, 0.97)`` → ``[0.2, 0.4, 0.6, 0.8, 1.0]``.
    """
    if low == high == 0:  # counts of what never happened
        return [0.0, 1.0]
    if high <= low:  # a constant: it is drawn in the middle
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


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span><i style="background:{_COLOURS[index % len(_COLOURS)]}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'
