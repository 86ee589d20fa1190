"""``harbor:DATASET``: tasks of Harbor 0.26 (a directory of them, or a registered data set), run by its own ``Trial``.

Settings are those of its ``TrialConfig``, of ``DatasetConfig`` below ``dataset``, and ``rewards``: a weight for each
that is trained. The agent finds the session by ``OPENAI_BASE_URL`` (``ANTHROPIC_BASE_URL``:
``agent.model_name=anthropic/…``)."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from harbor.models.job.config import DatasetConfig
from harbor.models.trial.config import TrialConfig
from harbor.models.trial.error_policy import ERROR_POLICIES
from harbor.trial.trial import Trial

from atropos_verl.agents.client import AgentSession, Reward
from atropos_verl.environments.serve import Environment, PlayError, launch_directory, merged
from atropos_verl.errors import ConfigError


@contextlib.asynccontextmanager
async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
    """Raises ``ConfigError`` where no agent would ask the policy, and Harbor's errors about data set and settings."""
    weights, source = settings.pop("rewards", {"reward": 1.0}), settings.pop("dataset", {})
    agent = settings.get("agent", {})
    if agent.get("name", "oracle") in ("oracle", "nop") and not agent.get("import_path"):
        raise ConfigError("no agent would ask the policy: --set agent.name=terminus-2, or another", "--set")
    directory = launch_directory() / target
    name, _, version = target.partition("@")
    source |= {"path": directory} if directory.is_dir() else {"name": name, "version": version or None}
    tasks = await DatasetConfig(**source).get_task_configs()
    for task in tasks[:1]:
        TrialConfig(**{**settings, "task": task})

    async def play(task: Any, session: AgentSession) -> Reward:
        own = {"task": task, "agent": {"env": session.variables}}
        with tempfile.TemporaryDirectory(prefix="harbor-") as trials:
            defaults = {"trials_dir": trials, "agent": {"model_name": "openai/policy"}}
            trial = await Trial.create(TrialConfig(**merged(merged(defaults, settings), own)))
            result = await trial.run()
        for error in result.recorded_exceptions():
            # Harbor grades a rollout after an error that it does not know, and would try it again.
            if error.policy.should_retry or not error.policy.has_valid_reward:
                again = error.policy.should_retry and error.exception_type in ERROR_POLICIES
                raise PlayError(f"harbor: {error.exception_type}: {error.exception_message}", 503 if again else None)
        rewards = (result.verifier_result and result.verifier_result.rewards) or {}
        if not rewards:
            raise PlayError(f"harbor: {result.task_name} was not graded")
        if missing := weights.keys() - rewards.keys():
            told = f"{result.task_name} has no reward {min(missing)} but {', '.join(rewards)}"
            raise ConfigError(f"{told}: --set rewards.NAME=WEIGHT for those to train", "--set")
        return Reward(sum(rewards[name] * weight for name, weight in weights.items()), info={"rewards": rewards})

    yield Environment(tasks, play)
