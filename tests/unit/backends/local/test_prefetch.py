"""The prefetching thread: what happens when, and how it ends. Fakes write down the order of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.serving import eventually

from atropos_verl.backends.local.batch_feed import OverlapFeed, SyncFeed
from atropos_verl.backends.local.prefetch import Prefetcher


class _Source:
    """Batches 1, 2, 3, …; each waits until it is allowed, calling its ``check`` meanwhile."""

    def __init__(self, events: list[str], *, allowed: int = 0) -> None:
        self.events = events
        self.allowed = allowed
        self.fetched = 0
        self.fail_at = 0

    def __call__(self, check: Callable[[], None]) -> int:
        number = self.fetched + 1
        self.events.append(f"fetch {number}")
        while number > self.allowed:
            check()
            time.sleep(0.002)
        if number == self.fail_at:
            raise ConnectionError(f"batch {number} is gone")
        self.fetched = number
        self.events.append(f"have {number}")
        return number


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "atropos-verl-prefetch"]


def test_the_next_batch_is_fetched_while_this_one_is_in_use_and_no_further() -> None:
    events: list[str] = []
    source = _Source(events, allowed=10)
    prefetcher = Prefetcher(source)
    for step in (1, 2, 3):
        assert prefetcher.take() == step
        events.append(f"train {step}")
        if step < 3:
            prefetcher.start()
            eventually(lambda: f"have {step + 1}" in events, "the next batch to come while this one trains")  # noqa: B023
            time.sleep(0.02)  # for a third one, which nobody asked for
        events.append(f"trained {step}")
    assert prefetcher.close() == []
    assert events == [
        *("fetch 1", "have 1", "train 1", "fetch 2", "have 2", "trained 1"),
        *("train 2", "fetch 3", "have 3", "trained 2", "train 3", "trained 3"),
    ]
    assert _prefetch_threads() == []


def test_taking_waits_for_the_batch_that_is_under_way() -> None:
    source = _Source([])
    prefetcher = Prefetcher(source)
    prefetcher.start()
    prefetcher.start()  # one is under way already
    threading.Timer(0.05, lambda: setattr(source, "allowed", 1)).start()
    assert prefetcher.take() == 1
    assert source.events == ["fetch 1", "have 1"]
    prefetcher.close()


def test_an_error_of_the_thread_is_raised_where_the_batch_is_taken() -> None:
    source = _Source([], allowed=2)
    source.fail_at = 2
    prefetcher = Prefetcher(source)
    assert prefetcher.take() == 1
    prefetcher.start()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="batch 2 is gone"):
            prefetcher.take()
    assert prefetcher.close() == []
    assert _prefetch_threads() == []


def test_a_service_that_dies_while_a_batch_lies_ready_ends_the_run_and_the_batch_is_kept() -> None:
    dead = threading.Event()

    def check() -> None:
        if dead.is_set():
            raise ChildProcessError("environment died")

    events: list[str] = []
    prefetcher = Prefetcher(_Source(events, allowed=1), check=check)
    prefetcher.start()
    eventually(lambda: "have 1" in events, "the batch")
    dead.set()
    eventually(lambda: not _prefetch_threads(), "the thread to notice", timeout=10.0)
    with pytest.raises(ChildProcessError, match="environment died"):
        prefetcher.take()
    assert prefetcher.close() == [1]


def test_closing_ends_a_wait_and_hands_back_what_came() -> None:
    waiting = Prefetcher(_Source([]))
    waiting.start()
    assert waiting.close() == []
    waiting.start()  # nothing after the end
    assert waiting.close() == []

    asked, answered = threading.Event(), threading.Event()

    def answer_under_way(check: Callable[[], None]) -> int:
        asked.set()
        assert answered.wait(10.0)  # the API has sent it; stopping now would lose it
        return 7

    late = Prefetcher(answer_under_way)
    late.start()
    assert asked.wait(10.0)
    threading.Timer(0.05, answered.set).start()
    assert late.close() == [7]
    assert _prefetch_threads() == []


class _Trainer:
    """The part of a trainer that a feed uses."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.put: list[Any] = []
        self.in_hand = self

    def prepare(self, batch: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.events.append(f"samples {batch.number}")

    def put_back(self, batches: list[Any]) -> None:
        self.put += [batch.number for batch in batches]


class _Batch:
    def __init__(self, number: int) -> None:
        self.number = number
        self.timings: dict[str, float] = {}


def test_the_overlapped_feed_prepares_ahead_and_hands_back_what_is_left() -> None:
    events: list[str] = []
    source = _Source(events, allowed=10)
    trainer = _Trainer(events)
    feed = OverlapFeed(trainer, lambda check: _Batch(source(check)), None)  # type: ignore[arg-type, return-value]
    first: Any = feed.take(more=True)
    assert first.number == 1
    assert first.timings["prefetch"] > 0
    eventually(lambda: "samples 2" in events, "the second batch's samples while the first one trains")
    feed.close()
    assert trainer.put == [2]
    assert events == ["fetch 1", "have 1", "samples 1", "fetch 2", "have 2", "samples 2"]

    last = OverlapFeed(trainer, lambda check: _Batch(source(check)), None)  # type: ignore[arg-type, return-value]
    last.take(more=False)
    last.close()
    assert events[-1] == "samples 3"
    assert trainer.put == [2], "the last step of a run fetches nothing that nobody will train on"


def test_the_synchronous_feed_fetches_when_asked_and_in_the_callers_thread() -> None:
    seen: list[Any] = []

    def wait(check: Any) -> Any:
        seen.append((check, threading.current_thread()))
        return _Batch(1)

    def check() -> None:
        """Nothing has died."""

    feed = SyncFeed(wait, check)
    assert seen == []
    feed.take(more=True)
    assert seen == [(check, threading.main_thread())]
    feed.close()
