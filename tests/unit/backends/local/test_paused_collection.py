"""The garbage collector rests while libraries are imported."""

from __future__ import annotations

import gc

import pytest

from atropos_verl.backends.local.run import paused_collection


def test_nothing_is_collected_meanwhile_and_nothing_of_it_later() -> None:
    before = gc.get_freeze_count()
    try:
        with paused_collection():
            assert not gc.isenabled()
            with paused_collection():
                assert not gc.isenabled()
            assert not gc.isenabled()  # the inner block is not the one that ends it
            kept = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_a_failed_import_leaves_the_collector_on() -> None:
    try:
        with pytest.raises(ImportError), paused_collection():
            raise ImportError("no such library")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        before = gc.get_freeze_count()
        with paused_collection():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == before
    finally:
        gc.enable()
