"""The session routes of a gateway without an engine: what an agent says costs one token, the number of the turn."""

import copy
import itertools
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class StubGateway:
    """``answers``: statuses given to the next requests of agents, before anything else."""

    def __init__(self) -> None:
        self.sessions: dict[str, dict[str, Any]] = {}
        self.answers: list[int] = []
        self._numbers = itertools.count()
        routes = [
            Route("/sessions", self._open, methods=["POST"]),
            Route("/sessions/{id}/reward", self._reward, methods=["POST"]),
            Route("/sessions/{id}/abort", self._abort, methods=["POST"]),
            Route("/sessions/{id}/rollout", self._rollout),
            Route("/s/{id}/v1/chat/completions", self._turn, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def _open(self, request: Request) -> Response:
        name = f"s{next(self._numbers)}"
        self.sessions[name] = {**await request.json(), "state": "open", "turns": 0}
        base = f"{str(request.base_url).rstrip('/')}/s/{name}/v1"
        return JSONResponse({"id": name, "base_url": base, "api_key": f"key-{name}"})

    async def _turn(self, request: Request) -> Response:
        if self.answers and (status := self.answers.pop(0)) != 200:
            return JSONResponse({"error": {"message": "scripted"}}, status)
        session = self.sessions[request.path_params["id"]]
        session["turns"] += 1
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": str(session["turns"])}}]})

    async def _reward(self, request: Request) -> Response:
        session, body = self.sessions[request.path_params["id"]], await request.json()
        session.update(body, state="finished")
        return JSONResponse({"state": "finished"})

    async def _abort(self, request: Request) -> Response:
        self.sessions[request.path_params["id"]]["state"] = "aborted"
        return JSONResponse({})

    async def _rollout(self, request: Request) -> Response:
        session = self.sessions.get(request.path_params["id"])
        if session is None or session["state"] != "finished":
            return JSONResponse({"error": {"message": "none"}}, 404 if session is None else 409)
        number = int(request.path_params["id"][1:])
        prompt: dict[str, Any] = {"token_ids": [5, 6], "masks": [-100, -100], "logprobs": [1.0, 1.0]}
        row = [{**copy.deepcopy(prompt), "turns": [], "spans": []} for _ in "ab"]
        for turn in range(session["turns"]):  # the odd turns are in a second row
            own, at = row[turn % 2], len(row[turn % 2]["token_ids"])
            own["token_ids"] += [7, 100 + number]
            own["masks"] += [-100, 100 + number]
            own["logprobs"] += [1.0, -0.5]
            own["turns"].append(turn)
            own["spans"].append([at + 1, at + 2])
        rows = [own for own in row if own["turns"]]
        return JSONResponse({"reward": session["reward"], "per_turn": session.get("per_turn"), "rows": rows})
