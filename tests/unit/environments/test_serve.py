"""What is refused before an environment of another ecosystem is opened, and its tasks."""

import argparse
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY, EnvironmentConfig, LaunchConfig
from atropos_verl.environments import serve
from atropos_verl.environments.serve import Environment, adapter_of, add_arguments, opened, settings_of
from atropos_verl.errors import ConfigError


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_settings_are_nested_and_the_last_wins() -> None:
    words = ["agent=x", "agent.max_turns=3", "agent.harness.id=null", "a=[1, 2]", "agent.max_turns=4"]
    assert settings_of(words) == {"agent": {"max_turns": 4, "harness": {"id": None}}, "a": [1, 2]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["agent"], "'agent' is not KEY=VALUE"),
        (["=3"], "'=3' is not KEY=VALUE"),
        (["agent.=3"], "'agent.=3' is not KEY=VALUE"),
        (["rewards=[1"], r"'rewards=\[1' is not KEY=VALUE with a value in YAML"),
    ],
)
def test_what_is_no_setting_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings_of(words)


@pytest.mark.parametrize("named", ["gym:x", "verifiers", "verifiers:"])
def test_an_unknown_ecosystem_is_told_the_forms(named: str) -> None:
    with pytest.raises(
        ConfigError, match="is none of verifiers:TASKSET, openenv:URL_OR_PACKAGE, nemo-gym:CONFIG, harbor:DATASET"
    ):
        adapter_of(named)


@pytest.mark.parametrize(("found", "told"), [(None, "has none"), ("0.1.14", r"has 0\.1\.14")])
def test_a_package_that_is_missing_or_another_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: str | None, told: str
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise serve.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(serve.metadata, "version", version)
    with pytest.raises(ConfigError, match=f"needs verifiers 0.4 in .*{told}: pip install 'verifiers==0.4"):
        adapter_of("verifiers:gsm8k")


async def test_the_last_tasks_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
        async def play(task: Any, session: Any) -> Any: ...

        yield Environment(list(range(int(target))), play)

    monkeypatch.setattr(serve, "adapter_of", lambda named: (open_environment, named))

    async def tasks(action: str, count: str, *words: str) -> list[int]:
        async with opened(options(action, count, *words)) as (_, found):
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


def test_a_script_and_an_ecosystem_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"script \(x\.py\) and ecosystem \(verifiers:a\) exclude each other"):
        EnvironmentConfig(script="x.py", ecosystem="verifiers:a")
