"""``verifiers:TASKSET``: tasksets of verifiers 0.4 (``verifiers.v1``), played by its own ``Env.run_slot``. Settings are
those below ``--env.`` of ``vf-eval``, and its ``sampling`` and ``select``. Judges keep their own addresses."""

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import verifiers.v1 as vf

from atropos_verl.agents.client import AgentSession, Reward
from atropos_verl.environments.serve import Environment, PlayError, merged
from atropos_verl.errors import ConfigError

_KEY = "ATROPOS_SESSION_API_KEY_"  # verifiers hands no variable with API_KEY in its name to programs of a task


@contextlib.asynccontextmanager
async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
    """Raises ``ConfigError`` where settings cannot be carried or the taskset is endless, and verifiers' own errors."""
    sampling, select = settings.pop("sampling", {}), settings.pop("select", {})
    env = vf.load_environment(vf.resolve_env_config(merged({"taskset": {"id": target}}, settings)))
    taskset = env.taskset.select(vf.SelectConfig(**select))
    context = {"model": "policy", "sampling": vf.SamplingConfig(**sampling)}
    if not taskset.bounded:
        raise ConfigError(f"verifiers:{target} has no end; bound it: --set select.include.idx=0:1000", "--set")
    _check(env.config)

    async def play(task: Any, session: AgentSession) -> Reward:
        variable = f"{_KEY}{session.id}"
        os.environ[variable] = session.api_key
        try:
            client = vf.EvalClientConfig(base_url=session.base_url, api_key_var=variable)
            (slot,) = env.slots(task)
            episode = await env.run_slot(slot, vf.ModelContext(client=client, **context))
        finally:
            del os.environ[variable]
        traces = [trace for trace in episode.traces if trace.agent.config.client.base_url == session.base_url]
        if not episode.ok or not traces:
            error = next(filter(None, [episode.last_error, *(trace.last_error for trace in episode.traces)]), None)
            text = "it was not finished" if error is None else f"{error.type}: {error.message}"
            raise PlayError(f"verifiers: {text}", getattr(error, "status_code", None))
        if len(traces) > 1 or not traces[0].agent.trainable:
            told = ", ".join(f"{trace.agent.name} (trained: {trace.agent.trainable})" for trace in traces)
            raise ConfigError(f"verifiers:{target} asks the policy as {told}; a session trains one", "environment")
        (trace,) = traces
        given = trace.rewards.items()
        rewards = {name: reward and {"score": reward.score, "weight": reward.weight} for name, reward in given}
        info = {"rewards": rewards, "metrics": trace.metrics, "stop_condition": trace.stop_condition}
        return Reward(trace.reward, info=info)

    async with env.serving():
        # Without a shared server each rollout has its own, which ends with it; a shared one keeps an HTTP client for
        # each session that it has ever seen.
        env._interception = None
        yield Environment(list(taskset), play)


def _check(config: Any) -> None:
    roles = {name: role for name, role in config if isinstance(role, vf.AgentConfig)}
    policy = [name for name, role in roles.items() if role.client is None]
    if len(policy) != 1:
        text = f"{', '.join(policy) or 'no role'} would be the policy, and a session trains one role: give each other"
        raise ConfigError(f"{text} one of {', '.join(roles)} an address (--set ROLE.client.base_url=URL)", "--set")
    for name, part in {"": config, f"{policy[0]}.": roles[policy[0]]}.items():
        if part.retries.max_retries or part.retries.rules:
            text = "would train the attempts that failed with the reward of the last; the runner replaces rollouts"
            raise ConfigError(f"{name}retries {text}", "--set")
