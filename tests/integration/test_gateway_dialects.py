"""OpenAI's Chat Completions and Responses and Anthropic's Messages through their own SDKs, streamed and not.

Tokens come from the fake engine, so that every text is known. (The conversations of tests/unit/gateway go further.)
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anthropic
import openai
import pytest
from support.fake_engine import FakeEngine, text_reply
from support.sdks import ANTHROPIC, OPENAI, chat, messages, responses, said
from support.serving import serving

PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}


def call_text(x: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"x": {x}}}}}\n</tool_call>'


RENDERED = f"So é世 🙂.\n{call_text(1)}\n{call_text(2)}"
REPLY = f"<think>\nhm\n</think>\n\n{RENDERED}<|im_end|>"
ASK = {"role": "user", "content": "q"}


class Gateway:
    """A gateway before the fake engine, and the SDKs' clients."""

    def __init__(self, engine: FakeEngine, url: str, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.session = {"base_url": f"{url}/v1", "api_key": "K"}
        self.openai = OPENAI.with_options(**self.session)
        self.anthropic = ANTHROPIC.with_options(base_url=url, api_key="K")

    def says(self, *texts: str) -> None:
        self.engine.reset(text_reply(self.tokenizer, *texts), max_context_len=4096)

    def ask(self, api: Callable[..., Any], *history: Any, stream: bool = False, **options: Any) -> Any:
        return api(self.session, history or [ASK], stream=stream, **options)

    def prompt(self) -> str:
        return str(self.tokenizer.decode(self.engine.requests[-1].prompt_token_ids))


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[Gateway]:
    engine = FakeEngine()
    with serving(engine, tokenizer, model_name="tiny", api_key="K") as client:
        yield Gateway(engine, str(client.base_url).rstrip("/"), tokenizer)


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    shared.says(REPLY)
    return shared


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("api", "end", "tokens", "ends"),
    [
        (chat, lambda answer: answer.choices[0].finish_reason, "completion_tokens", ["tool_calls", "stop"]),
        (responses, lambda answer: answer.status, "output_tokens", ["completed", "completed"]),
        (messages, lambda answer: answer.stop_reason, "output_tokens", ["tool_use", "end_turn"]),
    ],
)
def test_an_agent_thinks_calls_tools_in_parallel_and_takes_their_answers(
    gateway: Gateway, api: Callable[..., Any], end: Callable[[Any], str], tokens: str, ends: list[str], stream: bool
) -> None:
    history = [{"role": "system", "content": "Be brief."}, ASK]
    first = gateway.ask(api, *history, stream=stream, tools=[TOOL])
    [answer] = said(first)
    assert (answer["content"], answer["reasoning_content"]) == ("So é世 🙂.", "hm")
    called = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in answer["tool_calls"]]
    assert called == [("add", {"x": 1}), ("add", {"x": 2})] and len({one["id"] for one in answer["tool_calls"]}) == 2
    assert getattr(first.usage, tokens) == len(gateway.tokenizer.encode(REPLY))
    results = [
        {"role": "tool", "tool_call_id": one["id"], "content": f"r{k}"} for k, one in enumerate(answer["tool_calls"])
    ]
    gateway.says("3<|im_end|>")
    last = gateway.ask(api, *history, answer, *reversed(results), stream=stream, tools=[TOOL])
    assert said(last)[0]["content"] == "3" and [end(first), end(last)] == ends
    prompt = gateway.prompt().replace('"x":1', '"x": 1').replace('"x":2', '"x": 2')
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call tools:")
    answered = "<tool_response>\nr1\n</tool_response>\n<tool_response>\nr0\n</tool_response><|im_end|>"
    assert f"<|im_start|>assistant\n{RENDERED}<|im_end|>\n<|im_start|>user\n{answered}" in prompt


def test_reasoning_stays_in_the_content_unless_tools_or_the_client_ask(gateway: Gateway) -> None:
    gateway.says("<think>a</think>b<|im_end|>")
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    for api, options in ((chat, {"extra_body": {"separate_reasoning": True}}), (messages, thinking)):
        assert said(gateway.ask(api))[0]["content"] == "<think>a</think>b"
        [apart] = said(gateway.ask(api, stream=True, **options))
        assert (apart["content"], apart["reasoning_content"]) == ("b", "a")


def test_responses_continue_by_the_id_of_the_last(gateway: Gateway) -> None:
    create = partial(gateway.openai.responses.create, model="tiny", tools=[{"type": "function", **TOOL["function"]}])
    first = create(input="q", instructions="Be brief.")
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "r"} for item in first.output[2:]]
    create(input=results, previous_response_id=first.id)
    assert f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{RENDERED}<|im_end|>\n" in gateway.prompt()
    assert "Be brief." not in gateway.prompt()  # instructions are of one request
    cut = create(input="q", max_output_tokens=9, store=False)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    for name in ("resp_x", cut.id):
        with pytest.raises(openai.BadRequestError, match="send the whole conversation") as caught:
            create(input="q", previous_response_id=name)
        assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_messages_end_for_the_reasons_of_the_api(gateway: Gateway, stream: bool) -> None:
    gateway.says("aX")
    stopped = gateway.ask(messages, stream=stream, stop_sequences=["X"])
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("a", "stop_sequence", "X")
    cut = gateway.ask(messages, stream=stream, max_tokens=1)
    assert (cut.content[0].text, cut.stop_reason) == ("a", "max_tokens")
    gateway.says("<|im_end|>")
    assert gateway.ask(messages, stream=stream).content == []


def test_messages_count_their_tokens_and_hold_results_beside_text(gateway: Gateway) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "r"}]}
    asked: dict[str, Any] = {"model": "tiny", "system": [{"type": "text", "text": "Be brief."}]}
    asked["messages"] = [{"role": "user", "content": [{"type": "text", "text": "and?"}, result]}]
    answer = gateway.anthropic.messages.create(**asked, max_tokens=9)
    assert "system\nBe brief.<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>user\nand?" in gateway.prompt()
    assert gateway.anthropic.messages.count_tokens(**asked).input_tokens == answer.usage.input_tokens


def test_errors_are_the_sdks_own(gateway: Gateway) -> None:
    gpt, claude = gateway.openai, gateway.anthropic
    search: Any = [{"type": "web_search_20250305", "name": "web_search"}]
    message = partial(claude.messages.create, model="m", max_tokens=9, messages=[ASK], tools=search)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        gpt.with_options(api_key="x").models.list()
    with pytest.raises(openai.NotFoundError, match="no such endpoint"):
        gpt.embeddings.create(model="m", input="a")
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.completions.create(model="m", prompt="a" * 5000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(anthropic.AuthenticationError, match="API key"):
        claude.with_options(api_key="x").models.list()
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="web_search") as caught:
            message(stream=stream)
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize("api", [chat, responses, messages])
def test_errors_inside_a_stream_reach_the_sdks(gateway: Gateway, api: Callable[..., Any]) -> None:
    gateway.engine.fail_with, gateway.engine.fail_after = RuntimeError("x"), 2
    with pytest.raises((openai.APIError, anthropic.APIError), match="internal error"):
        gateway.ask(api, stream=True)
