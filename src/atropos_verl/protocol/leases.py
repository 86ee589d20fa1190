"""``LeasedBatches``: every batch of the API is trained exactly once in what a run ends up with, whoever dies when.

A step is durable when the journal says which batch it consumed; only then is its batch acked. An upstream API gives no
leases: its batches are ours from the moment they leave it, and the same code journals them. docs/internals.md has the
table of what a resumed run does after a crash at any point, and what each answer to an ack means."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from atropos_verl.errors import AtroposAPIError, AtroposHTTPStatusError
from atropos_verl.protocol.client import AtroposClient, FetchedBatch
from atropos_verl.protocol.journal import BatchJournal, DamagedBatchError, JournalEntry, entry_at

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_OVER = {409: ("lost", logging.WARNING), 404: ("forgotten", logging.INFO)}
"""HTTP status → what became of a lease."""


@dataclass(frozen=True, slots=True)
class HeldBatch:
    """A batch that is on disk, and reserved at an API that knows leases."""

    body: bytes  # not decoded
    entry: JournalEntry
    waited: float = 0.0  # seconds until it came; 0 from the journal


class LeasedBatches:
    """The batches of one run. A step: ``fetch``, optimiser step, ``trained``, ``ack``; checkpoint, the journal's
    ``discard_through``. A run that may have died before calls ``resume`` first, before it registers. Leases are renewed
    from a thread of its own; ``fetch`` may run in another thread than the rest (the next batch is fetched while one is
    trained on)."""

    def __init__(self, client: AtroposClient, journal: BatchJournal) -> None:
        self.client = client
        self.journal = journal
        self.outcomes: Counter[str] = Counter()
        """Counts how acks ended: ``acked``, ``already``, ``late``, ``lost`` (somebody else has it), ``forgotten``."""
        self._owed: dict[int, JournalEntry] = {}
        """By number in the journal: trained, and the ack did not get through."""
        self._keeper = _LeaseKeeper(client)
        # Held while an entry is looked up, changed and told about; never while waiting for a batch.
        self._lock = threading.RLock()

    def fetch(
        self,
        max_wait_time: float | None = None,
        should_stop: Callable[[], None] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> HeldBatch:
        """The next batch of the API, in the journal (with the notes ``meta``) before anything else happens to it.
        Raises ``CheckpointError``, ``AtroposAPIError`` as ``get_batch``, or where the API does not take an ack it is
        owed."""
        while True:
            self._settle_debts()
            started = time.monotonic()
            fetched = self.client.get_batch(max_wait_time=max_wait_time, should_stop=should_stop)
            waited = time.monotonic() - started
            with self._lock:
                held = self._keep(fetched, meta)
            if held is not None:
                return replace(held, waited=waited)

    def poll(self, meta: Mapping[str, Any] | None = None) -> HeldBatch | None:
        """One ``GET /batch``: None when there is no batch. Raises as ``fetch``."""
        self._settle_debts()
        fetched = self.client.poll_batch()
        with self._lock:
            return None if fetched is None else self._keep(fetched, meta)

    def trained(self, entry: JournalEntry, step: int) -> JournalEntry:
        """Note durably that ``step`` consumed the batch. Raises ``CheckpointError`` when that cannot be written."""
        with self._lock:
            return self.journal.change(entry, step=step)

    def ack(self, entry: JournalEntry) -> str:
        """Tell the API that the batch is ours for good. Call it after ``trained``. An API that cannot be reached now is
        told before the next ``fetch``: the run goes on. Returns one of ``outcomes``, ``owed`` (not told yet) or
        ``none`` (no lease)."""
        with self._lock:
            entry = entry_at(entry.path)
            if entry.lease_id is None or entry.acked:
                return "none" if entry.lease_id is None else "already"
            try:
                outcome = self._verdict(entry)
            except AtroposAPIError as error:
                logger.warning("lease %s is not acked yet: %s", entry.lease_id, error.reason)
                self._owed[entry.sequence] = entry
                return "owed"
            self.journal.note_acked(entry)
            return outcome

    def release(self, entry: JournalEntry) -> None:
        """Give an untrained batch back: the API hands it out again, the journal forgets it. Without a lease, nothing
        is done. A failure is logged: the lease ends by itself."""
        if self._give_back(entry := entry_at(entry.path)) is not None:
            self.journal.drop(entry)

    def _give_back(self, entry: JournalEntry) -> bool | None:
        """Whether the API hands the batch out again; None without a lease."""
        if entry.lease_id is None or entry.acked:
            return None
        self._keeper.forget(entry.lease_id)
        try:
            self.client.release(entry.lease_id)
        except AtroposAPIError as error:
            logger.warning("lease %s could not be released: %s", entry.lease_id, error.reason)
            return False
        return True

    def resume(self, after_step: int) -> list[HeldBatch]:
        """Settle the leases that an earlier process left, and list what a run that goes on at ``after_step`` trains on
        first, in the order fetched. Call it before registering: other settings take returned batches apart. Raises
        ``AtroposAPIError`` (the API cannot be asked) and ``CheckpointError``."""
        if again := self.journal.bring_back(after_step):
            logger.warning("%d batches of steps after %d are trained on again", again, after_step)
        bodies: dict[int, bytes] = {}
        for entry in self.journal.pending(after_step):
            try:
                bodies[entry.sequence] = self.journal.read(entry)
            except DamagedBatchError as error:
                fate = "the API hands it out again" if self._give_back(entry) else "it is lost"
                kept = self.journal.set_aside(entry)
                logger.error("%s. This batch is not trained on from here: %s. What is left is %s", error, fate, kept)
        for entry in self.journal.owed():
            is_covered = entry.step is not None and entry.step <= after_step
            if self._verdict(entry) == "lost" and not is_covered:
                logger.warning("%s: the API gave this batch to another trainer; it is not trained on here", entry.path)
                self.journal.drop(entry)
            else:
                self.journal.note_acked(entry)
        return [HeldBatch(bodies[entry.sequence], entry) for entry in self.journal.pending(after_step)]

    def close(self) -> None:
        """Stop renewing. Idempotent; to be called before the client is closed."""
        self._keeper.close()

    def _keep(self, fetched: FetchedBatch, meta: Mapping[str, Any] | None) -> HeldBatch | None:
        """None when the journal holds the batch under an earlier lease: it only gets the new one."""
        before = self.journal.find(fetched.earlier_lease_ids) if fetched.earlier_lease_ids else None
        if before is None:
            entry = self.journal.record(fetched.body, meta, fetched.lease_id)
        else:
            logger.warning("lease %s had ended; its batch is here already: %s", before.lease_id, before.path)
            entry = self.journal.change(before, lease_id=fetched.lease_id, acked=False)
        if entry.step is not None:
            self.ack(entry)
        elif entry.lease_id is not None:
            self._keeper.keep(entry.lease_id)
        return HeldBatch(fetched.body, entry) if before is None else None

    def _settle_debts(self) -> None:
        with self._lock:
            for sequence, entry in list(self._owed.items()):
                now = entry_at(entry.path)  # its batch may have come again, and been acked, meanwhile
                if now.is_owed:
                    self._verdict(now)
                    self.journal.note_acked(now)
                del self._owed[sequence]

    def _verdict(self, entry: JournalEntry) -> str:
        """Ack, and say what came of it. Raises ``AtroposAPIError`` when the API gives no answer."""
        assert entry.lease_id is not None
        try:
            outcome = self.client.ack(entry.lease_id)
        except AtroposHTTPStatusError as error:
            if error.status_code not in _OVER:
                raise
            outcome, level = _OVER[error.status_code]
            logger.log(level, "lease %s (%s): %s", entry.lease_id, outcome, error.body or error.reason)
        self._keeper.forget(entry.lease_id)
        self.outcomes[outcome] += 1
        return outcome


class _LeaseKeeper:
    """Renews leases from a thread, which exists while there are any. A process that dies renews nothing."""

    def __init__(self, client: AtroposClient) -> None:
        self._client = client
        self._seconds = client.lease_seconds
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, lease_id: str) -> None:
        with self._lock:
            self._held.add(lease_id)
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                self._thread.start()

    def forget(self, lease_id: str) -> None:
        with self._lock:
            self._held.discard(lease_id)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        assert self._seconds is not None
        while not self._stop.wait(self._seconds / _RENEWALS_PER_LEASE):
            with self._lock:
                held = sorted(self._held)
            for lease_id in held:
                try:
                    self._client.renew(lease_id, self._seconds, self._raise_if_closed)
                except _ClosedError:
                    return
                except AtroposHTTPStatusError as error:
                    if error.status_code in _OVER:
                        self.forget(lease_id)  # acked meanwhile, or ended: the ack will tell
                    logger.info("lease %s is not renewed: %s", lease_id, error.reason)
                except AtroposAPIError as error:
                    logger.info("lease %s is not renewed now: %s", lease_id, error.reason)
                except Exception:  # a thread that ends lets every lease run out
                    logger.exception("lease %s is not renewed now", lease_id)

    def _raise_if_closed(self) -> None:
        if self._stop.is_set():
            raise _ClosedError


class _ClosedError(Exception):
    """Ends a renewal that nobody waits for."""
