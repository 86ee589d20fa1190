"""The garbage collector rests while libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from atropos_verl.backends.local.run import paused_collection


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_collected_meanwhile_and_nothing_of_it_later() -> None:
    before = gc.get_freeze_count()
    with paused_collection():
        with paused_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the inner block is not the one that ends it
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_a_failed_import_leaves_the_collector_on_and_one_that_was_off_stays_off() -> None:
    with pytest.raises(ImportError), paused_collection():
        raise ImportError("no such library")
    assert gc.isenabled()
    gc.unfreeze()
    gc.disable()
    with paused_collection():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == 0
