"""Formats numbers and curves for people."""

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"
_NONE = "-"


def decimal(value: float | None, digits: int = 3) -> str:
    """Formats 0.4118 as ``0.412``, tiny and huge values as ``1.2e-05``, no value as ``-``, NaN as ``nan``."""
    if value is None:
        return _NONE
    if value == 0 or 10**-digits <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def count(value: float | None) -> str:
    """Formats a count as ``1,234``; from a hundred thousand on as ``123k``, ``1.2M``, ``3.4G``."""
    if value is None or not math.isfinite(value):
        return _NONE
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.1f}{unit}"
    return f"{value / 1e3:.0f}k" if abs(value) >= 99_999.5 else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Formats seconds in at most five characters: ``0.41``, ``12.3``, ``1234``."""
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def duration(value: float | None) -> str:
    """Formats seconds as ``4.2s``, ``59s``, ``1m 05s``, ``3h 07m``, ``2d 04h``."""
    if value is None or not math.isfinite(value):
        return _NONE
    if value < 9.95:
        return f"{value:.1f}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(value / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(value / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def sparkline(values: Sequence[float | None], width: int = 60, *, ascii_only: bool = False) -> str:
    """Draws a curve of one character per value; more than ``width`` values are averaged in buckets.

    A bucket of nothing but None and values that are not finite is a space.
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    number = min(len(values), width)
    edges = [len(values) * i // number for i in range(number + 1)] if number else []
    means = [_mean(values[start:end]) for start, end in itertools.pairwise(edges)]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(blocks) - 1
    return "".join(
        " " if mean is None else blocks[round((mean - low) / span * top) if span > 0 else top // 2] for mean in means
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
