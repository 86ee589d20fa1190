"""The ledger knows what clients are sent over real HTTP, by every dialect: token, version, logprob."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from support.atropos_clients import HI, HI_PROMPT, managed_server
from support.fake_engine import FakeEngine, logprob_of, text_reply
from support.serving import eventually, serving

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import NO_LOGPROB, UNKNOWN_VERSION, SequenceMatch


class SwappingEngine(FakeEngine):
    """New weights before every second token: token k of a request is of version ``base + k // 2``."""

    base = 0

    async def _turn(self, position: int) -> None:
        await super()._turn(position)
        self.policy_version = self.base + position // 2


@pytest.fixture(scope="module")
def served(tokenizer: Any) -> Iterator[tuple[SwappingEngine, Ledger, httpx.Client]]:
    engine, ledger = SwappingEngine(), Ledger()
    with serving(engine, tokenizer, ledger=ledger) as client:
        yield engine, ledger, client


@pytest.fixture
def ledger(served: tuple[SwappingEngine, Ledger, httpx.Client]) -> Ledger:
    return served[1]


@pytest.fixture
def client(served: tuple[SwappingEngine, Ledger, httpx.Client]) -> httpx.Client:
    return served[2]


@pytest.fixture
def engine(served: tuple[SwappingEngine, Ledger, httpx.Client], tokenizer: Any) -> SwappingEngine:
    served[0].reset(text_reply(tokenizer, "yes<|im_end|>", "no<|im_end|>"))
    served[0].base += 10  # another oracle for every test
    return served[0]


def find(ledger: Ledger, prompt: list[int], completion: list[int]) -> SequenceMatch:
    tokens = np.array([*prompt, *completion], dtype=np.int64)
    mask = np.arange(len(tokens)) >= len(prompt)
    [match] = look_up(ledger, [SequenceQuery(token_ids=tokens, loss_mask=mask)])
    return match


def check(match: SequenceMatch, start: int, count: int, base: int, index: int) -> None:
    """``count`` tokens from ``start`` are those of completion ``index`` of one request."""
    assert match.versions[start : start + count].tolist() == [base + k // 2 for k in range(count)]
    expected = np.float32([logprob_of(index, k) for k in range(count)])
    np.testing.assert_array_equal(match.logprobs[start : start + count], expected)


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
    ledger: Ledger,
    client: httpx.Client,
    engine: SwappingEngine,
    tokenizer: Any,
    dialect: str,
    streamed: bool,
    constrained: bool,
) -> None:
    path, body, form = DIALECTS[dialect]
    answer = client.post(path, json={**body, **({"stream": True} if streamed else {}), **(form if constrained else {})})
    assert answer.status_code == 200, answer.text
    prompt = tokenizer.encode(HI_PROMPT if HI in body.values() else "ab")
    several = "temperature" in str(body)
    for index, text in enumerate(("yes<|im_end|>", "no<|im_end|>")[: 1 + several]):
        tokens = tokenizer.encode(text)
        match = find(ledger, prompt, tokens)
        assert match.unmatched_spans == 0 and (match.temperature == 0.7 or not several)
        if constrained:
            assert match.versions[len(prompt) :].tolist() == [engine.base + k // 2 for k in range(len(tokens))]
            assert match.logprobs[len(prompt) :].tolist() == [NO_LOGPROB] * len(tokens)
        else:
            check(match, len(prompt), len(tokens), engine.base, index)


def test_a_stream_that_its_reader_left_is_known_as_far_as_it_went(
    ledger: Ledger, client: httpx.Client, engine: SwappingEngine, tokenizer: Any
) -> None:
    engine.reset(text_reply(tokenizer, "x" * 300), token_delay=0.005)
    recorded = ledger.stats().recorded_spans
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as session:
        stream = session.completions.create(model="m", prompt="left", max_tokens=300, stream=True)
        pieces = [next(iter(stream)).choices[0].text for _ in range(4)]
        stream.close()
    eventually(lambda: ledger.stats().recorded_spans > recorded, "what was read to be recorded")
    read = tokenizer.encode("".join(pieces))
    assert len(read) >= 4
    match = find(ledger, tokenizer.encode("left"), read)
    check(match, 4, len(read), engine.base, 0)


def test_figures_are_in_the_gateways_metrics(ledger: Ledger, client: httpx.Client, engine: SwappingEngine) -> None:
    client.post("/v1/completions", json={"prompt": "figures", "n": 2})
    text = client.get("/metrics").text
    stats = ledger.stats()
    assert f"atropos_verl_gateway_ledger_spans {float(stats.spans)}\n" in text and stats.spans >= 2
    assert f"atropos_verl_gateway_ledger_bytes {float(stats.bytes)}\n" in text


# atroposlib's ManagedServer -----------------------------------------------------------------------------------------


def as_query(node: Any, group: int = 0, *, with_logprobs: bool = False) -> SequenceQuery:
    logprobs = np.array(node.logprobs)
    return SequenceQuery(
        token_ids=np.array(node.tokens, dtype=np.int64),
        loss_mask=np.array(node.masked_tokens) != -100,
        logprobs=np.where(logprobs == 1.0, np.nan, logprobs) if with_logprobs else None,
        group=group,
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_every_span_of_a_managed_conversation_is_matched(
    kind: str, ledger: Ledger, client: httpx.Client, engine: SwappingEngine, model_dir: Path, tokenizer: Any
) -> None:
    async with managed_server(kind, str(client.base_url).rstrip("/"), model_dir, tokenizer) as managed:
        messages: list[dict[str, str]] = [*HI]
        for _ in range(3):
            answer = await managed.chat_completion(messages=messages, n=1, max_tokens=16, temperature=1.0)
            messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
            messages += [{"role": "user", "content": "so?"}]
        (node,) = managed.get_state()["nodes"]
    [match] = look_up(ledger, [as_query(node)])
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (3, 0, 0)
    mask = np.array(node.masked_tokens) != -100
    assert match.versions[mask].tolist() == [engine.base + k // 2 for k in (0, 1, 2, 3)] * 3
    assert (match.versions[~mask] == UNKNOWN_VERSION).all()
    np.testing.assert_array_equal(match.logprobs[mask], np.float32([logprob_of(0, k) for k in range(4)] * 3))


async def test_a_group_of_identical_prompts_is_matched_one_to_one(
    ledger: Ledger, client: httpx.Client, engine: SwappingEngine, model_dir: Path, tokenizer: Any
) -> None:
    """n = 12, which atroposlib splits into 8 and 4: six times "yes", six times "no"; another group asks the same."""
    groups = []
    for _ in range(2):
        base = engine.base
        engine.logprob = lambda index, position, base=base: logprob_of(index, position) - base / 64  # other weights
        async with managed_server("vllm", str(client.base_url).rstrip("/"), model_dir, tokenizer) as managed:
            await managed.chat_completion(messages=[{"role": "user", "content": "group"}], n=12, max_tokens=3)
            groups.append((base, list(managed.get_state()["nodes"])))
        engine.base += 10
    assert [len(nodes) for _, nodes in groups] == [12, 12]
    for number, (base, nodes) in reversed(list(enumerate(groups))):
        queries = [as_query(node, number, with_logprobs=True) for node in nodes]
        for query, match in zip(queries, look_up(ledger, queries), strict=True):
            assert (match.unmatched_spans, match.ambiguous_spans) == (0, 0)
            assert query.logprobs is not None
            np.testing.assert_array_equal(match.logprobs[query.loss_mask], np.float32(query.logprobs[query.loss_mask]))
            assert match.versions[query.loss_mask].tolist() == [base + k // 2 for k in range(3)]
