"""The next batch, fetched and prepared in a thread while the trainer trains on this one.

::

    IDLE ──start──▶ FETCHING ──▶ READY ──take──▶ IDLE
                       │           │
                       └── error ──┴──▶ FAILED: take raises it, now and ever after

At most one batch is held: what waits longer only grows stale. While a batch lies READY the run's services are still
looked after, so that an environment that dies during a long optimiser step is news when that step ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHECK_SECONDS = 0.5
"""Between two looks at the run's services while a batch lies ready."""
_WAKE_SECONDS = 0.25
"""A waiting main thread wakes this often: Python delivers signals to it between two waits."""
_END_SECONDS = 40.0
"""For a request under way to be answered when the prefetcher closes: a batch may be in the answer."""


class _ClosedError(Exception):
    """Ends a wait for a batch that nobody will take."""


class Prefetcher(Generic[T]):
    """Runs ``fetch`` in a thread of its own. Everything else is called from one thread, the trainer's.

    Args:
        fetch: returns the next batch, prepared. It calls its argument often while it waits; that raises when nobody
            wants the batch any more, or when ``check`` does.
        check: raises when a process of the run has died.
    """

    def __init__(self, fetch: Callable[[Callable[[], None]], T], *, check: Callable[[], None] | None = None) -> None:
        self._fetch = fetch
        self._check = check
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._wanted = False
        self._ready: list[T] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to fetch a batch; nothing is done when one is under way or ready."""
        with self._condition:
            if self._closed or self._ready or self._wanted:
                return
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="atropos-verl-prefetch", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def take(self) -> T:
        """The batch under way (begun now, if there is none), waited for.

        Raises:
            Whatever ``fetch`` or ``check`` raised, also while a batch is ready.
        """
        self.start()
        with self._condition:
            while self._failure is None and not self._ready:
                self._condition.wait(_WAKE_SECONDS)
            if self._failure is not None:
                raise self._failure
            batch = self._ready.pop()
            self._condition.notify_all()
            return batch

    def close(self) -> list[T]:
        """End the thread. Returns the batch that was fetched and not taken, if any. Idempotent.

        A request that was sent is waited for, since a batch may be in its answer; a second Ctrl-C ends that wait.
        """
        with self._condition:
            self._closed = True
            self._wanted = False
            self._condition.notify_all()
        if self._thread is not None:
            deadline = time.monotonic() + _END_SECONDS
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._thread.join(_WAKE_SECONDS)
            if self._thread.is_alive():
                logger.warning("a request for a batch is still without an answer; what it brings is lost")
            self._thread = None
        left, self._ready = self._ready, []
        return left

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._next_is_wanted():
                batch = self._fetch(self._stop_or_check)
                with self._condition:
                    self._ready.append(batch)
                    self._wanted = False
                    self._condition.notify_all()
        except _ClosedError:
            return
        except BaseException as error:  # noqa: BLE001 - the end of a thread: `take` raises it in the trainer's
            with self._condition:
                self._failure = error
                self._condition.notify_all()

    def _next_is_wanted(self) -> bool:
        """Wait until a batch is wanted; False when closed. Looks at the services while one lies ready."""
        while True:
            with self._condition:
                timeout = _CHECK_SECONDS if self._ready else None  # whatever else changes notifies
                self._condition.wait_for(lambda: self._closed or self._wanted, timeout)
                if self._closed:
                    return False
                if self._wanted:
                    return True
            if self._check is not None:
                self._check()

    def _stop_or_check(self) -> None:
        if self._closed:
            raise _ClosedError
        if self._check is not None:
            self._check()
