"""``GenerationEngine``: what generates for the gateway; ``PinnedEngine``: the one that held-out evaluations ask."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from atropos_verl.engine.gate import RequestGate
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

if TYPE_CHECKING:
    from atropos_verl.engine.embedded import TransformersEngine

logger = logging.getLogger(__name__)

_END_SECONDS = 30.0
"""For requests of an evaluation that was given up to let go of the engine."""


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


class PinnedEngine:
    """A ``GenerationEngine`` whose requests wait at its ``gate`` until ``pin``, and are let in until ``unpin``.

    In between one version of the weights answers, that at ``pin``: the caller does not change them, or hands in a copy.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.gate = RequestGate()
        self.gate.pause()
        self._engine = self._pinned = engine
        self._copy: TransformersEngine | None = None
        self.policy_version = engine.policy_version
        """At the last ``pin``."""
        self.max_context_len, self.eos_token_ids = engine.max_context_len, engine.eos_token_ids

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        return await self._pinned.agenerate(request)

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        return self._pinned.astream(request)

    def pin(self, copy: TransformersEngine | None = None) -> None:
        """Let requests in: to ``copy``, which ``unpin`` closes, or to the engine itself."""
        self._copy, self._pinned = copy, copy or self._engine
        self.policy_version = self._pinned.policy_version
        self.gate.resume()

    def unpin(self) -> None:
        """Let no more requests in, and wait for those that are being served. Idempotent."""
        try:
            self.gate.drain(_END_SECONDS)
        except TimeoutError as error:
            logger.warning("an evaluation is over, and its requests are not: %s", error)
            self.gate.pause()
        self.close()
        self._copy, self._pinned = None, self._engine

    def close(self) -> None:
        """End the copy, if there is one; what is being served gets ``EngineStoppedError``. Idempotent."""
        if self._copy is not None:
            self._copy.close()
