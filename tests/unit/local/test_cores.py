"""Threads of engine and trainer."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_verl.config import RunConfig
from atropos_verl.local.cores import share_cores


@pytest.mark.parametrize(
    ("settings", "device", "omp", "cores", "expected"),
    [
        ({}, "cpu", None, 8, (None, None)),
        ({"mode": "overlap"}, "cpu", None, 8, (4, 4)),
        ({"mode": "overlap"}, "cpu", None, 2, (1, 1)),
        ({"mode": "overlap"}, "cpu", None, 1, (1, 1)),
        ({"mode": "overlap"}, "cpu", None, 3, (1, 2)),
        ({"mode": "overlap"}, "cuda", None, 8, (None, None)),
        ({"mode": "overlap"}, "cpu", "1", 8, (None, None)),
        ({"mode": "overlap", "inference": {"num_threads": 6}}, "cpu", None, 8, (6, 2)),
        ({"mode": "overlap", "trainer": {"num_threads": 7}}, "cpu", None, 8, (4, 7)),
        ({"inference": {"num_threads": 6}}, "cpu", None, 8, (6, None)),
    ],
)
def test_cores_are_shared_when_both_sides_compute_at_once(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    device: str,
    omp: str | None,
    cores: int,
    expected: tuple[int | None, int | None],
) -> None:
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    threads = share_cores(RunConfig.from_mapping(settings), device, cores)
    assert (threads.engine, threads.trainer) == expected
