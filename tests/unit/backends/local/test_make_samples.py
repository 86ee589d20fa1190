"""Samples of a batch whose staleness was looked at before."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest

from atropos_verl.backends.local.trainer import AtroposTrainer
from atropos_verl.protocol.journal import JournalEntry
from atropos_verl.training.batch_source import RolloutData
from atropos_verl.training.staleness import Applied
from atropos_verl.types import NOT_TRAINED, SampleSettings, ScoredGroup


@pytest.fixture
def trainer() -> Iterator[Any]:
    made = AtroposTrainer.__new__(AtroposTrainer)
    vars(made).update(
        state=SimpleNamespace(policy_version=3),
        moments=None,
        settings=SampleSettings(),
        provenance=Mock(),
        source=Mock(),
    )
    yield made
    made.__dict__.clear()


@pytest.mark.parametrize("version", [3, 2])
def test_what_was_found_for_this_version_is_used_and_noted_in_the_trace(trainer: Any, version: int) -> None:
    ids = np.array([5, 6, 8])
    group = ScoredGroup(
        token_ids=(ids, ids), masks=(np.array([NOT_TRAINED, NOT_TRAINED, 8]),) * 2, scores=np.array([1.0, 0.0]),
        group_id="g",
    )  # fmt: skip
    entry = cast(JournalEntry, SimpleNamespace(sequence=1, path=Path("batch_000001.json")))
    looked_at = Applied([group], [0], 0, {})
    data = RolloutData([group], entry, matches=[[None, None]], applied=(version, looked_at))
    trainer.provenance.apply.return_value = anew = Applied([group], [0], 0, {})
    report = trainer._make_samples(data)
    assert len(report.samples) == 2 and data.applied is None
    used = looked_at if version == 3 else anew
    [noted] = trainer.source.trace.collected.call_args_list
    assert noted.args[0] == [(1, 0)] and noted.args[2] == [[None, None]] and noted.args[3] is used
    assert trainer.provenance.apply.called is (version == 2)
