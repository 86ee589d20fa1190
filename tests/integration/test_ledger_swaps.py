"""Many weight swaps under load: 64 clients over real HTTP, an engine whose every token and logprob spell the version.

The oracle does not depend on bookkeeping. The weights of version v are such that each token is ``v % 251`` and its
logprob is ``spelled(v)``, distinct for every version, whatever the prompt: what a client was sent says by itself which
weights wrote it.
"""

import asyncio
import math
import os
import random
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

SWAPS = int(os.environ.get("ATROPOS_VERL_SWAPS", "60"))
"""1000 take a minute or two."""
CLIENTS = 64
LONGEST = 24
HIDDEN, VOCAB, MODULUS = 16, 259, 251


def gap(version: int) -> float:
    """Logit of the one likely token; all others have 0."""
    return 6.0 + version * 0.002


def spelled(version: int) -> float:
    return -math.log1p((VOCAB - 1) * math.exp(-gap(version)))


def spelling_model() -> Any:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny_causal_lm(tie_word_embeddings=False, **sizes)
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


Sequence = list[tuple[int, float]]
"""Tokens as a client knows them: with their logprobs, NaN where it wrote them itself."""


async def converse(client: httpx.AsyncClient, rng: random.Random, name: int, sent: list[Sequence]) -> None:
    """One to three turns; half of the conversations begin as those of all other clients do, some ask for two."""
    said = [7, 7, 7] if rng.random() < 0.5 else [name, *(rng.randrange(250) for _ in range(4))]
    sequences: list[Sequence] = [[] for _ in range(rng.choice((1, 1, 2)))]
    for _ in range(rng.randint(1, 3)):
        for sequence in sequences:
            sequence += [(token, math.nan) for token in said]
        prompt = {"prompt_token_ids": [token for token, _ in sequences[0]]}
        settings = {"n": len(sequences), "temperature": 0.0, "max_tokens": rng.randint(1, LONGEST), "logprobs": 0}
        answer = await client.post("/generate", json={"prompt": prompt, **settings})
        assert answer.status_code == 200, answer.text
        for sequence, row in zip(sequences, answer.json()["logprobs"], strict=True):
            sequence += [(int(token), value) for place in row for token, value in place[0].items()]
        sent += sequences[1:]  # turns of a branch are asked one by one
        sequences = sequences[:1]
        said = [rng.randrange(250) for _ in range(rng.randint(1, 5))]
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


async def load(url: str, engine: TransformersEngine, gate: RequestGate, model: Any) -> list[Sequence]:
    sent: list[Sequence] = []
    is_done = False

    async def client(name: int) -> None:
        rng = random.Random(name)
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as session:
            while not is_done:
                await converse(session, rng, name, sent)

    async with asyncio.TaskGroup() as group:
        for name in range(CLIENTS):
            group.create_task(client(name))
        for version in range(1, SWAPS + 1):
            await asyncio.to_thread(swap_weights, engine, gate, weights_of(model, version), version)
        is_done = True
    return sent


def test_no_request_fails_and_no_token_is_attributed_to_a_wrong_version() -> None:
    gate, ledger, reference = RequestGate(), Ledger(), spelling_model()
    with engine_of(spelling_model(), gate=gate, max_running=CLIENTS, max_context_len=256) as engine:
        engine.update_weights_from_tensor(list(weights_of(reference, 0).items()), 0)
        with serving(engine, build_tiny_tokenizer(), gate=gate, ledger=ledger) as http:
            sent = asyncio.run(load(str(http.base_url), engine, gate, reference))
    random.Random(0).shuffle(sent)
    columns = [tuple(map(np.array, zip(*sequence, strict=True))) for sequence in sent]
    queries = [
        # half of the environments send no logprobs
        SequenceQuery(token_ids=ids, loss_mask=~np.isnan(values), logprobs=values if i % 2 else None, group=i)
        for i, (ids, values) in enumerate(columns)
    ]
    matches = [match for i in range(0, len(queries), 64) for match in look_up(ledger, queries[i : i + 64])]
    mixed = ambiguous = 0
    seen: set[int] = set()
    for query, (_, logprobs), match in zip(queries, columns, matches, strict=True):
        assert match.unmatched_spans == 0
        known = query.loss_mask & (match.versions != UNKNOWN_VERSION)
        versions = match.versions[known]
        mixed += len(set(versions.tolist())) > 1
        seen |= set(versions.tolist())
        # Short answers to a common beginning, 251 versions apart, are the same ids: without logprobs not guessed.
        ambiguous += match.ambiguous_spans
        assert known.sum() == query.loss_mask.sum() or (match.ambiguous_spans and query.logprobs is None)
        # what the client was sent, not what anybody wrote down
        np.testing.assert_array_equal(versions % MODULUS, query.token_ids[known])
        expected = [spelled(int(version)) for version in versions]
        np.testing.assert_allclose(logprobs[known], expected, rtol=0, atol=2e-5)
        rounding = 0.0 if query.logprobs is not None else 1e-6  # of one of several alike
        np.testing.assert_allclose(match.logprobs[known], np.float32(logprobs[known]), rtol=0, atol=rounding)
    assert engine.policy_version == SWAPS
    assert ambiguous < len(sent) / 50
    # Every swap had sequences running, which cross at most as many swaps as they have tokens.
    assert len(sent) >= CLIENTS and mixed >= SWAPS // LONGEST and len(seen) > SWAPS // 2
