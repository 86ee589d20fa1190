"""Seeded requests over the routes of sessions: no answer is a failure of the server, and every rollout is sound.

``ATROPOS_VERL_FUZZ=50000`` (``make fuzz``) sends so many.
"""

import json
import os
from pathlib import Path
from typing import Any

from support.request_fuzz import FuzzedRequest, FuzzedRoute, RequestFuzzer, answer_of, check_answer
from support.sessions import OracleEngine, trained_samples
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.gateway.app import create_app
from atropos_verl.gateway.sessions import SessionStore

_HEADERS = {"content-type": "application/json", "host": "localhost", "authorization": "Bearer K"}
_SESSION = {"group": "g", "task": "t", "metadata": {"a": [1, {"b": None}]}, "ttl": 60.5, "size": 8}
_REWARD = {"reward": 0.5, "per_turn": [1, 0.5], "finished": False, "info": {"why": "x"}}
_CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "n": 2}
_PROMPT = {"prompt": ["a", [1]], "max_tokens": 2}
_REQUESTS_PER_SESSION = 40


async def ask(app: Any, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    sent = b"" if body is None else json.dumps(body).encode()
    status, answer = await answer_of(app, FuzzedRequest(method, path, _HEADERS, sent))
    return status, json.loads(answer)


async def test_no_request_makes_a_session_fail(tmp_path: Path) -> None:
    count = int(os.environ.get("ATROPOS_VERL_FUZZ", 1000))
    engine, store = OracleEngine(max_context_len=256), SessionStore(tmp_path)
    app = create_app(engine, build_tiny_tokenizer(), model_name="tiny", api_key="K", sessions=store)
    statuses, rollouts = set(), 0
    for seed in range(max(1, count // _REQUESTS_PER_SESSION)):
        opened = [(await ask(app, "POST", "/sessions", {"group": "g"}))[1] for _ in range(2)]
        session, other = (one["id"] for one in opened)
        own = {**_HEADERS, "authorization": f"Bearer {opened[0]['api_key']}"}
        posts = {
            "/sessions": ([_SESSION], _HEADERS),
            f"/sessions/{session}/reward": ([_REWARD] * 7 + [{"reward": 1}], _HEADERS),
            f"/sessions/{other}/abort": ([{"reason": "x"}, {}], _HEADERS),
            f"/s/{session}/v1/chat/completions": ([_CHAT, {**_CHAT, "n": 1, "stream": True}], own),
            "/v1/completions": ([_PROMPT, {"prompt": "ab", "stream": True}], own),
        }
        gets = (f"/sessions/{session}", f"/sessions/{session}/rollout", f"/sessions/{other}", f"/s/{session}/v1/models")
        routes = [FuzzedRoute("POST", path, *about) for path, about in posts.items()]
        routes = [*3 * routes, *(FuzzedRoute("GET", path, (), _HEADERS) for path in gets)]
        engine.samples.clear()
        for _, request in zip(range(_REQUESTS_PER_SESSION), RequestFuzzer(seed, routes), strict=False):
            status, answer = await answer_of(app, request)
            check_answer(request, status, answer)
            statuses.add(status)
        status, _ = await ask(app, "POST", f"/sessions/{session}/reward", {"reward": 1})
        assert status in (200, 409)
        status, rollout = await ask(app, "GET", f"/sessions/{session}/rollout")
        assert status == 200
        trained = trained_samples(rollout)
        assert len(trained) <= len(engine.samples) and all(sample in engine.samples for sample in trained)
        rollouts += bool(trained)
        assert not engine.active
    assert {200, 400, 401, 404, 405, 409, 410, 415} <= statuses, statuses
    assert rollouts > count // _REQUESTS_PER_SESSION // 2
    store.close()
