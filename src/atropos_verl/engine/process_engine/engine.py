"""``ProcessEngine``: the embedded engine in a process of its own, seen from the trainer's process."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from atropos_verl.engine.blocking_api import EngineFront
from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.process_engine import messages as wire
from atropos_verl.engine.process_engine.process import EngineProcess
from atropos_verl.engine.process_engine.shared_weights import SharedBuffer, store_over
from atropos_verl.engine.scheduler import EngineLimits, EngineStats
from atropos_verl.errors import EngineError, EngineStoppedError, WeightSyncError
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

if TYPE_CHECKING:
    import torch

    from atropos_verl.engine.weights import WeightStore

__all__ = ["ProcessEngine"]

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0
"""It ends as soon as it sees the end of the connection, and has nothing that would be lost if it is killed."""


@dataclass(eq=False)
class _Answer:
    """What the other process owes us."""

    id: int
    future: Future[Any] = field(default_factory=Future)
    on_delta: Callable[[GenerationDelta], None] | None = None

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # an asyncio task that is cancelled must not cancel it

    def resolve(self, value: Any, error: Exception | None = None) -> None:
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(value)


class ProcessEngine(EngineFront[_Answer]):
    """``InferenceEngine`` over a ``TransformersEngine`` in another process. Safe for many threads and loops.

    The process loads the model while the caller does something else; whatever needs it waits. Its log records become
    this process's. Weights lie twice in memory that both processes share: one buffer generates, and new weights are
    copied straight into the other. On a CPU of this machine only.

    Args:
        path: a Hugging Face directory with model and tokenizer.
        gate: paused by the trainer around a weight sync; None: a gate of its own.
        dtype: as torch names it (``"float32"``, ``"bfloat16"``); None: the checkpoint's.
        num_threads: of torch in the engine's process; None: torch's default.
        process: started before; None: one is started now.
        start_timeout: seconds until the model must be loaded.
        wait_timeout: seconds to wait for a token boundary.
        settings: as ``TransformersEngine``'s.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        gate: RequestGate | None = None,
        dtype: str | None = None,
        num_threads: int | None = None,
        process: EngineProcess | None = None,
        start_timeout: float = 600.0,
        wait_timeout: float = 300.0,
        **settings: Any,
    ) -> None:
        self.gate = gate if gate is not None else RequestGate()
        self._start_timeout, self._wait_timeout = start_timeout, wait_timeout
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._answers: dict[int, _Answer] = {}
        self._stopped: EngineStoppedError | None = None
        self._closing = False
        self._ready = threading.Event()
        self._start_error: Exception | None = None
        self._writing = threading.Lock()  # of those who write weights or change their memory
        self._policy_version = -1
        self._release_weights = bool(settings.get("release_weights", True))
        self._staged = False
        self._buffers: list[SharedBuffer] = []
        self._stores: list[WeightStore] = []
        self._process = process or EngineProcess()
        self._channel = self._process.channel
        self._thread = threading.Thread(target=self._read, name="atropos-verl-engine-replies", daemon=True)
        self._thread.start()
        settings["wait_timeout"] = wait_timeout
        self._send([wire.Start(str(path), dtype, num_threads, settings)])

    def wait_ready(self) -> Self:
        """Until the model is loaded.

        Raises:
            EngineError: it cannot be loaded; as ``TransformersEngine`` says it.
            EngineStoppedError: the process ended, or was not ready within ``start_timeout`` seconds.
        """
        if not self._ready.wait(self._start_timeout):
            self.close()
            raise EngineStoppedError(f"the engine's process was not ready within {self._start_timeout:g} s")
        if self._start_error is not None:
            raise self._start_error
        return self

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Version of the weights it holds; -1 before the first update from a trainer."""
        return self._policy_version

    @property
    def max_context_len(self) -> int:
        """Prompt plus completion, in tokens, at most."""
        return self.wait_ready()._limits.max_context_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.wait_ready()._limits.vocab_size

    @property
    def weights_ready(self) -> bool:
        """False from ``release_memory_occupation`` (or an update that failed half-way) to the next full update."""
        return self.wait_ready()._stores[0].ready

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """Counters since the start, and what it holds now."""
        return msgspec.convert(self._call("stats"), EngineStats)

    # -- generation: see EngineFront ---------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """See ``EngineFront``."""
        if self._stopped is not None:
            raise EngineStoppedError(str(self._stopped))

    def _submit(self, request: GenerationRequest, on_delta: Callable[[GenerationDelta], None] | None = None) -> _Answer:
        if request.seed is not None:  # the engine takes seeds modulo 2**64; the wire takes none that are larger
            request = dataclasses.replace(request, seed=request.seed % 2**64)
        return self._ask(lambda number: wire.Generate(number, request, on_delta is not None), on_delta)

    def _cancel(self, pending: Sequence[_Answer]) -> None:
        with self._lock:
            live = [answer.id for answer in pending if self._answers.pop(answer.id, None) is not None]
        if live:
            self._send([wire.Cancel(live)])

    def abort(self, request_id: str) -> bool:
        """See ``TransformersEngine.abort``."""
        return bool(self._result(self._ask(lambda number: wire.Abort(number, request_id)), "abort"))

    # -- weights, memory, logprobs -----------------------------------------------------------------------------------

    def compute_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """See ``InferenceEngine`` and ``TransformersEngine``."""
        return list(self._call("compute_logprobs", list(token_ids), temperature))

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int | None = None
    ) -> int:
        """See ``TransformersEngine``: the buffer that generates is written, while the engine stands still."""
        with self._writing:
            store = self.wait_ready()._stores[0]
            done: int | None = None
            try:
                self._call("begin_update")
                copied = store.update(named_tensors)
                done = self._policy_version + 1 if policy_version is None else policy_version
            finally:  # also when this thread was interrupted: the engine stands until it is told
                self._call("end_update", store.ready, done)
            self._policy_version = done
            return copied

    def stage_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Copy new weights into the buffer that is idle while generation goes on; returns bytes copied.

        Raises:
            WeightSyncError: as ``update_weights_from_tensor``; what is generated from is untouched.
        """
        with self._writing:
            self.wait_ready().check_alive()
            self._staged = True
            return self._stores[1].update(named_tensors)

    def compute_staged_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """``compute_logprobs`` under the staged weights, while generation goes on.

        Raises ``EngineError`` when none are staged.
        """
        with self._writing:
            if not self._staged:
                raise EngineError("no weights are staged: call stage_weights_from_tensor() first")
            if not self._stores[1].ready:
                raise EngineError("no complete weights are staged: call stage_weights_from_tensor() first")
            return list(self._call("staged_logprobs", list(token_ids), temperature))

    def swap_weights(self, policy_version: int | None = None) -> None:
        """At a token boundary: generate from the staged weights from now on. Nothing is copied.

        Raises ``WeightSyncError`` when no complete weights are staged; nothing is changed then.
        """
        with self._writing:
            if not self._staged:
                raise WeightSyncError("no weights are staged: call stage_weights_from_tensor() first")
            if not (self._stores[0].ready and self._stores[1].ready):
                raise WeightSyncError(
                    "weights cannot be swapped: an update failed half-way, is missing, or was swapped in already"
                )
            version = self._policy_version + 1 if policy_version is None else policy_version
            self._call("swap_in", version)
            self._stores.reverse()
            self._stores[1].ready = False
            self._policy_version = version

    def release_memory_occupation(self) -> None:
        """See ``InferenceEngine``. Idempotent; a process that is gone has given everything back."""
        with self._writing:
            if self._stopped is not None:
                return
            self._call("release_memory_occupation")
            self._staged = self._stores[1].ready = False
            if self._release_weights:
                self._stores[0].ready = self._stores[0].resident = False

    def resume_memory_occupation(self) -> None:
        """See ``InferenceEngine``. Idempotent."""
        with self._writing:
            self._call("resume_memory_occupation")
            self._stores[0].resident = True

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 60.0) -> None:
        """End the process; waiting requests get ``EngineStoppedError``. Idempotent."""
        self._closing = True
        self._fail_all(EngineStoppedError("the engine was closed"))
        self._process.end(min(timeout, _END_SECONDS))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the connection ----------------------------------------------------------------------------------------------

    def hold(self, number: int) -> None:
        """See ``gate.RemoteSteps``."""
        self._send([wire.Hold(number)])

    def go(self) -> None:
        """See ``gate.RemoteSteps``."""
        self._send([wire.Go()])

    def _call(self, verb: str, *arguments: Any) -> Any:
        self.wait_ready()
        return self._result(self._ask(lambda number: wire.Call(number, verb, list(arguments))), verb)

    def _result(self, answer: _Answer, verb: str) -> Any:
        try:
            # The engine has the same limit, and says better what it waited for.
            return answer.future.result(self._wait_timeout + 30.0)
        except TimeoutError as error:
            if answer.future.done():
                raise
            raise TimeoutError(f"{verb}: no answer of the engine's process (pid {self.pid}); is it stopped?") from error

    def _ask(
        self, message: Callable[[int], wire.Command], on_delta: Callable[[GenerationDelta], None] | None = None
    ) -> _Answer:
        self.wait_ready()
        with self._lock:
            self.check_alive()
            answer = _Answer(next(self._ids), on_delta=on_delta)
            self._answers[answer.id] = answer
        self._send([message(answer.id)])
        return answer

    def _send(self, commands: list[wire.Command]) -> None:
        try:
            self._channel.send(commands)
        except OSError:  # the reading thread sees the end as well, and fails what waits
            logger.debug("the engine's process does not read any more")

    def _fail_all(self, error: EngineStoppedError) -> None:
        with self._lock:
            if self._stopped is None:
                self._stopped = error
            answers, self._answers = list(self._answers.values()), {}
        if not self._ready.is_set():
            self._start_error = self._start_error or self._stopped
            self._ready.set()
        for answer in answers:
            answer.resolve(None, self._stopped)
        self.gate.unlink()

    # -- the reading thread ------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for frame in self._channel.receive():
                for reply in frame:
                    self._handle(reply)
        except Exception:
            logger.exception("an answer of the engine's process cannot be understood")
        finally:
            if not self._closing:
                self._fail_all(EngineStoppedError(self._process.how_it_ended()))

    def _handle(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Delta(number, delta):
                answer = self._answers.get(number)
                if answer is not None and answer.on_delta is not None:
                    answer.on_delta(delta)
            case wire.Finished(number, generations):
                self._resolve(number, generations)
            case wire.Returned(number, value):
                self._resolve(number, value)
            case wire.Failed(0, fault):
                self._start_error = fault.to_error()
            case wire.Failed(number, fault):
                error = fault.to_error()
                self._resolve(number, None, error)
                if isinstance(error, EngineStoppedError):  # the process lives, its engine gave up
                    self._fail_all(error)
            case wire.Held(number):
                self.gate.held(number)
            case wire.LogLine(name, level, message):
                logging.getLogger(name).log(level, "%s", message)
            case wire.Ready():
                self._begin(reply)

    def _resolve(self, number: int, value: list[Generation] | Any, error: Exception | None = None) -> None:
        with self._lock:
            answer = self._answers.pop(number, None)
        if answer is not None:  # else: cancelled meanwhile
            answer.resolve(value, error)

    def _begin(self, ready: wire.Ready) -> None:
        self._limits = msgspec.convert(ready.limits, EngineLimits)
        self._buffers = [SharedBuffer(file, ready.places, ready.nbytes) for file in self._process.buffers]
        self._stores = [store_over(buffer, ready.places) for buffer in self._buffers]
        self._stores[1].ready = False
        self._process.close_buffers()
        self.gate.link(self)
        self._ready.set()
