"""Many weight swaps under load: 64 clients over real HTTP, an engine whose every token and logprob spell the version.

The oracle does not depend on bookkeeping. The weights of version v are such that each token is ``v % 251`` and its
logprob is ``spelled(v)``, distinct for every version, whatever the prompt: what a client was sent says by itself which
weights wrote it.
"""

import asyncio
import logging
import math
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import torch
from support.engines import engine_of, tiny_causal_lm
from support.serving import eventually, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import UNKNOWN_VERSION

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)

SWAPS = int(os.environ.get("ATROPOS_VERL_SWAPS", "60"))
"""1000 take a minute or two; with ``--log-cli-level=INFO`` the test says what it saw."""
CLIENTS = 64
LONGEST = 24
HIDDEN, VOCAB, MODULUS = 16, 259, 251


def gap(version: int) -> float:
    """Logit of the one likely token; all others have 0."""
    return 6.0 + version * 0.002


def spelled(version: int) -> float:
    """Logprob of that token."""
    return -math.log1p((VOCAB - 1) * math.exp(-gap(version)))


def spelling_model() -> Any:
    model = tiny_causal_lm(
        hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1, tie_word_embeddings=False, num_attention_heads=2
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Attention and MLP add nothing; embedding and norms are ones: the last hidden state is a vector of ones.
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
    return model


def weights_of(model: Any, version: int) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    head = torch.zeros(VOCAB, HIDDEN)
    head[version % MODULUS] = gap(version) / HIDDEN
    return {**found, "lm_head.weight": head}


@dataclass
class Sent:
    """One sequence as a client knows it."""

    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def ask(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.logprobs += [math.nan] * len(tokens)

    def take(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens
        self.mask += [True] * len(tokens)
        self.logprobs += logprobs


async def converse(client: httpx.AsyncClient, rng: random.Random, name: int, sent: list[Sent]) -> None:
    """One to three turns; half of the conversations begin as those of all other clients do, some ask for two."""
    opening = [7, 7, 7] if rng.random() < 0.5 else [name, *(rng.randrange(250) for _ in range(4))]
    n = rng.choice((1, 1, 2))
    sequences = [Sent() for _ in range(n)]
    for turn in range(rng.randint(1, 3)):
        if turn == 0:
            for sequence in sequences:
                sequence.ask(opening)
        else:  # turns of a branch are asked one by one
            sequences = sequences[:1]
            sequences[0].ask([rng.randrange(250) for _ in range(rng.randint(1, 5))])
        settings = {"n": len(sequences), "temperature": 0.0, "max_tokens": rng.randint(1, LONGEST)}
        prompt = sequences[0].tokens
        if rng.random() < 0.5:
            body = {"prompt": {"prompt_token_ids": prompt}, "logprobs": 0, **settings}
            answer = await client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            rows = answer.json()["logprobs"]
            pairs = [([int(next(iter(p[0]))) for p in row], [next(iter(p[0].values())) for p in row]) for row in rows]
        else:
            body = {"prompt": prompt, "logprobs": 0, "return_token_ids": True, **settings}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            choices = answer.json()["choices"]
            pairs = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        assert len(pairs) == len(sequences)
        for sequence, (tokens, logprobs) in zip(sequences, pairs, strict=True):
            sequence.take(tokens, logprobs)
    sent += sequences


def swap_weights(engine: TransformersEngine, gate: RequestGate, weights: dict[str, torch.Tensor], version: int) -> None:
    """Both ways that trainers use: into a second buffer while generation goes on, and in place.

    Sequences are running at every swap: each holds a token of the weights before and gets one of the new ones.
    """
    if version % 2:
        engine.stage_weights_from_tensor(weights)
    gate.pause(60.0)
    while not engine.stats().running:
        gate.resume()
        eventually(lambda: engine.stats().running > 0, "a sequence to run", timeout=60.0)
        gate.pause(60.0)
    if version % 2:
        engine.swap_weights(version)
    else:
        engine.update_weights_from_tensor(list(weights.items()), version)
    before = engine.stats().generated_tokens
    gate.resume()
    eventually(lambda: engine.stats().generated_tokens > before, "the new weights to write tokens", timeout=60.0)


async def load(url: str, engine: TransformersEngine, gate: RequestGate, model: Any) -> list[Sent]:
    sent: list[Sent] = []
    done = asyncio.Event()

    async def client(name: int) -> None:
        rng = random.Random(name)
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as session:
            while not done.is_set():
                await converse(session, rng, name, sent)

    async def trainer() -> None:
        try:
            for version in range(1, SWAPS + 1):
                await asyncio.to_thread(swap_weights, engine, gate, weights_of(model, version), version)
        finally:
            done.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(trainer())
        for name in range(CLIENTS):
            group.create_task(client(name))
    return sent


def test_no_request_fails_and_no_token_is_attributed_to_a_wrong_version() -> None:
    gate, ledger, model = RequestGate(), Ledger(), spelling_model()
    reference = spelling_model()
    with engine_of(model, gate=gate, max_running=CLIENTS, max_context_len=256) as engine:
        engine.update_weights_from_tensor(list(weights_of(reference, 0).items()), 0)
        with serving(engine, build_tiny_tokenizer(), gate=gate, ledger=ledger) as http:
            started = time.monotonic()
            sent = asyncio.run(load(str(http.base_url), engine, gate, reference))
            seconds = time.monotonic() - started
    random.Random(0).shuffle(sent)
    queries = [
        SequenceQuery(
            token_ids=np.array(s.tokens, dtype=np.int64),
            loss_mask=np.array(s.mask),
            logprobs=np.array(s.logprobs) if index % 2 else None,  # half of the environments send none
            group=index,
        )
        for index, s in enumerate(sent)
    ]
    matches = [match for i in range(0, len(queries), 64) for match in look_up(ledger, queries[i : i + 64])]
    tokens = mixed = ambiguous = 0
    seen: set[int] = set()
    for query, s, match in zip(queries, sent, matches, strict=True):
        assert match.unmatched_spans == 0
        known = query.loss_mask & (match.versions != UNKNOWN_VERSION)
        versions = match.versions[known]
        tokens += len(versions)
        mixed += len(set(versions.tolist())) > 1
        seen |= set(versions.tolist())
        # Short answers to a common beginning, 251 versions apart, are the same ids: without logprobs not guessed.
        ambiguous += match.ambiguous_spans
        assert known.sum() == query.loss_mask.sum() or (match.ambiguous_spans and query.logprobs is None)
        # what the client was sent, not what anybody wrote down
        np.testing.assert_array_equal(versions % MODULUS, query.token_ids[known])
        client_logprobs = np.array(s.logprobs)[known]
        expected = np.array([spelled(int(v)) for v in versions])
        np.testing.assert_allclose(client_logprobs, expected, rtol=0, atol=2e-5)
        rounding = 0.0 if query.logprobs is not None else 1e-6  # of one of several alike
        np.testing.assert_allclose(match.logprobs[known], np.float32(client_logprobs), rtol=0, atol=rounding)
    logger.info(
        "%d swaps in %.1f s, %d sequences, %d tokens, %d sequences of several versions, %d versions seen, "
        "%d ambiguous spans, ledger of %d bytes",
        *(SWAPS, seconds, len(sent), tokens, mixed, len(seen), ambiguous, ledger.stats().bytes),
    )
    assert engine.policy_version == SWAPS
    assert ambiguous < len(sent) / 50
    # Every swap had sequences running, which cross at most as many swaps as they have tokens.
    assert len(sent) >= CLIENTS and mixed >= SWAPS // LONGEST and len(seen) > SWAPS // 2
