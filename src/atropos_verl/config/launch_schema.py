"""The settings of a launch beside those of its trainer: processes, restarts, environments."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from atropos_verl.config.schema import (
    NonNegative,
    Place,
    Port,
    PositiveFloat,
    PositiveInt,
    ProgramConfig,
    Row,
    RunConfig,
    Section,
    SuperviseConfig,
    Variables,
    Words,
    describe,
)
from atropos_verl.errors import ConfigError

LAUNCH_DIRECTORY = "ATROPOS_VERL_LAUNCH_DIRECTORY"
"""Variable: the directory in which the command was started, in which modules of the user are looked for."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class ShareConfig(Section):
    """What part of the batches comes from an environment or an agent."""

    weight: NonNegative = Field(1.0, description="its share of the trained sequences is weight / sum of all weights")
    min_batch_allocation: float | None = Field(None, gt=0, le=1, description="least share of every batch")
    group_size: PositiveInt | None = Field(None, description="sequences per prompt; null: the run's")
    max_batches_offpolicy: PositiveInt | None = Field(None, description="batches queued ahead; null: the run's")


class EnvironmentConfig(ShareConfig, ProgramConfig):
    """One environment; ``environments`` maps names to these."""

    ecosystem: str | None = Field(None, description="in its place; one of docs/ecosystems.md, e.g. verifiers:TASKSET")
    omit: Words = Field((), description='arguments of the launcher to leave out, e.g. ["--env.min_batch_allocation"]')
    server_type: Literal["openai", "vllm", "sglang", "trl"] = Field("vllm", description="dialect it uses")
    copies: PositiveInt = Field(1, description="processes of it; they divide its weight")
    restart: Literal["always", "never"] = Field("always", description="when it dies")
    max_restarts: int = Field(5, ge=0, description="restarts in a row; then the run goes on without it")
    startup_timeout: PositiveFloat = Field(120.0, description="seconds from the first generation to its registration")
    evaluate: bool = Field(True, description="takes part in held-out evaluation (eval.before, eval.after)")

    def as_environment(self) -> Self:
        """That of another ecosystem as the program that serves it."""
        if self.ecosystem is None:
            return self
        env = {LAUNCH_DIRECTORY: str(Path.cwd()), **self.env}
        module = "atropos_verl.environments.serve"
        return self.model_copy(update={"module": module, "args": (self.ecosystem, *self.args), "env": env})


class AgentConfig(ShareConfig):
    """One agent; ``agents`` maps names to these. Each is an environment, whose program is ``atropos-verl agents``."""

    agent: str | None = Field(None, description="MODULE:FUNCTION, async def solve(task, session) -> float | Reward")
    command: str | None = Field(None, description="a command in its place; the task is its input, exit code 0 is 1")
    scorer: str | None = Field(None, description="MODULE:FUNCTION, score(task, output) of a command's output")
    tasks: str = Field("tasks.jsonl", description="file of tasks, one JSON value a line")
    eval_tasks: str | None = Field(None, description="held-out tasks (eval.before, eval.after); null: no evaluation")
    concurrency: PositiveInt = Field(64, description="sessions at once")
    timeout: PositiveFloat = Field(600.0, description="seconds for one rollout")
    python: str | None = Field(None, description="its interpreter, or a virtual environment; null: the launcher's")
    env: Variables = Field(default_factory=dict, description="environment variables")

    @model_validator(mode="after")
    def _one_agent(self) -> Self:
        if (self.agent is None) == (self.command is None):
            raise ValueError("name one of agent and command")
        return self

    def as_environment(self) -> EnvironmentConfig:
        """The runner, which works in the run directory: paths and modules are those of this directory."""
        values = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        shared = {name: values.pop(name) for name in EnvironmentConfig.model_fields if name in values}
        shared["env"] = {LAUNCH_DIRECTORY: str(Path.cwd()), **self.env}
        paths = {name: str(Path(values[name]).expanduser().absolute()) for name in values if name.endswith("tasks")}
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in {**values, **paths}.items()]
        args = tuple(word for pair in words for word in pair)
        evaluate = self.eval_tasks is not None
        return EnvironmentConfig(module="atropos_verl.agents.runner", args=args, evaluate=evaluate, **shared)


class ApiProcessConfig(Section):
    """The trajectory API that is started when ``atropos.api_url`` is null; ``atropos.server`` says which."""

    host: str = Field("127.0.0.1", description="address to bind")
    port: Port = Field(0, description="0: any free port")
    data_dir: Place | None = Field(None, description="directory of its data (embedded); null: run_dir/api")
    args: Words = Field((), description="further arguments of serve-api (embedded)")
    startup_timeout: PositiveFloat = Field(60.0, description="seconds until /status must answer")
    on_death: Literal["restart", "stop"] = Field("restart", description="stop: end the run, non-zero")
    max_restarts: int = Field(5, ge=0, description="restarts in a row; then the run ends, non-zero")


class TrainerProcessConfig(Section):
    """The trainer's process; what it trains and how are the keys at the top level."""

    python: str | None = Field(None, description="its interpreter, or a virtual environment; null: the launcher's")
    nproc: PositiveInt = Field(1, description="above 1: data-parallel ranks, under torchrun")
    env: Variables = Field(default_factory=dict, description="environment variables")
    on_death: Literal["restart", "stop"] = Field("restart", description="restart: and resume from the checkpoint")
    max_restarts: int = Field(3, ge=0, description="restarts in a row; then the run ends, non-zero")
    startup_timeout: PositiveFloat = Field(300.0, description="seconds until the gateway must answer")
    generation_timeout: PositiveFloat = Field(120.0, description="seconds from then to the first generation")
    stop_grace: PositiveFloat = Field(60.0, description="seconds to write its checkpoint when the run is stopped")


class LaunchConfig(Section):
    backend: Literal["local", "ray"] = Field(
        "local", description="local: verl's engine in the trainer process, or torchrun; ray: verl's trainer on Ray"
    )
    api: ApiProcessConfig = Field(default_factory=ApiProcessConfig)
    trainer_process: TrainerProcessConfig = Field(default_factory=TrainerProcessConfig)
    environments: dict[str, EnvironmentConfig] = Field(
        default_factory=lambda: {"demo": EnvironmentConfig()}, description="name → environment"
    )
    agents: dict[str, AgentConfig] = Field(default_factory=dict, description="name → agent, an environment too")
    envs: tuple[str, ...] | None = Field(None, description="names of environments and agents to start; null: all")
    only: tuple[Literal["api", "trainer", "environments"], ...] | None = Field(
        None, description="parts to start here; null: all without a URL"
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """Validate a nested mapping. Raises ``ConfigError`` naming every key that is wrong. An environment that is null
        is left out; without any, and without agents, the demo's is taken."""
        values = dict(values)
        named = values.pop("environments", None) or {}
        if isinstance(named, Mapping):
            named = {key: value for key, value in named.items() if value is not None}
        if named or values.get("agents"):
            values["environments"] = named
        return super().from_mapping(values, prefix)

    @model_validator(mode="after")
    def _names(self) -> Self:
        known = {**self.environments, **self.agents}
        if twice := self.environments.keys() & self.agents.keys():
            raise ValueError(f"agents.{min(twice)}: an environment has this name")
        for name in known:
            if not _NAME.fullmatch(name):
                raise ValueError(f"environments.{name}: a name is a letter, then letters, digits, - and _")
            if name in ("trainer", "trajectory_api"):
                raise ValueError(f"environments.{name}: the name belongs to another process of the run")
        unknown = [name for name in self.envs or () if name not in known]
        if unknown:
            listed = ", ".join(known) or "none"
            raise ValueError(f"envs: no environment named {', '.join(unknown)}; there are: {listed}")
        return self

    @property
    def chosen(self) -> dict[str, EnvironmentConfig]:
        """The environments that ``envs`` leaves, agents as such."""
        known = {name: environment.as_environment() for name, environment in self.environments.items()}
        known |= {name: agent.as_environment() for name, agent in self.agents.items()}
        return known if self.envs is None else {name: known[name] for name in self.envs}

    def starts(self, part: str) -> bool:
        """True when ``only`` leaves ``part``: ``api``, ``trainer`` or ``environments``."""
        return self.only is None or part in self.only


def describe_launch() -> list[Row]:
    """Every key of a launch as ``(dotted name, default, meaning)``; an environment's as ``environments.NAME.key``."""
    return describe(LaunchConfig) + describe(SuperviseConfig, "supervise.")


def note_of_unused_keys(config: RunConfig, prefix: str = "") -> str:
    """Names the keys that are set and without effect on a trainer whose API and environments run elsewhere, or "". An
    evaluation that is switched off is not among them. The backend puts ``prefix`` before its keys."""
    evaluation = {} if config.eval.commands_file is not None else _changed(config.eval)
    names = [f"env.{name}" for name in _changed(config.env)]
    names += [f"eval.{name}" for name, value in evaluation.items() if value is not False]
    unused = ", ".join(f"{prefix}{name}" for name in names)
    return unused and f"{unused}: not used, since atropos.api_url says that environments run elsewhere"


def check_keys(config: RunConfig, launch: LaunchConfig, *, own_api: bool) -> list[str]:
    """Warnings about unused keys. Raises ``ConfigError`` for one of ``main_atropos.py``, or of the other API."""
    for name in _changed(config.env).keys() - {"max_batches_offpolicy"}:
        text = f"main_atropos.py reads this key; a launch has it in environments.NAME (environments.demo.{name}=...)"
        raise ConfigError(text, f"env.{name}")
    api = _changed(launch.api)
    if own_api and config.atropos.server == "upstream":
        for name in api.keys() & {"data_dir", "args"}:
            raise ConfigError("the embedded API has it, atropos.server=upstream does not", f"api.{name}")
    if api and not own_api and launch.only is None:
        keys = ", ".join(f"api.{name}" for name in api)
        return [f"{keys}: not used, since atropos.api_url names an API that runs already"]
    return []


def _changed(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(exclude_defaults=True)
