"""Seeded requests over all routes of the gateway: no answer is a failure of the server, and nothing is kept of them.

``ATROPOS_VERL_FUZZ=500000`` (``make fuzz``) sends so many, and looks at the memory.
"""

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any

import psutil
import pytest
from support.fake_engine import FakeEngine, counting_reply, text_reply
from support.request_fuzz import FuzzedRoute, RequestFuzzer, answer_of, check_answer
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.app import create_app
from atropos_verl.types import GenerationRequest

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
_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}
_ONE = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
_TOOL = {"type": "function", "function": {"name": "w", "parameters": _SCHEMA}}
_ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "w", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "ok"},
]
_RESPONSES = {"tools": [{"type": "function", "name": "w", "parameters": _SCHEMA}], "instructions": "s", **_ONE}
_RESPONSES |= {"max_output_tokens": 9, "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}}}
_TEXT = {"type": "text", "text": "r"}
_BLOCKS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "t", "name": "w", "input": {"x": 1}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r"}]}],
    },
]
_ANTHROPIC = {"max_tokens": 9, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"], **_ONE}
_ANTHROPIC |= {"tools": [{"name": "w", "input_schema": _SCHEMA}], "tool_choice": {"type": "any"}}
_ANTHROPIC |= {"thinking": {"type": "enabled", "budget_tokens": 9}, "messages": _BLOCKS}
_PROMPT = {"prompt": {"prompt_token_ids": [1, 2]}}
_BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {**_CHAT, **_SHARED},
        {"messages": _MESSAGES[:1], "stream": True, "stream_options": {"include_usage": True}, **_SAMPLING},
        {"messages": _MESSAGES[:1], "chat_template": "{{ 1 }}"},
        {
            "messages": _MESSAGES[:1],
            "tools": [_TOOL],
            "tool_choice": _TOOL,
            "response_format": _FORMAT,
            "max_tokens": 60,
        },
        {"messages": _MESSAGES, "tools": [_TOOL], "stream": True, "logprobs": True, "top_logprobs": 2},
    ],
    "/v1/responses": [
        {"input": _ITEMS, **_RESPONSES, "tool_choice": {"type": "function", "name": "w"}},
        {"input": "hi", "stream": True, **_RESPONSES, "previous_response_id": None, "parallel_tool_calls": False},
    ],
    "/v1/messages": [_ANTHROPIC, {**_ANTHROPIC, "stream": True, "output_config": {"format": _FORMAT}}],
    "/v1/messages/count_tokens": [_ANTHROPIC],
    "/v1/completions": [{"prompt": ["a", [1]], "logprobs": 1, **_SHARED}, {"prompt": "a", "stream": True, **_SHARED}],
    "/generate": [
        {**_PROMPT, "logprobs": 0, "prompt_logprobs": 1, **_SHARED},
        {"prompt": "ab", **_SAMPLING},
        {"input_ids": [[1], [2]], "sampling_params": _SHARED, "return_logprob": True, "logprob_start_len": 0},
        {"text": ["a"], "sampling_params": {"max_new_tokens": 2}, "return_text_in_logprobs": True},
    ],
    "/generate/": [{"prompts": ["a", "b"], **_SHARED}],
}


_WRITTEN = text_reply(
    build_tiny_tokenizer(), '<think>h</think>a<tool_call>{"name": "w"}</tool_call>b<tool_call>{<|im_end|>'
)


def _reply(request: GenerationRequest, index: int) -> Sequence[int]:
    """Text with calls where it has room."""
    wants = request.max_tokens is not None and request.max_tokens > 50
    return _WRITTEN(request, index) if wants else counting_reply(request, index)


@pytest.mark.parametrize("key", [None, "K"])
async def test_no_request_makes_the_gateway_fail(key: str | None, caplog: pytest.LogCaptureFixture) -> None:
    count = int(os.environ.get("ATROPOS_VERL_FUZZ", 3000)) // 2
    if count > 100_000:
        caplog.set_level(logging.CRITICAL, "atropos_verl")  # pytest keeps every record
    tokenizer = build_tiny_tokenizer()
    engine = FakeEngine(_reply, max_context_len=700)
    app = create_app(engine, tokenizer, model_name="tiny", api_key=key, allowed_hosts=("localhost",))
    headers = {"content-type": "application/json", **({} if key is None else {"authorization": f"Bearer {key}"})}
    gets = [FuzzedRoute("GET", path, (), headers) for path in ("/health", "/v1/models", "/metrics")]
    posts = [FuzzedRoute("POST", path, bodies, headers) for path, bodies in _BODIES.items()]
    sizes, statuses, served = [], set(), set()
    for number, request in zip(range(count), RequestFuzzer(1 if key else 0, [*gets, *8 * posts]), strict=False):
        status, answer = await answer_of(app, request)
        check_answer(request, status, answer)
        statuses.add(status)
        if status == 200:
            served.add(request.target)
        if number % max(100, count // 50) == 0:
            assert not engine.active
            engine.reset(_reply, max_context_len=700)
            if count > 100_000:
                gc.collect()
                sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert {200, 400, 403, 404, 405, 415} <= statuses and served >= _BODIES.keys()
    if count > 100_000:
        assert sizes[-1] - sizes[len(sizes) // 5] < 50, f"memory grows (MiB): {sizes}"
