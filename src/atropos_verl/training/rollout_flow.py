"""Tells the throttle of the gateway what lies between a completion and its step: the API's queue, batches in hand."""

from __future__ import annotations

import logging
import threading

from atropos_verl.config.schema import OffPolicyConfig
from atropos_verl.errors import AtroposAPIError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle

__all__ = ["RolloutFlow", "make_throttle"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


def make_throttle(
    config: OffPolicyConfig, ledger: Ledger, batch_size: int, batches_per_version: int = 1
) -> StalenessThrottle | None:
    """What ``off_policy.on_stale=wait`` asks for; None with ``drop``.

    Args:
        batch_size: sequences of one batch of the API.
        batches_per_version: batches that are trained on between two policy versions.
    """
    if config.max_staleness is None or config.on_stale == "drop":
        return None
    return StalenessThrottle(ledger, batch_size, config.max_staleness, batches_per_version=batches_per_version)


class RolloutFlow:
    """Nothing is done without a throttle (``off_policy.on_stale=drop``).

    Args:
        client: asked for the queue; needed with a throttle.
        group_size: sequences of one queued group.
    """

    def __init__(self, throttle: StalenessThrottle | None, client: AtroposClient | None, group_size: int) -> None:
        self._throttle = throttle
        self._client = client
        self._group_size = group_size
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def fetched(self) -> None:
        """A batch is in hand."""
        if self._throttle is not None:
            self._throttle.batch_fetched()

    def done(self) -> None:
        """A batch was trained on and the new weights are served, or it was given up."""
        if self._throttle is not None:
            self._throttle.batch_done()

    def watch(self) -> None:
        """Training begins: prompts may be held back. Asks the API for its queue from a thread. Idempotent."""
        if self._throttle is not None and self._thread is None:
            self._throttle.active = True
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="atropos-verl-queue-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Training has ended: nothing is held any more. To be called before the client is closed. Idempotent."""
        if self._throttle is not None:
            self._throttle.active = False
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        assert self._throttle is not None and self._client is not None
        while not self._stop.wait(_POLL_SECONDS):
            try:
                self._throttle.queue_is(self._client.status().queue_size * self._group_size)
            except AtroposAPIError as error:  # whoever fetches batches reports it
                logger.info("the queue of the API is not known now: %s", error.reason)
