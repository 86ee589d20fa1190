"""/generate in the dialects of vLLM, SGLang and trl: values of every field that clients read."""

from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine, text_reply
from support.serving import post, refused
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.types import GenerationRequest

TOKENIZER = build_tiny_tokenizer()


@pytest.fixture
def engine(served: tuple[FakeEngine, httpx.Client]) -> FakeEngine:
    served[0].reset()
    return served[0]


def generate(client: httpx.Client, **body: Any) -> Any:
    return post(client, "/generate", **body)


def test_vllm_answer(client: httpx.Client, engine: FakeEngine) -> None:
    engine.policy_version = 3
    answer = generate(client, prompt={"prompt_token_ids": [64, 65]}, logprobs=0, n=2, max_tokens=3)
    # the fake counts on from the last prompt token, completion i starting i higher: "cde", "def"
    assert answer == {
        "text": ["cde", "def"],
        "prompt": "ab",
        "finish_reasons": ["length", "length"],
        "token_ids": [[66, 67, 68], [67, 68, 69]],
        "prompt_token_ids": [64, 65],
        "logprobs": [
            [[{"66": -0.125}], [{"67": -0.25}], [{"68": -0.375}]],
            [[{"67": -0.125 - 1 / 1024}], [{"68": -0.25 - 1 / 1024}], [{"69": -0.375 - 1 / 1024}]],
        ],
        "policy_version": 3,
        "policy_versions": [[3, 3], [3, 3]],
    }


def test_vllm_parameters_and_prompt_forms(client: httpx.Client, engine: FakeEngine) -> None:
    same = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "seed": 2}
    prompts = ("ab", [64, 65], {"prompt": "ab"}, {"prompt_token_ids": [64, 65]})
    for prompt in prompts:
        answer = generate(client, prompt=prompt, stop=["q"], **same)
        assert answer["prompt"] == "ab" and "logprobs" not in answer and "prompt_logprobs" not in answer
    generate(client, prompt_token_ids=[64, 65], max_new_tokens=4)
    generate(client, prompt_token_ids=[64, 65], max_new_tokens=4, max_tokens=3)  # vLLM's own name is max_tokens
    for sent in engine.requests[:4]:
        rest = {"max_tokens": 16, "stop": ("q",), "request_id": sent.request_id, **same}
        assert sent == GenerationRequest(prompt_token_ids=(64, 65), **rest)  # type: ignore[arg-type]
    assert [sent.max_tokens for sent in engine.requests[4:]] == [4, 3]


def test_sglang_answer(client: httpx.Client, engine: FakeEngine) -> None:
    engine.policy_version = 5
    answer = generate(
        client,
        input_ids=[64, 65],
        sampling_params={"max_new_tokens": 2, "max_tokens": 9, "temperature": 0.5, "top_k": 1 << 30},
        return_logprob=True,
        return_text_in_logprobs=False,
    )
    identity = answer["meta_info"].pop("id")
    assert isinstance(identity, str) and identity
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
    assert engine.requests[0].temperature == 0.5 and engine.requests[0].top_k == -1


def test_sglang_lists_texts_and_input_logprobs(client: httpx.Client, engine: FakeEngine) -> None:
    params = {"max_new_tokens": 1, "n": 2}
    answers = generate(client, text="ab", sampling_params=params, return_logprob=True, return_text_in_logprobs=True)
    assert [a["output_ids"] for a in answers] == [[66], [67]]
    assert answers[0]["meta_info"]["output_token_logprobs"] == [[-0.125, 66, "c"]]
    batch = generate(client, input_ids=[[64], [70]], sampling_params={"max_new_tokens": 1})
    assert [a["output_ids"] for a in batch] == [[65], [71]]
    assert "output_token_logprobs" not in batch[0]["meta_info"]
    scored = [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]]
    for start in (0, 2):
        asked = {"sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": start}
        answer = generate(client, input_ids=[5, 6, 7], **asked)
        assert answer["meta_info"]["input_token_logprobs"] == scored[start:]
    generate(client, text="ab")
    assert engine.requests[-1].max_tokens == 128  # SGLang's default


def test_sglang_says_what_matched(client: httpx.Client, engine: FakeEngine) -> None:
    engine.reset(text_reply(TOKENIZER, "yes<|im_end|>"))
    eos = generate(client, input_ids=[1], sampling_params={"max_new_tokens": 9})
    assert eos["text"] == "yes" and eos["meta_info"]["finish_reason"] == {"type": "stop", "matched": 258}
    engine.reset(text_reply(TOKENIZER, "yes"))
    text = generate(client, input_ids=[1], sampling_params={"max_new_tokens": 9, "stop": "s"})
    assert text["text"] == "ye" and text["meta_info"]["finish_reason"] == {"type": "stop", "matched": "s"}
    kept = generate(client, input_ids=[1], sampling_params={"max_new_tokens": 9, "stop": "s", "no_stop_trim": True})
    assert kept["text"] == "yes"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": "a", "input_ids": [1]}),
        ("prompt_token_ids", {"prompt": "a", "prompt_token_ids": [1]}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": [1] * 512}),
        ("input_ids", {"input_ids": [1] * 512}),
        ("prompt.prompt_token_ids", {"prompt": {"prompt_token_ids": ["a"]}}),
        ("prompt.multi_modal_data", {"prompt": {"prompt_token_ids": [1], "multi_modal_data": {"image": "x"}}}),
        ("stream", {"prompt": "a", "stream": True}),
        ("logprobs", {"prompt": "a", "logprobs": 3}),
        ("use_beam_search", {"prompt": "a", "use_beam_search": True}),
        ("stream", {"input_ids": [1], "stream": True}),
        ("input_ids", {"input_ids": [1], "text": "a"}),
        ("input_ids", {"input_ids": [], "sampling_params": {}}),
        ("input_ids", {"sampling_params": {}}),
        ("sampling_params", {"input_ids": [1], "sampling_params": [{}]}),
        ("sampling_params.top_p", {"input_ids": [1], "sampling_params": {"top_p": 7}}),
        ("sampling_params.frequency_penalty", {"input_ids": [1], "sampling_params": {"frequency_penalty": 1}}),
        ("top_logprobs_num", {"input_ids": [1], "top_logprobs_num": 2}),
        ("trl prompts", {"prompt": "a"}),
        ("trl prompts", {"prompts": []}),
        ("trl repetition_penalty", {"prompts": ["a"], "repetition_penalty": 1.1}),
        ("trl guided_decoding_regex", {"prompts": ["a"], "guided_decoding_regex": "a+"}),
    ],
)
def test_refusals_name_the_field(client: httpx.Client, engine: FakeEngine, param: str, body: dict[str, Any]) -> None:
    path = "/generate/" if param.startswith("trl ") else "/generate"
    assert refused(client, path, **body)["param"] == param.removeprefix("trl ")
    assert engine.requests == []
