"""OpenEnv's adapter with a stub of its package: its servers are ended, and what counts as an action."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Self

import httpx
import pytest
from support.trajectory_server import free_port


class Client:
    """Of a package's server, which was started and answers nothing."""

    made: ClassVar[list["Client"]] = []

    def __init__(self) -> None:
        self._base_url, self.is_closed = f"ws://127.0.0.1:{free_port()}", False
        self.made.append(self)

    @classmethod
    async def from_env(cls, name: str, use_docker: bool) -> Self:
        return cls()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_closed = True


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package, name = ModuleType("openenv"), "atropos_verl.environments.openenv"
    package.GenericEnvClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openenv", package)
    monkeypatch.setattr(Client, "made", [])
    yield importlib.import_module(name)
    del sys.modules[name]


async def test_a_server_that_was_started_and_tells_no_schema_is_ended(adapter: Any) -> None:
    async with adapter.open_environment("package", {"seeds": 1}) as environment:
        with pytest.raises(httpx.ConnectError):
            await environment.play({"seed": 0}, SimpleNamespace())
    assert [client.is_closed for client in Client.made] == [True]


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('{"letter": "a"}', {"letter": "a"}),
        ('```json\n{"letter": "a"}\n```', {"letter": "a"}),
        ("7", {"letter": "7"}),
        (" a\n", {"letter": "a"}),
    ],
)
def test_an_action_is_json_or_the_value_of_its_one_required_field(
    adapter: Any, text: str, action: dict[str, Any]
) -> None:
    schema = {"required": ["letter"], "properties": {"letter": {"type": "string"}}}
    assert adapter.action_of(text, schema) == action
    assert adapter.action_of("7", {**schema, "properties": {}}) == {"letter": 7}
    assert adapter.action_of("a", {"required": ["letter", "other"]}) is None
