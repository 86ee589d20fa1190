"""/v1/chat/completions and /v1/completions: values of every field, streaming, refusals."""

import json
import logging
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine, text_reply
from support.serving import post, refused, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.types import GenerationRequest

TOKENIZER = build_tiny_tokenizer()
HI = [{"role": "user", "content": "hi"}]
# <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n
HI_IDS = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)


@pytest.fixture
def engine(served: tuple[FakeEngine, httpx.Client]) -> FakeEngine:
    served[0].reset(text_reply(TOKENIZER, "yes<|im_end|>", "no<|im_end|>"))
    return served[0]


def events(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_chat_answer_has_every_field(client: httpx.Client, engine: FakeEngine) -> None:
    engine.policy_version = 7
    answer = post(client, "/v1/chat/completions", model="tiny", messages=HI, n=2, logprobs=True, return_token_ids=True)
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["prompt_token_ids"] == HI_IDS
    # "yes" + eos = 4 tokens, "no" + eos = 3
    usage = {"prompt_tokens": len(HI_IDS), "completion_tokens": 7, "total_tokens": len(HI_IDS) + 7}
    assert answer["usage"] == usage
    assert answer["policy_version"] == 7 and answer["policy_versions"] == [[7, 7], [7, 7]]
    first, second = answer["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["message"] == {"role": "assistant", "content": "yes"}
    assert second["message"] == {"role": "assistant", "content": "no"}
    assert first["finish_reason"] == "stop"
    assert first["token_ids"] == [88, 68, 82, 258]
    assert first["logprobs"]["content"][0] == {"token": "y", "logprob": -0.125, "bytes": [121], "top_logprobs": []}
    assert [entry["logprob"] for entry in second["logprobs"]["content"]] == [-(k / 8) - 1 / 1024 for k in (1, 2, 3)]


def test_chat_passes_every_sampling_parameter(client: httpx.Client, engine: FakeEngine) -> None:
    same = {"n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 11, "ignore_eos": True}
    # letter_counting of Atropos sends the id of an end among the stop strings
    body = {"max_completion_tokens": 5, "max_tokens": 99, "stop": ["END", 258], "stop_token_ids": [3, 4], **same}
    post(client, "/v1/chat/completions", messages=HI, **body)
    [sent] = engine.requests
    expected = {"max_tokens": 5, "stop": ("END",), "stop_token_ids": (3, 4, 258), "request_id": sent.request_id, **same}
    assert sent == GenerationRequest(prompt_token_ids=tuple(HI_IDS), **expected)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_apis(client: httpx.Client, engine: FakeEngine) -> None:
    post(client, "/v1/chat/completions", messages=HI, temperature=None, stop=None, top_k=0, max_tokens=None)
    post(client, "/v1/completions", prompt="hi")
    chat, text = engine.requests
    assert chat.max_tokens == 512 - len(HI_IDS)  # the rest of the context
    assert (chat.temperature, chat.top_p, chat.top_k, chat.min_p, chat.stop, chat.seed) == (1.0, 1.0, -1, 0.0, (), None)
    assert text.max_tokens == 16
    assert text.prompt_token_ids == (71, 72)


def test_chat_content_parts_tools_and_template_options() -> None:
    engine, tokenizer = FakeEngine(), build_tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].content }}|{{ tools[0].function.name }}|{{ mood }}|{{ add_generation_prompt }}"
    )
    parts = [{"type": "text", "text": text} for text in "ab"]
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    options = {"chat_template_kwargs": {"mood": "calm"}, "add_generation_prompt": False}
    with serving(engine, tokenizer) as client:
        post(client, "/v1/chat/completions", messages=[{"role": "user", "content": parts}], **tools, **options)
    assert engine.requests[0].prompt_token_ids == tuple(TOKENIZER.encode("a\nb|f|calm|False"))


def test_completions_take_every_form_of_prompt(client: httpx.Client, engine: FakeEngine) -> None:
    for prompt in ("hi", ["hi", "a"], [71, 72], [[71, 72], [64]]):
        post(client, "/v1/completions", prompt=prompt)
    hi, a = (71, 72), (64,)
    assert sorted(r.prompt_token_ids for r in engine.requests) == sorted([hi, hi, a, hi, hi, a])


def test_completion_choices_are_in_prompt_order(client: httpx.Client) -> None:
    answer = post(client, "/v1/completions", prompt=["a", "bc"], n=2, logprobs=0, return_token_ids=True)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    as_ids = post(client, "/v1/completions", prompt="a", logprobs=0, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["tokens"] == ["token_id:88", "token_id:68", "token_id:82", "token_id:258"]
    assert [c["text"] for c in answer["choices"]] == ["yes", "no", "yes", "no"]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[64], [64], [65, 66], [65, 66]]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 14, "total_tokens": 17}
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1, 2, 3],
        "tokens": ["y", "e", "s", "<|im_end|>"],
        "token_logprobs": [-0.125, -0.25, -0.375, -0.5],
        "top_logprobs": [{"y": -0.125}, {"e": -0.25}, {"s": -0.375}, {"<|im_end|>": -0.5}],
    }


def test_stop_string_is_cut_from_text_but_kept_in_tokens(client: httpx.Client, engine: FakeEngine) -> None:
    engine.reply = text_reply(TOKENIZER, "answer</a>")
    answer = post(client, "/v1/completions", prompt="a", stop=["</a>"], return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["text"] == "answer" and choice["finish_reason"] == "stop" and choice["stop_reason"] == "</a>"
    assert choice["token_ids"] == TOKENIZER.encode("answer</a>")
    kept = post(client, "/v1/completions", prompt="a", stop=["</a>"], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "answer</a>"


def test_length_is_cut_to_the_rest_of_the_context(client: httpx.Client, engine: FakeEngine) -> None:
    engine.max_context_len = 10
    engine.reply = lambda request, index: [64] * 100
    answer = post(client, "/v1/completions", prompt="a" * 7, max_tokens=50)
    assert engine.requests[0].max_tokens == 3
    assert answer["choices"][0]["text"] == "aaa" and answer["choices"][0]["finish_reason"] == "length"
    post(client, "/v1/completions", prompt="a" * 9)
    assert engine.requests[1].max_tokens == 1
    error = refused(client, "/v1/completions", prompt="a" * 10)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "maximum context length is 10 tokens" in error["message"] and "10 tokens" in error["message"]
    assert refused(client, "/v1/chat/completions", messages=HI)["param"] == "messages"


def test_version_of_the_first_token_is_reported_when_weights_change_midway(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.policy_version = 4

    def logprob(index: int, position: int) -> float:
        engine.policy_version = 4 + position
        return -1.0

    engine.reply, engine.logprob = lambda request, index: [64, 65, 66], logprob
    answer = post(client, "/v1/completions", prompt="a")
    assert answer["policy_version"] == 4 and answer["policy_versions"] == [[4, 6]]


def test_bytes_are_those_of_the_token_and_every_end_of_the_engine_is_cut(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.reply = text_reply(TOKENIZER, "é<|im_start|>")
    answer = post(client, "/v1/chat/completions", messages=HI, logprobs=True, skip_special_tokens=False)
    assert [e["bytes"] for e in answer["choices"][0]["logprobs"]["content"][:2]] == [[0xC3], [0xA9]]
    assert answer["choices"][0]["message"]["content"] == "é<|im_start|>"
    two = FakeEngine(engine.reply)
    two.eos_token_ids = frozenset({257, 258})
    with serving(two, TOKENIZER) as other:
        answer = post(other, "/v1/chat/completions", messages=HI, skip_special_tokens=False)
        assert answer["choices"][0]["message"]["content"] == "é"


def test_infinite_logprob_is_sent_as_vllm_does_and_nan_is_an_error(client: httpx.Client, engine: FakeEngine) -> None:
    engine.logprob = lambda index, position: float("-inf") if position == 1 else -0.5
    answer = post(client, "/v1/completions", prompt="a", logprobs=0, max_tokens=3)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -9999.0, -0.5]
    engine.logprob = lambda index, position: float("nan")
    response = client.post("/v1/completions", json={"prompt": "a", "logprobs": 0})
    assert response.status_code == 500
    assert "logprob of a generated token is NaN" in response.json()["error"]["message"]


def test_chat_stream(client: httpx.Client) -> None:
    options = {"stream_options": {"include_usage": True}, "return_token_ids": True, "logprobs": True}
    chunks = events(client, "/v1/chat/completions", messages=HI, n=2, **options)
    *pieces, last = chunks
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": len(HI_IDS), "completion_tokens": 7, "total_tokens": len(HI_IDS) + 7}
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in pieces)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, (text, ids) in enumerate([("yes", [88, 68, 82, 258]), ("no", [77, 78, 258])]):
        mine = [chunk["choices"][0] for chunk in pieces if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in mine) == text
        assert [token_id for choice in mine[1:] for token_id in choice["token_ids"]] == ids
        logprobs = [entry["logprob"] for choice in mine[1:] for entry in choice["logprobs"]["content"]]
        assert logprobs == [-(k + 1) / 8 - index / 1024 for k in range(len(ids))]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_completion_stream_has_offsets_and_no_usage_unless_asked(client: httpx.Client) -> None:
    chunks = events(client, "/v1/completions", prompt="a", logprobs=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "yes"
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2], [3]]
    assert all("usage" not in chunk for chunk in chunks)
    assert refused(client, "/v1/completions", prompt=["a", "b"], stream=True)["param"] == "stream"


def test_error_inside_a_stream_is_its_last_event(client: httpx.Client, engine: FakeEngine) -> None:
    engine.fail_with, engine.fail_after = RuntimeError("secret detail"), 2
    response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "internal_server_error"
    assert "RuntimeError" in last["error"]["message"] and "secret" not in last["error"]["message"]
    assert "[DONE]" not in response.text


REFUSED: dict[str, list[Any]] = {
    "repetition_penalty": [1.1],
    "frequency_penalty": [0.5],
    "presence_penalty": [-1],
    "logit_bias": [{"5": 10}],
    "best_of": [4],
    "min_tokens": [3],
    "guided_json": [{"type": "object"}],
    "response_format": [{"type": "json_object"}],
    "echo": [True],
    "suffix": ["x"],
    "temperature": [-0.1, "hot", 10**400],
    "top_p": [0, 1.5],
    "top_k": [-2],
    "min_p": [2],
    "n": [0, 1.5, True, 10**30],
    "max_tokens": [0],
    "stop": [[""], 5.5, [-1], ["a"] * 257, "a" * 4097],
    "stop_token_ids": [[1, -1], [10**30], [[]]],
    "prompt_logprobs": [0],
    "background": [True],
    "spaces_between_special_tokens": [False],
    "seed": ["x"],
    "stream": ["yes"],
    "logprobs": [21],
    "prompt": [[], [[]], [1, "a"], {"a": 1}],
    "stream_options": [3],
}
CHAT_REFUSED: dict[str, list[Any]] = {
    "top_logprobs": [5],
    "messages": [[], ["hi"], *([{"role": "user", "content": bad}] for bad in (3, [{"type": "image_url"}]))],
    "tool_choice": ["required", {"type": "function", "function": "f"}, {"type": "allowed_tools"}, 3],
    "response_format": [{"type": "grammar"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 3}, 3],
    "functions": [[{"name": "f"}]],
    "chat_template_kwargs": [
        *({name: 1} for name in ("tokenize", "self", "messages", "tools", "add_generation_prompt", "chat_template")),
        *({name: 1} for name in ("conversation", "conversations", "documents", "tokenizer_kwargs", "return_dict")),
    ],
    "tools": [
        *("f", ["f"], [{"type": "function"}], [{"type": "web_search"}], [{"type": "custom", "custom": {"name": "f"}}]),
        *([{"function": {"name": "f"}}] * 2, [{"function": {"name": "f", "parameters": [1]}}]),
    ],
    "parallel_tool_calls": ["yes"],
    "prompt_template": ["x"],
    "continue_final_message": [True],
}


@pytest.mark.parametrize("field", [*REFUSED, *(f"chat {field}" for field in CHAT_REFUSED)])
def test_refusals_name_the_field_and_never_reach_the_engine(
    client: httpx.Client, engine: FakeEngine, field: str
) -> None:
    chat, name = field.startswith("chat "), field.removeprefix("chat ")
    path, whole = ("/v1/chat/completions", {"messages": HI}) if chat else ("/v1/completions", {"prompt": "a"})
    for value in (CHAT_REFUSED if chat else REFUSED)[name]:
        error = refused(client, path, **{**whole, name: value})
        assert error["param"] == name and name in error["message"], value
    assert engine.requests == []


def test_neutral_values_of_unsupported_fields_pass(client: httpx.Client, engine: FakeEngine) -> None:
    neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    neutral |= {"best_of": 1, "response_format": {"type": "text"}, "guided_json": None, "tools": None, "user": "me"}
    post(client, "/v1/chat/completions", messages=HI, top_logprobs=0, **neutral)
    assert len(engine.requests) == 1


def test_unknown_fields_and_models_are_logged_once(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="atropos_verl"):
        for _ in range(3):
            post(client, "/v1/completions", prompt="a", model="gpt-x", reasoning={"effort": "low"}, user="u")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any("'reasoning'" in message for message in messages)
    assert any("'gpt-x'" in message and "'tiny'" in message for message in messages)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b'{"prompt": "\xff"}'])
def test_bodies_that_are_no_json_object(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
