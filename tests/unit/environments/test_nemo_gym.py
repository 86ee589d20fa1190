"""NeMo Gym's adapter with stubs of its package and of the servers that it starts."""

import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.trajectory_server import free_port

from atropos_verl.agents.runner import is_infrastructure
from atropos_verl.environments.serve import PlayError
from atropos_verl.http_thread import ServerThread


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name = "atropos_verl.environments.nemo_gym"
    monkeypatch.setitem(sys.modules, "nemo_gym", ModuleType("nemo_gym"))
    module: Any = importlib.import_module(name)

    @contextlib.asynccontextmanager
    async def started(target: str, settings: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async def run(request: Request) -> Response:
            asked = (await request.json())["responses_create_params"]
            async with httpx.AsyncClient() as http:
                answer = await http.post(f"{settings['policy_base_url']}/responses", json=asked)
            if answer.status_code != 200:
                return JSONResponse({"detail": "the policy failed"}, 500)
            return JSONResponse({"reward": 2.5, "letters": 3})

        app = Starlette(routes=[Route("/run", run, methods=["POST"])])
        with ServerThread(app, service="agent", advice="", host="127.0.0.1", port=0) as agent:
            host, _, port = agent.url.removeprefix("http://").partition(":")
            yield {"agent": {"host": host, "port": port}}

    monkeypatch.setattr(module, "_started", started)
    monkeypatch.setattr(module, "_tasks", lambda agents, file: [TASK])
    yield module
    del sys.modules[name]


TASK = {"agent_ref": {"name": "agent"}, "responses_create_params": {"input": "x"}}


async def test_requests_reach_the_session_and_a_gateway_that_is_gone_is_no_fault_of_the_agent(adapter: Any) -> None:
    asked: list[tuple[str, Any]] = []

    async def respond(request: Request) -> Response:
        asked.append((request.headers["authorization"], await request.json()))
        return JSONResponse({})

    app = Starlette(routes=[Route("/s/a/v1/responses", respond, methods=["POST"])])
    async with adapter.open_environment("config", {}) as environment:
        with ServerThread(app, service="gateway", advice="", host="127.0.0.1", port=0) as gateway:
            session = SimpleNamespace(id="a", base_url=f"{gateway.url}/s/a/v1", api_key="K")
            reward = await environment.play(TASK, session)
        assert (reward.value, reward.info) == (2.5, {"metrics": {"letters": 3}})
        assert asked == [("Bearer K", {"input": "x", "metadata": {}})]
        session.base_url = f"http://127.0.0.1:{free_port()}/s/a/v1"
        with pytest.raises(PlayError, match=r"500 .*the policy failed") as failure:
            await environment.play(TASK, session)
        assert is_infrastructure(failure.value)
