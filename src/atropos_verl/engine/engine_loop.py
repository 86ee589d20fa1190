"""The thread that owns the model: takes requests, runs steps, stops at token boundaries.

::

    wait for work ─▶ gate.step() ─▶ boundary.step() ─▶ drop aborted ─▶ prefill newcomers ─▶ decode one token each

``gate`` is the trainer's: paused, requests keep their tokens and nothing runs. ``boundary`` is the engine's own:
whoever uses the model from outside (weight updates, memory, logprobs) pauses it for that long, so each stands at a
token boundary whether or not the trainer paused the gate.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from atropos_verl.engine.continuous_batch import ContinuousBatch
from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.model_runner import ModelRunner
from atropos_verl.engine.scheduler import EngineLimits, EngineStats, PrefillBudget, RunningSequence, Ticket, WaitQueue
from atropos_verl.engine.weights import WeightStore
from atropos_verl.errors import EngineError, EngineStoppedError
from atropos_verl.types import GenerationDelta, GenerationRequest

__all__ = ["EngineLoop"]

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine is given up."""


class EngineLoop:
    """Requests in, completions out. Its methods may be called from any thread; see the module for the order of things.

    Args:
        runner: the model and its KV cache.
        weights: nothing is generated while they are not ``ready``.
        gate: the trainer's.
        limits: what requests were validated against.
        max_running: KV slots.
        max_prefill_tokens: padded tokens of one prefill.
        num_threads: ``torch.set_num_threads`` in this thread; None: unchanged.
        seed: of requests without a seed of their own.
        policy_version: asked at the start of each forward.
        after_step: called in the thread after each of its steps, and once more at its end.
    """

    def __init__(
        self,
        runner: ModelRunner,
        weights: WeightStore,
        gate: RequestGate,
        *,
        limits: EngineLimits,
        tokenizer: Any,
        max_running: int,
        max_prefill_tokens: int,
        num_threads: int | None,
        seed: int,
        policy_version: Callable[[], int],
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._weights = weights
        self._gate = gate
        self._limits = limits
        self._tokenizer = tokenizer
        self._max_prefill_tokens = max_prefill_tokens
        self._num_threads = num_threads
        self._policy_version = policy_version
        self._after_step = after_step
        self._random = random.Random(seed)
        self._pieces: dict[int, str] = {}  # text of single tokens, shared by all stop-string checks
        self._boundary = RequestGate()
        self._exclusive_lock = threading.Lock()
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._waiting = WaitQueue()
        self._tickets: set[Ticket] = set()
        self._aborting: list[Ticket] = []
        self._stopped: EngineStoppedError | None = None
        self._requests = self._finished = self._aborted = self._failed = 0
        # Touched at a token boundary only:
        self._batch = ContinuousBatch(runner, max_running)
        self._evictions = self._failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="atropos-verl-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. It is ended at interpreter exit if nobody did before: killed inside torch it may crash."""
        self._thread.start()
        atexit.register(self.stop, 10.0)

    # -- the callers' side -------------------------------------------------------------------------------------------

    def refuse_stopped(self) -> None:
        """Raise ``EngineStoppedError`` with the first cause when the engine is gone."""
        if self._stopped is not None:
            raise EngineStoppedError(str(self._stopped)) from self._stopped.__cause__

    def submit(self, request: GenerationRequest, on_delta: Callable[[GenerationDelta], None] | None = None) -> Ticket:
        """Queue a validated request. ``on_delta`` is called in the engine's thread and must not block."""
        ticket = Ticket(request, on_delta)
        with self._condition:
            self.refuse_stopped()
            seed = request.seed if request.seed is not None else self._random.getrandbits(64)
            self._waiting.push(ticket.build_sequences(self._limits, self._tokenizer, seed, self._pieces))
            self._tickets.add(ticket)
            self._requests += 1
            self._condition.notify_all()
        return ticket

    def find(self, request_id: str) -> list[Ticket]:
        with self._condition:
            return [ticket for ticket in self._tickets if ticket.request.request_id == request_id]

    def cancel(self, tickets: Sequence[Ticket]) -> int:
        """Drop these at the next token boundary; returns how many were still on their way."""
        with self._condition:
            live = [ticket for ticket in tickets if ticket in self._tickets and not ticket.cancelled]
            for ticket in live:
                ticket.cancelled = True
            self._aborting += live
            self._condition.notify_all()
        if live:
            self._gate.wake()
        return len(live)

    @contextlib.contextmanager
    def exclusive(self, what: str, timeout: float) -> Iterator[None]:
        """Hold the loop at a token boundary and keep other callers out, waiting at most ``timeout`` seconds for each.

        Raises ``TimeoutError`` naming ``what``, or ``EngineStoppedError``.
        """
        if not self._exclusive_lock.acquire(timeout=timeout):
            raise TimeoutError(f"{what}: waited {timeout:g} s for another caller that uses the model")
        try:
            self.refuse_stopped()
            try:
                self._boundary.pause(timeout)
                yield
            finally:
                self._boundary.resume()
        finally:
            self._exclusive_lock.release()
            with self._condition:
                self._condition.notify_all()  # what the loop waits for may have changed

    def evict(self) -> None:
        """At a token boundary: send every running sequence back to the front of the queue, with its tokens."""
        evicted = self._batch.evict()
        self._evictions += len(evicted)
        with self._condition:
            self._waiting.push_evicted(evicted)

    def stop(self, timeout: float) -> None:
        """End the thread, failing every request; ``TimeoutError`` when a step still runs after ``timeout`` seconds."""
        atexit.unregister(self.stop)
        self._fail_all(EngineStoppedError("the engine was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the engine's thread did not end within {timeout:g} s: a step is still running")

    def stats(self) -> EngineStats:
        with self._condition:
            return EngineStats(
                running=len(self._batch.running),
                waiting=len(self._waiting),
                requests=self._requests,
                finished=self._finished,
                aborted=self._aborted,
                failed=self._failed,
                prompt_tokens=self._batch.prompt_tokens,
                generated_tokens=self._batch.generated_tokens,
                evictions=self._evictions,
                kv_bytes=self._runner.cache.nbytes,
                weight_bytes=self._weights.nbytes,
            )

    def _fail_all(self, error: EngineStoppedError) -> None:
        with self._condition:
            if self._stopped is None:
                self._stopped = error
            tickets = list(self._tickets)
            self._tickets.clear()
            self._waiting.clear()
            self._failed += len(tickets)
            self._condition.notify_all()
        for ticket in tickets:
            ticket.fail(error)
        self._gate.wake()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while self._stopped is None:
                self._wait_for_work()
                with self._gate.step(timeout=1.0, stop=self._interrupted) as may_run, self._boundary.step(1.0) as free:
                    if free and self._stopped is None:
                        self._guarded_step(may_run)
                self._after_step()
        finally:
            # Whatever ended the thread, nobody may wait for it for ever.
            self._fail_all(EngineStoppedError("the engine's thread ended unexpectedly; the log has the reason"))
            self._batch.evict()
            self._after_step()

    def _interrupted(self) -> bool:
        return self._stopped is not None or bool(self._aborting)

    def _has_work(self) -> bool:
        return self._interrupted() or (self._weights.ready and bool(self._batch.running or len(self._waiting)))

    def _wait_for_work(self) -> None:
        with self._condition:
            self._condition.wait_for(self._has_work, timeout=5.0)

    def _guarded_step(self, may_run: bool) -> None:
        """One iteration. A failure ends the sequences that took part in it, and the engine goes on."""
        try:
            self._drop_aborted()
            if may_run and self._weights.ready and self._step():
                self._failed_steps = 0
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the requests get the error
            self._fail_step(error)

    def _step(self) -> bool:
        """Let newcomers in, then one token for everyone. False when there was nothing to do."""
        budget = PrefillBudget(self._max_prefill_tokens, self._runner.max_prefill_logits)
        with self._condition:
            newcomers = self._waiting.take(self._batch.free_slots, budget)
        if newcomers:
            self._finish(self._batch.prefill(newcomers, self._policy_version()))
        if self._batch.running:
            self._finish(self._batch.decode(self._policy_version()))
            return True
        return bool(newcomers)

    def _finish(self, ended: list[RunningSequence]) -> None:
        if ended:
            with self._condition:
                # Those that end together are answered in the order they came.
                for ticket in dict.fromkeys(s.ticket for s in sorted(ended, key=lambda s: s.ordinal)):
                    if ticket.resolve_if_done():
                        self._tickets.discard(ticket)
                        self._finished += 1

    def _drop_aborted(self) -> None:
        if not self._aborting:
            return
        with self._condition:
            aborting, self._aborting = self._aborting, []
            for ticket in aborting:
                if ticket in self._tickets:
                    self._tickets.remove(ticket)
                    self._aborted += ticket.abort()
            self._waiting.remove_finished()
        self._batch.compact()

    def _fail_step(self, error: Exception) -> None:
        """The sequences of the failed forward get the error; the others are prefilled again."""
        self._failed_steps += 1
        logger.exception("an engine step failed (%d in a row)", self._failed_steps)
        reason = EngineError(f"the engine failed while generating: {type(error).__name__}: {error}")
        reason.__cause__ = error
        victims = {sequence.ticket for sequence in self._batch.participants}
        self._batch.participants = []
        with self._condition:
            self._tickets -= victims
            for ticket in victims:
                self._failed += ticket.fail(reason)
        self.evict()
        with self._condition:
            self._waiting.remove_finished()
        self._runner.cache.clear()
        if self._failed_steps >= _MAX_FAILED_STEPS:
            stopped = EngineStoppedError(f"the engine gave up after {self._failed_steps} failed steps: {error}")
            stopped.__cause__ = error
            self._fail_all(stopped)
