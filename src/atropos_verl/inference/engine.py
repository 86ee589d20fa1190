"""What every inference engine offers, and the two values that pass through it.

The verbs are SGLang's and verl's own: ``generate``, ``update_weights_from_tensor``, ``resume_memory_occupation``,
``release_memory_occupation``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

__all__ = ["FinishReason", "Generation", "GenerationDelta", "GenerationRequest", "InferenceEngine"]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to sample from it.

    Raises nothing itself; the engine validates against its limits and raises ``GenerationRequestError``.
    """

    prompt_token_ids: tuple[int, ...]
    n: int = 1
    """Completions of the same prompt; each is sampled independently."""
    max_tokens: int | None = None
    """New tokens at most; None: as many as the engine's context still holds."""
    temperature: float = 1.0
    """0 = greedy; logprobs are then those of temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 or 0: off."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Stop strings; the tokens that spell the stop string are kept in ``token_ids`` (token-exact), finish is "stop"."""
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's end-of-sequence ids. The stop token is part of ``token_ids``."""
    ignore_eos: bool = False
    seed: int | None = None
    """With a seed, the same request gives the same tokens whatever else the engine is running."""
    prompt_logprobs: int | None = None
    """k: also return the k best alternatives (and the token itself) at each prompt position."""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion."""

    token_ids: tuple[int, ...]
    """New tokens only, the stop token included."""
    logprobs: tuple[float, ...]
    """Logprob of each token under the sampling temperature, over the full vocabulary (before top-p/top-k/min-p)."""
    finish_reason: FinishReason
    policy_version_first: int
    """Policy version that sampled the first token."""
    policy_version_last: int
    """Policy version that sampled the last token; differs when weights were swapped in between."""
    policy_version_runs: tuple[tuple[int, int], ...] = ()
    """Which version sampled each token, run-length encoded: ``(policy version, tokens)``, the counts adding up to all
    tokens. Empty: the engine only knows first and last."""
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """[P] per prompt position {token_id: logprob}; position 0 is None (nothing predicts it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDelta:
    """New tokens of one completion while it is being generated (streaming)."""

    index: int
    """Which of the n completions."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    policy_version: int | None = None
    """Version that sampled these tokens; None: the engine does not say."""


@runtime_checkable
class InferenceEngine(Protocol):
    """An engine that generates from the newest weights it was given. Safe to call from several threads and loops."""

    @property
    def policy_version(self) -> int:
        """Version of the weights it holds; -1 before the first update from a trainer."""

    @property
    def max_context_len(self) -> int:
        """Prompt plus completion, in tokens, at most."""

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        """``request.n`` completions. Cancelling the awaiting task frees the request's slots.

        Raises ``GenerationRequestError`` (bad request) or ``EngineStoppedError`` (engine closed).
        """

    def astream(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """The same, token by token. Closing the iterator frees the slots."""

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
