"""``TrajectoryApi``: the trajectory API as an ASGI application: who may call, the paths, and errors as answers.

Pages of other sites and requests without the token are refused before anything else."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from atropos_verl.errors import AtroposVerlError, ConfigError, StorageWriteError
from atropos_verl.http_thread import (
    SameLines,
    bracketed,
    environment_token,
    foreign_page,
    has_token,
    is_loopback,
    listen,
    uvicorn_config,
)
from atropos_verl.protocol.messages import AckRequest, EnvIdentifier, EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import CheckedGroup, Refusal
from atropos_verl.protocol.wire import MEDIA_TYPE, pack_group
from atropos_verl.server.batcher import StoredGroup
from atropos_verl.server.bodies import (
    BatchResponse,
    Connection,
    Connections,
    StatusBarrier,
    batch_parts,
    decoded,
    idempotency,
    is_compressed,
    lease_seconds,
    read_body,
)
from atropos_verl.server.body_checker import BodyChecker, Rules
from atropos_verl.server.settings import COMPRESSIONS, SECOND_TRAINER, ServerSettings
from atropos_verl.server.status import Metrics, env_status, environments, status
from atropos_verl.server.store import Counters, Environment, RequestError, Store

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response | dict[str, Any]]]
"""What is no ``Response`` is sent as JSON."""

FEATURES = ("batch_fill", "idempotency", "leases", "packed", "rollouts", "wait")
"""Features beyond upstream's protocol; a client learns them at ``/register``."""
_TICK_SECONDS = 1.0
_LONGEST_WAIT = 60.0
_MAX_WAITING = 64
"""Requests that wait for a batch; further ones are answered at once. Each arrival wakes them all."""
_RECHECK_SECONDS = 0.25
"""A waiting ``GET /batch`` looks again after each group, and this often for what time alone changes (leases, fill)."""
_OPEN_PATHS = frozenset({"/", "/health"})
"""Hold no data: the name of the API, and an empty page that asks for the token."""
_CLIENT_GONE = 499
_PACKED_SHARE = 0.2
"""Bytes of packed groups kept ahead of need, over those received. (A packed group has about a third of its JSON.)"""
_NOT_REGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
_MAX_UNKNOWN = 1000
_SHOWN_NAME = 80
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_EXAMPLE = "tokens masks scores advantages ref_logprobs generation_params inference_logprobs messages images"


class TrajectoryApi:
    """An ASGI application over a store that it opens. ``now``: seconds since the epoch, for tests. Close the store.
    Raises ``ConfigError`` or ``StorageError``: the data directory cannot be used."""

    def __init__(self, settings: ServerSettings | None = None, now: Callable[[], float] | None = None) -> None:
        self.store = Store(settings or ServerSettings(), now)
        self.counters = Counters(started_at=self.store.now())
        self.connections = Connections()
        self._metrics = Metrics(self.store, self.counters)
        self._barrier = StatusBarrier()
        self._arrived = asyncio.Event()
        self._waiting = 0
        self.checker = BodyChecker()
        self._unknown: set[str] = set()
        self._refusals = SameLines()
        self._page = Path(__file__).with_name("page.html").read_bytes()
        self.handlers: dict[str, Handler] = {
            "GET /": self.root,
            "GET /health": self.health,
            "POST /register": self.register,
            "POST /register-env": self.register_env,
            "POST /disconnect-env": self.disconnect_env,
            "GET /wandb_info": self.wandb_info,
            "GET /info": self.info,
            "POST /scored_data": partial(self._take, is_list=False),
            "POST /scored_data_list": partial(self._take, is_list=True),
            "GET /status": self.status,
            "GET /status-env": self.status_env,
            "GET /latest_example": self.latest_example,
            "POST /reset_data": self.reset_data,
            "GET /batch": self.batch,
            "POST /batch/ack": self.ack,
            "POST /batch/renew": self.renew,
            "POST /batch/release": self.release,
            "GET /metrics": self.metrics,
            "GET /page-data": self.page_data,
        }
        if self.store.settings.allow_get_reset:
            self.handlers["GET /reset_data"] = self.reset_data
        self._paths = {name.partition(" ")[2] for name in self.handlers}
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self.store.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Idempotency-Key", "X-Atropos-Lease", "X-Atropos-Wait"],
            expose_headers=["X-Atropos-Lease-Id", "X-Atropos-Step", "Retry-After"],
        )
        failures = (Refusal, RequestError, StorageWriteError, HTTPException, ClientDisconnect)
        self._app = Starlette(
            routes=[self._route(name, handler) for name, handler in self.handlers.items()],
            exception_handlers=dict.fromkeys(failures, self._failed),
            lifespan=self._lifespan,
            middleware=[cors] if self.store.settings.cors_origins else [],
        )
        self._app.router.redirect_slashes = False

    # --- every request -----------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        connection = self._connection(request)
        if connection is not None:
            connection.done()
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counters.requests[path, message["status"]] += 1
            await send(message)

        try:
            await (self._refused(request) or self._app)(scope, receive, send_counted)
        finally:
            self.counters.bytes_held -= scope.pop("bytes_held", 0)

    def _route(self, name: str, handler: Handler) -> Route:
        method, path = name.split()

        async def endpoint(request: Request) -> Response:
            answer = await handler(request)
            response = answer if isinstance(answer, Response) else _json(answer)
            # A batch was synced when it was made: what the disk refuses since then is another request's.
            if (method == "POST" or path in ("/batch", "/reset_data")) and not isinstance(answer, BatchResponse):
                await self.store.synced()
            return response

        route = Route(path, endpoint, methods=[method])
        route.methods = {method}  # without HEAD, which would hand a batch out
        return route

    async def _body(self, request: Request, *, is_data: bool = False) -> bytes:
        return await read_body(request, self.store.settings, self.counters, is_data=is_data)

    def _connection(self, request: Request) -> Connection | None:
        return self.connections.get(request.scope.get("client"))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        ticker = asyncio.create_task(self._tick())
        self.checker = BodyChecker()  # a closed one, after a stop, stays closed
        yield
        self.checker.close()
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            with contextlib.suppress(StorageWriteError):  # the store has logged it
                self.store.expire()
                await self.store.synced()

    async def _failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=_CLIENT_GONE)
        if isinstance(error, HTTPException):
            return _json({"detail": error.detail}, error.status_code, dict(error.headers or {}))
        status_code = getattr(error, "status", 422 if isinstance(error, Refusal) else 507)  # 507: the disk refused
        reason = getattr(error, "reason", "")
        if reason:
            self.counters.refused[reason] += 1
            environment = self.store.environment(error.env_id) if isinstance(error, Refusal) else None
            if environment is not None:
                environment.refused += 1
            path, sender = request.scope["path"], environment and environment.env_id
            if self._refusals.is_new(f"{path} {reason} {sender}"):
                logger.warning("%s refused: %s", path, error, extra={"event": "refused", "reason": reason})
        if isinstance(error, Refusal):
            return _json(error.as_fields(), 422)
        headers = {"retry-after": "1"} if status_code in (429, 503) else {}
        if status_code in (400, 408, 413, 415, 503):
            headers["connection"] = "close"  # the rest of the body is not read
        return _json({"detail": str(error), "message": str(error)}, status_code, headers)

    def _refused(self, request: Request) -> Response | None:
        """The answer to a request that is not allowed, else None."""
        settings, headers, path = self.store.settings, request.headers, request.scope["path"]
        forbidden = foreign_page(headers, settings.allowed_hosts, settings.cors_origins)
        token, status_code = settings.token, 403
        if forbidden is not None and (path not in _OPEN_PATHS or forbidden.startswith("host")):
            detail = f"{forbidden}; start the server with --allowed-host or --cors-origin to add it"
        elif token is None or path in _OPEN_PATHS or request.method == "OPTIONS" or has_token(headers, token):
            return None
        elif not has_token(headers, environment_token(token)):
            status_code, detail = 401, "this server demands its token: send 'Authorization: Bearer TOKEN'"
        elif path == "/reset_data":
            detail = "an environment's token does not allow /reset_data: the run's own one does"
        else:
            return None
        self.counters.refused["forbidden" if status_code == 403 else "unauthorized"] += 1
        return _json({"detail": detail}, status_code, {"www-authenticate": "Bearer"} if status_code == 401 else None)

    # --- trainer and environments ------------------------------------------------------------------------------------

    async def register(self, request: Request) -> dict[str, Any]:
        kind = self.store.register(decoded(await self._body(request), TrainerRegistration))
        current = self.store.registration
        assert current is not None
        return {
            # Upstream gives 128 bits; 63 are read by every JSON parser.
            "uuid": uuid.uuid4().int >> 65,
            "registration": kind,
            "batch_size": current.batch_size,
            "max_token_len": current.max_token_len,
            "current_step": self.store.step,
            "features": FEATURES,
        }

    async def register_env(self, request: Request) -> dict[str, Any]:
        environment = self.store.register_env(decoded(await self._body(request), EnvRegistration))
        registration = self.store.registration
        if environment is None or registration is None:
            return {"status": "wait for trainer to start"}
        return {
            "status": "success",
            "env_id": environment.env_id,
            "wandb_name": environment.real_name,
            "checkpoint_dir": registration.checkpoint_dir,
            "starting_step": self.store.step,
            "checkpoint_interval": registration.save_checkpoint_interval,
            "num_steps": registration.num_steps,
            "features": FEATURES,
        }

    async def disconnect_env(self, request: Request) -> dict[str, Any]:
        env_id = decoded(await self._body(request), EnvIdentifier).env_id
        if not self.store.disconnect_env(env_id):
            return {"status": "failure", "error": f"env_id {env_id} is not a registered environment"}
        return {"status": "success"}

    async def wandb_info(self, request: Request) -> dict[str, Any]:
        return {name: getattr(self.store.registration, f"wandb_{name}", None) for name in ("group", "project")}

    async def info(self, request: Request) -> dict[str, Any]:
        return {name: getattr(self.store.registration, name, -1) for name in ("batch_size", "max_token_len")}

    async def reset_data(self, request: Request) -> Response:
        self.store.reset()
        return Response("Reset successful", media_type="text/plain")

    # --- groups ------------------------------------------------------------------------------------------------------

    async def _take(self, request: Request, *, is_list: bool) -> Response:
        store, counters = self.store, self.counters
        body = await self._body(request, is_data=True)
        key, digest = await idempotency(request, body)
        answer = store.replied(key, digest)
        if answer is not None:
            return Response(answer, media_type="application/json")
        trainer = store.registration
        rules = Rules(
            vocab_size=None if trainer is None else trainer.vocab_size,
            environments=len(store.environments),
            strict=store.settings.strict,
            largest=trainer.batch_size if trainer is not None and trainer.batch_fill == "exact" else None,
            packs=store.wants_packed,
        )
        groups = await self.checker.check(body, is_list, rules)
        env_id = groups[0].env_id if groups else None
        await self._barrier.before_accept(env_id)
        for group in groups:
            if group.env_id is not None:
                self._known_env(group.env_id)  # a reset meanwhile has made it unknown
        first = store.next_seq

        def reply(duplicates: int) -> bytes:
            fields: dict[str, Any] = {"status": "received"} | ({"groups_processed": len(groups)} if is_list else {})
            if duplicates:
                fields |= {"duplicates": duplicates} if is_list else {"duplicate": True}
            return msgspec.json.encode(fields)

        answer = store.accept(groups, reply, key, digest)
        for group in groups:
            store.hear_env(group.env_id)
        by_digest = {group.digest: group for group in groups}
        for seq in range(first, store.next_seq):
            stored = store.groups[seq]
            group = by_digest[stored.digest]
            self._warn_of_unknown(group)
            # After the answer, which its sender need not wait for: packing, and freeing some 50,000 numbers.
            asyncio.get_running_loop().call_soon(self._answered, stored, group)
            counters.happened(store.now(), groups=1, tokens=stored.tokens)
            counters.bytes_in += len(stored.raw)
            counters.glimpses.append({"at": store.now(), "env_id": stored.env_id, **group.glimpse})
        self._barrier.accepted(env_id, self._connection(request))
        self._arrived.set()
        return Response(answer, media_type="application/json")

    def _known_env(self, env_id: int) -> Environment:
        environment = self.store.environment(env_id)
        if environment is None:
            text = f"env_id = {env_id} is not a registered environment; POST /register-env first"
            raise Refusal("unknown_env", text, "env_id", value=env_id)
        return environment

    def _warn_of_unknown(self, group: CheckedGroup) -> None:
        for name in group.unknown:
            if name not in self._unknown and len(self._unknown) < _MAX_UNKNOWN:
                self._unknown.add(name)
                text = "environment %s sends %s, which is no field of ScoredData: it is not used"
                logger.warning(text, group.env_id, json.dumps(name)[:_SHOWN_NAME])

    def _answered(self, stored: StoredGroup, group: CheckedGroup) -> None:
        """Pack ahead of need while that takes little beside what was received. Holds the last reference to the
        decoded group."""
        store = self.store
        room = _PACKED_SHARE * (store.held_bytes - store.packed_bytes) - store.packed_bytes
        # One that was checked apart before the first wish for packed batches has neither form any more.
        wanted = store.wants_packed and room > 0 and (group.packed is not None or group.fields is not None)
        if wanted and store.groups.get(stored.seq) is stored and stored.packed is None:
            store.keep_packed(stored, pack_group(group) if group.packed is None else group.packed)

    async def latest_example(self, request: Request) -> Response | dict[str, Any]:
        latest = self.store.latest
        if latest is None:  # upstream's answer while nothing came
            return {name: [] for name in _EXAMPLE.split()}
        return Response(b"".join(latest.json_parts()), media_type="application/json")

    # --- batches -----------------------------------------------------------------------------------------------------

    async def batch(self, request: Request) -> Response | dict[str, Any]:
        store = self.store
        lease = request.headers.get("x-atropos-lease")
        seconds = None if lease is None else lease_seconds(lease, store.settings.max_lease, "X-Atropos-Lease")
        asked = request.headers.get("x-atropos-wait")
        wait = 0.0 if asked is None else lease_seconds(asked, _LONGEST_WAIT, "X-Atropos-Wait")
        wants_packed = MEDIA_TYPE in request.headers.get("accept", "")
        if store.registration is None:
            return _NOT_REGISTERED
        store.hear_trainer()
        store.wants_packed = store.wants_packed or wants_packed
        end = time.monotonic() + wait
        while (batch := store.next_batch(seconds)) is None:
            left = end - time.monotonic()
            if left <= 0 or self._waiting >= _MAX_WAITING:
                return {"batch": None}
            self._waiting += 1
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), min(left, _RECHECK_SECONDS))
            finally:
                self._waiting -= 1
            self._arrived.clear()
            if await request.is_disconnected():
                raise ClientDisconnect  # nobody would read the batch
            store.hear_trainer()
        await store.synced()  # now: when the disk refuses it later, another request may be the one that hears of it
        members = store.members(batch)
        self.counters.happened(store.now(), batches=1)
        about = {"step": batch.step, "groups": len(members), "sequences": sum(group.size for group in members)}
        about["tokens"] = sum(group.tokens for group in members)
        again = "" if batch.deliveries == 1 else f" (delivery number {batch.deliveries})"
        text = "batch of step {step}: {groups} groups, {sequences} sequences, {tokens} tokens".format(**about)
        logger.info("%s%s", text, again, extra={"event": "batch", **about, "lease": batch.lease_id})
        try:  # joining a long batch takes a while
            parts = await asyncio.to_thread(batch_parts, members, packed=wants_packed)
        except BaseException:
            store.settle(batch.lease_id, "it could not be sent")
            raise
        media_type = MEDIA_TYPE if wants_packed else "application/json"
        zipped = is_compressed(store.settings.compression, request, sum(map(len, parts)))
        return BatchResponse(batch, parts, media_type, zipped, store, self.counters, self._connection(request))

    async def ack(self, request: Request) -> dict[str, Any]:
        lease_id = decoded(await self._body(request), AckRequest).lease_id
        outcome = self.store.ack(lease_id)
        self.store.hear_trainer()
        return {"status": "success", "ack": outcome, "lease_id": lease_id}

    async def renew(self, request: Request) -> dict[str, Any]:
        asked = decoded(await self._body(request), AckRequest)
        seconds = lease_seconds(asked.seconds, self.store.settings.max_lease, "seconds")
        deadline = self.store.renew(asked.lease_id, seconds)
        self.store.hear_trainer()
        return {"status": "success", "lease_id": asked.lease_id, "deadline": deadline}

    async def release(self, request: Request) -> dict[str, Any]:
        lease_id = decoded(await self._body(request), AckRequest).lease_id
        self.store.release(lease_id)
        return {"status": "success", "lease_id": lease_id}

    # --- figures -----------------------------------------------------------------------------------------------------

    async def root(self, request: Request) -> Response | dict[str, Any]:
        if "text/html" in request.headers.get("accept", ""):
            return Response(self._page, media_type="text/html")
        return {"message": "AtroposLib API"}

    async def health(self, request: Request) -> dict[str, Any]:
        return {"status": "ok"}

    async def status(self, request: Request) -> dict[str, Any]:
        self.store.expire()
        return status(self.store)

    async def status_env(self, request: Request) -> dict[str, Any]:
        body, asked = await self._body(request), request.query_params.get("env_id")
        if not body and asked is not None:
            body = msgspec.json.encode({"env_id": asked})
        env_id = decoded(body, EnvIdentifier).env_id
        self._known_env(env_id)
        self.store.hear_env(env_id)
        await self._barrier.before_status(env_id, self._connection(request))
        self.store.expire()
        return env_status(self.store, self._known_env(env_id))

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page_data(self, request: Request) -> dict[str, Any]:
        store, now = self.store, self.store.now()
        store.expire()
        return {
            "status": status(store),
            "environments": environments(store),
            "uptime": now - self.counters.started_at,
            "series": [[row[0] - int(now), *row[1:]] for row in self.counters.series],
            "latest": list(self.counters.glimpses),
            "now": now,
            "registration": store.registration,
            "refused": dict(self.counters.refused),
        }


def _json(fields: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(fields), status_code, headers, "application/json")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as ``extra``."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname, "logger": record.name}
        fields["message"] = record.getMessage()
        fields |= {name: value for name, value in record.__dict__.items() if name not in self._STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def check_bind(host: str, settings: ServerSettings, *, insecure: bool = False) -> ServerSettings:
    """The settings for listening on ``host``; on the loopback, only by the loopback's names. Raises ``ConfigError`` for
    a public address without a token."""
    if is_loopback(host):
        return replace(settings, allowed_hosts=(*_LOOPBACK_NAMES, host, *settings.allowed_hosts))
    if settings.token is None and not insecure:
        text = f"{host} is reached from other machines: give --token (or ATROPOS_API_TOKEN), or --insecure if only"
        raise ConfigError(f"{text} trusted machines reach it", "host")
    return settings


def serve(settings: ServerSettings, host: str = "127.0.0.1", port: int = 8000, *, insecure: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Requests that run then are given 10 seconds. Raises ``ConfigError`` (a public
    address without a token, a data directory of 0.1.0), ``ServiceError`` (the port is taken), ``StorageError``."""
    import uvicorn

    settings = check_bind(host, settings, insecure=insecure)
    listener = listen(host, port, "trajectory API", "Choose another --port.")
    app = TrajectoryApi(settings)
    where = f"http://{bracketed(host)}:{listener.getsockname()[1]}"
    kept = f"kept in {settings.data_dir}" if settings.data_dir else "IN MEMORY ONLY: a restart forgets everything"
    logger.info("serving at %s, data %s", where, kept, extra={"event": "serving", "url": where})
    if settings.token is None and not is_loopback(host):
        logger.warning("%s has no token: everybody who reaches this address can read and write", where)
    server = uvicorn.Server(uvicorn_config(app, listener, **uvicorn_options(app)))
    # uvicorn handles both signals, and raises the one it got again once it has shut down: nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except KeyboardInterrupt:
        logger.debug("interrupted")
    finally:
        app.store.close()
    logger.info("stopped", extra={"event": "stopped"})


def uvicorn_options(app: TrajectoryApi) -> dict[str, Any]:
    """What the API needs beside ``uvicorn_config``'s own settings."""
    return {
        "connections": app.connections,
        "lifespan": "on",
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": 10,
    }


def _place(text: str) -> Path:
    if not text:  # of a variable that is not set: it would be the current directory
        raise argparse.ArgumentTypeError("it is empty; name a directory")
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve-api``. Defaults are those of ``ServerSettings``."""
    known, add = ServerSettings(), parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    add("--data-dir", type=_place, help="keep everything here, so that a restart loses nothing (default: in memory)")
    add("--fsync", action="store_true", help="wait for the disk before each answer: safe against power loss, too")
    add(
        "--token",
        default=os.environ.get("ATROPOS_API_TOKEN") or None,
        help="bearer token that clients must send (default: $ATROPOS_API_TOKEN)",
    )
    add("--insecure", action="store_true", help="allow a public --host without a token")
    append: dict[str, Any] = {"action": "append", "default": []}
    add("--cors-origin", dest="cors_origins", **append, help="web origin that may call (repeat; '*': any)")
    add("--allowed-host", dest="allowed_hosts", **append, help="further Host name to answer to on the loopback")
    add("--no-get-reset", dest="allow_get_reset", action="store_false", help="allow /reset_data by POST only")
    add("--second-trainer", choices=SECOND_TRAINER, default=known.second_trainer, help="while one is active")
    add("--env-timeout", type=float, default=known.env_timeout, help="silent seconds until an environment is gone")
    add("--dedupe-window", type=float, default=known.dedupe_window, help="seconds in which a repeated group is dropped")
    add("--max-queue-groups", type=int, default=known.max_queue_groups)
    add("--max-queue-bytes", type=int, default=known.max_queue_bytes)
    add("--max-body-bytes", type=int, default=known.max_body_bytes, help="longest body as sent")
    add("--max-inflated-bytes", type=int, default=known.max_inflated_bytes, help="longest body once inflated")
    add("--max-bytes-at-once", type=int, default=known.max_bytes_at_once, help="of all requests being read")
    add("--compression", choices=COMPRESSIONS, default=known.compression, help="auto: not to this machine")
    add("--strict", action="store_true", help="check lengths of per-token extras of anonymous groups, too")
    add("--log-format", choices=("text", "json"), default="text")


def run(options: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit code: 0, or with the reason in the log 2 (configuration) or 1."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        values = {field.name: getattr(options, field.name) for field in fields(ServerSettings) if field.name in options}
        serve(ServerSettings(**values), options.host, options.port, insecure=options.insecure)
    except AtroposVerlError as error:
        logger.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
