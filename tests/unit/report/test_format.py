"""Numbers and curves for people, against strings written by hand."""

import math
from collections.abc import Callable

import pytest

from atropos_verl.report.format import count, decimal, duration, seconds, sparkline


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        (decimal, [0.4118, -3.0, 0.0], "0.412 | -3.000 | 0.000"),
        (decimal, [1.234e-05, -123456.0, math.nan, -math.inf, None], "1.2e-05 | -1.2e+05 | nan | -inf | -"),
        (count, [0, 1234.4, 99_999, 99_999.6, 123_456], "0 | 1,234 | 99,999 | 100k | 123k"),
        (count, [999_499, 999_600, 1_250_000, 3_400_000_000], "999k | 1.0M | 1.2M | 3.4G"),
        (count, [math.inf, None], "- | -"),
        (seconds, [0.0, 0.414, 9.99, 9.996, 12.34, 99.96, None], "0.00 | 0.41 | 9.99 | 10.0 | 12.3 | 100 | -"),
        (duration, [0.04, 4.24, 9.96, 59.4, 59.6, 65], "0.0s | 4.2s | 10s | 59s | 1m 00s | 1m 05s"),
        (duration, [3599.6, 11_220, 86_399, 187_200], "1h 00m | 3h 07m | 1d 00h | 2d 04h"),
        (duration, [math.nan, None], "- | -"),
    ],
)
def test_numbers(function: Callable[[float | None], str], values: list[float | None], expected: str) -> None:
    assert " | ".join(map(function, values)) == expected


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 60, "▁▂▃▄▅▆▇█"),
        ([7, 0], 60, "█▁"),
        ([0.3, 0.3], 60, "▄▄"),
        ([0.0, None, math.nan, 1.0], 60, "▁  █"),
        ([], 60, ""),
        ([None], 60, ""),
        ([0, 2, 2, 4], 2, "▁█"),  # the means of the two buckets are 1 and 3
        # edges 0, 2, 4, 7, means 0, 7 and 3.5, which is block 3.5 and rounds to 4
        ([0, 0, 7, 7, 3, 3.5, 4], 3, "▁█▅"),
    ],
)
def test_a_curve(values: list[float | None], width: int, curve: str) -> None:
    assert sparkline(values, width) == curve


def test_a_curve_in_ascii() -> None:
    assert sparkline([0.0, 0.5, 1.0], ascii_only=True) == "_+@"  # 0.5 * 7 = 3.5, which rounds to even: index 4
