"""The methods of an inference engine, under SGLang's and verl's names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

if TYPE_CHECKING:
    import torch


@runtime_checkable
class GenerationEngine(Protocol):
    """Generates from the newest weights it has. Safe to call from several threads and loops."""

    policy_version: int
    """Version of the weights it holds; -1 before the first update from a trainer."""
    max_context_len: int
    """Prompt plus completion, in tokens, at most."""
    eos_token_ids: frozenset[int]
    """They end a completion unless a request ignores them; the one that did is part of its tokens."""

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """``request.n`` completions. Cancelling the awaiting task frees the request's slots.

        Raises ``GenerationRequestError`` (bad request) or ``EngineStoppedError`` (engine closed).
        """

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """The same, token by token. Closing the iterator frees the slots."""


@runtime_checkable
class InferenceEngine(GenerationEngine, Protocol):
    """An engine that also takes new weights from a trainer and scores sequences."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Generation]]:
        """Blocking form for a list of requests, from a plain thread."""

    def compute_logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Logprob of tokens 1..T-1 of one sequence given those before: ``T - 1`` values. Works while paused."""

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int | None = None
    ) -> int:
        """Copy new weights in; returns bytes copied. Raises ``WeightSyncError`` naming a tensor that is missing,
        unknown, or of another shape — before or while copying, leaving the version unchanged."""

    def resume_memory_occupation(self) -> None:
        """Take the memory for weights and KV cache again."""

    def release_memory_occupation(self) -> None:
        """Give back KV cache (and weights, if so configured). Running requests keep their tokens and are
        prefilled again after ``resume_memory_occupation``."""

    def close(self) -> None:
        """Stop; waiting requests get ``EngineStoppedError``."""
