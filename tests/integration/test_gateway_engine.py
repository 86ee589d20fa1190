"""The gateway in front of the real embedded engine: what arrives over HTTP is what the weights say."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from support.engines import logprob_oracle
from support.serving import serving
from support.tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM

from atropos_verl.engine.embedded import TransformersEngine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Any]]:
    """A client of the gateway, and the engine's weights in float64, outside the engine."""
    path = build_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with (
        TransformersEngine.from_pretrained(path) as engine,
        serving(engine, engine.tokenizer, gate=engine.gate) as client,
    ):
        yield client, reference


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
def test_logprobs_over_http_are_those_of_the_weights(served: tuple[httpx.Client, Any], dialect: str) -> None:
    client, reference = served
    prompt, shared = [64, 65, 66], {"temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 3}
    if dialect == "vllm":
        body = {"prompt": {"prompt_token_ids": prompt}, "logprobs": 0, "max_tokens": 12, **shared}
        answer = client.post("/generate", json=body).json()
        got = [[next(iter(position[0].items())) for position in sequence] for sequence in answer["logprobs"]]
        pairs = [([int(t) for t, _ in sequence], [v for _, v in sequence]) for sequence in got]
    elif dialect == "sglang":
        params = {"max_new_tokens": 12, **shared}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        answers = client.post("/generate", json=body).json()
        rows = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
        pairs = [([token for _, token, _ in row], [value for value, _, _ in row]) for row in rows]
    else:
        body = {"prompt": prompt, "logprobs": 0, "max_tokens": 12, "return_token_ids": True, **shared}
        choices = client.post("/v1/completions", json=body).json()["choices"]
        pairs = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
    assert len(pairs) == 2 and pairs[0][0] != pairs[1][0]
    for tokens, values in pairs:
        assert 1 <= len(tokens) <= 12
        expected = logprob_oracle(reference, (*prompt, *tokens), 0.7)[len(prompt) - 1 :]
        assert values == pytest.approx(expected, abs=1e-5)


def test_metrics_count_what_was_prefilled_and_what_was_reused(served: tuple[httpx.Client, Any]) -> None:
    client, _ = served

    def counts() -> list[float]:
        lines = client.get("/metrics").text.splitlines()
        names = [f"atropos_verl_gateway_{name}_tokens_total " for name in ("prefilled", "reused")]
        return [float(line.split()[-1]) for name in names for line in lines if line.startswith(name)]

    before = counts()
    for length in (50, 60):
        client.post("/generate", json={"prompt": {"prompt_token_ids": list(range(length))}, "max_tokens": 1})
    assert [after - first for after, first in zip(counts(), before, strict=True)] == [50 + 12, 48]
