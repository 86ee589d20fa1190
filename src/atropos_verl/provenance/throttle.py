"""``StalenessThrottle`` holds new prompts back that would be too stale by the time they are trained on.

A new prompt waits while ``fetched batches + (queued + under way) // batch_size`` exceeds ``off_policy.max_staleness``:
AReaL's bound (arXiv 2505.24298) in terms of what shows from outside. A next turn of an episode is never held.

That holds where sequences come in the order in which they began. Slow ones are overtaken, and would be left out more
often than others: while groups are left out as stale, fewer sequences may be under way.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import GenerationRequest

_POLL_SECONDS = 0.02
_PROBE_TOKENS = 1  # requests for so few tokens are health checks: they pass
_LEAST_LINGER, _MOST_LINGER = 0.25, 5.0
"""Seconds after which a completion that has not shown up in the queue is not expected any more."""
_NARROWER, _WIDER = 1 / 4, 1 / 50
"""Of a batch: how many sequences fewer may be under way after a batch with stale groups, and more after one without."""
_DELAYS = 32
"""Newest delays between a completion and its place in the queue that the next ones are judged by."""


class StalenessThrottle:
    """Safe to call from any thread and event loop. ``batch_size``: sequences of an optimiser step, of which there are
    ``batches_per_version`` between two policy versions. ``ledger`` knows what was generated before."""

    def __init__(
        self,
        ledger: Ledger,
        batch_size: int,
        max_staleness: int,
        clock: Callable[[], float] = time.monotonic,
        batches_per_version: int = 1,
    ) -> None:
        self._ledger = ledger
        self._batch_size = batch_size
        self._bound = max_staleness
        self._batches_per_version = batches_per_version
        self._clock = clock
        self._lock = threading.RLock()
        self._queued = 0
        self._fetched = 0
        self._margin = 0.0  # sequences that may not be under way, though the bound alone would let them
        self._generating = 0
        self._finished: deque[tuple[float, int]] = deque()
        self._delays: deque[float] = deque(maxlen=_DELAYS)
        self.active = False
        """Nothing is held while False: before and after training, when evaluations ask and no batch is taken."""
        self.held = 0  # requests that had to wait so far

    def queue_is(self, sequences: int) -> None:
        """Note the sequences that the API has queued now: those that are new there are under way no more."""
        with self._lock:
            arrived = sequences - self._queued
            self._queued = sequences
            while arrived > 0 and self._finished:
                when, count = self._finished.popleft()
                self._delays.append(self._clock() - when)
                if count > arrived:
                    self._finished.appendleft((when, count - arrived))
                arrived -= count

    def batch_fetched(self) -> None:
        """A batch left the queue. It is trained on, or waits for that."""
        with self._lock:
            self._fetched += 1
            self._queued = max(0, self._queued - self._batch_size)

    def batch_done(self, stale: int = 0) -> None:
        """It was trained on, and the engine has the new weights; or it was given up. ``stale`` groups were left out."""
        with self._lock:
            self._fetched = max(0, self._fetched - 1)
            margin = self._margin + self._batch_size * (_NARROWER if stale else -_WIDER)
            self._margin = min(max(margin, 0.0), float(self._bound * self._batch_size))

    @property
    def expected_staleness(self) -> int:
        """That a sequence that begins now will have, in policy versions."""
        with self._lock:
            usual = max(_LEAST_LINGER, 2 * max(self._delays)) if self._delays else _MOST_LINGER
            horizon = self._clock() - min(usual, _MOST_LINGER)
            while self._finished and self._finished[0][0] < horizon:
                self._finished.popleft()
            under_way = self._generating + sum(count for _, count in self._finished)
            ahead = self._fetched + (self._queued + under_way + int(self._margin)) // self._batch_size
            return ahead // self._batches_per_version

    @asynccontextmanager
    async def admitted(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[None]:
        """Wait until the new sequences among ``requests`` may begin, and count them while the block runs."""
        begins = sum(request.n for request in requests if self._is_new(request))
        if not begins:
            yield
            return
        waited = False
        while not self._begin(begins):  # one count for all: half a request that waits for itself would wait for ever
            self.held += not waited
            waited = True
            await asyncio.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            with self._lock:
                self._generating -= begins
                self._finished.append((self._clock(), begins))

    def _is_new(self, request: GenerationRequest) -> bool:
        probe = request.max_tokens is not None and request.max_tokens <= _PROBE_TOKENS
        return not (probe or self._ledger.continues(request.prompt_token_ids))

    def _begin(self, n: int) -> bool:
        with self._lock:
            if self.active and self.expected_staleness > self._bound:
                return False
            self._generating += n
            return True
