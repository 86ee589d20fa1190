"""The second buffer of the engine's weights: filled and looked at while the first one generates."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from atropos_verl.engine.model_runner import ModelRunner
from atropos_verl.engine.weights import WeightStore
from atropos_verl.errors import EngineError

__all__ = ["SpareWeights"]


class SpareWeights:
    """A copy of the model with weights of its own. Used by one thread, which need not be the engine's.

    Args:
        model: the one that generates; it must not be running while the copy is made.
        max_context_len: longest sequence of ``logprobs``, tokens.
        instead_of: tensors that the copy is to use in place of the model's, by ``id`` of these; none of them is copied.
    """

    def __init__(self, model: Any, max_context_len: int, instead_of: Mapping[int, torch.Tensor] | None = None) -> None:
        copied = copy.deepcopy(model, dict(instead_of or {}))
        self._runner = ModelRunner(copied, max_context_len=max_context_len)
        self._weights = WeightStore.of_model(copied)
        self._weights.ready = False  # a copy of what generates is nothing to swap in

    def filled(self) -> None:
        """Complete weights were written into them by somebody else."""
        self._weights.ready = True

    def update(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """See ``WeightStore.update``."""
        return self._weights.update(named_tensors)

    def logprobs(self, token_ids: Sequence[int], temperature: float) -> list[float]:
        """Logprobs of tokens 1 .. T-1 under these weights. Raises ``EngineError`` when they are not complete."""
        if not self._weights.ready:
            raise EngineError("no complete weights are staged: call stage_weights_from_tensor() first")
        return self._runner.logprobs(token_ids, temperature)

    def swap_into(self, serving: WeightStore) -> None:
        """Put these weights into ``serving`` and take its old ones. Raises ``WeightSyncError`` when none are staged."""
        serving.exchange(self._weights)
