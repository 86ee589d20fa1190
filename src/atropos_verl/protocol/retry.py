"""When a call to the trajectory API is tried again, and how long all tries together may take.

======================================================  ====================================================
endpoint                                                tried again
======================================================  ====================================================
``/status``, ``/info``, ``/wandb_info``,                ``Rule.FREELY``: refused or broken connections,
``/status-env``, ``/batch/ack``                         time-outs, HTTP 429 and 5xx
``GET /batch``, ``GET /reset_data``, every other POST   ``Rule.UNSENT``: only while nothing of the request can
                                                        have reached the API
======================================================  ====================================================

A POST with an idempotency key is tried again freely: a server that knows the key takes the data once.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from atropos_verl.protocol.exchange import ExchangeError

__all__ = ["RetryPolicy", "Rule", "pause"]

logger = logging.getLogger(__name__)

GROWTH = 1.5
"""Each interval is this many times the one before."""
_JITTER = 0.1
_TRIES_PER_TIMEOUT = 3
_SLICE_SECONDS = 0.25

T = TypeVar("T")


class Rule(enum.Enum):
    """Which failures of a call are tried again."""

    FREELY = "the call changes nothing, or a server recognises the repetition"
    UNSENT = "the call must not be carried out twice"

    def allows(self, failure: BaseException) -> bool:
        if not isinstance(failure, ExchangeError) or not failure.transient:
            return False
        return self is Rule.FREELY or not failure.sent


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``attempts`` quick tries; the interval after try i (from 0) is ``delay * 1.5**i`` seconds."""

    attempts: int
    delay: float

    def interval(self, attempt: int) -> float:
        """Seconds to wait after try ``attempt`` (from 0); after the last quick try it no longer grows."""
        return float(self.delay * GROWTH ** min(attempt, self.attempts - 1))

    def call(
        self,
        try_once: Callable[[float], T],
        *,
        name: str,
        rule: Rule,
        seconds: float,
        should_stop: Callable[[], None] | None = None,
    ) -> T:
        """The result of ``try_once(seconds_left)``, which raises ``ExchangeError``; tried again as ``rule`` allows.

        All tries and the waits between them end within ``seconds``. A call that may be repeated spends at most a
        third of them on one try, so that a lost packet does not cost it all.

        Raises:
            AtroposAPIError: the failure of the last try.
            Whatever ``should_stop`` raises, called between tries.
        """
        deadline = time.monotonic() + seconds
        longest = seconds / min(_TRIES_PER_TIMEOUT, self.attempts) if rule is Rule.FREELY else seconds

        def attempt() -> T:
            return try_once(max(0.0, min(longest, deadline - time.monotonic())))

        def enough(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number >= self.attempts or time.monotonic() + state.upcoming_sleep >= deadline

        def announce(state: tenacity.RetryCallState) -> None:
            level = logging.INFO if state.attempt_number == 1 else logging.WARNING
            failure = state.outcome.exception() if state.outcome is not None else None
            wait = state.upcoming_sleep
            logger.log(level, "%s: try %d failed (%s); again in %.2f s", name, state.attempt_number, failure, wait)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(rule.allows),
            wait=tenacity.wait_exponential(multiplier=self.delay, exp_base=GROWTH)
            + tenacity.wait_random(0, _JITTER * self.delay),
            stop=enough,
            sleep=lambda length: pause(length, should_stop),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ExchangeError as failure:
            raise failure.error from failure.__cause__


def pause(seconds: float, should_stop: Callable[[], None] | None = None) -> None:
    """Sleep, calling ``should_stop`` at once and every quarter of a second, so that what it raises is raised soon."""
    end = time.monotonic() + seconds
    while True:
        if should_stop is not None:
            should_stop()
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _SLICE_SECONDS) if should_stop is not None else left)
