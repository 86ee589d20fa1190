"""A client of the gateway's sessions: httpx and nothing heavier, for agents and runners.

::

    async with Client("http://127.0.0.1:9004", key) as client, client.session("group 7") as session:
        openai = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
        ...
        await session.reward(1.0)
"""

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from atropos_verl.errors import AtroposVerlError
from atropos_verl.http_thread import SameLines

logger = logging.getLogger(__name__)
_LONGEST_WAIT = 5.0
"""Seconds between two tries."""
_TOLD_AFTER = 4
"""Tries, of two to three seconds in all."""
_LINES = SameLines()


def may_pass(status: int) -> bool:
    """A later try may get another answer. Servers that know no POST say 501, a gateway never."""
    return status == 429 or (status >= 500 and status != 501)


class SessionError(AtroposVerlError):
    """The gateway refused what was asked, or could not be reached for ``patience`` seconds (``status`` 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reward:
    """What an agent may return in the place of a number."""

    value: float
    per_turn: Sequence[float] | None = None
    """One for each answered turn, in their order."""
    info: Mapping[str, Any] | None = None


class AgentSession:
    """One rollout at the gateway. ``api_key`` opens this session only; ``base_url`` ends with ``/v1``."""

    def __init__(self, client: "Client", opened: Mapping[str, Any]) -> None:
        self._client = client
        self.id, self.base_url, self.api_key = (str(opened[name]) for name in ("id", "base_url", "api_key"))
        self.is_rewarded = False

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables by which the SDKs of OpenAI and Anthropic find the session."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.base_url.removesuffix("/v1"),
            "ANTHROPIC_API_KEY": self.api_key,
        }

    async def reward(
        self,
        reward: float,
        *,
        per_turn: Sequence[float] | None = None,
        finished: bool = True,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the rollout's reward, and with ``finished`` end it. The same again changes nothing. Raises
        ``SessionError``: 409 it has another one; 410 it was aborted, or its time ended."""
        body = {"reward": reward, "finished": finished, "per_turn": per_turn and list(per_turn), "info": info}
        await self._client.ask("POST", f"/sessions/{self.id}/reward", body)
        self.is_rewarded = finished

    async def abort(self, reason: str = "") -> None:
        """End it without a rollout. Raises ``SessionError``: 409 it has its reward."""
        await self._client.ask("POST", f"/sessions/{self.id}/abort", {"reason": reason})

    async def tree(self) -> dict[str, Any]:
        """Its requests, lineages, tokens and versions."""
        return await self._client.ask("GET", f"/sessions/{self.id}")

    async def rollout(self) -> dict[str, Any]:
        """Its reward and its rows, each with ``token_ids``, ``masks``, ``logprobs``. Raises ``SessionError``: 409, not
        finished."""
        return await self._client.ask("GET", f"/sessions/{self.id}/rollout")


class Client:
    """Opens sessions at a gateway. Failures of the network and answers of 429 and 5xx are tried again for ``patience``
    seconds: a gateway that is started again has its sessions."""

    def __init__(
        self, gateway_url: str, api_key: str | None = None, *, timeout: float = 60.0, patience: float = 180.0
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        url = gateway_url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout)
        self._patience, self._silent_since = patience, float("inf")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def session(
        self,
        group: str,
        *,
        task: str = "",
        metadata: Mapping[str, Any] | None = None,
        ttl: float | None = None,
        size: int | None = None,
    ) -> AsyncIterator[AgentSession]:
        """A new session of ``group``; it is aborted when the block raises, and ends at its ``ttl`` (seconds) without a
        reward. Raises ``SessionError``."""
        body = {"group": group, "task": task, "metadata": metadata, "ttl": ttl, "size": size}
        session = AgentSession(self, await self.ask("POST", "/sessions", body, key=uuid.uuid4().hex))
        try:
            yield session
        except BaseException as error:
            with contextlib.suppress(SessionError):
                await session.abort(f"{type(error).__name__}: {error}"[:200])
            raise

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, key: str | None = None
    ) -> dict[str, Any]:
        """``body`` without what is None."""
        headers = {} if key is None else {"Idempotency-Key": key}
        sent = body and {name: value for name, value in body.items() if value is not None}
        # One that has been gone for so long is not waited for again by each request, nor by the end of each session.
        end = min(self._silent_since, time.monotonic()) + self._patience
        url = f"{str(self._http.base_url).rstrip('/')}{path}"
        for attempt in itertools.count():
            failure = None
            try:
                answer = await self._http.request(method, path, json=sent, headers=headers)
                self._silent_since, status, text = float("inf"), answer.status_code, " ".join(answer.text.split())[:300]
                if not may_pass(status):
                    break
            except httpx.TransportError as error:
                status, text, failure = 0, f"{type(error).__name__} {error}", error
                self._silent_since = min(self._silent_since, time.monotonic())
            wait = min(0.2 * 1.5**attempt, _LONGEST_WAIT)
            if time.monotonic() + wait >= end:
                raise SessionError(f"{method} {url}: {text}", status) from failure
            if attempt == _TOLD_AFTER and _LINES.is_new(text):
                logger.warning("%s %s: %s; it is tried for %g seconds", method, url, text, self._patience)
            await asyncio.sleep(wait)
        if status >= 400 or "json" not in answer.headers.get("content-type", ""):
            raise SessionError(f"{method} {url}: {status} {text}", status)
        found: dict[str, Any] = answer.json()
        return found
