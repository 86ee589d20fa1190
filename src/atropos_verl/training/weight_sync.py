"""From the trainer's weights to an engine that serves them: ``AtroposShardingManager``.

The rollout phase is the body of the ``with`` block; ``swap`` puts newer weights into it while rollouts go on. No token
is sampled from weights that the canary has not seen. An engine that runs out of memory, or fails in a kernel, is
rebuilt and gets the weights once more. When *enter* or a swap fails the gate stays shut; entering again starts over.
*Exit* never masks the exception of the body: a failure while leaving is logged and attached as a note.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from atropos_verl.errors import AtroposVerlError, WeightSyncError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")


class WeightSource(Protocol):
    """The trainer's side, with the full weights by Hugging Face name."""

    @property
    def policy_version(self) -> int: ...
    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]: ...


class SyncableEngine(Protocol):
    """The engine's side. ``update_weights_from_tensor`` may also take ``policy_version=`` and return the bytes copied;
    ``swap`` needs a second buffer, ``stage_weights_from_tensor`` and ``swap_weights``."""

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Any: ...
    def resume_memory_occupation(self) -> Any: ...
    def release_memory_occupation(self) -> Any: ...


class PausableGate(Protocol):
    def pause(self, timeout: float) -> Any: ...
    def resume(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync."""

    policy_version: int
    seconds: float
    bytes_copied: int
    canary_max_abs_logprob_diff: float | None  # None: there is no canary
    paused_seconds: float | None  # for which a swap held generation; None: it was no swap


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed prompt whose logprobs trainer and engine must agree on after every sync."""

    trainer_logprobs: Callable[[], Sequence[float]]
    engine_logprobs: Callable[[], Sequence[float]]
    staged_logprobs: Callable[[], Sequence[float]] | None = None  # of the second buffer, for ``swap``
    threshold: float  # largest absolute difference of a logprob that passes, in nats

    def check(self, *, staged: bool = False) -> float:
        """The largest difference. Raises ``WeightSyncError`` above the threshold or when one is not finite."""
        ask = self.staged_logprobs if staged else self.engine_logprobs
        if ask is None:
            raise WeightSyncError("this canary cannot see staged weights: give it staged_logprobs")
        expected, actual = list(self.trainer_logprobs()), list(ask())
        if len(expected) != len(actual) or not expected:
            raise WeightSyncError(f"canary: trainer gave {len(expected)} logprobs, engine {len(actual)}")
        worst = max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(expected, actual, strict=True))
        if worst > self.threshold:
            raise WeightSyncError(
                f"after the weight sync the engine's logprobs differ from the trainer's by up to {worst:.3g} "
                f"(sync.canary_threshold={self.threshold:g}): it does not hold the trained weights, or computes in "
                "another precision. Check that model.path is the same on both sides; for bf16 raise the threshold"
            )
        return worst


@dataclass
class AtroposShardingManager:
    """Context manager around the rollout phase: newest weights in, gate open; gate shut, memory released.
    ``pause_timeout``: seconds to wait for the token boundary."""

    engine: SyncableEngine
    source: WeightSource
    _: KW_ONLY
    gate: PausableGate
    canary: Canary | None = None
    pause_timeout: float = 60.0
    last_sync: SyncReport | None = field(default=None, init=False)
    syncs: int = field(default=0, init=False)

    def __enter__(self) -> Self:
        self._mending(self.engine.resume_memory_occupation)
        self._serve()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.gate.pause(self.pause_timeout)
            self._mending(self.engine.release_memory_occupation)
        except Exception as error:
            if exc is None:
                raise
            logger.exception("leaving the rollout phase failed after %s", type(exc).__name__)
            exc.add_note(f"(leaving the rollout phase failed as well: {error!r})")

    def swap(self) -> SyncReport:
        """Puts the source's weights into the open rollout phase; sequences in flight continue under them. Raises
        ``WeightSyncError``, with the gate shut: a tensor does not fit, the canary differs, or there is one buffer."""
        return self._mending(self._swap, self.restore)

    def _swap(self) -> SyncReport:
        version, engine = self.source.policy_version, self.engine
        try:
            if not (hasattr(engine, "stage_weights_from_tensor") and hasattr(engine, "swap_weights")):
                raise WeightSyncError(f"{type(engine).__name__} has no second buffer for weights; use mode=sync")
            started = time.perf_counter()
            copied = engine.stage_weights_from_tensor(self.source.named_tensors())
            seconds = time.perf_counter() - started
            difference = None if self.canary is None else self.canary.check(staged=True)
            self.gate.pause(self.pause_timeout)
            paused = time.perf_counter()
            engine.swap_weights(policy_version=version)
        except BaseException:
            try:
                self.gate.pause(self.pause_timeout)
            except Exception:  # the failure that brought us here is the news
                logger.exception("the gate could not be shut after a failed weight swap")
            raise
        self.gate.resume()
        held = time.perf_counter() - paused
        return self._note(SyncReport(version, seconds + held, copied, difference, held))

    def restore(self) -> SyncReport:
        """Gives an engine in the open rollout phase that lost its weights the source's. Raises as ``sync``."""
        self.gate.pause(self.pause_timeout)
        return self._serve()

    def _serve(self) -> SyncReport:
        report = self.sync()
        self.gate.resume()
        return report

    def _mending(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """``work()``; when that fails as engines fail, ``again`` (None: ``work``) after the engine was rebuilt."""
        try:
            return work()
        except Exception as error:
            rebuild = getattr(self.engine, "rebuild", None)
            if rebuild is None or isinstance(error, AtroposVerlError):
                raise
            logger.warning("a weight sync failed; the engine is rebuilt and gets the weights again", exc_info=error)
            rebuild()
        return (again or work)()

    def sync(self) -> SyncReport:
        """Copies the source's weights into the engine and checks the canary. The gate must be closed. Raises
        ``WeightSyncError`` when a tensor does not fit, or the canary found a difference."""
        return self._mending(self._sync)

    def _sync(self) -> SyncReport:
        version = self.source.policy_version
        started = time.perf_counter()
        update = self.engine.update_weights_from_tensor
        versioned = {"policy_version": version} if "policy_version" in inspect.signature(update).parameters else {}
        copied = update(self.source.named_tensors(), **versioned)
        seconds = time.perf_counter() - started
        difference = None if self.canary is None else self.canary.check()
        return self._note(SyncReport(version, seconds, copied if isinstance(copied, int) else 0, difference, None))

    def _note(self, report: SyncReport) -> SyncReport:
        self.last_sync = report
        self.syncs += 1
        return report
