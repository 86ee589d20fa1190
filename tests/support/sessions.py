"""A gateway with sessions, an engine that remembers what it sampled, and the comparison of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.types import GenerationDelta, GenerationRequest
from support.fake_engine import FakeEngine, Reply, counting_reply
from support.serving import serving

Sample = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and the ids that were sampled after it."""


class OracleEngine(FakeEngine):
    """``samples``: what was sampled to its end, in the order of the ends."""

    def reset(self, reply: Reply = counting_reply, *, max_context_len: int = 65_536, token_delay: float = 0.0) -> None:
        super().reset(reply, max_context_len=max_context_len, token_delay=token_delay)
        self.samples: list[Sample] = []
        self.by_request: Counter[str] = Counter()

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        seen: dict[int, list[int]] = {}
        async for delta in super().astream(request):
            ids = seen.setdefault(delta.index, [])
            ids += delta.token_ids
            if delta.finish_reason is not None:
                self.samples.append((tuple(request.prompt_token_ids), tuple(ids)))
                self.by_request[request.request_id] += 1
            yield delta


def trained_samples(rollout: dict[str, Any]) -> list[Sample]:
    """What the rows of a rollout train: each span and all that stands before it. Checks the rows' own shape."""
    samples: list[Sample] = []
    for row in rollout["rows"]:
        ids, masks = row["token_ids"], row["masks"]
        assert len(ids) == len(masks) == len(row["logprobs"]) == len(row["versions"])
        assert len(row["spans"]) == len(row["turns"]) == len(row["finish_reasons"]) > 0
        inside = {position for start, stop in row["spans"] for position in range(start, stop)}
        for position, (token, mask) in enumerate(zip(ids, masks, strict=True)):
            assert mask == (token if position in inside else -100)
            assert (row["versions"][position] == -2) == (position not in inside)
            assert position in inside or row["logprobs"][position] == 1.0
        samples += [(tuple(ids[:start]), tuple(ids[start:stop])) for start, stop in row["spans"]]
    return samples


def check_rollout(rollout: dict[str, Any], sampled: list[Sample]) -> None:
    """Every sampled token is trained once, in exactly the context in which it was sampled."""
    assert Counter(trained_samples(rollout)) == Counter(sampled)


@contextmanager
def session_gateway(
    directory: Path, engine: Any, tokenizer: Any, *, key: str | None = "K", **options: Any
) -> Iterator[httpx.Client]:
    """A client of a gateway whose sessions are stored in ``directory``; it sends the gateway's key."""
    store = SessionStore(directory)
    try:
        with serving(engine, tokenizer, sessions=store, api_key=key, **options) as client:
            client.headers["authorization"] = f"Bearer {key}"
            yield client
    finally:
        store.close()


def open_session(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/sessions", json={"group": "g", **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def rollout_of(client: httpx.Client, session: dict[str, Any], reward: float = 1.0) -> dict[str, Any]:
    """Finish a session, and its rollout."""
    response = client.post(f"/sessions/{session['id']}/reward", json={"reward": reward})
    assert response.status_code == 200, response.text
    response = client.get(f"/sessions/{session['id']}/rollout")
    assert response.status_code == 200, response.text
    return dict(response.json())
