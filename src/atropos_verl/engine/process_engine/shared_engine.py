"""``TransformersEngine`` whose weights another process writes: the engine in the engine's process."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.process_engine.shared_weights import SharedBuffer, SharedWeightStore, plan
from atropos_verl.engine.scheduler import EngineLimits, Ticket
from atropos_verl.engine.weight_staging import SpareWeights
from atropos_verl.errors import EngineError, WeightSyncError

__all__ = ["SharedEngine"]


class SharedEngine(TransformersEngine):
    """The same engine; new weights are written by the trainer, this side only says when and changes buffers.

    Args:
        descriptors: of two anonymous files, for the two buffers of weights.
        settings: as ``TransformersEngine``'s.
    """

    def __init__(self, model: Any, tokenizer: Any, *, descriptors: list[int], **settings: Any) -> None:
        self.places, self.nbytes = plan(model)
        buffers = [SharedBuffer(descriptor, self.places, self.nbytes) for descriptor in descriptors]
        self._shared = SharedWeightStore(model, buffers)
        self._update: ExitStack | None = None
        super().__init__(model, tokenizer, weights=self._shared, **settings)

    @property
    def limits(self) -> EngineLimits:
        """What requests are validated against."""
        return self._limits

    def submit(self, request: Any, on_delta: Any = None) -> Ticket:
        """Queue a validated request."""
        return self._submit(request, on_delta)

    def cancel(self, tickets: list[Ticket]) -> int:
        """Drop these at the next token boundary."""
        return self._cancel(tickets)

    # -- weights -----------------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Stand at a token boundary until ``end_update``: the buffer that generates is about to be written."""
        with ExitStack() as stack:
            stack.enter_context(self._loop.exclusive("update_weights_from_tensor", self._wait_timeout))
            self._loop.evict()
            self._update = stack.pop_all()

    def end_update(self, ready: bool, policy_version: int | None) -> None:
        """Go on. ``policy_version`` None: the update failed. Nothing to do when none was begun."""
        if self._update is None:
            return
        update, self._update = self._update, None
        with update:
            self._shared.ready = ready
            if policy_version is not None:
                self._policy_version = policy_version

    def staged_logprobs(self, token_ids: list[int], temperature: float) -> list[float]:
        """``compute_staged_logprobs`` of what the trainer wrote into the spare buffer."""
        self._spare_as_written()
        return self.compute_staged_logprobs(token_ids, temperature)

    def swap_in(self, policy_version: int) -> None:
        """``swap_weights`` of what the trainer wrote into the spare buffer."""
        self._spare_as_written()
        self.swap_weights(policy_version)

    def _spare_as_written(self) -> None:
        if not self._shared.resident:
            raise WeightSyncError("the weights' memory is released: call resume_memory_occupation() first")
        if self._spare is None:
            with self._loop.exclusive("stage_weights_from_tensor", self._wait_timeout):
                self._spare = SpareWeights(self.model, self.max_context_len, self._shared.spare_tensors())
        self._spare.filled()

    def _make_spare(self) -> SpareWeights:
        raise EngineError("weights of this engine are staged by the trainer's process")

    def release_memory_occupation(self) -> None:
        """See ``InferenceEngine``; also gives the pages of the spare buffer back."""
        super().release_memory_occupation()
        self._shared.spare.give_back()
