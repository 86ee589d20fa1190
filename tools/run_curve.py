"""Draws reward and held-out scores of a run as an SVG file: ``python tools/run_curve.py RUN_DIR FILE.svg``."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from atropos_verl.report.run_report import load_run

_WIDTH, _HEIGHT = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_CURVES = (("mean reward of the step", "#2f6fdb"), ("held-out score", "#d9642c"))
_STYLE = "<style>text{font:11px sans-serif;fill:#666}.grid{stroke:#8884;stroke-width:.6}</style>"


def curve(run_dir: Path) -> str:
    """The drawing of ``run_dir``; the held-out scores stand at the steps whose policy they are of."""
    run = load_run(run_dir)
    held_out = dict(run.series("held_out/score"))
    for step, label in ((0, "before"), (run.steps[-1]["step"], "after")):
        if (score := run.summary.get(f"held_out_{label}")) is not None:
            held_out[step] = score
    return _drawing(run.series("reward/mean"), sorted(held_out.items()))


def _drawing(*curves: Sequence[tuple[int, float]]) -> str:
    points = [point for one in curves for point in one]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    marks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - marks[0]) / (marks[-1] - marks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_STYLE]
    for mark in marks:
        y = place(first, mark)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:.6g}</text>')
    for step, x, anchor in ((first, _LEFT, "start"), (last, _WIDTH - _RIGHT, "end")):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {step}</text>')
    for left, (label, colour), one in zip((70, 220), _CURVES, curves, strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one))
        parts.append(f'<text x="{left}" y="22" style="fill:{colour}">{label}</text>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="780">'
    return f"{head}{''.join(parts)}</svg>\n"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns two to ``most + 1`` round values that enclose ``[low, high]``."""
    if high - low <= max(abs(low), abs(high)) * 1e-12:  # a constant, but for rounding: it is drawn in the middle
        return [low - 0.1, low, low + 0.1]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999999)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(begin, end + 1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("file", type=Path, help="the SVG file to write")
    options = parser.parse_args()
    options.file.write_text(curve(options.run_dir))
