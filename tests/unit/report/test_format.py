"""Numbers and curves for people, against strings written by hand."""

from __future__ import annotations

import math

import pytest

from atropos_verl.report.format import count, decimal, duration, seconds, sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4118, "0.412"),
        (-3.0, "-3.000"),
        (0.0, "0.000"),
        (0.00001234, "1.2e-05"),
        (-123456.0, "-1.2e+05"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "-"),
    ],
)
def test_decimal(value: float | None, text: str) -> None:
    assert decimal(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.4, "1,234"),
        (99_999, "99,999"),
        (99_999.6, "100k"),
        (123_456, "123k"),
        (999_499, "999k"),
        (999_600, "1.0M"),
        (1_250_000, "1.2M"),
        (3_400_000_000, "3.4G"),
        (math.inf, "-"),
        (None, "-"),
    ],
)
def test_count(value: float | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.414, "0.41"), (9.99, "9.99"), (9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (None, "-")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0s"),
        (4.24, "4.2s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (65, "1m 05s"),
        (3599.6, "1h 00m"),
        (11_220, "3h 07m"),
        (86_399, "1d 00h"),
        (187_200, "2d 04h"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_duration(value: float | None, text: str) -> None:
    assert duration(value) == text


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0]) == "█▁"
    assert sparkline([0.0, 0.5, 1.0], ascii_only=True) == "_+@"  # 0.5 * 7 = 3.5, which rounds to even: index 4


def test_sparkline_of_equal_values_of_gaps_and_of_nothing() -> None:
    assert sparkline([0.3, 0.3]) == "▄▄"
    assert sparkline([0.0, None, math.nan, 1.0]) == "▁  █"
    assert sparkline([]) == ""
    assert sparkline([None]) == ""


def test_sparkline_averages_in_buckets() -> None:
    # Four values in two buckets: means 1 and 3.
    assert sparkline([0, 2, 2, 4], width=2) == "▁█"
    # Seven in three: edges 0, 2, 4, 7 → means 0, 7, 3.5 → blocks 0, 7 and 3.5, which rounds to 4.
    assert sparkline([0, 0, 7, 7, 3, 3.5, 4], width=3) == "▁█▅"
