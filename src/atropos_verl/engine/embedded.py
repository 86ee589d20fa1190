"""The embedded inference engine: continuous batching over any Hugging Face causal language model, in this process.

``requests`` has what is asked for, ``scheduler`` the queue and the thread, ``runner`` the forwards, ``kv_cache`` the
cache, ``sampling`` the draws, ``weights`` the tensors.

transformers ships a continuous-batching manager. It is not used because it seeds per process rather than per request,
takes logprobs after top-p, keeps no policy version and cannot stop at a token boundary; on a CPU it also warms up for
5 s and is several times slower (``benchmarks/bench_generation.py --manager``).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.requests import EngineLimits, EngineStats, Ticket, eos_token_ids, validate
from atropos_verl.engine.runner import ModelRunner, check_supported
from atropos_verl.engine.sampling import effective_temperature
from atropos_verl.engine.scheduler import Scheduler
from atropos_verl.errors import EngineError, GenerationRequestError, WeightSyncError
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """``InferenceEngine`` in this process. Safe to call from several threads and event loops.

    Args:
        model: a Hugging Face causal language model; the engine owns it from now on (eval mode, weights overwritten).
        tokenizer: decodes tokens to look for stop strings, and names the end-of-sequence id.
        gate: paused by the trainer around a weight sync; None: a gate of its own.
        max_running: KV slots: sequences decoded together. More sequences wait, first come first served. The KV cache
            grows with the longest sequence, at most to ``max_running * max_context_len`` positions.
        max_context_len: prompt plus completion in tokens; None: the model's ``max_position_embeddings``.
        dtype: cast the model to it; None: as it is.
        device: where the model runs.
        num_threads: ``torch.set_num_threads`` in the engine's thread; None: unchanged. (torch keeps one number for
            threads that are yet to start, so it can reach them as well.)
        release_weights: ``release_memory_occupation`` also frees the weights, not only the KV cache.
        keep_kv: ``swap_weights`` keeps the KV of running sequences, computed with the weights before; otherwise they
            are prefilled again before their next token, as after ``update_weights_from_tensor``.
        seed: of requests without a seed of their own.
        max_prefill_tokens: padded prompt tokens of one prefill at most (a longer prompt goes alone), which bounds how
            long a newcomer delays the sequences that are running.
        wait_timeout: seconds ``compute_logprobs`` and the weight and memory calls wait for a token boundary.

    Raises:
        EngineError: an architecture it cannot run exactly (``check_supported``), or limits that leave no room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        gate: RequestGate | None = None,
        max_running: int = 64,
        max_context_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
        release_weights: bool = True,
        keep_kv: bool = False,
        seed: int = 0,
        max_prefill_tokens: int = 8192,
        wait_timeout: float = 300.0,
    ) -> None:
        if max_running < 1:
            raise EngineError(f"max_running is {max_running}: give at least one KV slot")
        context = _context_len(model.config, max_context_len)
        check_supported(model.config, context)
        self.model = model.to(device=device, dtype=dtype) if dtype is not None else model.to(device=device)
        self.tokenizer = tokenizer
        self.gate = gate if gate is not None else RequestGate()
        self._runner = ModelRunner(self.model, max_context_len=context)
        self._limits = EngineLimits(
            max_context_len=context,
            vocab_size=self._runner.vocab_size,
            eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), model.config, tokenizer),
        )
        self._release_weights = release_weights
        self._keep_kv = keep_kv
        self._wait_timeout = wait_timeout
        self._staged: ModelRunner | None = None
        self._scheduler = Scheduler(
            self._runner,
            self.gate,
            limits=self._limits,
            tokenizer=tokenizer,
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            num_threads=num_threads,
            seed=seed,
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, tokenizer: Any | None = None, dtype: torch.dtype | str | None = None, **settings: Any
    ) -> Self:
        """Load model and tokenizer from a Hugging Face directory; ``settings`` as in the constructor.

        ``dtype`` None keeps the checkpoint's.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype="auto" if dtype is None else dtype, attn_implementation="sdpa"
        )
        return cls(model, tokenizer, **settings)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Version of the weights it holds; -1 before the first update from a trainer."""
        return self._scheduler.policy_version

    @property
    def max_context_len(self) -> int:
        """Prompt plus completion, in tokens, at most."""
        return self._limits.max_context_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._limits.vocab_size

    @property
    def weights_ready(self) -> bool:
        """False from ``release_memory_occupation`` (or an update that failed half-way) to the next full update."""
        return self._runner.weights.ready

    def stats(self) -> EngineStats:
        """Counters since the start, and what it holds now."""
        return self._scheduler.stats()

    # -- generation --------------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise ``EngineStoppedError`` with the first cause when the engine is gone."""
        self._scheduler.refuse_stopped()

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """See ``InferenceEngine``. A request stopped by ``abort`` returns what it had, finish "abort".

        Raises ``EngineError`` when a step failed, besides the errors of the protocol.
        """
        validate(request, self._limits)
        pending = self._scheduler.submit(request)
        try:
            return await asyncio.wrap_future(pending.future)
        except asyncio.CancelledError:
            self._scheduler.cancel([pending])
            raise

    def astream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """See ``InferenceEngine``. A bad request raises here; generation starts when the first delta is asked for."""
        self.check_alive()
        validate(request, self._limits)
        return self._stream(request)

    async def _stream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[GenerationDelta | None] = asyncio.Queue()

        def put(delta: GenerationDelta | None) -> None:
            # A loop that is closed has nobody left to read.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        pending = self._scheduler.submit(request, put)
        pending.future.add_done_callback(lambda _: put(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            pending.future.result(timeout=0)  # raises what ended the request
        finally:
            self._scheduler.cancel([pending])

    def generate(self, requests: Sequence[GenerationRequest], timeout: float = 3600.0) -> list[list[Generation]]:
        """See ``InferenceEngine``. Raises ``TimeoutError`` when the whole list took longer than ``timeout`` seconds."""
        for request in requests:
            validate(request, self._limits)
        deadline = time.monotonic() + timeout
        submitted: list[Ticket] = []
        try:
            for request in requests:
                submitted.append(self._scheduler.submit(request))  # noqa: PERF401 - those submitted before a failure count
            return [pending.future.result(timeout=max(0.0, deadline - time.monotonic())) for pending in submitted]
        except TimeoutError as error:
            done = sum(pending.future.done() for pending in submitted)
            raise TimeoutError(
                f"generate: {done} of {len(submitted)} requests were done after {timeout:g} s "
                f"(gate {self.gate.state.value}, weights {'ready' if self.weights_ready else 'not ready'})"
            ) from error
        finally:
            self._scheduler.cancel(submitted)

    def abort(self, request_id: str) -> bool:
        """End the requests with this ``request_id``: they return what they have, finish "abort". False: none has it."""
        return self._scheduler.cancel_id(request_id) > 0

    # -- weights, memory, logprobs: at a token boundary, in the caller's thread --------------------------------------

    def compute_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """See ``InferenceEngine``. Temperature 0 counts as 1.

        Raises:
            GenerationRequestError: an id outside the vocabulary, a sequence longer than the context, a bad temperature.
            EngineError: the engine has no usable weights.
        """
        if len(token_ids) > self.max_context_len:
            raise GenerationRequestError(
                f"token_ids has {len(token_ids)} tokens; the context holds {self.max_context_len}", "token_ids"
            )
        if not 0.0 <= temperature < float("inf"):
            raise GenerationRequestError(f"temperature must be 0 or more, not {temperature!r}", "temperature")
        with self._exclusive("compute_logprobs"):
            if not self.weights_ready:
                raise EngineError("the engine has no usable weights: call update_weights_from_tensor() first")
            return self._runner.logprobs(token_ids, effective_temperature(temperature))

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int | None = None
    ) -> int:
        """See ``InferenceEngine``. ``policy_version`` None: one more than the last.

        KV computed with the old weights is dropped; running sequences are prefilled again before their next token.
        After a failure half-way the weights are a mixture, and nothing is generated until an update succeeds.
        """
        with self._exclusive("update_weights_from_tensor"):
            self._scheduler.evict()
            copied = self._runner.weights.update(named_tensors)
            self._set_version(policy_version)
            return copied

    def stage_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Copy new weights into a second buffer while generation goes on; returns bytes copied.

        The buffer (as much memory as the weights) is made by the first call and kept until memory is released.

        Raises:
            WeightSyncError: as ``update_weights_from_tensor``; what is generated from is untouched.
        """
        if self._staged is None:
            with self._exclusive("stage_weights_from_tensor"):
                staged = ModelRunner(copy.deepcopy(self.model), max_context_len=self.max_context_len)
            staged.weights.ready = False  # a copy of what generates is nothing to swap in
            self._staged = staged
        return self._staged.weights.update(named_tensors)

    def compute_staged_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """``compute_logprobs`` under the staged weights, while generation goes on.

        Raises ``EngineError`` when none are staged.
        """
        if self._staged is None:
            raise EngineError("no weights are staged: call stage_weights_from_tensor() first")
        if not self._staged.weights.ready:
            raise EngineError("no complete weights are staged: call stage_weights_from_tensor() first")
        return self._staged.logprobs(token_ids, effective_temperature(temperature))

    def swap_weights(self, policy_version: int | None = None) -> None:
        """At a token boundary: generate from the staged weights from now on. Nothing is copied.

        Raises ``WeightSyncError`` when no complete weights are staged; nothing is changed then.
        """
        if self._staged is None:
            raise WeightSyncError("no weights are staged: call stage_weights_from_tensor() first")
        with self._exclusive("swap_weights"):
            self._runner.weights.exchange(self._staged.weights)
            if not self._keep_kv:
                self._scheduler.evict()
            self._set_version(policy_version)

    def _set_version(self, policy_version: int | None) -> None:
        scheduler = self._scheduler
        scheduler.policy_version = scheduler.policy_version + 1 if policy_version is None else policy_version

    def _exclusive(self, what: str) -> contextlib.AbstractContextManager[None]:
        return self._scheduler.exclusive(what, self._wait_timeout)

    def release_memory_occupation(self) -> None:
        """See ``InferenceEngine``. Idempotent."""
        self._staged = None
        with self._exclusive("release_memory_occupation"):
            self._scheduler.evict()
            self._runner.cache.clear()
            if self._release_weights:
                self._runner.weights.release()
            if self._runner.device.type == "cuda":
                torch.cuda.empty_cache()

    def resume_memory_occupation(self) -> None:
        """See ``InferenceEngine``. Released weights stay unusable until ``update_weights_from_tensor``. Idempotent.

        The KV cache takes its memory when the next request needs it.
        """
        with self._exclusive("resume_memory_occupation"):
            self._runner.weights.allocate()

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 60.0) -> None:
        """Stop the thread; waiting requests get ``EngineStoppedError``. Idempotent. Raises ``TimeoutError``."""
        self._scheduler.stop(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _context_len(config: Any, wanted: int | None) -> int:
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if wanted is None and positions is None:
        raise EngineError(f"{config.model_type} names no max_position_embeddings: give max_context_len")
    context = int(min(value for value in (wanted, positions) if value is not None))
    if context < 2:
        raise EngineError(f"max_context_len is {context}: it must hold a prompt token and a new one")
    return context
