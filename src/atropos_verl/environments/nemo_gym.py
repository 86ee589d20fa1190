"""``nemo-gym:CONFIG``: environments of NeMo Gym 0.4, started by ``gym env start``, played by ``/run`` of their agents.

Gym knows one address of the policy. This listens there, and sends a request to the session whose id the agent hands on
with the metadata of its task's request. Where a judge or an agent asks without them, the environment is refused.
Settings: ``tasks`` (JSONL; default: the agents' data sets of type train); others are Gym's (``++KEY=VALUE`` there)."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import nemo_gym
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atropos_verl.agents.client import AgentSession, Reward
from atropos_verl.agents.runner import read_tasks
from atropos_verl.environments.serve import Environment, PlayError, launch_directory
from atropos_verl.errors import ConfigError
from atropos_verl.http_thread import ServerThread

_MODEL = "responses_api_models/openai_model/configs/openai_model.yaml"
_SESSION = "atropos_session"


@contextlib.asynccontextmanager
async def open_environment(target: str, settings: dict[str, Any]) -> AsyncIterator[Environment]:
    """Raises ``ConfigError``: Gym does not start with these settings, or a task cannot be played."""
    file = settings.pop("tasks", None)
    sessions: dict[str, AgentSession] = {}
    failed: dict[str, int] = {}
    """Status by session; "" stands for requests of none."""
    trust = httpx.create_ssl_context()  # a client of its own would read the system's certificates each time: 20 ms

    async def forward(request: Request) -> Response:
        body = await request.json()
        name = (body.get("metadata") or {}).pop(_SESSION, "")
        if name not in sessions:  # it may be over
            if not name:
                failed[""] = 400
            return JSONResponse({"error": {"message": f"no session {name}"}}, 400)
        session = sessions[name]
        headers = {"Authorization": f"Bearer {session.api_key}"}
        try:
            async with httpx.AsyncClient(timeout=None, verify=trust, headers=headers) as http:
                answer = await http.post(f"{session.base_url}/{request.path_params['path']}", json=body)
        except httpx.TransportError as error:
            failed[name] = 503
            return JSONResponse({"error": {"message": f"the gateway: {type(error).__name__} {error}"}}, 503)
        if answer.status_code >= 400:
            failed[name] = answer.status_code
        return Response(answer.content, answer.status_code, media_type="application/json")

    app = Starlette(routes=[Route("/v1/{path:path}", forward, methods=["POST"])])
    policy = ServerThread(app, service="policy", advice="", host="127.0.0.1", port=0)
    with policy:
        own = {"policy_base_url": f"{policy.url}/v1", "policy_api_key": "none", "policy_model_name": "policy"}
        async with _started(target, {**settings, **own}) as agents:

            async def play(row: Mapping[str, Any], session: AgentSession) -> Reward:
                params = row["responses_create_params"]
                params = {**params, "metadata": {**(params.get("metadata") or {}), _SESSION: session.id}}
                url = "http://{host}:{port}/run".format(**agents[row["agent_ref"]["name"]])
                sessions[session.id] = session
                try:
                    # A rollout's cookies are its own.
                    async with httpx.AsyncClient(timeout=None, verify=trust) as http:
                        answer = await http.post(url, json={**row, "responses_create_params": params})
                finally:
                    del sessions[session.id]
                    status = failed.pop(session.id, None)
                if "" in failed:
                    text = "its agent or judge asks the policy without the metadata of the task: it cannot be carried"
                    raise ConfigError(f"nemo-gym:{target}: {text}", "environment")
                result = answer.json() if answer.status_code == 200 else {}
                if "reward" not in result or "_ng_failure_class" in result:
                    raise PlayError(f"nemo-gym: {answer.status_code} {answer.text[:300]}", status)
                metrics = {name: value for name, value in result.items() if isinstance(value, int | float)}
                return Reward(metrics.pop("reward"), info={"metrics": metrics})

            yield Environment(_tasks(agents, file), play)


@contextlib.asynccontextmanager
async def _started(target: str, settings: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Gym with its servers; the settings of its agents, by name."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        head = {"host": "127.0.0.1", "port": free.getsockname()[1]}
    words = [f"++{name}={json.dumps(value)}" for name, value in _leaves({**settings, "head_server": head})]
    command = [str(Path(sys.executable).with_name("gym")), "env", "start", "--config", target, "--config", _MODEL]
    # Ray makes sockets there; below a launch's TMPDIR their names are too long.
    short = {"RAY_TMPDIR": "/tmp", **os.environ}
    process = await asyncio.create_subprocess_exec(*command, *words, cwd=launch_directory(), env=short)
    try:
        async with httpx.AsyncClient(base_url="http://{host}:{port}".format(**head)) as http:
            instances: list[Any] = []
            while not instances:
                await asyncio.sleep(0.5)
                if process.returncode is not None:
                    text = f"`gym env start` ended with {process.returncode}; its lines above say why"
                    raise ConfigError(f"nemo-gym:{target}: {text}", "environment")
                with contextlib.suppress(httpx.TransportError):
                    found = (await http.get("/server_instances")).json()
                    instances = [await http.get(instance["url"]) for instance in found]
            config = yaml.safe_load((await http.get("/global_config_dict_yaml")).json())
        parts = [(name, part.get("responses_api_agents")) for name, part in config.items() if isinstance(part, dict)]
        yield {name: agent for name, kinds in parts if kinds for agent in kinds.values()}
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        await process.wait()


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]


def _tasks(agents: Mapping[str, Any], file: str | None) -> list[dict[str, Any]]:
    files = [(next(iter(agents)) if len(agents) == 1 else None, file)] if file else []
    for name, agent in agents.items() if file is None else ():
        files += [(name, data["jsonl_fpath"]) for data in agent.get("datasets") or () if data.get("type") == "train"]
    tasks = []
    for owner, path in files:
        places = launch_directory() / path, Path(nemo_gym.PARENT_DIR, path)
        for number, task in enumerate(read_tasks(next(filter(Path.exists, places), places[0])), 1):
            task.setdefault("agent_ref", {"name": owner})
            if task["agent_ref"]["name"] not in agents or "responses_create_params" not in task:
                text = f"no responses_create_params, or an agent_ref that is none of {', '.join(agents)}"
                raise ConfigError(f"{path}, task {number}: {text}", "--set tasks")
            tasks.append(task)
    return tasks
