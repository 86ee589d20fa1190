"""``PinnedEngine``: what held-out evaluations ask, so that one version of the weights writes all of an evaluation."""

import logging
from collections.abc import AsyncGenerator

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.protocol import GenerationEngine, InferenceEngine
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

_END_SECONDS = 30.0
"""For requests of an evaluation that was given up to let go of the engine."""


class PinnedEngine:
    """A ``GenerationEngine`` whose requests wait at its ``gate`` until ``pin``, and are let in until ``unpin``.

    In between the weights are those at ``pin``: the caller does not change them, or hands in a copy of the engine.
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self.gate = RequestGate()
        self.gate.pause()
        self._engine = self._pinned = engine
        self._copy: InferenceEngine | None = None
        self.policy_version = engine.policy_version
        """At the last ``pin``."""
        self.max_context_len, self.eos_token_ids = engine.max_context_len, engine.eos_token_ids

    async def agenerate(self, request: GenerationRequest) -> list[Generation]:
        return await self._pinned.agenerate(request)

    def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        return self._pinned.astream(request)

    def pin(self, copy: InferenceEngine | None = None) -> None:
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
