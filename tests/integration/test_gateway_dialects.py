"""OpenAI's Chat Completions and Responses and Anthropic's Messages through their own SDKs, streamed and not.

Tokens come from the fake engine, so that every text is known; the last tests sample from the demo model.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from support.fake_engine import FakeEngine, text_reply
from support.serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_verl.assets import demo_model_path
from atropos_verl.engine.embedded import TransformersEngine

PARAMETERS = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
RESPONSES_TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": PARAMETERS, "strict": True}
ANTHROPIC_TOOL = {"name": "add", "description": "Adds.", "input_schema": PARAMETERS}


def call_text(x: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"x": {x}}}}}\n</tool_call>'


REPLY = f"<think>\nhm\n</think>\n\nSo é世 🙂.\n{call_text(1)}\n{call_text(2)}<|im_end|>"
RENDERED = f"So é世 🙂.\n{call_text(1)}\n{call_text(2)}"


class Gateway:
    """A gateway before the fake engine, and the SDKs' clients."""

    def __init__(self, engine: FakeEngine, url: str, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="K", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key="K", max_retries=0)

    def says(self, *texts: str) -> None:
        self.engine.reset(text_reply(self.tokenizer, *texts), max_context_len=4096)

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


# -- chat completions ------------------------------------------------------------------------------------------------


def chat(client: openai.OpenAI, streamed: bool, **body: Any) -> Any:
    body = {"model": "tiny", **body}
    if not streamed:
        return client.chat.completions.create(**body)
    with client.chat.completions.stream(**body, stream_options={"include_usage": True}) as stream:
        return stream.get_final_completion()


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_calls_tools_in_parallel_and_takes_their_answers(gateway: Gateway, streamed: bool) -> None:
    said: list[Any] = [{"role": "user", "content": "q"}]
    first = chat(gateway.openai, streamed, messages=said, tools=[CHAT_TOOL])
    [choice] = first.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "So é世 🙂."
    assert choice.message.model_extra["reasoning_content"] == "hm"
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("add", '{"x": 1}'),
        ("add", '{"x": 2}'),
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert first.usage.completion_tokens == len(gateway.tokenizer.encode(REPLY))
    # Answers come in another order; the message goes back as the SDK has it.
    answers = [
        {"role": "tool", "tool_call_id": c.id, "content": f"r{k}"} for k, c in enumerate(choice.message.tool_calls)
    ]
    gateway.says("3<|im_end|>")
    said += [choice.message.model_dump(exclude_none=True), *reversed(answers)]
    last = chat(gateway.openai, streamed, messages=said, tools=[CHAT_TOOL])
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("3", "stop")
    assert f"<|im_start|>assistant\n{RENDERED}<|im_end|>\n<|im_start|>user\n<tool_response>\nr1" in gateway.prompt()


def test_chat_reasoning_stays_in_the_content_unless_tools_or_the_client_ask(gateway: Gateway) -> None:
    gateway.says("<think>a</think>b<|im_end|>")
    said = [{"role": "user", "content": "q"}]
    assert chat(gateway.openai, False, messages=said).choices[0].message.content == "<think>a</think>b"
    apart = chat(gateway.openai, True, messages=said, extra_body={"separate_reasoning": True}).choices[0].message
    assert (apart.content, apart.model_extra["reasoning_content"]) == ("b", "a")


# -- responses -------------------------------------------------------------------------------------------------------


def respond(client: openai.OpenAI, streamed: bool, **body: Any) -> Any:
    body = {"model": "tiny", **body}
    if not streamed:
        return client.responses.create(**body)
    with client.responses.stream(**body) as stream:
        numbers = [event.sequence_number for event in stream]
        assert numbers == list(range(len(numbers)))
        return stream.get_final_response()


def parts(response: Any) -> list[tuple[str, ...]]:
    shown: dict[str, Callable[[Any], tuple[str, ...]]] = {
        "reasoning": lambda item: (item.content[0].text,),
        "message": lambda item: (item.content[0].text,),
        "function_call": lambda item: (item.name, item.arguments),
    }
    return [(item.type, *shown[item.type](item)) for item in response.output]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_responses_with_their_whole_history_or_the_id_of_the_last(
    gateway: Gateway, streamed: bool, stateful: bool
) -> None:
    said: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]
    first = respond(gateway.openai, streamed, input=said, tools=[RESPONSES_TOOL], instructions="Be brief.")
    assert first.status == "completed" and first.output_text == "So é世 🙂."
    assert parts(first) == [
        ("reasoning", "hm"),
        ("message", "So é世 🙂."),
        ("function_call", "add", '{"x": 1}'),
        ("function_call", "add", '{"x": 2}'),
    ]
    tokens = len(gateway.tokenizer.encode(REPLY))
    assert (first.usage.output_tokens, first.usage.total_tokens) == (tokens, tokens + first.usage.input_tokens)
    calls = [item for item in first.output if item.type == "function_call"]
    answers = [{"type": "function_call_output", "call_id": c.call_id, "output": f"r{k}"} for k, c in enumerate(calls)]
    gateway.says("3<|im_end|>")
    if stateful:
        last = respond(gateway.openai, streamed, input=answers, previous_response_id=first.id, tools=[RESPONSES_TOOL])
    else:
        said += [*(item.model_dump(exclude_none=True) for item in first.output), *answers]
        last = respond(gateway.openai, streamed, input=said, tools=[RESPONSES_TOOL])
    assert last.output_text == "3" and last.status == "completed"
    prompt = gateway.prompt()
    assert (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{RENDERED}<|im_end|>\n<|im_start|>user\n<tool_resp"
        in prompt
    )
    assert "Be brief." not in prompt  # instructions are of one request


def test_responses_that_are_cut_say_so_and_unknown_ids_are_refused(gateway: Gateway) -> None:
    cut = respond(gateway.openai, False, input="q", max_output_tokens=9)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    forgotten = respond(gateway.openai, False, input="q", store=False)
    for name in ("resp_x", forgotten.id):
        with pytest.raises(openai.BadRequestError, match="send the whole conversation") as caught:
            respond(gateway.openai, False, input="q", previous_response_id=name)
        assert caught.value.code == "previous_response_not_found"


# -- messages --------------------------------------------------------------------------------------------------------


def message(client: anthropic.Anthropic, streamed: bool, **body: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 500, **body}
    if not streamed:
        return client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_think_call_tools_and_take_their_results(gateway: Gateway, streamed: bool) -> None:
    said: list[Any] = [{"role": "user", "content": "q"}]
    more = {"tools": [ANTHROPIC_TOOL], "system": [{"type": "text", "text": "Be brief."}]}
    more |= {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    first = message(gateway.anthropic, streamed, messages=said, **more)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (first.content[0].thinking, first.content[1].text) == ("hm", "So é世 🙂.")
    assert [block.input for block in first.content[2:]] == [{"x": 1}, {"x": 2}]
    assert first.stop_reason == "tool_use"
    assert first.usage.output_tokens == len(gateway.tokenizer.encode(REPLY))
    prompt_tokens = first.usage.input_tokens
    assert gateway.anthropic.messages.count_tokens(model="tiny", messages=said, **more).input_tokens == prompt_tokens
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": f"r{k}"}]}
        for k, block in enumerate(first.content[2:])
    ]
    gateway.says("3<|im_end|>")
    said += [{"role": "assistant", "content": [block.model_dump() for block in first.content]}]
    said += [{"role": "user", "content": [*reversed(results), {"type": "text", "text": "and?"}]}]
    last = message(gateway.anthropic, streamed, messages=said, **more)
    assert (last.content[0].text, last.stop_reason) == ("3", "end_turn")
    answered = "<tool_response>\nr1\n</tool_response>\n<tool_response>\nr0\n</tool_response><|im_end|>"
    prompt = gateway.prompt()
    assert f"<|im_start|>assistant\n{RENDERED}<|im_end|>".replace('"x": ', '"x":') in prompt
    assert f"<|im_start|>user\n{answered}\n<|im_start|>user\nand?<|im_end|>" in prompt
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call tools:")


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_end_for_the_reasons_of_the_api(gateway: Gateway, streamed: bool) -> None:
    said = [{"role": "user", "content": "q"}]
    gateway.says("aX")
    stopped = message(gateway.anthropic, streamed, messages=said, stop_sequences=["X"])
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("a", "stop_sequence", "X")
    cut = message(gateway.anthropic, streamed, messages=said, max_tokens=1)
    assert (cut.content[0].text, cut.stop_reason) == ("a", "max_tokens")
    gateway.says("<|im_end|>")
    assert message(gateway.anthropic, streamed, messages=said).content == []


# -- errors ----------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def test_errors_are_the_sdks_own_and_images_are_refused_by_name(gateway: Gateway) -> None:
    said = [{"role": "user", "content": [IMAGE]}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        chat(gateway.openai, False, messages=said)
    with pytest.raises(openai.BadRequestError, match="input_image"):
        respond(gateway.openai, True, input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}])
    for streamed in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="image") as caught:
            result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}
            message(gateway.anthropic, streamed, messages=[{"role": "user", "content": [result]}])
        assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        message(gateway.anthropic.with_options(api_key="wrong"), False, messages=said)
    said = [{"role": "user", "content": "q"}]
    with pytest.raises(anthropic.BadRequestError, match="web_search"):
        message(gateway.anthropic, False, messages=said, tools=[{"type": "web_search_20250305", "name": "web_search"}])


def test_errors_inside_a_stream_reach_the_sdks(gateway: Gateway) -> None:
    said = [{"role": "user", "content": "q"}]
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (openai.APIError, lambda: chat(gateway.openai, True, messages=said)),
        (openai.APIError, lambda: respond(gateway.openai, True, input="q")),
        (anthropic.APIError, lambda: message(gateway.anthropic, True, messages=said)),
    ]
    for kind, call in calls:
        gateway.engine.fail_with, gateway.engine.fail_after = RuntimeError("x"), 2
        with pytest.raises(kind, match="internal error"):
            call()
        gateway.says(REPLY)


# -- what is enforced, by the embedded engine ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[openai.OpenAI, anthropic.Anthropic]]:
    path = demo_model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with (
        TransformersEngine(model, tokenizer, num_threads=1) as engine,
        serving(engine, tokenizer, model_name="demo") as client,
    ):
        url = str(client.base_url).rstrip("/")
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="K"), anthropic.Anthropic(base_url=url, api_key="K")


ASK: list[Any] = [{"role": "user", "content": "1+1"}]
FORMAT = {"name": "n", "schema": PARAMETERS, "strict": True}


@pytest.mark.parametrize("streamed", [False, True])
def test_formats_and_calls_are_enforced(real: tuple[openai.OpenAI, anthropic.Anthropic], streamed: bool) -> None:
    client, messages = real
    formatted = chat(
        client, streamed, messages=ASK, response_format={"type": "json_schema", "json_schema": FORMAT}, seed=1
    )
    assert list(json.loads(formatted.choices[0].message.content)) == ["x"]
    called = chat(client, streamed, messages=ASK, tools=[CHAT_TOOL], tool_choice="required", parallel_tool_calls=False)
    [call] = called.choices[0].message.tool_calls
    assert list(json.loads(call.function.arguments)) == ["x"] and called.choices[0].finish_reason == "tool_calls"
    response = respond(client, streamed, input="1+1", text={"format": {"type": "json_schema", **FORMAT}})
    assert list(json.loads(response.output_text)) == ["x"]
    tool = {
        "tools": [ANTHROPIC_TOOL],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    }
    [block] = message(messages, streamed, messages=ASK, **tool).content
    assert block.type == "tool_use" and isinstance(block.input["x"], int)


def test_alternatives_and_seeds(real: tuple[openai.OpenAI, anthropic.Anthropic]) -> None:
    client, _ = real
    asked = {"messages": ASK, "n": 2, "seed": 7, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    first, again = chat(client, False, **asked), chat(client, True, **asked)
    for one, other in zip(first.choices, again.choices, strict=True):
        assert one.message.content == other.message.content
        for entry, streamed in zip(one.logprobs.content, other.logprobs.content, strict=True):
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert entry.logprob == pytest.approx(streamed.logprob, abs=1e-4)
            known = {top.token: top.logprob for top in entry.top_logprobs}
            assert known.get(entry.token, entry.logprob) == entry.logprob


def test_a_schema_that_cannot_be_enforced_is_refused_by_name(real: tuple[openai.OpenAI, anthropic.Anthropic]) -> None:
    schema = {"type": "object", "not": {"type": "string"}}
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"response_format: it cannot be enforced.*not") as caught:
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
            list(real[0].chat.completions.create(model="demo", messages=ASK, response_format=form, stream=streamed))
        assert caught.value.param == "response_format"
