"""Line charts as SVG text, for pages that must open without internet and without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from atropos_verl.report.format import count, decimal

__all__ = ["line_chart", "ticks"]

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_COLOURS = ("#2f6fdb", "#d9642c", "#2a9d50", "#9a4fc4", "#b8860b", "#c2385a", "#1797a6", "#777777")
_MOST_POINTS = 1000
"""A long run is averaged to this many points per curve: more cannot be seen, and would make a page of megabytes."""


def line_chart(series: Mapping[str, Points]) -> str:
    """One ``<svg>`` with a curve per name, ``(step, value)`` each, and a legend where there are several.

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
    """Two to ``most + 1`` round values that enclose ``[low, high]``.

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
    return [(_mean([x for x, _ in bucket]), _mean([y for _, y in bucket])) for bucket in buckets]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
