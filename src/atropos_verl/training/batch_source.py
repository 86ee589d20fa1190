"""``BatchSource``: the one way of batches from the trajectory API to an optimiser step, for both backends.

``backends.local`` takes one batch a step (``take``), ``backends.ray`` fills slots of TransferQueue (``next``).
docs/internals.md has the order of its writes. It imports no torch, so a run can register before the policy is there.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ConfigError,
)
from atropos_verl.protocol.client import make_client, register_trainer
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.schema import validated, without_fields
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.extensions import load_rescoring
from atropos_verl.training.quarantine import QuarantineStore
from atropos_verl.training.staleness import Applied, BatchMatches, BatchProvenance
from atropos_verl.training.step import RunTotals
from atropos_verl.training.trace import TraceWriter
from atropos_verl.types import FloatArray, QuarantinedGroup, SampleReport, ScoredGroup

logger = logging.getLogger(__name__)

_MOST_LOST_BATCHES = 5
"""Answers of 500 to GET /batch in a row after which the API is taken to be broken."""
_QUEUE_POLL_SECONDS = 0.1
_ATTEND_SECONDS = 0.5
"""Between two calls of ``attend`` while a batch is fetched ahead."""
_END_SECONDS = 40.0
"""For a request under way to be answered when training is over: a batch may be in the answer."""

Check = Callable[[], None]
"""Called while waiting; ends the wait by raising."""


@dataclass
class RolloutData:
    """One batch on its way to the optimiser. ``matches`` None: not looked up yet. ``timings`` are in seconds."""

    groups: list[ScoredGroup]
    entry: JournalEntry | None = None
    matches: BatchMatches | None = None
    off_policy: dict[str, float | int | None] = field(default_factory=dict)
    report: SampleReport | None = None
    applied: tuple[int, Applied] | None = None
    """Policy version, and what was found for it when staleness was looked at."""
    timings: dict[str, float] = field(default_factory=dict)
    trainer_logprobs: Sequence[FloatArray] = ()
    """[T] of each sample of ``report``, before the update."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of the groups: number of the batch in the journal, index in it."""
        return [] if self.entry is None else [(self.entry.sequence, i) for i in range(len(self.groups))]

    def trainer_logprobs_by_place(self) -> dict[tuple[int, int, int], FloatArray]:
        """By place and position in the group."""
        places = {group.group_id: place for place, group in zip(self.places, self.groups, strict=False)}
        samples = [] if self.report is None else self.report.samples
        return {
            (*places[sample.group_id], sample.sequence_index): row
            for sample, row in zip(samples, self.trainer_logprobs, strict=False)
            if sample.group_id in places
        }


class BatchSource:
    """The batches of one run, from registration to ack. A run calls ``resume`` and ``register``, then ``attach`` once
    the policy is loaded, and then takes batches. One thread fetches; ``trained``, ``ack`` and ``done`` may be called
    from another."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        if config.atropos.api_url is None:
            raise ConfigError("no trajectory API: set it, or run recipe/atropos/main_atropos.py", "atropos.api_url")
        self.config = config
        self.run_dir = run_dir
        self.client = make_client(config, config.atropos.api_url)
        self.journal = BatchJournal(run_dir / "journal", config.journal.keep)
        self.batches = LeasedBatches(self.client, self.journal)
        self.quarantine = QuarantineStore(run_dir / "quarantine", config.journal.quarantine_bytes)
        self.trace = TraceWriter(run_dir, config.trace.bytes)
        self.note: Callable[[str], None] = lambda message: logger.info("%s", message)
        self.is_registered = False
        self._step = 0
        self._early: deque[HeldBatch | RolloutData] = deque()
        """Batches that come before those that the API delivers next."""
        self._resumed: int | None = None
        self._provenance: BatchProvenance | None = None
        self._throttle: StalenessThrottle | None = None
        self._totals = RunTotals()
        self._prepare: Callable[[RolloutData], None] | None = None
        self._ahead: Future[RolloutData] | None = None
        """The batch that is fetched while the trainer trains on another: one, since a batch that waits grows stale."""
        self._stopped = False
        self._check: Check = lambda: None
        self._attend: Check = lambda: None
        self._rescored: Callable[[ScoredGroup], ScoredGroup] | None = None
        self._has_delivered = False  # a batch came from the API while this process trained
        self._is_explained = False
        self._queue_watch: threading.Thread | None = None
        """Tells the throttle of the API's queue until ``_is_over`` is set."""
        self._is_over = threading.Event()

    def resume(self, step: int) -> int:
        """Puts the batches of an earlier process that a run at ``step`` trains on first in front, once; returns how
        many. Raises as ``LeasedBatches.resume``."""
        if self._resumed is None:
            owed = self.batches.resume(step) if self.config.resume != "disable" else []
            self._early.extend(owed)
            self._count_fetched(len(owed))
            self._resumed, self._step = len(owed), step
            self._begin_trace(None if self.config.resume == "disable" else step)
        return self._resumed

    def _begin_trace(self, step: int | None) -> None:
        # The journal forgets a batch that a checkpoint covers, and the trace does not: no number stands for two.
        self.journal.number_from(self.trace.begin(step) + 1)

    def register(self, step: int, batch_size: int, checkpoint_dir: Path | None = None) -> None:
        """Registers the trainer, which is at ``step``, once, after ``resume``. Raises as ``register_trainer``."""
        if self.is_registered:
            return
        self._step = step
        self._begin_trace(step or None)
        register_trainer(
            self.client,
            self.config,
            batch_size,
            starting_step=step,
            checkpoint_dir=checkpoint_dir or self.run_dir / "checkpoints",
            first_poll=self._poll,
        )
        self.is_registered = True

    def _poll(self) -> None:
        """One GET /batch: an upstream API lets environments register only after it. A batch it returns is kept."""
        if held := self.batches.poll({"after_step": self._step}):
            self._early.append(held)
            self._count_fetched()

    def attach(self, provenance: BatchProvenance, throttle: StalenessThrottle | None, totals: RunTotals) -> None:
        """Gives the source what comes with the policy, to decode batches. ``totals`` count lost and stale ones."""
        self._provenance, self._throttle, self._totals = provenance, throttle, totals
        self._count_fetched(len(self._early))

    def go_on(self, step: int, policy_version: int, note: Callable[[str], None]) -> None:
        """After ``attach``, when the checkpoint is loaded (0: there was none): what an earlier process knew is known
        again, and ``resume``."""
        assert self._provenance is not None and self._provenance.ledger is not None, "attach comes first"
        version = self._provenance.resumed_at = None if self.config.resume == "disable" else policy_version
        if known := self._provenance.ledger.persist(self.run_dir / "ledger", version):
            note(f"{known} completions of before the interruption are known: their groups may still come")
        if pending := self.resume(step):
            note(f"{pending} batches fetched before the interruption are trained first")

    def start(
        self,
        check: Check | None,
        *,
        starts_environment: bool = False,
        prepare: Callable[[RolloutData], None] | None = None,
        attend: Check = lambda: None,
    ) -> None:
        """Training begins: ``take`` may be called, prompts may be held back, and ``reward.path`` scores what comes.
        ``check`` is called while waiting, and raises when a process of the run has died; ``attend`` in the thread of
        ``take``. ``starts_environment``: its first batch may take ``env.startup_timeout``, and who watches the
        environment says what keeps it. ``prepare``: prefetch one batch, and call this for it in the source's thread."""
        self._check, self._attend, self._is_explained = check or self._check, attend, starts_environment
        if self.config.reward.path is not None:
            assert self._provenance is not None, "attach comes first"
            self._rescored = load_rescoring(self.config.reward.path, self._provenance.decode)
        self._prepare, self._stopped = prepare, False
        if self._throttle is not None and self._queue_watch is None:
            self._throttle.active = True
            self._is_over.clear()
            of = (self._throttle,)
            self._queue_watch = threading.Thread(
                target=self._report_queue, args=of, name="atropos-verl-queue", daemon=True
            )
            self._queue_watch.start()

    def take(self, *, more: bool) -> RolloutData:
        """The next batch. ``more``: another one will be wanted after it. Raises as ``next``."""
        if self._prepare is None:
            return self.next(self._check_and_attend)
        batch = self._ahead or self._fetch_ahead(self._prepare)
        while not wait([batch], _ATTEND_SECONDS).done:
            self._attend()
        self._check()  # what died during a long optimiser step is known now, and the batch is kept
        data, self._ahead = batch.result(), None
        if more:
            self._fetch_ahead(self._prepare)
        return data

    def _check_and_attend(self) -> None:
        self._check()
        self._attend()

    def _stop_or_check(self) -> None:
        if self._stopped:
            raise CancelledError  # which no retry catches
        self._check()

    def _fetch_ahead(self, prepare: Callable[[RolloutData], None]) -> Future[RolloutData]:
        self._ahead = Future()
        # Not an executor's thread, which the interpreter would wait for at its end.
        of = (self._ahead, prepare)
        threading.Thread(target=self._prefetch, args=of, name="atropos-verl-prefetch", daemon=True).start()
        return self._ahead

    def _prefetch(self, batch: Future[RolloutData], prepare: Callable[[RolloutData], None]) -> None:
        try:
            started = time.perf_counter()
            data = self.next(self._stop_or_check)
            prepare(data)
            data.timings["prefetch"] = time.perf_counter() - started
            batch.set_result(data)
        except BaseException as error:  # noqa: BLE001 - the end of a thread: `take` raises it in the trainer's
            batch.set_exception(error)

    def next(self, check: Check | None = None) -> RolloutData:
        """Waits for the next batch, with as many requests as it takes. Raises ``AtroposTimeoutError``: none came in
        time; ``AtroposAPIError``: the API failed, or lost more than five batches in a row."""
        is_starting = self._is_explained and not self._has_delivered
        limit = self.config.env.startup_timeout if is_starting else self.config.atropos.rollout_timeout
        deadline = time.monotonic() + limit
        lost = 0
        gone_since: float | None = None
        while True:
            remaining = deadline - time.monotonic()
            try:
                return self.fetch(min(self.config.batch_max_wait_time, max(remaining, 0.1)), check)
            except AtroposTimeoutError as error:
                if time.monotonic() >= deadline:
                    raise
                logger.info("%s", error.reason) if self._is_explained else self.note(error.reason)
                gone_since = None
            except AtroposHTTPStatusError as error:
                # Upstream encodes a batch after taking it off its queue: one NaN score in it gives 500, and the batch
                # is gone. The next one may be fine, so the run goes on, and says what was lost.
                lost += 1
                if error.status_code != 500 or lost > _MOST_LOST_BATCHES or time.monotonic() >= deadline:
                    raise
                self._totals.batches_lost_at_api += 1
                self.note(f"{error.reason}: the API lost a batch (an upstream API does, on a NaN score); going on")
            except AtroposAPIError as error:
                # The API we started may have died this moment: then its own log is the better explanation.
                if check is not None:
                    time.sleep(0.5)
                    check()
                gone_since = gone_since or time.monotonic()
                patience = (self.config.atropos.lease_seconds or 0.0) if self.client.leased else 0.0
                if not isinstance(error, AtroposConnectionError) or time.monotonic() - gone_since >= patience:
                    raise
                self.note(f"{error.reason}; it keeps what is leased and queued, so it is awaited for {patience:g} s")

    def fetch(self, max_wait_time: float | None = None, should_stop: Check | None = None) -> RolloutData:
        """The next batch, in one request. Raises as ``LeasedBatches.fetch``, and ``AtroposProtocolError``."""
        while self._early:
            first = self._early.popleft()
            if isinstance(first, RolloutData):
                return first
            try:
                return self._decode(first)
            except AtroposProtocolError as error:
                # It ended the run that fetched it; without this it would end every resume as well.
                logger.warning("journalled batch %s is not a batch: %s", first.entry.path, error.reason)
                name = first.entry.path.stem
                group = ScoredGroup(token_ids=(), masks=(), scores=np.zeros(0), group_id=name, raw=first.body)
                self.quarantine.put(QuarantinedGroup(group=group, reason=error.reason))
                self.batches.trained(first.entry, self._step)
                self.done()
        held = self.batches.fetch(max_wait_time, should_stop, {"after_step": self._step})
        self._has_delivered = True
        self._count_fetched()
        return self._decode(held)

    def _decode(self, held: HeldBatch) -> RolloutData:
        assert self._provenance is not None, "attach comes first"
        started = time.perf_counter()
        settings = self._provenance.settings
        groups = validated(without_fields(decode_batch(held.body), settings.ignore_fields), settings.vocab_size)
        if self._rescored is not None:
            groups = [self._rescored(group) if group.defect is None else group for group in groups]
        decoded = time.perf_counter()
        matches = self._provenance.recall(groups, self.journal, held.entry)
        self.trace.arrived(held.entry.sequence, groups)
        timings = {"decode": decoded - started, "look_up": time.perf_counter() - decoded, "wait": held.waited}
        return RolloutData(groups, held.entry, matches=matches, timings=timings)

    def collect(
        self, data: RolloutData, policy_version: int, make: Callable[[list[ScoredGroup]], SampleReport]
    ) -> SampleReport:
        """Has samples made of the groups that are not too old for ``policy_version``, as the ledger completes them, and
        keeps them in ``data``. Bad groups are written to ``run_dir/quarantine``."""
        assert self._provenance is not None, "attach comes first"
        (version, applied), data.applied = data.applied or (None, None), None
        matches = self._provenance.look_up(data.groups) if data.matches is None else data.matches
        if applied is None or version != policy_version:
            applied = self._provenance.apply(data.groups, matches, policy_version)
        data.off_policy = applied.figures
        data.report = make(applied.groups)
        if data.entry is not None:
            self.trace.collected(data.places, data.groups, matches, applied, data.report)
        for bad in data.report.quarantined:
            self.quarantine.put(bad)
        return data.report

    def discard_if_stale(self, data: RolloutData, policy_version: int) -> bool:
        """True when every group is older than ``off_policy.max_staleness``: the batch is over, without a step."""
        assert self._provenance is not None and data.matches is not None, "attach and fetch come first"
        if self._provenance.config.max_staleness is None or not data.groups:
            return False
        data.applied = policy_version, self._provenance.apply(data.groups, data.matches, policy_version)
        if data.applied[1].groups:
            return False
        logger.warning("every group of a batch exceeds off_policy.max_staleness; the batch is not trained on")
        if data.entry is not None:
            applied = Applied([], [], {})
            self.trace.collected(data.places, data.groups, data.matches, applied, SampleReport())
        self._totals.batches_stale += 1
        self.trained(data, self._step)
        self.ack(data)
        self.done(len(data.groups))
        return True

    def trained(self, data: RolloutData, step: int, **of_trace: Any) -> None:
        """Notes durably that ``step`` consumed the batch; ``ack`` follows when the new weights are served.
        ``of_trace``: for ``TraceWriter.ended``."""
        self._step = step
        if data.entry is not None:
            self.batches.trained(data.entry, step)
            self.trace.ended(data.places, step, **of_trace)
        if self._provenance is not None:
            self._provenance.consumed(data.matches or [])

    def ack(self, data: RolloutData) -> None:
        """Lets the API forget the batch."""
        if data.entry is not None:
            self.batches.ack(data.entry)

    def stop(self, *, give_back: bool) -> None:
        """Training is over, or has failed: ends the prefetch, and holds no prompt back any more. A batch that was
        fetched and not trained on is the next one to be taken, unless ``give_back`` is asked for. Idempotent."""
        self._stopped = True
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not wait([ahead], _END_SECONDS).done:  # which a second Ctrl-C ends
            logger.warning("a request for a batch is still without an answer; a batch in it is lost")
        elif ahead is not None and ahead.exception() is None:
            self._early.appendleft(ahead.result())
        if give_back:
            self.give_back()
        self._unwatch_queue()

    def give_back(self) -> None:
        """Untrained batches go back to an API that can take them (with leases)."""
        while self._early:
            first = self._early.popleft()
            if first.entry is not None:
                self.batches.release(first.entry)
            self.done()

    def close(self) -> None:
        """Stops renewing leases, then closes the connection. Idempotent."""
        self._unwatch_queue()
        self.batches.close()
        self.client.close()
        self.trace.close()

    def _count_fetched(self, batches: int = 1) -> None:
        for _ in range(batches):
            if self._throttle is not None:
                self._throttle.batch_fetched()

    def done(self, stale: int = 0) -> None:
        """The new weights of a batch are served, or it was given up; ``stale`` of its groups were left out."""
        if self._throttle is not None:
            self._throttle.batch_done(stale)

    def _unwatch_queue(self) -> None:
        if self._throttle is not None:
            self._throttle.active = False
        if self._queue_watch is not None:
            self._is_over.set()
            self._queue_watch.join()
            self._queue_watch = None

    def _report_queue(self, throttle: StalenessThrottle) -> None:
        while not self._is_over.wait(_QUEUE_POLL_SECONDS):
            try:
                throttle.queue_is(self.client.status().queue_size * self.config.group_size)
            except Exception as error:  # noqa: BLE001 - a thread that ends lets the throttle hold prompts back for ever
                logger.info("the queue of the API is not known now: %s", error)
