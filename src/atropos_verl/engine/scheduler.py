"""The thread that owns the model: takes requests, runs steps, stops at token boundaries.

::

    GenerationRequest ──submit──▶ Ticket with n sequences ──▶ queue ────admit──▶ a KV slot ──finish──▶ Generation
                                                               ▲                   │
                                                               └──── evicted ──────┘
                                                 (new weights, or memory released: tokens are kept)

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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.requests import EngineLimits, EngineStats, RunningSequence, Ticket
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.sampling import SamplingRows, effective_temperature, sample
from atropos_verl.errors import EngineError, EngineStoppedError
from atropos_verl.types import GenerationDelta, GenerationRequest

__all__ = ["Scheduler"]

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine is given up."""


def take_prefill(
    waiting: deque[RunningSequence], slots: int, max_tokens: int, max_logits: int
) -> list[RunningSequence]:
    """Take the sequences of one prefill from the queue, in order. A context that is in it already costs nothing.

    Args:
        slots: sequences at most.
        max_tokens: distinct contexts times the longest of them, at most; a longer context goes alone.
        max_logits: distinct contexts times distinct lengths (the positions for which a padded prefill computes
            logits), at most.
    """
    taken: list[RunningSequence] = []
    contexts: set[tuple[int, ...]] = set()
    lengths: set[int] = set()
    while waiting and len(taken) < slots:
        if (context := waiting[0].context()) not in contexts:
            rows, grown = len(contexts) + 1, lengths | {len(context)}
            if rows > 1 and (rows * max(grown) > max_tokens or rows * len(grown) > max_logits):
                break
            contexts.add(context)
            lengths = grown
        taken.append(waiting.popleft())
    return taken


class ContinuousBatch:
    """The sequences that hold a KV slot, decoded together. Used by one thread at a time.

    Invariant between steps: slot ``r`` belongs to ``running[r]`` and its cache holds all tokens of that sequence but
    the last one, which the next decode step feeds in.
    """

    def __init__(self, runner: ModelRunner, max_running: int) -> None:
        self._runner = runner
        self._max_running = max_running
        self._rows: SamplingRows | None = None  # of `running`; None after rows joined or left
        self.running: list[RunningSequence] = []
        self.participants: list[RunningSequence] = []
        """Sequences of the forward pass under way: those that a failure is to be blamed on."""
        self.prompt_tokens = 0
        self.generated_tokens = 0

    @property
    def free_slots(self) -> int:
        return self._max_running - len(self.running)

    def prefill(self, newcomers: Sequence[RunningSequence], policy_version: int) -> list[RunningSequence]:
        """Compute the contexts of ``newcomers`` into free slots and sample one token each; returns those that ended.

        Sequences with the same context (the n completions of a prompt, in one request or several) are computed once.
        """
        self.participants = list(newcomers)
        for ticket in {sequence.ticket for sequence in newcomers}:
            if (best := ticket.request.prompt_logprobs) is not None and ticket.prompt_logprobs is None:
                temperature = effective_temperature(ticket.request.temperature)
                ticket.prompt_logprobs = self._runner.prompt_logprobs(
                    ticket.request.prompt_token_ids, best, temperature
                )
        prompts: dict[tuple[int, ...], int] = {}
        picks = [prompts.setdefault(sequence.context(), len(prompts)) for sequence in newcomers]
        # The first sequence of each distinct context takes the slot it is computed in; the others get copies behind.
        # (Contexts are numbered as they appear, so a row is the first of its own when its number is new.)
        firsts = [picks.index(number) for number in range(len(prompts))]
        order = firsts + sorted(set(range(len(newcomers))) - set(firsts))
        base = len(self.running)
        logits = self._runner.prefill(list(prompts), base, len(newcomers))
        if len(newcomers) > len(prompts):
            self._runner.cache.copy_rows(
                [base + picks[row] for row in order[len(prompts) :]],
                list(range(base + len(prompts), base + len(newcomers))),
                max(map(len, prompts)),
            )
            logits = logits[torch.tensor([picks[row] for row in order], device=logits.device)]
        self.prompt_tokens += sum(map(len, prompts))
        fresh = [newcomers[row] for row in order]
        self.running = self.running + fresh
        self._rows = None
        return self._sample_and_push(fresh, logits, self._build_rows(fresh), policy_version)

    def decode(self, policy_version: int) -> list[RunningSequence]:
        """One more token for every running sequence; returns those that ended."""
        running = self.participants = self.running
        logits = self._runner.decode(
            [sequence.tokens[-1] for sequence in running], [sequence.context_len - 1 for sequence in running]
        )
        if self._rows is None:
            self._rows = self._build_rows(running)
        return self._sample_and_push(running, logits, self._rows, policy_version)

    def evict(self) -> list[RunningSequence]:
        """Empty every slot; the sequences keep their tokens. Returns them."""
        evicted, self.running, self._rows = self.running, [], None
        return evicted

    def compact(self) -> None:
        """Close the gaps that ended sequences left: the last sequences move into their slots."""
        self._rows = None
        alive = [slot for slot, sequence in enumerate(self.running) if sequence.finish_reason is None]
        keep = len(alive)
        holes = sorted(set(range(keep)) - set(alive))
        movers = [slot for slot in alive if slot >= keep]
        if movers:
            longest = max(self.running[slot].context_len for slot in movers)
            self._runner.cache.copy_rows(movers, holes, longest - 1)
        kept = self.running[:keep]
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = self.running[mover]
        self.running = kept

    def _build_rows(self, sequences: Sequence[RunningSequence]) -> SamplingRows:
        return SamplingRows.build(
            [sequence.ticket.request for sequence in sequences],
            [sequence.key for sequence in sequences],
            self._runner.vocab_size,
            self._runner.device,
        )

    def _sample_and_push(
        self, sequences: Sequence[RunningSequence], logits: torch.Tensor, rows: SamplingRows, policy_version: int
    ) -> list[RunningSequence]:
        positions = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64)
        with torch.inference_mode():
            tokens, logprobs = sample(logits, rows, positions)
            # One transfer per step; float64 holds every token id and every float32 logprob exactly.
            token_list, logprob_list = torch.stack((tokens.double(), logprobs.double())).tolist()
        done: list[RunningSequence] = []
        for sequence, token, logprob in zip(sequences, token_list, logprob_list, strict=True):
            if logprob != logprob:
                raise EngineError(
                    f"logits are not finite: the weights of policy version {policy_version} hold NaN or infinity"
                )
            if sequence.push(int(token), logprob, policy_version):
                done.append(sequence)
        self.generated_tokens += len(sequences)
        if done:
            self.compact()
        self.participants = []
        return done


class Scheduler:
    """Requests in, completions out. Its methods may be called from any thread; see the module for the order of things.

    Nothing is generated while the runner's weights are not ready. The arguments are those of ``TransformersEngine``.
    """

    def __init__(
        self,
        runner: ModelRunner,
        gate: RequestGate,
        *,
        limits: EngineLimits,
        tokenizer: Any,
        max_running: int,
        max_prefill_tokens: int,
        num_threads: int | None,
        seed: int,
    ) -> None:
        self._runner = runner
        self._gate = gate
        self._limits = limits
        self._tokenizer = tokenizer
        self._max_prefill_tokens = max_prefill_tokens
        self._num_threads = num_threads
        self._random = random.Random(seed)
        self._pieces: dict[int, str] = {}  # text of single tokens, shared by all stop-string checks
        self._boundary = RequestGate()
        self._exclusive_lock = threading.Lock()
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._waiting: deque[RunningSequence] = deque()
        """First come first served."""
        self._arrived = 0
        self._tickets: set[Ticket] = set()
        self._aborting: list[Ticket] = []
        self._stopped: EngineStoppedError | None = None
        self._requests = self._finished = self._aborted = self._failed = 0
        # Touched at a token boundary only:
        self.policy_version = -1
        self._batch = ContinuousBatch(runner, max_running)
        self._evictions = self._failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="atropos-verl-engine", daemon=True)
        self._thread.start()
        # Ended at interpreter exit if nobody did before: killed inside torch it may crash.
        atexit.register(self.stop, 10.0)

    # -- the callers' side -------------------------------------------------------------------------------------------

    def refuse_stopped(self) -> None:
        """Raise ``EngineStoppedError`` with the first cause when the engine is gone."""
        if self._stopped is not None:
            raise EngineStoppedError(str(self._stopped)) from self._stopped.__cause__

    def submit(self, request: GenerationRequest, on_delta: Callable[[GenerationDelta], None] | None = None) -> Ticket:
        """Queue a validated request. ``on_delta`` is called in the engine's thread and must not block."""
        with self._condition:
            self.refuse_stopped()
            ticket = Ticket(
                request,
                on_delta,
                limits=self._limits,
                tokenizer=self._tokenizer,
                seed=request.seed if request.seed is not None else self._random.getrandbits(64),
                pieces=self._pieces,
            )
            for sequence in ticket.sequences:
                sequence.ordinal = self._arrived
                self._arrived += 1
            self._waiting += ticket.sequences
            self._tickets.add(ticket)
            self._requests += 1
            self._condition.notify_all()
        return ticket

    def cancel_id(self, request_id: str) -> int:
        """``cancel`` for the tickets of requests with this id."""
        with self._condition:
            found = [ticket for ticket in self._tickets if ticket.request.request_id == request_id]
        return self.cancel(found)

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
            # What runs arrived before what waits, so the front is its place.
            self._waiting.extendleft(sorted(evicted, key=lambda sequence: sequence.ordinal, reverse=True))

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
                weight_bytes=self._runner.weights.nbytes,
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
                with self._condition:
                    self._condition.wait_for(self._has_work, timeout=5.0)
                with self._gate.step(timeout=1.0, stop=self._interrupted) as may_run, self._boundary.step(1.0) as free:
                    if free and self._stopped is None:
                        self._guarded_step(may_run)
        finally:
            # Whatever ended the thread, nobody may wait for it for ever.
            self._fail_all(EngineStoppedError("the engine's thread ended unexpectedly; the log has the reason"))
            self._batch.evict()

    def _interrupted(self) -> bool:
        return self._stopped is not None or bool(self._aborting)

    def _has_work(self) -> bool:
        return self._interrupted() or (self._runner.weights.ready and bool(self._batch.running or self._waiting))

    def _guarded_step(self, may_run: bool) -> None:
        """One iteration. A failure ends the sequences that took part in it, and the engine goes on."""
        try:
            self._drop_aborted()
            if may_run and self._runner.weights.ready and self._step():
                self._failed_steps = 0
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the requests get the error
            self._fail_step(error)

    def _step(self) -> bool:
        """Let newcomers in, then one token for everyone. False when there was nothing to do."""
        with self._condition:
            newcomers = take_prefill(
                self._waiting, self._batch.free_slots, self._max_prefill_tokens, self._runner.max_prefill_logits
            )
        if newcomers:
            self._finish(self._batch.prefill(newcomers, self.policy_version))
        if self._batch.running:
            self._finish(self._batch.decode(self.policy_version))
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
            self._drop_finished()
        self._batch.compact()

    def _drop_finished(self) -> None:
        self._waiting = deque(sequence for sequence in self._waiting if sequence.finish_reason is None)

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
            self._drop_finished()
        self._runner.cache.clear()
        if self._failed_steps >= _MAX_FAILED_STEPS:
            stopped = EngineStoppedError(f"the engine gave up after {self._failed_steps} failed steps: {error}")
            stopped.__cause__ = error
            self._fail_all(stopped)
