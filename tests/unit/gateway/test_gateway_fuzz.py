"""Seeded requests over all routes of the gateway: no answer is a failure of the server, and every rollout is sound.

``ATROPOS_VERL_FUZZ=500000`` (``make fuzz``) sends so many, and looks at the memory.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine, counting_reply, text_reply
from support.request_fuzz import FuzzedRequest, FuzzedRoute, answer_of, fuzzed
from support.sdks import blocks_of, items_of
from support.sessions import OracleEngine, trained_samples
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.app import create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.types import GenerationRequest

COUNT = int(os.environ.get("ATROPOS_VERL_FUZZ", 3000))
JSON = {"content-type": "application/json"}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "name": "n", "schema": SCHEMA}
TEXT = {"type": "text", "text": "hi"}
FUNCTION = {"name": "w", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"city": "Rome"}'}}
ONE = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
SAMPLING = {"n": 2, "max_tokens": 3, "top_k": 5, "min_p": 0.1, **ONE}
SHARED = {**SAMPLING, "stop": ["x", 258], "stop_token_ids": [3], "ignore_eos": True, "skip_special_tokens": False}
FIRST = {"role": "user", "content": [TEXT]}
MESSAGES: list[dict[str, Any]] = [
    {**FIRST, "role": "developer"},
    {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": [TEXT]},
]
CHAT = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "chat_template_kwargs": {"x": 1}, **SHARED}
CHAT |= {"logprobs": True, "return_token_ids": True, "add_generation_prompt": False}
STREAMED = {"messages": [FIRST], "stream": True, "stream_options": {"include_usage": True}, **SAMPLING}
FORCED = {"messages": [FIRST], "tools": [TOOL], "tool_choice": TOOL, "max_tokens": 60}
FORCED |= {"response_format": {"type": "json_schema", "json_schema": FORMAT}}
RESPONSES = {"instructions": "s", "max_output_tokens": 9, "text": {"format": FORMAT}, **ONE}
RESPONSES |= {"tools": [{"type": "function", **FUNCTION}]}
ITEMS = [*items_of([FIRST, *MESSAGES[1:]]), {"role": "assistant", "content": "a"}]
ANTHROPIC = {
    "messages": [*blocks_of([FIRST, *MESSAGES[1:]])],
    "max_tokens": 9,
    "system": [TEXT],
    "stop_sequences": ["x"],
    **ONE,
}
ANTHROPIC |= {"tools": [{"name": "w", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
ANTHROPIC |= {"thinking": {"type": "enabled", "budget_tokens": 9}}
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        CHAT,
        STREAMED,
        {"messages": [FIRST], "chat_template": "{{ 1 }}"},
        FORCED,
        {"messages": MESSAGES, "tools": [TOOL], "stream": True, "logprobs": True, "top_logprobs": 2},
    ],
    "/v1/responses": [
        {"input": ITEMS, **RESPONSES, "tool_choice": {"type": "function", "name": "w"}},
        {"input": "hi", "stream": True, **RESPONSES, "previous_response_id": None, "parallel_tool_calls": False},
    ],
    "/v1/messages": [ANTHROPIC, {**ANTHROPIC, "stream": True, "output_config": {"format": FORMAT}}],
    "/v1/messages/count_tokens": [ANTHROPIC],
    "/v1/completions": [{"prompt": ["a", [1]], "logprobs": 1, **SHARED}, {"prompt": "a", "stream": True, **SHARED}],
    "/generate": [
        {"prompt": {"prompt_token_ids": [1, 2]}, "logprobs": 0, "prompt_logprobs": 1, **SHARED},
        {"prompt": "ab", **SAMPLING},
        {"input_ids": [[1], [2]], "sampling_params": SHARED, "return_logprob": True, "logprob_start_len": 0},
        {"text": ["a"], "sampling_params": {"max_new_tokens": 2}, "return_text_in_logprobs": True},
    ],
    "/generate/": [{"prompts": ["a", "b"], **SHARED}],
}
TOKENIZER = build_tiny_tokenizer()
WRITTEN = text_reply(TOKENIZER, '<think>h</think>a<tool_call>{"name": "w"}</tool_call>b<tool_call>{<|im_end|>')


def reply(request: GenerationRequest, index: int) -> Sequence[int]:
    """Text with calls where it has room."""
    return (WRITTEN if (request.max_tokens or 0) > 50 else counting_reply)(request, index)


@pytest.mark.parametrize("key", [None, "K"])
async def test_no_request_makes_the_gateway_fail(key: str | None) -> None:
    engine = FakeEngine(reply, max_context_len=700)
    app = create_app(engine, TOKENIZER, model_name="tiny", api_key=key, allowed_hosts=("localhost",))
    headers = JSON if key is None else {**JSON, "authorization": f"Bearer {key}"}
    gets = [FuzzedRoute("GET", path, (), headers) for path in ("/health", "/v1/models", "/metrics")]
    posts = [FuzzedRoute("POST", path, bodies, headers) for path, bodies in BODIES.items()]
    statuses, served = set(), set()

    def look() -> None:
        assert not engine.active
        engine.reset(reply, max_context_len=700)  # it keeps what it was asked

    async for request, status in fuzzed(app, 1 if key else 0, [*gets, *8 * posts], COUNT // 2, look):
        statuses.add(status)
        served |= {request.target} if status == 200 else set()
    assert {200, 400, 403, 404, 405, 415} <= statuses and served >= BODIES.keys()


OPENING = {"group": "g", "task": "t", "metadata": {"a": [1, {"b": None}]}, "ttl": 60.5, "size": 8}
REWARD = {"reward": 0.5, "per_turn": [1, 0.5], "finished": False, "info": {"why": "x"}}
ASKED = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
PROMPTS = [{"prompt": ["a", [1]], "max_tokens": 2}, {"prompt": "ab", "stream": True}]


async def test_no_request_makes_a_session_fail(tmp_path: Path) -> None:
    engine, store = OracleEngine(max_context_len=256), SessionStore(tmp_path)
    app = create_app(engine, TOKENIZER, model_name="tiny", api_key="K", sessions=store)
    headers = {**JSON, "host": "localhost", "authorization": "Bearer K"}

    async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer = await answer_of(app, FuzzedRequest(method, path, headers, json.dumps(body).encode()))
        return status, json.loads(answer)

    statuses, rollouts, seeds = set(), 0, range(COUNT // 120)
    for seed in seeds:
        opened = [(await ask("POST", "/sessions", {"group": "g"}))[1] for _ in range(2)]
        (session, other), key = (f"/sessions/{one['id']}" for one in opened), opened[0]["api_key"]
        base, own = session.replace("sessions", "s"), {**headers, "authorization": f"Bearer {key}"}
        routes = [
            FuzzedRoute("POST", "/sessions", [OPENING], headers),
            FuzzedRoute("POST", f"{session}/reward", [REWARD] * 7 + [{"reward": 1}], headers),
            FuzzedRoute("POST", f"{other}/abort", [{"reason": "x"}, {}], headers),
            FuzzedRoute("POST", f"{base}/v1/chat/completions", [{**ASKED, "n": 2}, {**ASKED, "stream": True}], own),
            FuzzedRoute("POST", "/v1/completions", PROMPTS, own),
        ] * 3
        gets = (session, f"{session}/rollout", other, f"{base}/v1/models")
        routes += [FuzzedRoute("GET", path, (), headers) for path in gets]
        engine.samples.clear()
        statuses |= {status async for _, status in fuzzed(app, seed, routes, 40)}
        assert (await ask("POST", f"{session}/reward", {"reward": 1}))[0] in (200, 409)
        status, rollout = await ask("GET", f"{session}/rollout")
        trained = trained_samples(rollout)
        assert len(trained) <= len(engine.samples) and all(sample in engine.samples for sample in trained)
        assert status == 200 and not engine.active
        rollouts += bool(trained)
    assert {200, 400, 401, 404, 405, 409, 410, 415} <= statuses, statuses
    assert rollouts > len(seeds) // 2
    store.close()
