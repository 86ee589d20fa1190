"""The gateway before the real embedded engine: logprobs are those of the weights, and what is asked is enforced."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
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
    path = build_tiny_model(tmp_path_factory.mktemp("tiny"))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with (
        TransformersEngine.from_pretrained(path) as engine,
        serving(engine, engine.tokenizer, gate=engine.gate) as client,
    ):
        yield client, reference


def test_logprobs_over_http_are_those_of_the_weights(served: tuple[httpx.Client, Any]) -> None:
    client, reference = served
    prompt, shared = [64, 65, 66], {"temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 3}
    answer = client.post("/generate", json={"prompt": prompt, "logprobs": 0, "max_tokens": 12, **shared}).json()
    assert len(answer["token_ids"]) == 2 and answer["token_ids"][0] != answer["token_ids"][1]
    for tokens, entries in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert 1 <= len(tokens) <= 12
        expected = logprob_oracle(reference, (*prompt, *tokens), 0.7)[len(prompt) - 1 :]
        values = [entry[str(token)] for token, [entry] in zip(tokens, entries, strict=True)]
        assert values == pytest.approx(expected, abs=1e-5)


def test_metrics_count_what_was_prefilled_and_what_was_reused(served: tuple[httpx.Client, Any]) -> None:
    client, _ = served
    seen = []
    for length in (50, 60):
        client.post("/generate", json={"prompt": list(range(length)), "max_tokens": 1})
        lines = [line.split() for line in client.get("/metrics").text.splitlines() if line[0] != "#"]
        figures = {words[0].removeprefix("atropos_verl_gateway_"): float(words[-1]) for words in lines}
        seen.append([figures[f"{name}_tokens_total"] for name in ("prefilled", "reused")])
    [before, after] = seen
    assert (after[0] - before[0], after[1] - before[1]) == (12, 48)


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}}}
SCHEMA |= {"required": ["x"], "additionalProperties": False}
FUNCTION: dict[str, Any] = {"name": "add", "parameters": SCHEMA}
ASK: list[Any] = [{"role": "user", "content": "1+1"}]


@pytest.fixture
def gpt(served: tuple[httpx.Client, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0].base_url}/v1", api_key="K", max_retries=0)


def test_formats_and_calls_are_enforced(served: tuple[httpx.Client, Any], gpt: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "m", "messages": ASK}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    with gpt.chat.completions.stream(**ask, response_format=form) as events:
        texts = [events.get_final_completion().choices[0].message.content]
    tools = [{"type": "function", "function": FUNCTION}]
    called = gpt.chat.completions.create(**ask, tools=tools, tool_choice="required", parallel_tool_calls=False)
    [call] = called.choices[0].message.tool_calls
    texts.append(call.function.arguments)
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    texts.append(gpt.responses.create(model="m", input="1+1", text={"format": form}).output_text)
    claude = anthropic.Anthropic(base_url=str(served[0].base_url), api_key="K")
    choice: Any = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    own: Any = [{"name": "add", "input_schema": SCHEMA}]
    [block] = claude.messages.create(**ask, max_tokens=500, tools=own, tool_choice=choice).content
    made = [*map(json.loads, texts), block.input]
    assert all(list(one) == ["x"] and one["x"] in range(100) for one in made) and len(made) == 4


def test_alternatives_and_seeds(gpt: openai.OpenAI) -> None:
    asked = {"model": "m", "messages": ASK, "n": 2, "seed": 7, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    first = gpt.chat.completions.create(**asked).choices
    with gpt.chat.completions.stream(**asked) as events:
        events.until_done()
        again = events.current_completion_snapshot.choices
    for one, other in zip(first, again, strict=True):
        assert one.message.content == other.message.content
        for entry, streamed in zip(one.logprobs.content, other.logprobs.content, strict=True):
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert entry.logprob == pytest.approx(streamed.logprob, abs=1e-4)
            known = {tuple(top.bytes): top.logprob for top in entry.top_logprobs}
            assert known.get(tuple(entry.bytes), entry.logprob) == entry.logprob


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(gpt: openai.OpenAI, stream: bool) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object", "not": {"type": "string"}}},
    }
    with pytest.raises(openai.BadRequestError, match=r"response_format: it cannot be enforced.*not") as caught:
        gpt.chat.completions.create(model="m", messages=ASK, response_format=form, stream=stream)
    assert caught.value.param == "response_format"
