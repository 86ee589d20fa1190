"""Where the embedded engine runs, by mode, device and what the user says."""

from __future__ import annotations

from typing import Any

import pytest

from atropos_verl.backends.local.engine import placement_of
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, "cpu", "thread"),
        ({"mode": "overlap"}, "cpu", "process"),
        ({"mode": "overlap"}, "cuda", "thread"),
        ({"inference": {"placement": "process"}}, "cpu", "process"),
        ({"mode": "overlap", "inference": {"placement": "thread"}}, "cpu", "thread"),
    ],
)
def test_a_process_where_the_engine_computes_beside_the_trainer(
    settings: dict[str, Any], device: str, expected: str
) -> None:
    assert placement_of(RunConfig.from_mapping(settings), device) == expected


def test_a_process_is_refused_where_weights_cannot_be_shared() -> None:
    config = RunConfig.from_mapping({"inference": {"placement": "process"}})
    with pytest.raises(ConfigError, match=r"inference.placement: process is for engines on a CPU.*cuda"):
        placement_of(config, "cuda")
