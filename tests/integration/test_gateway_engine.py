"""The gateway in front of the real embedded engine: what arrives over HTTP is what the weights say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.serving import eventually, serving
from support.tiny_model import build_tiny_model

from atropos_verl.engine.embedded import TransformersEngine

MAX_RUNNING = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    """The same weights in float64, outside the engine."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


Served = tuple[TransformersEngine, httpx.Client]


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Iterator[Served]:
    with (
        TransformersEngine.from_pretrained(model_dir, max_running=MAX_RUNNING) as engine,
        serving(engine, engine.tokenizer, gate=engine.gate) as client,
    ):
        yield engine, client


def expected_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """log softmax(logits / temperature) of each completion token, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
def test_logprobs_over_http_are_those_of_the_weights(served: Served, reference: Any, dialect: str) -> None:
    client, prompt, shared = served[1], [64, 65, 66], {"temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 3}
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
        assert values == pytest.approx(expected_logprobs(reference, prompt, tokens, 0.7), abs=1e-5)


def test_prompt_logprobs_over_http(served: Served, reference: Any) -> None:
    prompt = [64, 70, 80, 90]
    body = {"prompt": {"prompt_token_ids": prompt}, "prompt_logprobs": 2, "max_tokens": 1, "temperature": 0.0}
    entries = served[1].post("/generate", json=body).json()["prompt_logprobs"]
    assert entries[0] is None and len(entries) == 4
    own = [next(iter(entry.items())) for entry in entries[1:]]
    assert [int(token) for token, _ in own] == prompt[1:]
    assert [v for _, v in own] == pytest.approx(expected_logprobs(reference, prompt[:1], prompt[1:], 1.0), abs=1e-5)


def test_hang_up_frees_the_engines_slots(served: Served) -> None:
    engine, client = served
    aborted = engine.stats().aborted
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=client.base_url, timeout=httpx.Timeout(10.0, read=0.05)) as impatient,
    ):
        impatient.post("/generate", json={"prompt": [1], "n": MAX_RUNNING, "max_tokens": 250, "ignore_eos": True})
    eventually(lambda: engine.stats().running == 0 and engine.stats().waiting == 0, "the slots to be free")
    assert engine.stats().aborted > aborted
