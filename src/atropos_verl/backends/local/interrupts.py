"""Ctrl-C and ``kill`` wait until a step is whole: weights, counters and journal then say the same."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["held_interrupts"]

logger = logging.getLogger(__name__)

_ONE_INTERRUPT_SECONDS = 1.0
"""Signals this close together are one: torchrun passes on to its workers the Ctrl-C that they got from the terminal."""


@contextmanager
def held_interrupts(*, deliver: bool = True) -> Iterator[None]:
    """SIGINT and SIGTERM are delivered when the block ends; a second one, over a second later, at once.

    An exception of the block goes up as it is, and the signal is dropped: the run is ending anyway, and its cause is
    the better explanation. Blocks may be nested. Outside the main thread, where Python delivers no signal, nothing
    is done.

    Args:
        deliver: False drops the first signal altogether: for the last things that a run does before it ends anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    first: list[tuple[int, float]] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        if not first:
            logger.info("%s: finishing what must be whole first; again to stop at once", signal.Signals(number).name)
            first.append((number, time.monotonic()))
        elif time.monotonic() - first[0][1] > _ONE_INTERRUPT_SECONDS:
            restore()
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not None:  # None: not set by Python, so it could not be put back
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if first and deliver:
        signal.raise_signal(first[0][0])
