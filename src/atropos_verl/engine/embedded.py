"""The embedded inference engine: continuous batching over any Hugging Face causal language model, in this process.

One thread owns the model. ``gate`` is the trainer's: paused, requests keep their tokens and nothing runs. Whoever uses
the model from outside (weight updates, memory, logprobs) pauses the engine's own gate for that long.

A step that raises costs no request: the engine goes on from the tokens of all of them. What fails again and again,
alone, gets the error (docs/internals.md)."""

import asyncio
import atexit
import contextlib
import copy
import ctypes
import gc
import heapq
import itertools
import logging
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from atropos_verl.engine.kv_cache import PrefixIndex
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.engine.requests import (
    EngineLimits,
    EngineStats,
    OnDelta,
    RunningSequence,
    StopStrings,
    Ticket,
    eos_token_ids,
    validate,
)
from atropos_verl.engine.runner import ModelRunner, context_len
from atropos_verl.engine.sampling import Grammars
from atropos_verl.engine.scheduler import ContinuousBatch, take_prefill
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError, WeightSyncError
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

_WAIT_TIMEOUT = 300.0  # seconds that weight, memory and logprob calls wait for another one, and for a token boundary
_ATTEND_SECONDS = 1.0
_TURN = 16  # sequences of a client request that are queued together; then it is the others' turn
_TURN_ROUNDS = 32  # rounds (tokens) after which a request without a slot takes one from a large request
_ROOM_ROUNDS = 4  # rounds after which one more sequence may run, after a failure
_BLAME_AFTER, _MAX_FAILED_STEPS = 5, 10
"""Failed steps in a row after which a sequence that ran alone is to blame (if a known request works), and after which
the engine is given up."""
_PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill at most (a longer prompt goes alone): how long newcomers delay those that run."""
_TRIM_BYTES = 2**28  # of weights above which freed memory is handed back: to take it again costs 0.4 ms per MB
_PROOF_TOKENS, _PROOF_NATS = 16, 1e-3
"""Tokens whose logprobs prove the weights after a failure, and their largest difference."""


class TransformersEngine(contextlib.AbstractContextManager["TransformersEngine"]):
    """A ``GenerationEngine`` in this process, under SGLang's and verl's names. Safe to call from several threads and
    event loops.

    Args:
        model: a Hugging Face causal language model; the engine owns it from now on (eval mode, weights overwritten).
        tokenizer: decodes tokens to look for stop strings, and names the end-of-sequence id.
        gate: paused by the trainer around a weight sync; None: a gate of its own.
        max_running: KV slots: sequences decoded together (after a failure fewer, for a while). More sequences wait. The
            KV cache grows with the longest sequence, at most to ``max_running * max_context_len`` positions.
        max_context_len: prompt plus completion in tokens; None: the model's ``max_position_embeddings``.
        num_threads: of torch, in the engine's thread (and in threads that are yet to start); None: unchanged.
        release_weights: ``release_memory_occupation`` also frees the weights, not only the KV cache.
        keep_kv: ``swap_weights`` keeps the KV of running sequences, and what is stored until the next swap; otherwise
            sequences are prefilled again before their next token, as after ``update_weights_from_tensor``.
        seed: of requests without a seed of their own.

    Raises ``EngineError``: an architecture it cannot run exactly (``context_len``), or limits that leave no room."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        gate: RequestGate | None = None,
        max_running: int = 64,
        max_context_len: int | None = None,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
        release_weights: bool = True,
        keep_kv: bool = False,
        seed: int = 0,
    ) -> None:
        if max_running < 1:
            raise EngineError(f"max_running is {max_running}: give at least one KV slot")
        self.max_context_len = context_len(model.config, max_context_len)
        self.eos_token_ids = eos_token_ids(getattr(model, "generation_config", None) or model.config, tokenizer)
        self.model = model.to(device=device)
        self.tokenizer = tokenizer
        self.gate = gate or RequestGate()
        self.attend: Callable[[], None] | None = None
        """Gives weights again that a failure damaged; ``generate`` calls it while it waits. None: nobody gives them,
        and the engine is given up then."""
        self._release_weights, self._keep_kv, self._num_threads = release_weights, keep_kv, num_threads
        self._runner = ModelRunner(self.model, max_context_len=self.max_context_len)
        self._staged: ModelRunner | None = None
        self.vocab_size = self._runner.vocab_size
        sizes = {"max_context_len": self.max_context_len, "vocab_size": self.vocab_size}
        self._limits = EngineLimits(**sizes, eos_token_ids=self.eos_token_ids)
        self._grammars = Grammars(tokenizer, self.vocab_size, self.eos_token_ids)
        self._random = random.Random(seed)
        self._pieces: dict[int, str] = {}  # text of single tokens, shared by all stop-string checks
        self._boundary = RequestGate()
        self._exclusive_lock = threading.Lock()
        self._counts = EngineStats()
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._waiting: list[RunningSequence] = []  # a heap
        self._arrivals, self._turn = itertools.count(), 0
        self._tickets: set[Ticket] = set()
        self._aborting: set[Ticket] = set()
        self._stopped: EngineStoppedError | None = None
        # Touched at a token boundary only:
        self.policy_version = -1
        """Version of the weights it holds; -1 before the first update from a trainer."""
        self._max_running = max_running
        self._batch = ContinuousBatch(self._runner, max_running, self._counts)
        self._failed_steps = self._rounds = 0
        self._sound = True  # as far as known tokens showed after the last failure
        step = -(-self.vocab_size // min(_PROOF_TOKENS, self.max_context_len))
        self._proof_tokens = list(range(0, self.vocab_size, step))
        self._proof: list[float] | None = None
        self._thread = threading.Thread(target=self._run, name="atropos-verl-engine", daemon=True)
        self._thread.start()
        # Ended at interpreter exit if nobody did before: killed inside torch it may crash.
        atexit.register(self.close, 10.0)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Any | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a Hugging Face directory. ``settings``: of the constructor; ``dtype`` None: the checkpoint's."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        form = {"dtype": dtype or "auto", "attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(str(path), **form)
        return cls(model, tokenizer or AutoTokenizer.from_pretrained(str(path)), **settings)

    @property
    def weights_ready(self) -> bool:
        """False from ``release_memory_occupation``, or an update that failed half-way, to the next full update."""
        return self._runner.weights.ready

    def stats(self) -> EngineStats:
        """Counters since the start, and what it holds now."""
        with self._condition:
            sizes = {"kv_bytes": self._runner.cache.nbytes, "weight_bytes": self._runner.weights.nbytes}
            return replace(self._counts, running=len(self._batch.running), waiting=len(self._waiting), **sizes)

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """See ``GenerationEngine``. One that ``abort`` ended returns what it had; one that fails again and again gets
        ``EngineError``."""
        validate(request, self._limits)
        matcher = await asyncio.to_thread(self._grammars.matcher, request) if request.constraint else None
        ticket = self._submit(request, None, matcher)
        try:
            return await asyncio.wrap_future(ticket.future)
        finally:
            self._cancel([ticket])

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See ``GenerationEngine``. A bad request raises here; generation starts when the first delta is asked for."""
        self.check_alive()
        validate(request, self._limits)
        return self._stream(request)

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[GenerationDelta | None] = asyncio.Queue()

        def put(delta: GenerationDelta | None) -> None:
            # A loop that is closed has nobody left to read.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        matcher = await asyncio.to_thread(self._grammars.matcher, request) if request.constraint else None
        ticket = self._submit(request, put, matcher)
        ticket.future.add_done_callback(lambda _: put(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            ticket.future.result(timeout=0)  # raises what ended the request
        finally:
            self._cancel([ticket])

    def generate(self, requests: Sequence[GenerationRequest], timeout: float = 3600.0) -> list[list[Generation]]:
        """``agenerate`` for a list, from a plain thread. Raises ``TimeoutError`` after ``timeout`` seconds."""
        for request in requests:
            validate(request, self._limits)
        deadline = time.monotonic() + timeout
        matchers = [self._grammars.matcher(request) for request in requests]
        tickets = [self._submit(request, None, matcher) for request, matcher in zip(requests, matchers, strict=True)]
        results = list[list[Generation]]()
        try:
            for ticket in tickets:
                while not ticket.future.done() and (left := deadline - time.monotonic()) > 0:
                    wait([ticket.future], min(left, _ATTEND_SECONDS))
                    if self.attend is not None and not ticket.future.done():
                        self.attend()
                results.append(ticket.future.result(timeout=0))
            return results
        except TimeoutError as error:
            done = sum(ticket.future.done() for ticket in tickets)
            raise TimeoutError(
                f"generate: {done} of {len(tickets)} requests were done after {timeout:g} s "
                f"(gate {self.gate.state}, weights {'ready' if self.weights_ready else 'not ready'})"
            ) from error
        finally:
            self._cancel(tickets)

    def abort(self, request_id: str) -> bool:
        """End the requests with this ``request_id``: they return what they have, finish "abort". False: none has it."""
        with self._condition:
            return self._cancel([one for one in self._tickets if one.request.request_id == request_id]) > 0

    def check_alive(self) -> None:
        """Raise ``EngineStoppedError`` with the first cause when the engine is gone."""
        if self._stopped is not None:
            raise EngineStoppedError(str(self._stopped)) from self._stopped.__cause__

    def _submit(self, request: GenerationRequest, on_delta: OnDelta | None = None, matcher: Any = None) -> Ticket:
        """Queue a validated request."""
        with self._condition:
            self.check_alive()
            seed = request.seed if request.seed is not None else self._random.getrandbits(64)
            stops = StopStrings(self.tokenizer, request.stop, self._pieces) if request.stop else None
            ticket = Ticket(request, self._limits, stops, seed, on_delta, matcher)
            for sequence in ticket.sequences:
                sequence.turn, sequence.ordinal = self._turn + sequence.place // _TURN, next(self._arrivals)
                heapq.heappush(self._waiting, sequence)
            self._tickets.add(ticket)
            self._counts.requests += 1
            self._condition.notify_all()
        return ticket

    def _cancel(self, tickets: Sequence[Ticket]) -> int:
        """Drop these at the next token boundary; returns how many were still on their way."""
        with self._condition:
            live = [ticket for ticket in tickets if ticket in self._tickets and ticket not in self._aborting]
            self._aborting.update(live)
            if live:
                self._condition.notify_all()
        if live:
            self.gate.wake()
        return len(live)

    # -- weights, memory, logprobs: at a token boundary, in the caller's thread --------------------------------------

    def compute_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """[T-1] logprobs, at temperature 1, of tokens 1..T-1 of a sequence given those before. Works while paused.

        Raises ``GenerationRequestError``: an id outside the vocabulary, too long; ``EngineError``: no usable weights.
        """
        if len(token_ids) > self.max_context_len:
            raise GenerationRequestError(
                f"token_ids has {len(token_ids)} tokens; the context holds {self.max_context_len}", "token_ids"
            )
        with self._exclusive("compute_logprobs", with_weights=True):
            return self._runner.logprobs(token_ids)

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int | None = None
    ) -> int:
        """Copy new weights in; returns bytes copied. ``policy_version`` None: one more than the last.

        Raises ``WeightSyncError`` naming a tensor that is missing, unknown, or of another shape. The version is then
        unchanged; after a failure half-way nothing is generated until an update succeeds."""
        with self._exclusive("update_weights_from_tensor"):
            self._evict()
            copied = self._runner.weights.update(named_tensors)
            self._serve(policy_version)
            return copied

    def _serve(self, policy_version: int | None) -> None:
        self.policy_version = self.policy_version + 1 if policy_version is None else policy_version
        self._proof = self._runner.logprobs(self._proof_tokens)

    def stage_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """``update_weights_from_tensor`` into a second buffer while generation goes on. The buffer (as much memory as
        the weights) is made by the first call and kept until memory is released."""
        if self._staged is None:
            with self._exclusive("stage_weights_from_tensor"):
                staged = ModelRunner(copy.deepcopy(self.model), max_context_len=self.max_context_len)
            staged.weights.ready = False  # a copy of what generates is nothing to swap in
            self._staged = staged
        return self._staged.weights.update(named_tensors)

    def compute_staged_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """``compute_logprobs`` under the staged weights, while generation goes on. Raises ``EngineError`` when none are
        staged."""
        if self._staged is None or not self._staged.weights.ready:
            raise EngineError("no complete weights are staged: call stage_weights_from_tensor() first")
        return self._staged.logprobs(token_ids)

    def swap_weights(self, policy_version: int | None = None) -> None:
        """Generate from the staged weights from the next token on; nothing is copied. Raises ``WeightSyncError`` when
        no complete weights are staged; nothing is changed then."""
        if self._staged is None or not self._staged.weights.ready:
            what = "an update is missing, failed half-way, or was swapped in already"
            raise WeightSyncError(f"no complete weights are staged: {what}")
        with self._exclusive("swap_weights"):
            self._runner.weights.exchange(self._staged.weights)
            if self._keep_kv:
                self._runner.cache.prefixes.age()
            else:
                self._evict()
            self._serve(policy_version)

    def copy(self) -> Self:
        """An engine of its own with the weights and the version that this one has now. Raises ``EngineError`` without
        usable weights."""
        with self._exclusive("copy", with_weights=True):
            model, version = copy.deepcopy(self.model), self.policy_version
        settings: dict[str, Any] = {"max_running": self._max_running, "max_context_len": self.max_context_len}
        engine = type(self)(model, self.tokenizer, num_threads=self._num_threads, **settings)
        engine.policy_version = version
        return engine

    def rebuild(self) -> None:
        """Give back all memory but that of the weights. For a weight update that failed: it can then be tried again."""
        self._staged = None
        with self._exclusive("rebuild"):
            self._requeue(self._batch.evict())
            self._clear()

    def release_memory_occupation(self) -> None:
        """Give back KV cache, and weights if so configured; running requests keep their tokens. Idempotent."""
        self._staged = None
        if self._stopped is not None:
            return
        with self._exclusive("release_memory_occupation"):
            self._evict()
            self._runner.cache.clear()
            held = self._runner.weights.nbytes
            if self._release_weights:
                self._runner.weights.release()
            torch.cuda.empty_cache()
            if held >= _TRIM_BYTES:
                with contextlib.suppress(AttributeError, OSError):  # a C library without it
                    ctypes.CDLL(None).malloc_trim(0)

    def resume_memory_occupation(self) -> None:
        """Take the weights' memory again (their values: ``update_weights_from_tensor``); the KV cache takes its when
        the next request needs it. Idempotent."""
        with self._exclusive("resume_memory_occupation"):
            self._runner.weights.allocate()

    @contextlib.contextmanager
    def _exclusive(self, what: str, *, with_weights: bool = False) -> Iterator[None]:
        """Hold the loop at a token boundary and keep other callers out. Raises ``TimeoutError`` naming ``what``, or
        ``EngineStoppedError``."""
        if not self._exclusive_lock.acquire(timeout=_WAIT_TIMEOUT):
            raise TimeoutError(f"{what}: waited {_WAIT_TIMEOUT:g} s for another caller that uses the model")
        try:
            self.check_alive()
            self._boundary.pause(_WAIT_TIMEOUT)
            if with_weights and not self.weights_ready:
                raise EngineError("the engine has no usable weights: call update_weights_from_tensor() first")
            yield
        finally:
            self._boundary.resume()
            self._exclusive_lock.release()
            with self._condition:
                self._condition.notify_all()  # what the loop waits for may have changed

    def _evict(self) -> None:
        """Forget all keys and values; running sequences go back to the queue with their tokens."""
        self._runner.cache.prefixes = PrefixIndex()
        self._requeue(self._batch.evict())

    def _requeue(self, evicted: Sequence[RunningSequence] = ()) -> None:
        """Those that lost their slot wait again; those that have ended wait no more."""
        self._counts.evictions += len(evicted)
        with self._condition:
            self._waiting = [one for one in (*self._waiting, *evicted) if one.finish_reason is None]
            heapq.heapify(self._waiting)

    def close(self, timeout: float = 60.0) -> None:
        """End the thread; waiting requests get ``EngineStoppedError``. Idempotent. Raises ``TimeoutError`` when a step
        still runs after ``timeout`` seconds."""
        atexit.unregister(self.close)
        self._fail_all(EngineStoppedError("the engine was closed"))
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's thread did not end within {timeout:g} s: a step is still running")

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _fail_all(self, error: EngineStoppedError) -> None:
        with self._condition:
            if self._stopped is None:
                self._stopped = error
            tickets = list(self._tickets)
            self._tickets.clear()
            self._waiting.clear()
            self._counts.failed += len(tickets)
            self._condition.notify_all()
        for ticket in tickets:
            ticket.fail(error)
        self.gate.wake()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while self._stopped is None:
                with self._condition:
                    self._condition.wait_for(self._has_work, timeout=5.0)
                with self.gate.step(timeout=1.0, stop=self._interrupted) as may_run, self._boundary.step(1.0) as free:
                    try:
                        if free and self._stopped is None:
                            self._drop_aborted()
                            if may_run and self.weights_ready:
                                self._step()
                    except BaseException as error:  # noqa: BLE001 - a thread that ends helps nobody
                        self._recover(error)
        except BaseException as error:
            logger.error("the engine's thread ended", exc_info=error)
            if not isinstance(stopped := error, EngineStoppedError):
                stopped = EngineStoppedError(f"the engine cannot go on: {_named(error)}")
                stopped.__cause__ = error
            self._fail_all(stopped)
        finally:
            self._batch.evict()

    def _interrupted(self) -> bool:
        return self._stopped is not None or bool(self._aborting)

    def _has_work(self) -> bool:
        return self._interrupted() or (self.weights_ready and bool(self._batch.running or self._waiting))

    def _step(self) -> None:
        """Let newcomers in, then one token for everyone."""
        self._rounds += 1
        with self._condition:
            if self._rounds % _TURN_ROUNDS == 0 and self._waiting and not self._batch.free_slots:
                self._make_room()
            bounds = self._batch.free_slots, _PREFILL_TOKENS, self._runner.max_prefill_logits
            newcomers = take_prefill(self._waiting, *bounds, self._runner.cache.prefixes.find)
            self._turn = max([self._turn, *(sequence.turn for sequence in newcomers)])
        if newcomers:
            self._finish(self._batch.prefill(newcomers, self.policy_version))
        decodes = bool(self._batch.running)
        if decodes:
            self._finish(self._batch.decode(self.policy_version))
        if decodes or (newcomers and self._sound):  # that shows that the engine works
            self._failed_steps = 0
            if self._rounds % _ROOM_ROUNDS == 0:
                self._batch.room = min(self._batch.room + 1, self._max_running)

    def _make_room(self) -> None:
        """The first sequences of requests that wait take the slots of the last ones of requests for more than fit."""
        first = sorted((s for s in self._waiting if s.place < _TURN), key=lambda s: s.place)
        asked = ((s, s.ticket.request) for s in self._batch.running)
        large = (s for s, request in asked if max(request.asked, request.n) > self._max_running)
        pairs = zip(first, sorted(large, key=lambda s: s.place, reverse=True), strict=False)
        moved = [(sequence, other) for sequence, other in pairs if other.place > sequence.place + 1]
        for sequence, _ in moved:
            sequence.turn = -1
        self._batch.remove([other for _, other in moved])
        self._requeue([other for _, other in moved])

    def _finish(self, ended: Sequence[RunningSequence]) -> None:
        if ended:
            with self._condition:
                # Those that end together are answered in the order they came.
                for ticket in dict.fromkeys(s.ticket for s in sorted(ended, key=lambda s: s.ordinal)):
                    if ticket.resolve_if_done():
                        self._tickets.discard(ticket)
                        self._counts.finished += 1

    def _drop_aborted(self) -> None:
        if not self._aborting:
            return
        with self._condition:
            aborting, self._aborting = self._aborting & self._tickets, set()
            self._tickets -= aborting
            self._counts.aborted += sum(ticket.abort() for ticket in aborting)
            self._requeue()
        self._batch.remove([sequence for sequence in self._batch.running if sequence.finish_reason is not None])

    def _recover(self, error: BaseException) -> None:
        """Everything goes back to the queue, and the engine is rebuilt; or ``EngineStoppedError``: it is given up."""
        self._failed_steps += 1
        logger.error("an engine step failed (%d in a row); the engine is rebuilt", self._failed_steps, exc_info=error)
        if self._failed_steps >= _MAX_FAILED_STEPS:
            what = f"{self._failed_steps} failed steps: {_named(error)}"
            raise EngineStoppedError(f"the engine gave up after {what}") from error
        victims = self._batch.participants
        back = list(dict.fromkeys([*self._batch.evict(), *victims]))  # newcomers of a prefill are not running yet
        self._finish([sequence for sequence in back if sequence.finish_reason is not None])
        self._clear()
        self._sound = self._is_sound()
        if self._sound and self._failed_steps >= _BLAME_AFTER and len(victims) == 1:
            reason = EngineError(f"the engine failed while generating: {_named(error)}")
            reason.__cause__ = error
            with self._condition:
                self._tickets.discard(victims[0].ticket)
                self._failed_steps = _BLAME_AFTER - 1  # the next one that fails alone is blamed at once
                self._counts.failed += victims[0].ticket.fail(reason)
        self._requeue(back)
        self._batch.room = max(1, len(back) // 2) if self._failed_steps < _BLAME_AFTER - 1 else 1
        self._counts.rebuilds += 1

    def _clear(self) -> None:
        """A new batch, and the memory of keys, values and what is stored of them is given back."""
        self._runner.cache.clear()
        self._batch = ContinuousBatch(self._runner, self._max_running, self._counts)
        gc.collect()
        torch.cuda.empty_cache()

    def _is_sound(self) -> bool:
        """Whether known tokens have the logprobs that they had at first, and a request for more of them works. If not,
        the weights are not used until the trainer gives them again. Raises ``EngineStoppedError`` when nobody does."""
        if not self.weights_ready:
            return False
        try:
            now = self._runner.logprobs(self._proof_tokens)
            if np.isfinite(now).all():  # NaN weights are a request's error: those that follow may be good
                self._try_request()
            if self._proof is None or np.allclose(now, self._proof, rtol=0, atol=_PROOF_NATS, equal_nan=True):
                return True
            reason, is_damaged = "they give other logprobs than before", True
        except BaseException as error:  # noqa: BLE001 - whatever it is, other weights may not have it
            reason, is_damaged = _named(error), False
        if self.attend is not None:
            logger.warning("the engine's weights are damaged (%s) and wait for the newest ones", reason)
            self._runner.weights.ready = False
        elif is_damaged:
            what = f"its weights of version {self.policy_version} are damaged: {reason}"
            raise EngineStoppedError(f"the engine cannot go on: {what}")
        return False

    def _try_request(self) -> None:
        """All that a request goes through, with known tokens: prefill, decode, sampling."""
        request = GenerationRequest(prompt_token_ids=tuple(self._proof_tokens[:-1]), max_tokens=2, ignore_eos=True)
        batch = ContinuousBatch(self._runner, 1, EngineStats())
        batch.prefill(Ticket(request, self._limits).sequences, self.policy_version)
        if batch.running:
            batch.decode(self.policy_version)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
