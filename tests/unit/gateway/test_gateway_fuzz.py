"""Seeded requests over all routes of the gateway: no answer is a failure of the server, and nothing is kept of them.

``ATROPOS_VERL_FUZZ=500000`` (``make fuzz``) sends so many, and looks at the memory.
"""

import gc
import os
from typing import Any

import psutil
import pytest
from support.fake_engine import FakeEngine
from support.request_fuzz import FuzzedRoute, RequestFuzzer, answer_of, check_answer
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.app import create_app

_SAMPLING = {"n": 2, "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
_SHARED = {**_SAMPLING, "stop": ["x", 258], "stop_token_ids": [3], "ignore_eos": True, "skip_special_tokens": False}
_CALL = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"city": "Rome"}'}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "ok"},
]
_CHAT = {"messages": _MESSAGES, "tools": [{"type": "function", "function": {"name": "w"}}], "tool_choice": "auto"}
_CHAT |= {"chat_template_kwargs": {"x": 1}, "logprobs": True, "return_token_ids": True, "add_generation_prompt": False}
_PROMPT = {"prompt": {"prompt_token_ids": [1, 2]}}
_BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {**_CHAT, **_SHARED},
        {"messages": _MESSAGES[:1], "stream": True, "stream_options": {"include_usage": True}, **_SAMPLING},
        {"messages": _MESSAGES[:1], "chat_template": "{{ 1 }}"},
    ],
    "/v1/completions": [{"prompt": ["a", [1]], "logprobs": 1, **_SHARED}, {"prompt": "a", "stream": True, **_SHARED}],
    "/generate": [
        {**_PROMPT, "logprobs": 0, "prompt_logprobs": 1, **_SHARED},
        {"prompt": "ab", **_SAMPLING},
        {"input_ids": [[1], [2]], "sampling_params": _SHARED, "return_logprob": True, "logprob_start_len": 0},
        {"text": ["a"], "sampling_params": {"max_new_tokens": 2}, "return_text_in_logprobs": True},
    ],
    "/generate/": [{"prompts": ["a", "b"], **_SHARED}],
}


@pytest.mark.parametrize("key", [None, "K"])
async def test_no_request_makes_the_gateway_fail(key: str | None) -> None:
    count = int(os.environ.get("ATROPOS_VERL_FUZZ", 3000)) // 2
    engine = FakeEngine(max_context_len=128)
    app = create_app(engine, build_tiny_tokenizer(), model_name="tiny", api_key=key, allowed_hosts=("localhost",))
    headers = {"content-type": "application/json", **({} if key is None else {"authorization": f"Bearer {key}"})}
    gets = [FuzzedRoute("GET", path, (), headers) for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics")]
    posts = [FuzzedRoute("POST", path, bodies, headers) for path, bodies in _BODIES.items()]
    sizes, statuses = [], set()
    for number, request in zip(range(count), RequestFuzzer(1 if key else 0, [*gets, *8 * posts]), strict=False):
        status, answer = await answer_of(app, request)
        check_answer(request, status, answer)
        statuses.add(status)
        if number % max(100, count // 50) == 0:
            assert not engine.active
            engine.reset(max_context_len=128)
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert {200, 400, 403, 404, 405, 415} <= statuses
    if count > 100_000:
        assert sizes[-1] - sizes[len(sizes) // 5] < 50, f"memory grows (MiB): {sizes}"
