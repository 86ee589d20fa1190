"""verl's client of its replicas, one attempt at a time: an abort comes back, and a caller who leaves frees the slot.

verl's ``FullyAsyncLLMServerClient`` hides aborts: it waits a second, goes on, and reports one policy version per
attempt. Whoever continues an aborted answer here (``llm_engine``) needs each attempt, with its own versions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from atropos_verl.errors import AtroposVerlError, EngineError, EngineStoppedError, GenerationRequestError

__all__ = ["AttemptClient"]

logger = logging.getLogger(__name__)

_NO_SERVER = "No available servers in load balancer"
_NO_SERVER_RETRY = 0.25
"""Seconds between two looks at a load balancer without servers (replicas lent to the trainer, or starting)."""


class AttemptClient(LLMServerClient):  # type: ignore[misc]
    """``generate`` is one call of one replica, chosen by verl's load balancer."""

    @classmethod
    def of(cls, client: LLMServerClient) -> Self:
        """The same replicas as ``client``."""
        return cls(config=client.config, load_balancer_handle=client._load_balancer)

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """What the replica made before it was done or aborted. Cancelling frees the replica's slot.

        Raises:
            GenerationRequestError: the replica refuses the request.
            EngineStoppedError: the replica is dead.
            EngineError: the replica failed.
        """
        server_id, server = await self._acquire(request_id, prompt_ids, sampling_params)
        reference = server.generate.remote(
            request_id=self._vllm_request_id(request_id),
            prompt_ids=prompt_ids,
            sampling_params=sampling_params,
            **kwargs,
        )
        try:
            output: TokenOutput = await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            raise _as_ours(error.cause) from error
        except (RayActorError, TaskCancelledError) as error:
            raise EngineStoppedError(f"the rollout replica {server_id} is gone: {error}") from error
        finally:
            self._release_server(server_id, request_id=request_id)
        steps = output.extra_fields.get("global_steps")
        output.extra_fields.setdefault("min_global_steps", steps)
        output.extra_fields.setdefault("max_global_steps", steps)
        return output

    async def _acquire(self, request_id: str, prompt_ids: list[int], params: dict[str, Any]) -> tuple[str, Any]:
        waited = False
        while True:
            try:
                acquired: tuple[str, Any] = await self._acquire_server(
                    request_id, prompt_ids=prompt_ids, sampling_params=params
                )
                return acquired
            except RuntimeError as error:  # RayTaskError is one too
                if _NO_SERVER not in str(error):
                    raise
            if not waited:
                logger.info("no rollout replica is in the load balancer; %s waits for one", request_id)
                waited = True
            await asyncio.sleep(_NO_SERVER_RETRY)


def _as_ours(cause: BaseException | None) -> Exception:
    """A replica's error as one that the gateway knows."""
    if isinstance(cause, AtroposVerlError):
        return cause
    if isinstance(cause, ValueError):  # what vLLM and verl's servers raise for a request they cannot serve
        return GenerationRequestError(str(cause))
    return EngineError(f"the rollout replica failed: {type(cause).__name__}: {cause}")
