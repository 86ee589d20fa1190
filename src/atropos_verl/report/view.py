"""``atropos-verl view RUN_DIR …``: a page of runs, live and afterwards: curves, processes, and every rollout by tokens.

It reads run directories through ``TraceReader`` and changes nothing. What they hold was written by models and
environments: answers are JSON, the page shows it as text, and its ``Content-Security-Policy`` runs nothing else.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from atropos_verl.errors import ConfigError, ServiceError
from atropos_verl.http_thread import bracketed, foreign_page, has_token, is_loopback, listen, reachable, uvicorn_config
from atropos_verl.report.trace_reader import RolloutFilter, TraceReader
from atropos_verl.training.step import StepTail

_PAGE = Path(__file__).parent / "static"
_TOKEN_VARIABLE = "ATROPOS_VIEW_TOKEN"
_PORT = 8090
_SIGNS_OF_A_RUN = ("metrics.jsonl", "trace.sqlite", "state.json", "logs")
_MOST_RUNS = 200
_POLL_SECONDS = 0.5
_READ_BYTES = 4 << 20
_TOKENS = 1000
"""Tokens of a sequence in one answer."""
_SHUTDOWN_SECONDS = 2
_SAFE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class RunView:
    """The ASGI app. ``places``: run directories, or directories that hold some; ``token``: what requests below
    ``/api/`` must carry; ``hosts``: names that ``Host`` may have, empty: any."""

    def __init__(self, places: Sequence[Path], token: str | None = None, hosts: Sequence[str] = ()) -> None:
        self._places, self._token, self._hosts = places, token, hosts
        self._readers: dict[Path, TraceReader] = {}
        self.is_ending: Callable[[], bool] = lambda: False
        """Streams of events end when it says so."""
        answer = self._answer
        self._app = Starlette(
            routes=[
                Route("/", lambda _: FileResponse(_PAGE / "index.html")),
                Mount("/static", StaticFiles(directory=_PAGE)),
                Route("/api/runs", self._list),
                Route("/api/runs/{run}/events", self._events),
                Route("/api/runs/{run}/rollouts", answer(self._rollouts)),
                Route("/api/runs/{run}/counts", answer(lambda reader, _: reader.counts())),
                Route("/api/runs/{run}/groups/{id:int}", answer(lambda reader, of: reader.group(of.path_params["id"]))),
                Route("/api/runs/{run}/sequences/{id:int}", answer(_sequence)),
                Route("/api/runs/{run}/sessions/{id}", answer(lambda reader, of: reader.session(of.path_params["id"]))),
                Route("/api/runs/{run}/survivors", answer(lambda reader, _: reader.survivors())),
            ],
            exception_handlers={HTTPException: _refused, ConfigError: _refused},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _SAFE_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        headers = Headers(scope=scope)
        app: Any = self._app
        if reason := foreign_page(headers, self._hosts):
            app = _json({"detail": reason}, 403)
        elif self._token and scope["path"].startswith("/api/") and not has_token(headers, self._token):
            app = _json({"detail": "send the token of this view"}, 401)
        await app(scope, receive, send_safe)

    def runs(self) -> dict[str, Path]:
        """Name → directory: of each place itself, or else of the runs in it, the newest first."""
        found: dict[str, Path] = {}
        for place in self._places:
            inside = [] if _is_run(place) else [path for path in place.glob("*") if _is_run(path)]
            inside.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for path in inside[:_MOST_RUNS] or [place] * _is_run(place):
                name = path.absolute().name or str(path)
                # JSON and URLs carry no lone surrogates, which stand for bytes of a name that are not UTF-8.
                name = name.encode("utf-8", "replace").decode()
                number = sum(other == name or other.startswith(f"{name} (") for other in found)
                found[f"{name} ({number + 1})" if number else name] = path
        return found

    def _reader(self, request: Request) -> TraceReader:
        name = request.path_params["run"]
        path = self.runs().get(name)
        if path is None:
            raise HTTPException(404, f"no run is called {name!r} here")
        return self._readers.setdefault(path, TraceReader(path))

    def _list(self, _: Request) -> Response:
        return _json([{"name": name, "path": str(path.absolute())} for name, path in self.runs().items()])

    def _answer(self, answer: Callable[[TraceReader, Request], Any]) -> Callable[[Request], Response]:
        """An endpoint; since it is no coroutine, Starlette calls it in a thread."""

        def endpoint(request: Request) -> Response:
            try:
                return _json(answer(self._reader(request), request))
            except KeyError:
                raise HTTPException(404, "it is not in the trace of this run, or was removed from it") from None

        return endpoint

    def _rollouts(self, reader: TraceReader, request: Request) -> dict[str, Any]:
        given = {name: value for name, value in request.query_params.items() if value}
        try:
            limit, before = int(given.pop("limit", 50)), int(given.pop("before", 0)) or None
            wanted = msgspec.convert(given, RolloutFilter, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise HTTPException(400, f"limit, before or a filter: {error}") from None
        return {"rollouts": reader.rollouts(wanted, max(1, limit), before), "has_index": reader.has_index}

    def _events(self, request: Request) -> Response:
        reader = self._reader(request)
        tail = StepTail(reader.run_dir / "metrics.jsonl", request.headers.get("last-event-id", ""))
        stream = self._follow(reader, tail, request.query_params.getlist("metric") or ["*"])
        return StreamingResponse(stream, media_type="text/event-stream")

    async def _follow(self, reader: TraceReader, tail: StepTail, metrics: Sequence[str]) -> AsyncIterator[bytes]:
        """Server-sent events: ``steps`` (its id is a place in the file, for ``Last-Event-ID``) and ``live``."""
        is_wanted: dict[str, bool] = {}
        told: Any = None
        told_at = 0.0
        while not self.is_ending():
            is_new, lines = await asyncio.to_thread(tail.read, _READ_BYTES)
            for key in {key for line in lines for key in line} - set(is_wanted):
                always = key in ("step", "policy_version", "held_out/step")
                is_wanted[key] = always or any(fnmatchcase(key, pattern) for pattern in metrics)
            if is_new or lines:
                shown = [{key: value for key, value in line.items() if is_wanted[key]} for line in lines]
                yield _event("steps", {"anew": is_new, "lines": shown}, tail.id)
            if len(lines) == 0:
                live = await asyncio.to_thread(reader.live)
                state = live["running"], (live["state"] or {}).get("time")
                if told_at == 0 or (state != told and time.monotonic() - told_at >= 2 * _POLL_SECONDS):
                    told, told_at = state, time.monotonic()
                    yield _event("live", live)
                await asyncio.sleep(_POLL_SECONDS)


def _sequence(reader: TraceReader, request: Request) -> dict[str, Any]:
    """Without its tokens, or with ``_TOKENS`` of them from ``tokens=`` on."""
    found, first = reader.sequence(request.path_params["id"]), request.query_params.get("tokens", "")
    items = found.pop("items") or []
    if first.isdecimal():
        found["items"] = items[int(first) : int(first) + _TOKENS]
    return found


def _json(content: Any, status: int = 200) -> Response:
    return Response(_text(content), status, media_type="application/json")


def _text(content: Any) -> str:
    """JSON in ASCII: it holds surrogates that stand alone. A number that is not finite is null."""
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None))


def _event(name: str, content: Any, id_: str | None = None) -> bytes:
    head = f"id: {id_}\n" if id_ else ""
    return f"{head}event: {name}\ndata: {_text(content)}\n\n".encode()


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _json({"detail": error.detail}, error.status_code)
    return _json({"detail": str(error)}, 500)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in _SIGNS_OF_A_RUN)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="a run, or a directory of runs (default: runs)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=_PORT, help=f"port; 0 takes a free one (default: {_PORT})")
    add("--token", help=f"token to ask for (default: ${_TOKEN_VARIABLE}; beyond this machine, else, a new one)")


def run(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> int:
    """Serve until Ctrl-C. Returns the exit code; raises ``ConfigError`` for a place that is no directory."""
    import uvicorn

    places = options.run_dirs or [Path("runs")]
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place} is no directory; give run directories, or a directory that holds some")
    token = options.token or environment.get(_TOKEN_VARIABLE) or None
    hosts = ["localhost", "127.0.0.1", "::1", options.host.strip("[]").lower()] if is_loopback(options.host) else []
    if not hosts and token is None:
        token = secrets.token_urlsafe(24)
    logging.basicConfig(level=logging.WARNING)
    try:
        listener = listen(options.host, options.port, "view", "Choose another --port, or 0 for any.")
    except ServiceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    app = RunView(places, token, hosts)
    server = uvicorn.Server(
        uvicorn_config(app, listener, server_header=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    )
    app.is_ending = lambda: server.should_exit
    where = f"http://{bracketed(reachable(options.host))}:{listener.getsockname()[1]}/"
    sys.stdout.write(f"view: {where}{f'#token={token}' if token else ''}  (Ctrl-C ends it)\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        asyncio.run(server.serve(sockets=[listener]))
    return 0
