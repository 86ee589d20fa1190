"""Environments of other ecosystems: what is refused before one is opened, its tasks, and adapters with stubs."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.http_faults import refused_url

from atropos_verl.agents.runner import is_infrastructure
from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY, EnvironmentConfig, LaunchConfig
from atropos_verl.environments import serve
from atropos_verl.environments.serve import Environment, PlayError, adapter_of, opened, settings_of
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import ServerThread

Patch = pytest.MonkeyPatch
FORMS = "is none of verifiers:TASKSET, openenv:URL_OR_PACKAGE, nemo-gym:CONFIG, harbor:DATASET"


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


def test_settings_are_nested_and_the_last_wins() -> None:
    words = ["agent=x", "agent.max_turns=3", "agent.harness.id=null", "a=[1, 2]", "agent.max_turns=4"]
    assert settings_of(words) == {"agent": {"max_turns": 4, "harness": {"id": None}}, "a": [1, 2]}


@pytest.mark.parametrize(
    ("read", "given", "told"),
    [
        (settings_of, ["agent"], "'agent' is not KEY=VALUE"),
        (settings_of, ["=3"], "'=3' is not KEY=VALUE"),
        (settings_of, ["agent.=3"], "'agent.=3' is not KEY=VALUE"),
        (settings_of, ["rewards=[1"], r"'rewards=\[1' is not KEY=VALUE with a value in YAML"),
        *((adapter_of, named, FORMS) for named in ("gym:x", "verifiers", "verifiers:")),
    ],
)
def test_what_is_no_setting_or_ecosystem_is_refused(read: Callable[[Any], object], given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(given)


def test_a_missing_package_is_told_by_name(monkeypatch: Patch) -> None:
    missing = Mock(side_effect=serve.metadata.PackageNotFoundError)
    for found, told in ((missing, "has none"), (lambda _: "0.1.14", r"has 0\.1\.14")):
        monkeypatch.setattr(serve.metadata, "version", found)
        with pytest.raises(ConfigError, match=f"needs verifiers 0.4 in .*{told}: pip install 'verifiers==0.4"):
            adapter_of("verifiers:gsm8k")


async def test_the_last_tasks_are_held_out(monkeypatch: Patch) -> None:
    @contextlib.asynccontextmanager
    async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
        yield Environment(range(int(target)), AsyncMock())

    monkeypatch.setattr(serve, "adapter_of", lambda named: (open_environment, named))

    async def tasks(*words: str) -> list[int]:
        async with opened(options(*words)) as (_, found):
            return list(found)

    assert await tasks("serve", "10") == [*range(8)]
    assert await tasks("evaluate", "10") == [8, 9]
    assert await tasks("serve", "10", "--held-out", "1") == [*range(9)]
    assert await tasks("evaluate", "3") == [0, 1, 2], "too few to hold one out"
    with pytest.raises(ConfigError, match="0 has no tasks"):
        await tasks("serve", "0")


def test_a_launch_starts_it_with_its_arguments_last() -> None:
    values = {"words": {"ecosystem": "verifiers:a", "args": ["--set", "b=1"]}}
    started = LaunchConfig.from_mapping({"environments": values}).chosen["words"]
    assert started.module == "atropos_verl.environments.serve"
    assert started.args == ("verifiers:a", "--set", "b=1")
    assert LAUNCH_DIRECTORY in started.env
    # As the launcher writes it: its own options stand before the environment.
    parsed = options("serve", "--env.group_size", "4", "--config", "x.yaml", *started.args)
    assert (parsed.environment, parsed.group_size, parsed.set) == ("verifiers:a", 4, ["b=1"])
    with pytest.raises(ValueError, match=r"script \(x\.py\) and ecosystem \(verifiers:a\) exclude each other"):
        EnvironmentConfig(script="x.py", ecosystem="verifiers:a")


Adapter = Callable[..., Any]


@pytest.fixture
def adapter(monkeypatch: Patch) -> Iterator[Adapter]:
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:

        def imported(name: str, package: str, **names: Any) -> Any:
            stub = ModuleType(package)
            vars(stub).update(names)
            patch.setitem(sys.modules, package, stub)
            stack.callback(sys.modules.pop, f"atropos_verl.environments.{name}")
            return importlib.import_module(f"atropos_verl.environments.{name}")

        yield imported


async def test_a_server_of_openenv_without_a_schema_is_ended(adapter: Adapter) -> None:
    with refused_url() as nobody:
        client = AsyncMock(_base_url=nobody.replace("http", "ws"))
        openenv = adapter("openenv", "openenv", GenericEnvClient=Mock(from_env=AsyncMock(return_value=client)))
        async with openenv.open_environment("package", {"seeds": 1}) as environment:
            with pytest.raises(httpx.ConnectError):
                await environment.play({"seed": 0}, SimpleNamespace())
    client.__aexit__.assert_awaited_once()


def test_an_action_of_openenv_is_json_or_its_one_required_field(adapter: Adapter) -> None:
    action_of = adapter("openenv", "openenv", GenericEnvClient=None).action_of
    schema = {"required": ["letter"], "properties": {"letter": {"type": "string"}}}
    texts = ('{"letter": "a"}', '```json\n{"letter": "a"}\n```', " a\n", "7")
    assert [action_of(text, schema) for text in texts] == [{"letter": letter} for letter in "aaa7"]
    assert action_of("7", {**schema, "properties": {}}) == {"letter": 7}
    assert action_of("a", {"required": ["letter", "other"]}) is None


def serving(path: str, answer: Callable[[Request], Any]) -> ServerThread:
    app = Starlette(routes=[Route(path, answer, methods=["POST"])])
    return ServerThread(app, service="it", advice="", host="127.0.0.1", port=0)


async def test_nemo_gym_asks_the_session_or_tells_why(adapter: Adapter, monkeypatch: Patch) -> None:
    task = {"agent_ref": {"name": "agent"}, "responses_create_params": {"input": "x"}}
    asked: list[tuple[str, Any]] = []

    @contextlib.asynccontextmanager
    async def started(target: str, settings: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async def run(request: Request) -> Response:
            body = (await request.json())["responses_create_params"]
            async with httpx.AsyncClient() as http:
                answer = await http.post(f"{settings['policy_base_url']}/responses", json=body)
            if answer.status_code != 200:
                return JSONResponse({"detail": "it failed"}, 500)
            return JSONResponse({"reward": 2.5, "letters": 3})

        with serving("/run", run) as agent:
            host, _, port = agent.url.removeprefix("http://").partition(":")
            yield {"agent": {"host": host, "port": port}}

    async def respond(request: Request) -> Response:
        asked.append((request.headers["authorization"], await request.json()))
        return JSONResponse({})

    gym = adapter("nemo_gym", "nemo_gym")
    monkeypatch.setattr(gym, "_started", started)
    monkeypatch.setattr(gym, "_tasks", lambda agents, file: [task])
    async with gym.open_environment("config", {}) as environment:
        with serving("/s/a/v1/responses", respond) as gateway:
            session = SimpleNamespace(id="a", base_url=f"{gateway.url}/s/a/v1", api_key="K")
            reward = await environment.play(task, session)
        assert (reward.value, reward.info) == (2.5, {"metrics": {"letters": 3}})
        assert asked == [("Bearer K", {"input": "x", "metadata": {}})]
        with refused_url() as nobody, pytest.raises(PlayError, match=r"500 .*it failed") as failure:
            session.base_url = f"{nobody}/s/a/v1"
            await environment.play(task, session)
        assert is_infrastructure(failure.value)
