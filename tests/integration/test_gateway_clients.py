"""The clients that really call the gateway, over real HTTP: the ``openai`` package and atroposlib's own servers.

Tokens come from the fake engine, so that every token, logprob and mask is known by hand.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.atropos_clients import HI, HI_PROMPT, managed_server, server_manager
from support.fake_engine import FakeEngine, logprob_of, text_reply
from support.serving import eventually, serving

from atropos_verl.engine.protocol import RequestGate

KEY = "integration-key"
EOS = 258
YES, NO = [88, 68, 82, EOS], [77, 78, EOS]  # "yes", "no": byte - 33, then <|im_end|>


@pytest.fixture(scope="module")
def served(model_dir: Path, tokenizer: Any) -> Iterator[tuple[FakeEngine, RequestGate, str]]:
    engine, gate = FakeEngine(), RequestGate()
    with serving(engine, tokenizer, gate=gate, model_name=str(model_dir), api_key=KEY) as client:
        yield engine, gate, str(client.base_url).rstrip("/")


@pytest.fixture
def engine(served: tuple[FakeEngine, RequestGate, str], tokenizer: Any) -> FakeEngine:
    served[0].reset(text_reply(tokenizer, "yes<|im_end|>", "no<|im_end|>"))
    return served[0]


@pytest.fixture
def url(served: tuple[FakeEngine, RequestGate, str], engine: FakeEngine) -> str:
    return served[2]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def logprobs(index: int, count: int) -> list[float]:
    return [logprob_of(index, position) for position in range(count)]


# the openai package -------------------------------------------------------------------------------------------------


def test_openai_errors_arrive_as_the_packages_own_exceptions(
    client: openai.OpenAI, url: str, engine: FakeEngine
) -> None:
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.completions.create(model="m", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="a" * 600)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="m", prompt="a", presence_penalty=1.0)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="a")
    engine.fail_with = RuntimeError("boom")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="m", prompt="a")


# atroposlib's servers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_tokens_and_logprobs_arrive_exactly(kind: str, url: str, model_dir: Path, engine: FakeEngine) -> None:
    engine.logprob = lambda index, position: -0.1 - index / 3 - position / 7  # not exact in binary on purpose
    async with server_manager(kind, url, model_dir, api_key=KEY) as manager:
        prompt, tokens, values, reasons = await manager.tokens_and_logprobs_completion(
            prompt="ab", n=2, max_tokens=16, temperature=0.7, top_p=0.9, stop=["END"]
        )
    assert prompt == [64, 65]
    assert tokens == [YES, NO]
    assert values == [[-0.1 - i / 3 - p / 7 for p in range(len(t))] for i, t in enumerate([YES, NO])]
    assert reasons == (["stop", "stop"] if kind == "vllm" else [{"type": "stop", "matched": EOS}] * 2)
    sent = next(request for request in engine.requests if request.prompt_token_ids == (64, 65))
    assert (sent.n, sent.max_tokens, sent.temperature, sent.top_p, sent.stop) == (2, 16, 0.7, 0.9, ("END",))


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_managed_server_masks_and_logprobs_over_two_turns(
    kind: str, url: str, model_dir: Path, engine: FakeEngine, tokenizer: Any
) -> None:
    first_prompt = tokenizer.encode(HI_PROMPT)
    async with managed_server(kind, url, model_dir, tokenizer, api_key=KEY) as managed:
        answer = await managed.chat_completion(messages=HI, n=1, max_tokens=16, temperature=1.0)
        assert answer.choices[0].message.content == "yes" and answer.choices[0].finish_reason == "stop"
        (node,) = managed.get_state()["nodes"]
        assert node.tokens == first_prompt + YES
        assert node.masked_tokens == [-100] * len(first_prompt) + YES
        assert node.logprobs == [1.0] * len(first_prompt) + logprobs(0, 4)

        messages = [*HI, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so?"}]
        await managed.chat_completion(messages=messages, n=1, max_tokens=16, temperature=1.0)
        (node,) = managed.get_state()["nodes"]
        # atroposlib extends the node by the text after "yes": its own <|im_end|> doubles the one the policy wrote
        between = tokenizer.encode("<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n")
        assert node.tokens == first_prompt + YES + between + YES
        assert node.masked_tokens == [-100] * len(first_prompt) + YES + [-100] * len(between) + YES
        assert node.logprobs == [1.0] * len(first_prompt) + logprobs(0, 4) + [1.0] * len(between) + logprobs(0, 4)
    assert [r.prompt_token_ids for r in engine.requests if r.max_tokens == 16] == [
        tuple(first_prompt),
        tuple(first_prompt + YES + between),
    ]


async def test_prompt_logprobs_through_the_vllm_client(url: str, model_dir: Path) -> None:
    async with server_manager("vllm", url, model_dir, api_key=KEY) as manager:
        answer = await manager.servers[0].get_logprobs(input_ids=[5, 6, 7], top_k=2)
    assert answer == {
        "prompt_tokens": [5, 6, 7],
        # The fake: the token itself at -p, 1000 at -p - 0.5, 1001 at -p + 0.5. The prompt's own token comes first.
        "prompt_topk_token_ids": [[], [6, 1001, 1000], [7, 1001, 1000]],
        "prompt_topk_logprobs": [[], [-1.0, -0.5, -1.5], [-2.0, -1.5, -2.5]],
    }


@pytest.mark.parametrize("kind", ["openai", "vllm", "sglang"])
async def test_chat_and_completion_of_every_server_type(kind: str, url: str, model_dir: Path) -> None:
    async with server_manager(kind, url, model_dir, api_key=KEY) as manager:
        chat = await manager.chat_completion(messages=HI, n=2, max_tokens=16, temperature=1.0)
        text = await manager.completion(prompt="a", n=2, max_tokens=16)
    assert [choice.message.content for choice in chat.choices] == ["yes", "no"]
    assert [choice.text for choice in text.choices] == ["yes", "no"]
    assert manager.servers[0].server_healthy


async def test_trl_client(model_dir: Path, tokenizer: Any) -> None:
    engine = FakeEngine(text_reply(tokenizer, "yes<|im_end|>", "no"))
    with serving(engine, tokenizer, model_name="tiny") as client:  # this client sends no key
        async with server_manager("trl", str(client.base_url).rstrip("/"), model_dir) as manager:
            chat = await manager.chat_completion(messages=HI, n=2, max_tokens=16)
            text = await manager.completion(prompt="a", n=1, max_tokens=16)
    assert [choice.message.content for choice in chat.choices] == ["yes<|im_end|>", "no"]
    assert [choice.finish_reason for choice in chat.choices] == ["stop", "length"]  # it looks for eos itself
    assert text.choices[0].text == "yes<|im_end|>"
    assert engine.requests[0].prompt_token_ids == tuple(tokenizer.encode(HI_PROMPT))


async def test_health_checks_of_atropos_hold_during_a_weight_sync(
    url: str, model_dir: Path, served: tuple[FakeEngine, RequestGate, str]
) -> None:
    _, gate, _ = served
    async with server_manager("vllm", url, model_dir, api_key=KEY) as manager:
        await asyncio.to_thread(gate.pause, 5.0)
        try:
            waiting = asyncio.create_task(manager.tokens_and_logprobs_completion(prompt="ab", n=1, max_tokens=16))
            await asyncio.to_thread(eventually, lambda: gate.waiting == 1, "the request to wait at the gate")
            await asyncio.sleep(1.5)  # more than one round of its health check
            assert manager.servers[0].server_healthy and not waiting.done() and gate.waiting == 1
        finally:
            gate.resume()
        _, tokens, _, _ = await asyncio.wait_for(waiting, timeout=20.0)
    assert tokens == [YES]
