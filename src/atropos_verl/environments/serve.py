"""``atropos-verl environments``: an environment of another ecosystem as an Atropos environment. An adapter opens it in
its own interpreter and plays each task against a session of the gateway; the rest is the runner of agents."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from atropos_verl.agents.client import AgentSession, Reward
from atropos_verl.agents.runner import AgentError, Solve, add_runner_arguments, give, program, run_tasks
from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY
from atropos_verl.errors import ConfigError
from atropos_verl.training.extensions import search_launch_directory

ECOSYSTEMS = {
    "verifiers": ("verifiers", "0.4", "TASKSET"),
    "openenv": ("openenv", "0.10", "URL_OR_PACKAGE"),
    "nemo-gym": ("nemo-gym", "0.4", "CONFIG"),
    "harbor": ("harbor", "0.26", "DATASET"),
}
"""Prefix → package, the release whose API the adapter is written for, and what follows the prefix."""

_FORMS = ", ".join(f"{prefix}:{what}" for prefix, (_, _, what) in ECOSYSTEMS.items())


class PlayError(AgentError):
    """The ecosystem's runner gave no reward. ``status``: that of the model's answer where this is the cause."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Environment:
    """What an adapter opens. ``play`` raises ``PlayError`` where the native runner gave no reward."""

    tasks: Sequence[Any]
    play: Callable[[Any, AgentSession], Awaitable[Reward]]


Open = Callable[[str, dict[str, Any]], AbstractAsyncContextManager[Environment]]
"""``open_environment(target, settings)`` of an adapter: settings are the ecosystem's own, as a nested mapping."""


def launch_directory() -> Path:
    """Where the command was started: a launch starts this in the run directory."""
    return Path(os.environ.get(LAUNCH_DIRECTORY, Path.cwd()))


def adapter_of(named: str) -> tuple[Open, str]:
    """The adapter of ``PREFIX:TARGET``, and the target. Raises ``ConfigError``: neither exists, or its package is
    missing in this interpreter or of another release."""
    prefix, _, target = named.partition(":")
    if prefix not in ECOSYSTEMS or not target:
        raise ConfigError(f"{named!r} is none of {_FORMS}", "environment")
    package, release, _ = ECOSYSTEMS[prefix]
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "none"
    if found.split(".")[:2] != release.split("."):
        text = f"{named} needs {package} {release} in {sys.executable}, which has {found}: pip install"
        advice = f"'{package}=={release}.*' there, or name another interpreter (python: in a launch)"
        raise ConfigError(f"{text} {advice}", "environment")
    search_launch_directory()  # tasksets of the user's own
    module = importlib.import_module(f"atropos_verl.environments.{prefix.replace('-', '_')}")
    return module.open_environment, target


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """``a.b=VALUE`` (YAML) as nested mappings; later ones win. Raises ``ConfigError``."""
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name.endswith(".") or not name:
            raise ConfigError(f"{word!r} is not KEY=VALUE", "--set")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word!r} is not KEY=VALUE with a value in YAML: {error}", "--set") from error
        for key in reversed(name.split(".")):
            value = {key: value}
        settings = merged(settings, value)
    return settings


def merged(defaults: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {name for name, value in over.items() if isinstance(value, dict) and isinstance(defaults.get(name), dict)}
    return {**defaults, **over, **{name: merged(defaults[name], over[name]) for name in both}}


@contextlib.asynccontextmanager
async def opened(options: argparse.Namespace) -> AsyncIterator[tuple[Solve, Sequence[Any]]]:
    """The environment with those of its tasks that the action is for: the last ones are held out. Raises
    ``ConfigError``, also for what the ecosystem's own code says of target and settings."""
    open_environment, target = adapter_of(options.environment)
    async with contextlib.AsyncExitStack() as stack:
        try:
            opening = open_environment(target, settings_of(options.set))
            environment = await stack.enter_async_context(opening)
        except ConfigError:
            raise
        except Exception as error:
            words = "".join(f" --set {word}" for word in options.set)
            text = f"{options.environment}{words}: {type(error).__name__}: {error}"
            raise ConfigError(text, "environment") from error

        async def solve(task: Any, session: AgentSession) -> None:
            await give(session, await environment.play(task, session))

        if not (tasks := environment.tasks):
            raise ConfigError(f"{options.environment} has no tasks", "environment")
        first = len(tasks) - min(options.held_out, len(tasks) // 5)
        yield solve, (tasks[first:] or tasks) if options.action == "evaluate" else tasks[:first]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("serve", "evaluate"), help="serve it to the trainer, or evaluate on its held-out tasks")
    add("environment", help=_FORMS)
    setting = "a setting of the ecosystem (docs/ecosystems.md); may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    held_out = "last tasks that are evaluated and not trained, at most a fifth (default: %(default)s)"
    add("--held-out", type=int, default=32, help=held_out)
    add_runner_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code, as of the runner of agents. Raises ``ConfigError``."""
    return run_tasks(options, opened(options))


if __name__ == "__main__":
    sys.exit(program("environments", add_arguments, run))
