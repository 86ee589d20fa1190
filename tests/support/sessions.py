"""A gateway with sessions, an engine that remembers what it sampled, and the comparison of both.

As a program, ``python -m support.sessions DIRECTORY PORT``, a gateway that can be killed: this process has everything
imported, and forks one that serves; when that one dies, it forks the next. ``child`` in the directory holds the pid of
the one that serves.
"""

import itertools
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.types import GenerationDelta, GenerationRequest
from support.fake_engine import FakeEngine, Reply, counting_reply
from support.serving import post, serving
from support.tiny_model import build_tiny_tokenizer

Sample = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and the ids that were sampled after it."""


class OracleEngine(FakeEngine):
    """``samples``: what was sampled to its end, in the order of the ends."""

    def reset(self, reply: Reply = counting_reply, *, max_context_len: int = 65_536, token_delay: float = 0.0) -> None:
        super().reset(reply, max_context_len=max_context_len, token_delay=token_delay)
        self.samples: list[Sample] = []

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        seen: dict[int, list[int]] = {}
        async for delta in super().astream(request):
            ids = seen.setdefault(delta.index, [])
            ids += delta.token_ids
            if delta.finish_reason is not None:
                self.samples.append((tuple(request.prompt_token_ids), tuple(ids)))
            yield delta


def trained_samples(rollout: dict[str, Any]) -> list[Sample]:
    """What the rows of a rollout train: each span and all that stands before it. Checks the rows' own shape."""
    samples: list[Sample] = []
    for row in rollout["rows"]:
        ids, spans = row["token_ids"], row["spans"]
        assert len(spans) == len(row["turns"]) == len(row["finish_reasons"]) > 0
        inside = {position for start, stop in spans for position in range(start, stop)}
        columns = zip(ids, row["masks"], row["versions"], row["logprobs"], strict=True)
        for position, (token, mask, version, logprob) in enumerate(columns):
            assert mask == (token if position in inside else -100)
            assert (version == -2) == (position not in inside)
            assert position in inside or logprob == 1.0
        samples += [(tuple(ids[:start]), tuple(ids[start:stop])) for start, stop in spans]
    return samples


def check_rollout(rollout: dict[str, Any], sampled: list[Sample]) -> None:
    """Every sampled token is trained once, in exactly the context in which it was sampled."""
    assert Counter(trained_samples(rollout)) == Counter(sampled)


@contextmanager
def session_gateway(
    directory: Path, engine: Any, tokenizer: Any, *, key: str | None = "K", **options: Any
) -> Iterator[httpx.Client]:
    """A client of a gateway whose sessions are stored in ``directory``; it sends the gateway's key."""
    with (
        closing(SessionStore(directory)) as store,
        serving(engine, tokenizer, sessions=store, api_key=key, **options) as client,
    ):
        client.headers["authorization"] = f"Bearer {key}"
        yield client


def open_session(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return dict(post(client, "/sessions", **{"group": "g", **body}))


def rollout_of(client: httpx.Client, session: dict[str, Any], reward: float = 1.0) -> dict[str, Any]:
    """Finish a session, and its rollout."""
    post(client, f"/sessions/{session['id']}/reward", reward=reward)
    response = client.get(f"/sessions/{session['id']}/rollout")
    assert response.status_code == 200, response.text
    return dict(response.json())


def unlike_any_other(request: GenerationRequest, index: int) -> list[int]:
    """A text that no other process and no other request has."""
    text = f"{os.getpid()}.{next(NUMBERS)} " + "x" * random.randrange(30) + "<|im_end|>"
    return list(TOKENIZER.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    NUMBERS, TOKENIZER = itertools.count(), build_tiny_tokenizer()
    while os.getppid() != 1:
        if (child := os.fork()) == 0:
            engine, store = OracleEngine(unlike_any_other, token_delay=0.001), SessionStore(directory / "gateway")
            app = create_app(engine, TOKENIZER, model_name="tiny", api_key="K", sessions=store)
            GatewayServer(app, port=port).start(timeout=60.0)
            signal.pause()
        (directory / "child.tmp").write_text(str(child))
        (directory / "child.tmp").replace(directory / "child")
        os.waitpid(child, 0)
