"""Batches between the API and their step: decoded, looked up in the ledger, journalled, and not trained on yet."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from atropos_verl.backends.local.rollout_data import RolloutData
from atropos_verl.errors import AtroposProtocolError
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.schema import validated
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.off_policy_book import OffPolicyBook
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.training.rollout_flow import RolloutFlow
from atropos_verl.types import QuarantinedGroup, ScoredGroup

__all__ = ["InHand"]

logger = logging.getLogger(__name__)


class InHand:
    """Those that come before what the API delivers next, in order."""

    def __init__(
        self, batches: LeasedBatches, book: OffPolicyBook, quarantine: QuarantineStore, flow: RolloutFlow
    ) -> None:
        self._batches = batches
        self._book = book
        self._quarantine = quarantine
        self._flow = flow
        self._early: deque[RolloutData] = deque()

    def next(self) -> RolloutData | None:
        """The first of them; it is the caller's now."""
        return self._early.popleft() if self._early else None

    def take(self, held: Sequence[HeldBatch]) -> None:
        """Put batches that the API gave before anybody waited for one behind the others."""
        self._early.extend(self.decode(batch) for batch in held)

    def put_back(self, batches: Sequence[RolloutData]) -> None:
        """These are the next to be trained on: fetched, journalled, and not wanted now."""
        self._early.extendleft(reversed(batches))

    def give_back(self) -> None:
        """Untrained batches go back to an API that can take them (with leases)."""
        for data in self._early:
            if data.entry is not None:
                self._batches.release(data.entry)
            self._flow.done()
        self._early.clear()

    def replay(self, held: Sequence[HeldBatch], step: int) -> None:
        """Put journalled batches that the checkpoint of ``step`` does not cover in front of what the API delivers."""
        for batch in held:
            body, entry = batch.body, batch.entry
            try:
                groups = validated(decode_batch(body), self._book.settings.vocab_size)
            except AtroposProtocolError as error:
                # It ended the run that fetched it; without this it would end every resume as well.
                group = ScoredGroup(token_ids=(), masks=(), scores=np.zeros(0), group_id=entry.path.stem, raw=body)
                path = self._quarantine.put(QuarantinedGroup(group=group, reason=error.reason))
                logger.warning("journalled batch %s is not a batch: %s; kept in %s", entry.path, error.reason, path)
                self._batches.trained(entry, step)
            else:
                matches = self._book.recall(groups, self._batches.journal, entry)
                self._early.append(RolloutData(groups, entry, matches=matches))
                self._flow.fetched()

    def decode(self, held: HeldBatch) -> RolloutData:
        """A batch that has just come. Raises ``AtroposProtocolError`` when it is none."""
        started = time.perf_counter()
        groups = validated(decode_batch(held.body), self._book.settings.vocab_size)
        decoded = time.perf_counter()
        matches = self._book.look_up_and_keep(groups, self._batches.journal, held.entry)
        self._flow.fetched()
        timings = {"decode": decoded - started, "look_up": time.perf_counter() - decoded, "wait": held.waited}
        return RolloutData(groups, held.entry, matches=matches, timings=timings)
