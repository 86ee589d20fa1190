"""What atroposlib's own servers get from the gateway over real HTTP, token by token; the ledger knows all that is sent.

Tokens come from the fake engine, so that every token, logprob, version and mask is known by hand.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from support.fake_engine import FakeEngine, logprob_of, text_reply
from support.ledgers import one
from support.serving import serving

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import NO_LOGPROB, UNKNOWN_VERSION

HI = [{"role": "user", "content": "hi"}]
HI_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
YES, NO = [88, 68, 82, 258], [77, 78, 258]  # "yes", "no": byte - 33, then <|im_end|>


class SwappingEngine(FakeEngine):
    """New weights before every second token: token k of a request is of version ``base + k // 2``."""

    base = 0

    async def _turn(self, position: int) -> None:
        await super()._turn(position)
        self.policy_version = self.base + position // 2

    def versions(self, count: int) -> list[int]:
        return [self.base + k // 2 for k in range(count)]


Served = tuple[SwappingEngine, Ledger, httpx.Client]


@pytest.fixture(scope="module")
def served(model_dir: Path, tokenizer: Any) -> Iterator[Served]:
    engine, ledger = SwappingEngine(), Ledger()
    with serving(engine, tokenizer, ledger=ledger, model_name=str(model_dir), api_key="K") as client:
        client.headers["authorization"] = "Bearer K"
        yield engine, ledger, client


@pytest.fixture
def ledger(served: Served) -> Ledger:
    return served[1]


@pytest.fixture
def at(served: Served, model_dir: Path) -> dict[str, Any]:
    return {"url": str(served[2].base_url).rstrip("/"), "model_dir": model_dir, "api_key": "K"}


@pytest.fixture(autouse=True)
def engine(served: Served, tokenizer: Any) -> SwappingEngine:
    served[0].reset(text_reply(tokenizer, "yes<|im_end|>", "no<|im_end|>"))
    served[0].base += 10  # another oracle for every test
    return served[0]


@asynccontextmanager
async def server_manager(kind: str, url: str, model_dir: Path, api_key: str = "none") -> AsyncIterator[Any]:
    """atroposlib's manager, with one server of ``kind`` at the gateway; its health check ends with it."""
    named = {"server_type": kind, "base_url": url if kind == "trl" else f"{url}/v1", "model_name": str(model_dir)}
    manager = ServerManager([APIServerConfig(**named, api_key=api_key, timeout=30)])
    try:
        yield manager
    finally:
        task = manager.servers[0].check_task
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=5.0)


def logprobs(index: int, count: int) -> list[float]:
    return [logprob_of(index, position) for position in range(count)]


SHARED = {"n": 2, "temperature": 0.7}
FORM = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
DIALECTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HI, **SHARED}, {"response_format": {"type": "json_object"}}),
    "responses": ("/v1/responses", {"input": HI}, {"text": {"format": FORM}}),
    "messages": ("/v1/messages", {"messages": HI, "max_tokens": 9}, {"output_config": {"format": FORM}}),
    "completions": ("/v1/completions", {"prompt": "ab", **SHARED}, {}),
    "vllm": ("/generate", {"prompt": {"prompt_token_ids": [64, 65]}, **SHARED}, {}),
    "sglang": ("/generate", {"input_ids": [64, 65], "sampling_params": SHARED}, {}),
    "trl": ("/generate/", {"prompts": ["ab"], **SHARED}, {}),
}
"""Path, body, and what constrains its tokens."""
CASES = [(name, streamed, True) for name in list(DIALECTS)[:3] for streamed in (False, True)]
CASES += [(name, streamed, False) for name in list(DIALECTS)[:4] for streamed in (False, True)]
CASES += [(name, False, False) for name in list(DIALECTS)[4:]]


@pytest.mark.parametrize(("dialect", "streamed", "constrained"), CASES)
def test_every_dialect_is_written_down_and_constrained_tokens_have_no_logprob(
    served: Served, tokenizer: Any, dialect: str, streamed: bool, constrained: bool
) -> None:
    engine, ledger, client = served
    path, body, form = DIALECTS[dialect]
    answer = client.post(path, json={**body, **({"stream": True} if streamed else {}), **(form if constrained else {})})
    assert answer.status_code == 200, answer.text
    prompt, several = tokenizer.encode(HI_PROMPT if HI in body.values() else "ab"), "temperature" in str(body)
    for index, tokens in enumerate((YES, NO)[: 1 + several]):
        match = one(ledger, prompt, tokens)
        assert match.unmatched_spans == 0 and (match.temperature == 0.7 or not several)
        assert match.versions[len(prompt) :].tolist() == engine.versions(len(tokens))
        expected = [NO_LOGPROB] * len(tokens) if constrained else logprobs(index, len(tokens))
        assert match.logprobs[len(prompt) :].tolist() == expected


def test_figures_are_in_the_gateways_metrics(served: Served) -> None:
    _, ledger, client = served
    client.post("/v1/completions", json={"prompt": "figures", "n": 2})
    stats, text = ledger.stats(), client.get("/metrics").text
    assert f"atropos_verl_gateway_ledger_spans {float(stats.spans)}\n" in text and stats.spans >= 2
    assert f"atropos_verl_gateway_ledger_bytes {float(stats.bytes)}\n" in text


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_tokens_and_logprobs_arrive_exactly(kind: str, at: dict[str, Any], engine: SwappingEngine) -> None:
    engine.logprob = lambda index, position: -0.1 - index / 3 - position / 7  # not exact in binary on purpose
    async with server_manager(kind, **at) as manager:
        prompt, tokens, values, reasons = await manager.tokens_and_logprobs_completion(
            prompt="ab", n=2, max_tokens=16, temperature=0.7, top_p=0.9, stop=["END"]
        )
    assert (prompt, tokens) == ([64, 65], [YES, NO])
    assert values == [[-0.1 - i / 3 - p / 7 for p in range(len(t))] for i, t in enumerate([YES, NO])]
    assert reasons == (["stop", "stop"] if kind == "vllm" else [{"type": "stop", "matched": 258}] * 2)
    sent = next(request for request in engine.requests if request.prompt_token_ids == (64, 65))
    assert (sent.n, sent.max_tokens, sent.temperature, sent.top_p, sent.stop) == (2, 16, 0.7, 0.9, ("END",))


async def test_prompt_logprobs_through_the_vllm_client(at: dict[str, Any]) -> None:
    async with server_manager("vllm", **at) as manager:
        answer = await manager.servers[0].get_logprobs(input_ids=[5, 6, 7], top_k=2)
    assert answer == {
        "prompt_tokens": [5, 6, 7],
        # The fake: the token itself at -p, 1000 at -p - 0.5, 1001 at -p + 0.5. The prompt's own token comes first.
        "prompt_topk_token_ids": [[], [6, 1001, 1000], [7, 1001, 1000]],
        "prompt_topk_logprobs": [[], [-1.0, -0.5, -1.5], [-2.0, -1.5, -2.5]],
    }


@pytest.mark.parametrize("kind", ["openai", "vllm", "sglang"])
async def test_chat_and_completion_of_every_server_type(kind: str, at: dict[str, Any]) -> None:
    async with server_manager(kind, **at) as manager:
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
    shown = [(choice.message.content, choice.finish_reason) for choice in chat.choices]
    assert shown == [("yes<|im_end|>", "stop"), ("no", "length")]  # it looks for eos itself
    assert text.choices[0].text == "yes<|im_end|>"
    assert engine.requests[0].prompt_token_ids == tuple(tokenizer.encode(HI_PROMPT))


def as_query(node: Any, group: int = 0, *, with_logprobs: bool = False) -> SequenceQuery:
    logprobs = np.array(node.logprobs)
    return SequenceQuery(
        token_ids=np.array(node.tokens, dtype=np.int64),
        loss_mask=np.array(node.masked_tokens) != -100,
        logprobs=np.where(logprobs == 1.0, np.nan, logprobs) if with_logprobs else None,
        group=group,
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_a_managed_conversation_has_the_tokens_of_the_policy_and_is_matched(
    kind: str, at: dict[str, Any], engine: SwappingEngine, ledger: Ledger, tokenizer: Any
) -> None:
    # atroposlib extends the node by the text after "yes": its own <|im_end|> doubles the one the policy wrote
    again = tokenizer.encode("<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n")
    tokens, masks, values = list[int](), list[int](), list[float]()
    async with server_manager(kind, **at) as manager, manager.managed_server(tokenizer=tokenizer) as managed:
        messages = [{"role": "user", "content": kind}]
        for turn in range(3):
            answer = await managed.chat_completion(messages=messages, n=1, max_tokens=16, temperature=1.0)
            assert answer.choices[0].message.content == "yes" and answer.choices[0].finish_reason == "stop"
            new = again if turn else tokenizer.encode(HI_PROMPT.replace("hi", kind))
            asked = next(request for request in reversed(engine.requests) if request.max_tokens == 16)
            assert asked.prompt_token_ids == (*tokens, *new)
            tokens += new + YES
            masks += [-100] * len(new) + YES
            values += [1.0] * len(new) + logprobs(0, 4)
            (node,) = managed.get_state()["nodes"]
            assert (node.tokens, node.masked_tokens, node.logprobs) == (tokens, masks, values)
            messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "so?"}]
    [match] = look_up(ledger, [as_query(node)])
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (3, 0, 0)
    mask = np.array(masks) != -100
    assert match.versions[mask].tolist() == engine.versions(4) * 3
    assert (match.versions[~mask] == UNKNOWN_VERSION).all()
    np.testing.assert_array_equal(match.logprobs[mask], np.float32(values)[mask])


async def test_a_group_of_identical_prompts_is_matched_one_to_one(
    at: dict[str, Any], engine: SwappingEngine, ledger: Ledger, tokenizer: Any
) -> None:
    """n = 12, which atroposlib splits into 8 and 4: six times "yes", six times "no"; another group asks the same."""
    groups = []
    for _ in range(2):
        base = engine.base
        engine.logprob = lambda index, position, base=base: logprob_of(index, position) - base / 64  # other weights
        async with server_manager("vllm", **at) as manager, manager.managed_server(tokenizer=tokenizer) as managed:
            await managed.chat_completion(messages=[{"role": "user", "content": "group"}], n=12, max_tokens=3)
            groups.append((engine.versions(3), list(managed.get_state()["nodes"])))
        engine.base += 10
    assert [len(nodes) for _, nodes in groups] == [12, 12]
    for number, (versions, nodes) in reversed(list(enumerate(groups))):
        queries = [as_query(node, number, with_logprobs=True) for node in nodes]
        for query, match in zip(queries, look_up(ledger, queries), strict=True):
            assert (match.unmatched_spans, match.ambiguous_spans) == (0, 0)
            assert query.logprobs is not None
            np.testing.assert_array_equal(match.logprobs[query.loss_mask], np.float32(query.logprobs[query.loss_mask]))
            assert match.versions[query.loss_mask].tolist() == versions
