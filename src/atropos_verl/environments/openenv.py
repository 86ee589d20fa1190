"""``openenv:URL`` or ``openenv:PACKAGE``: environments of OpenEnv 0.10, by its ``GenericEnvClient``.

OpenEnv has no agent of its own for them: the policy sees each observation as JSON, the schema of actions with the
first, and answers with an action (JSON; where an action has one required field, the text may be its value). Settings:
``resets`` (arguments of ``reset``, a task for each) or ``seeds`` (1000: a task for each seed below it), ``max_turns``
(10), ``system_prompt``, ``sampling``, ``use_docker`` (of a package)."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from openenv import GenericEnvClient

from atropos_verl.agents.client import AgentSession, Reward
from atropos_verl.environments.serve import Environment, PlayError
from atropos_verl.errors import ConfigError

_KNOWN = {"resets", "seeds", "max_turns", "system_prompt", "sampling", "use_docker"}


def action_of(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The action that a text is, alone or as a fenced block; None: it is none."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = "\n".join(text.splitlines()[1:-1])
    try:
        action = json.loads(text)
    except ValueError:
        action = text
    required = schema.get("required", [])
    if not isinstance(action, dict):
        # "7" may stand for a text or for a number.
        is_text = len(required) == 1 and schema.get("properties", {}).get(required[0], {}).get("type") == "string"
        return {required[0]: text if is_text else action} if len(required) == 1 else None
    return action


@contextlib.asynccontextmanager
async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
    """Raises ``ConfigError`` for an unknown setting, and httpx's errors where no server answers at the URL."""
    if unknown := settings.keys() - _KNOWN:
        raise ConfigError(f"{min(unknown)} is none of {', '.join(sorted(_KNOWN))}", "--set")
    resets = settings.get("resets") or [{"seed": seed} for seed in range(settings.get("seeds", 1000))]
    is_url = target.startswith(("http://", "https://"))

    async with httpx.AsyncClient(timeout=None) as http:

        async def schema_of(url: str) -> dict[str, Any]:
            answer = (await http.get(f"{url}/schema", timeout=30.0)).raise_for_status()
            schema: dict[str, Any] = answer.json()["action"]
            return schema

        schema = await schema_of(target.rstrip("/")) if is_url else {}

        async def play(reset: Mapping[str, Any], session: AgentSession) -> Reward:
            docker = settings.get("use_docker", False)
            client = (
                GenericEnvClient(base_url=target)
                if is_url
                else await GenericEnvClient.from_env(target, use_docker=docker)
            )
            rewards: list[float] = []
            async with client:
                actions = schema if is_url else await schema_of(client._base_url.replace("ws", "http", 1))
                if actions.get("title") in ("Action", "CallToolAction", "ListToolsAction"):
                    listed = await client.step({"type": "list_tools"})
                    form = {"type": "call_tool", "tool_name": "NAME", "arguments": {}}
                    actions = {"action": form, "tools": listed.observation["tools"]}
                result = await client.reset(**reset)
                shown, stop = {"observation": result.observation, "action_schema": actions}, "max_turns"
                system = (
                    [{"role": "system", "content": settings["system_prompt"]}] if settings.get("system_prompt") else []
                )
                messages = [*system, {"role": "user", "content": json.dumps(shown, ensure_ascii=False)}]
                for _ in range(settings.get("max_turns", 10)):
                    said = await _answer(http, session, messages, settings.get("sampling") or {})
                    if (action := action_of(said["content"] or "", actions)) is None:
                        stop = "no_action"
                        break
                    result = await client.step(action)
                    rewards += [] if result.reward is None else [float(result.reward)]
                    if result.done:
                        stop = "done"
                        break
                    observed = json.dumps({"observation": result.observation}, ensure_ascii=False)
                    messages += [said, {"role": "user", "content": observed}]
            if not rewards and stop != "no_action":
                raise PlayError(f"openenv:{target} gave no reward in an episode that ended with {stop}")
            return Reward(sum(rewards), info={"rewards": rewards, "stop_condition": stop})

        yield Environment(resets, play)


async def _answer(
    http: httpx.AsyncClient, session: AgentSession, messages: list[dict[str, str]], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    answer = await http.post(
        f"{session.base_url}/chat/completions",
        headers={"Authorization": f"Bearer {session.api_key}"},
        json={**sampling, "model": "policy", "messages": messages},
    )
    if answer.status_code != 200:
        raise PlayError(f"the policy answered {answer.status_code}: {answer.text[:300]}", answer.status_code)
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message
