"""/v1/chat/completions, /v1/completions, and /generate of vLLM, SGLang and trl: values of every field, and refusals."""

import json
import logging
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine, logprob_of, text_reply
from support.serving import post, refused, serving
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.types import GenerationRequest

TOKENIZER = build_tiny_tokenizer()
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
HI_IDS = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
YES, NO = [88, 68, 82, 258], [77, 78, 258]  # byte - 33, then <|im_end|>


@pytest.fixture
def engine(served: tuple[FakeEngine, httpx.Client]) -> FakeEngine:
    """Two completions: yes, no."""
    served[0].reset(text_reply(TOKENIZER, "yes<|im_end|>", "no<|im_end|>"))
    return served[0]


@pytest.fixture
def counting(engine: FakeEngine) -> FakeEngine:
    """It counts on from the last prompt token, completion i starting i higher."""
    engine.reset()
    return engine


def logprobs_of(index: int, ids: list[int]) -> list[float]:
    return [logprob_of(index, position) for position in range(len(ids))]


def events(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_chat_answer_has_every_field(client: httpx.Client, engine: FakeEngine) -> None:
    engine.policy_version = 7
    answer = post(client, CHAT, model="tiny", messages=HI, n=2, logprobs=True, return_token_ids=True)
    assert answer.pop("id").startswith("chatcmpl-") and answer.pop("created")
    first, second = answer.pop("choices")
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "prompt_token_ids": HI_IDS,
        "usage": {"prompt_tokens": len(HI_IDS), "completion_tokens": 7, "total_tokens": len(HI_IDS) + 7},
        "policy_version": 7,
        "policy_versions": [[7, 7], [7, 7]],
    }
    for index, (choice, text, ids) in enumerate(((first, "yes", YES), (second, "no", NO))):
        entries = choice.pop("logprobs")["content"]
        assert choice.pop("message") == {"role": "assistant", "content": text}
        assert choice == {"index": index, "finish_reason": "stop", "stop_reason": None, "token_ids": ids}
        assert [entry["logprob"] for entry in entries] == logprobs_of(index, ids)
        first_letter = {"token": text[0], "logprob": logprob_of(index, 0), "bytes": [ord(text[0])], "top_logprobs": []}
        assert entries[0] == first_letter


def test_chat_passes_every_sampling_parameter_and_neutral_values_of_others(
    client: httpx.Client, engine: FakeEngine
) -> None:
    same = {"n": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 11, "ignore_eos": True}
    # letter_counting of Atropos sends the id of an end among the stop strings
    body = {"max_completion_tokens": 5, "max_tokens": 99, "stop": ["END", 258], "stop_token_ids": [3, 4], **same}
    neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    neutral |= {"best_of": 3, "response_format": {"type": "text"}, "guided_json": None, "tools": None, "user": "me"}
    post(client, CHAT, messages=HI, top_logprobs=0, **body, **neutral)
    [sent] = engine.requests
    expected = {"max_tokens": 5, "stop": ("END",), "stop_token_ids": (3, 4, 258), "request_id": sent.request_id, **same}
    assert sent == GenerationRequest(prompt_token_ids=tuple(HI_IDS), **expected)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_apis(client: httpx.Client, engine: FakeEngine) -> None:
    post(client, CHAT, messages=HI, temperature=None, stop=None, top_k=0, max_tokens=None)
    post(client, COMPLETIONS, prompt="hi")
    chat, text = engine.requests
    assert chat.max_tokens == 512 - len(HI_IDS)  # the rest of the context
    assert (chat.temperature, chat.top_p, chat.top_k, chat.min_p, chat.stop, chat.seed) == (1.0, 1.0, -1, 0.0, (), None)
    assert (text.max_tokens, text.prompt_token_ids) == (16, (71, 72))


def test_completions_take_every_form_of_prompt_and_answer_in_their_order(
    client: httpx.Client, engine: FakeEngine
) -> None:
    for prompt in ("a", [64], ["a"]):
        post(client, COMPLETIONS, prompt=prompt)
        assert engine.requests.pop().prompt_token_ids == (64,)
    answer = post(client, COMPLETIONS, prompt=[[64], [65, 66]], n=2, logprobs=0, return_token_ids=True)
    shown = [(c["index"], c["text"], c["prompt_token_ids"]) for c in answer["choices"]]
    assert shown == [(0, "yes", [64]), (1, "no", [64]), (2, "yes", [65, 66]), (3, "no", [65, 66])]
    assert sorted((request.place, request.asked) for request in engine.requests) == [(0, 4), (2, 4)]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 14, "total_tokens": 17}
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1, 2, 3],
        "tokens": ["y", "e", "s", "<|im_end|>"],
        "token_logprobs": [-0.125, -0.25, -0.375, -0.5],
        "top_logprobs": [{"y": -0.125}, {"e": -0.25}, {"s": -0.375}, {"<|im_end|>": -0.5}],
    }
    as_ids = post(client, COMPLETIONS, prompt="a", logprobs=0, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in YES]


def test_stop_string_is_cut_from_text_but_kept_in_tokens(client: httpx.Client, engine: FakeEngine) -> None:
    engine.reply = text_reply(TOKENIZER, "answer</a>")
    asked = {"prompt": "a", "stop": ["</a>"], "return_token_ids": True}
    for include, text in ((False, "answer"), (True, "answer</a>")):
        [choice] = post(client, COMPLETIONS, **asked, include_stop_str_in_output=include)["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "</a>")
        assert choice["token_ids"] == TOKENIZER.encode("answer</a>")


def test_length_is_cut_to_the_rest_of_the_context(client: httpx.Client, engine: FakeEngine) -> None:
    engine.max_context_len, engine.reply = 10, lambda request, index: [64] * 100
    [choice] = post(client, COMPLETIONS, prompt="a" * 7, max_tokens=50)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("aaa", "length")
    post(client, COMPLETIONS, prompt="a" * 9)
    assert [request.max_tokens for request in engine.requests] == [3, 1]
    error = refused(client, COMPLETIONS, prompt="a" * 10)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "maximum context length is 10 tokens, but the prompt has 10 tokens" in error["message"]
    assert refused(client, CHAT, messages=HI)["param"] == "messages"


def test_version_of_the_first_token_is_reported_when_weights_change_midway(
    client: httpx.Client, engine: FakeEngine
) -> None:
    def logprob(index: int, position: int) -> float:
        engine.policy_version = 4 + position
        return -1.0

    engine.policy_version, engine.logprob = 4, logprob
    answer = post(client, COMPLETIONS, prompt="a", max_tokens=3)
    assert (answer["policy_version"], answer["policy_versions"]) == (4, [[4, 6]])


def test_bytes_are_those_of_the_token_and_every_end_of_the_engine_is_cut(
    client: httpx.Client, engine: FakeEngine
) -> None:
    engine.reply = text_reply(TOKENIZER, "é<|im_start|>")
    asked = {"messages": HI, "logprobs": True, "skip_special_tokens": False}
    [choice] = post(client, CHAT, **asked)["choices"]
    assert [entry["bytes"] for entry in choice["logprobs"]["content"][:2]] == [[0xC3], [0xA9]]
    assert choice["message"]["content"] == "é<|im_start|>"
    two = FakeEngine(engine.reply)
    two.eos_token_ids = frozenset({257, 258})
    with serving(two, TOKENIZER) as other:
        assert post(other, CHAT, **asked)["choices"][0]["message"]["content"] == "é"


def test_infinite_logprob_is_sent_as_vllm_does_and_nan_is_an_error(client: httpx.Client, engine: FakeEngine) -> None:
    engine.logprob = lambda index, position: float("-inf") if position == 1 else -0.5
    answer = post(client, COMPLETIONS, prompt="a", logprobs=0, max_tokens=3)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -9999.0, -0.5]
    engine.logprob = lambda index, position: float("nan")
    response = client.post(COMPLETIONS, json={"prompt": "a", "logprobs": 0})
    assert response.status_code == 500
    assert "logprob of a generated token is NaN" in response.json()["error"]["message"]


def test_chat_stream(client: httpx.Client, engine: FakeEngine) -> None:
    options = {"stream_options": {"include_usage": True}, "return_token_ids": True, "logprobs": True}
    chunks = events(client, CHAT, messages=HI, n=2, **options)
    *pieces, last = chunks
    usage = {"prompt_tokens": len(HI_IDS), "completion_tokens": 7, "total_tokens": len(HI_IDS) + 7}
    assert (last["choices"], last["usage"]) == ([], usage)
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in pieces)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, (text, ids) in enumerate([("yes", YES), ("no", NO)]):
        first, *mine = [chunk["choices"][0] for chunk in pieces if chunk["choices"][0]["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in mine) == text
        assert [token_id for choice in mine for token_id in choice["token_ids"]] == ids
        logprobs = [entry["logprob"] for choice in mine for entry in choice["logprobs"]["content"]]
        assert logprobs == logprobs_of(index, ids)
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_completion_stream_has_offsets_and_no_usage_unless_asked(client: httpx.Client, engine: FakeEngine) -> None:
    chunks = events(client, COMPLETIONS, prompt="a", logprobs=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "yes"
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2], [3]]
    assert all("usage" not in chunk for chunk in chunks)
    assert refused(client, COMPLETIONS, prompt=["a", "b"], stream=True)["param"] == "stream"


def test_error_inside_a_stream_is_its_last_event(client: httpx.Client, engine: FakeEngine) -> None:
    engine.fail_with, engine.fail_after = RuntimeError("secret detail"), 2
    response = client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "internal_server_error"
    assert "RuntimeError" in last["error"]["message"] and "secret" not in last["error"]["message"]


def test_unknown_fields_and_models_are_logged_once(
    client: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="atropos_verl"):
        for _ in range(3):
            post(client, COMPLETIONS, prompt="a", model="gpt-x", reasoning={"effort": "low"}, user="u")
    model, field = caplog.messages
    assert "'reasoning'" in field and "'gpt-x'" in model and "'tiny'" in model


def test_vllm_answer(client: httpx.Client, counting: FakeEngine) -> None:
    counting.policy_version = 3
    answer = post(client, "/generate", prompt={"prompt_token_ids": [64, 65]}, logprobs=0, n=2, max_tokens=3)
    assert answer == {
        "text": ["cde", "def"],
        "prompt": "ab",
        "finish_reasons": ["length", "length"],
        "token_ids": [[66, 67, 68], [67, 68, 69]],
        "prompt_token_ids": [64, 65],
        "logprobs": [[[{str(66 + i + k): logprob_of(i, k)}] for k in range(3)] for i in range(2)],
        "policy_version": 3,
        "policy_versions": [[3, 3], [3, 3]],
    }


def test_vllm_parameters_and_prompt_forms(client: httpx.Client, counting: FakeEngine) -> None:
    same = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "seed": 2}
    for prompt in ("ab", [64, 65], {"prompt": "ab"}, {"prompt_token_ids": [64, 65]}):
        answer = post(client, "/generate", prompt=prompt, stop=["q"], **same)
        assert answer["prompt"] == "ab" and not {"logprobs", "prompt_logprobs"} & answer.keys()
        sent = counting.requests.pop()
        rest = {"max_tokens": 16, "stop": ("q",), "request_id": sent.request_id, **same}
        assert sent == GenerationRequest(prompt_token_ids=(64, 65), **rest)  # type: ignore[arg-type]
    for bounds in ({"max_new_tokens": 4}, {"max_new_tokens": 4, "max_tokens": 3}):  # vLLM's own name is max_tokens
        post(client, "/generate", prompt_token_ids=[64, 65], **bounds)
    assert [sent.max_tokens for sent in counting.requests] == [4, 3]


def test_sglang_answer(client: httpx.Client, counting: FakeEngine) -> None:
    counting.policy_version = 5
    params = {"max_new_tokens": 2, "max_tokens": 9, "temperature": 0.5, "top_k": 1 << 30}
    options = {"return_logprob": True, "return_text_in_logprobs": False}
    answer = post(client, "/generate", input_ids=[64, 65], sampling_params=params, **options)
    assert answer["meta_info"].pop("id") == counting.requests[0].request_id
    assert answer == {
        "text": "cd",
        "output_ids": [66, 67],
        "meta_info": {
            "finish_reason": {"type": "length", "length": 2},
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "cached_tokens": 0,
            "weight_version": "5",
            "policy_version": 5,
            "policy_versions": [5, 5],
            "output_token_logprobs": [[-0.125, 66, None], [-0.25, 67, None]],
            "input_token_logprobs": [],
        },
    }
    assert (counting.requests[0].temperature, counting.requests[0].top_k) == (0.5, -1)


def test_sglang_lists_texts_and_input_logprobs(client: httpx.Client, counting: FakeEngine) -> None:
    def ask(n: int = 1, **body: Any) -> Any:
        return post(client, "/generate", sampling_params={"max_new_tokens": 1, "n": n}, **body)

    answers = ask(2, text="ab", return_logprob=True, return_text_in_logprobs=True)
    assert [a["output_ids"] for a in answers] == [[66], [67]]
    assert answers[0]["meta_info"]["output_token_logprobs"] == [[-0.125, 66, "c"]]
    batch = ask(input_ids=[[64], [70]])
    assert [a["output_ids"] for a in batch] == [[65], [71]]
    assert "output_token_logprobs" not in batch[0]["meta_info"]
    scored = [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]]
    for start in (0, 2):
        answer = ask(input_ids=[5, 6, 7], return_logprob=True, logprob_start_len=start)
        assert answer["meta_info"]["input_token_logprobs"] == scored[start:]
    post(client, "/generate", text="ab")
    assert counting.requests[-1].max_tokens == 128  # SGLang's default


@pytest.mark.parametrize(
    ("written", "options", "text", "matched"),
    [
        ("yes<|im_end|>", {}, "yes", 258),
        ("yes", {"stop": "s"}, "ye", "s"),
        ("yes", {"stop": "s", "no_stop_trim": True}, "yes", "s"),
    ],
)
def test_sglang_says_what_matched(
    client: httpx.Client, engine: FakeEngine, written: str, options: dict[str, Any], text: str, matched: str | int
) -> None:
    engine.reply = text_reply(TOKENIZER, written)
    answer = post(client, "/generate", input_ids=[1], sampling_params={"max_new_tokens": 9, **options})
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == (text, {"type": "stop", "matched": matched})


SCHEMA: dict[str, Any] = {"type": "json_schema"}
FUNCTION: dict[str, Any] = {"function": {"name": "f"}}
RESERVED = ("self", "messages", "tools", "chat_template", "tokenize", "conversations", "documents", "return_dict")
REFUSED: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: {
        **{name: [1] for name in ("frequency_penalty", "min_tokens", "suffix", "echo", "background")},
        "repetition_penalty": [1.1],
        "presence_penalty": [-1],
        "logit_bias": [{"5": 10}],
        "best_of": [4],
        "guided_json": [{"type": "object"}],
        "response_format": [{"type": "json_object"}],
        "temperature": [-0.1, "hot", 10**400],
        "top_p": [0, 1.5],
        "top_k": [-2],
        "min_p": [2],
        "n": [0, 1.5, True, 10**30],
        "max_tokens": [0],
        "stop": [[""], 5.5, [-1], ["a"] * 257, "a" * 4097],
        "stop_token_ids": [[1, -1], [10**30], [[]]],
        "prompt_logprobs": [0],
        "spaces_between_special_tokens": [False],
        "seed": ["x"],
        "stream": ["yes"],
        "logprobs": [21],
        "prompt": [[], [[]], [1, "a"], {"a": 1}],
        "stream_options": [3],
    },
    CHAT: {
        "top_logprobs": [5],
        "messages": [[], ["hi"], *([{"role": "user", "content": bad}] for bad in (3, [{"type": "image_url"}]))],
        "tool_choice": ["required", {"type": "function", "function": "f"}, {"type": "allowed_tools"}, 3],
        "response_format": [{"type": "grammar"}, SCHEMA, {**SCHEMA, "json_schema": 3}, 3],
        "functions": [[{"name": "f"}]],
        "chat_template_kwargs": [{name: 1} for name in RESERVED],
        "tools": [
            *("f", ["f"], [{"type": "function"}], [{"type": "web_search"}], [{"type": "custom", "custom": FUNCTION}]),
            *([FUNCTION] * 2, [{"function": {"name": "f", "parameters": [1]}}]),
        ],
        "parallel_tool_calls": ["yes"],
        "prompt_template": ["x"],
        "continue_final_message": [True],
    },
}


NATIVE: dict[str, dict[str, list[Any]]] = {
    "/generate": {
        "prompt": [{}, {"prompt": "a", "input_ids": [1]}, {"prompt": ""}, {"prompt": [1] * 512}],
        "prompt_token_ids": [{"prompt": "a", "prompt_token_ids": [1]}],
        "prompt.prompt_token_ids": [{"prompt": {"prompt_token_ids": ["a"]}}],
        "prompt.multi_modal_data": [{"prompt": {"prompt_token_ids": [1], "multi_modal_data": {"image": "x"}}}],
        "stream": [{"prompt": "a", "stream": True}, {"input_ids": [1], "stream": True}],
        "logprobs": [{"prompt": "a", "logprobs": 3}],
        "use_beam_search": [{"prompt": "a", "use_beam_search": True}],
        "input_ids": [
            *({"input_ids": [1] * 512}, {"input_ids": [1], "text": "a"}),
            *({"input_ids": [], "stream": False}, {"sampling_params": {}}),
        ],
        "sampling_params": [{"input_ids": [1], "sampling_params": [{}]}],
        "sampling_params.top_p": [{"input_ids": [1], "sampling_params": {"top_p": 7}}],
        "sampling_params.frequency_penalty": [{"input_ids": [1], "sampling_params": {"frequency_penalty": 1}}],
        "top_logprobs_num": [{"input_ids": [1], "top_logprobs_num": 2}],
    },
    "/generate/": {
        "prompts": [{"prompt": "a"}, {"prompts": []}],
        "repetition_penalty": [{"prompts": ["a"], "repetition_penalty": 1.1}],
        "guided_decoding_regex": [{"prompts": ["a"], "guided_decoding_regex": "a+"}],
    },
}


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, fields in (REFUSED | NATIVE).items() for field in fields]
)
def test_refusals_name_the_field_and_never_reach_the_engine(
    client: httpx.Client, engine: FakeEngine, path: str, field: str
) -> None:
    for value in (REFUSED | NATIVE)[path][field]:
        body = value if path in NATIVE else {"prompt": "a", "messages": HI, field: value}
        error = refused(client, path, **body)
        assert error["param"] == field and field.rpartition(".")[2] in error["message"], value
    assert engine.requests == []
