"""The ASGI application: routes, key, errors, and clients that go away: their task is cancelled, but in a session."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from atropos_verl.engine.protocol import GenerationEngine, PinnedEngine, RequestGate
from atropos_verl.engine.requests import eos_token_ids
from atropos_verl.gateway.anthropic import count_tokens, messages
from atropos_verl.gateway.fields import ApiError, Fields, parse_body, to_api_error
from atropos_verl.gateway.native import generate, generate_trl
from atropos_verl.gateway.openai import completions
from atropos_verl.gateway.responses import responses
from atropos_verl.gateway.service import Answer, GatewayService
from atropos_verl.gateway.sessions import Session, SessionService, SessionStore, summary_of
from atropos_verl.gateway.text import TextCodec
from atropos_verl.http_thread import (
    EVALUATION_GROUP,
    EVALUATION_PATH,
    Listener,
    ServerThread,
    disconnected,
    foreign_page,
    printable,
    sent_token,
)
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle

logger = logging.getLogger(__name__)

Handler = Callable[[GatewayService, Fields], Answer]
"""Reads a request; it may take a while for a long one, so it runs in a thread."""

_MAX_BODY_BYTES = 16 << 20
"""Largest request body: about two million prompt tokens as JSON."""
_LONG_BODY_BYTES = 128 << 10
_MAX_SESSION_BODY_BYTES = 32 << 10
"""Of what opens a session, or its reward."""
_LONG_READERS = ThreadPoolExecutor(2, "gateway-long-request")
_MAX_UNREAD_BYTES = 256 << 20
"""Bodies in memory that are not read yet, together."""
_ROUTES_HINT = "chat, completions, responses and messages are under /v1; /generate, /health and /metrics are not"
_AGENT_ROUTES = "/v1/"
"""The routes that the key of a session opens, beside those of the session itself."""
_CLIENT_GONE = 499
_JSON = "application/json"


class GatewayServer(ServerThread):
    """Listens on the loopback unless told otherwise; ``port`` 0 takes a free one, ``listener`` listens already."""

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, listener: Listener | None = None) -> None:
        advice = "Set gateway.port to a free port, or to 0 to take any."
        where: dict[str, Any] = {"host": host, "port": port, "listener": listener}
        super().__init__(app, service="inference gateway", advice=advice, lifespan="off", **where)


def create_app(
    engine: GenerationEngine,
    tokenizer: Any,
    *,
    gate: RequestGate | None = None,
    ledger: Ledger | None = None,
    throttle: StalenessThrottle | None = None,
    evaluated: PinnedEngine | None = None,
    max_new_tokens: int | None = None,
    model_name: str,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    request_timeout: float | None = 1200.0,
    sessions: SessionStore | None = None,
    on_request: Callable[..., None] | None = None,
    advertise_url: str | None = None,
) -> Starlette:
    """The HTTP surface that Atropos environments and agents call.

    Args:
        evaluated: answers what held-out evaluations ask, under ``/evaluation``.
        max_new_tokens: of one completion at most, whatever a request asks for (None: the rest of the context).
        api_key: required on every route but /health, as bearer or basic key or ``x-api-key``.
        allowed_hosts: names that a request's ``Host`` may have (none: any).
        request_timeout: seconds a request may take in all, waiting included; then HTTP 504.
        sessions: what agents ask for in a session is recorded there.
        on_request: told of every request that ended, as ``training.trace.TraceWriter.request`` is.
        advertise_url: where agents reach this server (None: as whoever opens a session does)."""
    eos = getattr(engine, "eos_token_ids", None) or eos_token_ids(tokenizer)  # another engine may not say
    codec = TextCodec(tokenizer, eos)
    service = GatewayService(engine, codec, model_name, gate or RequestGate(), ledger, throttle, max_new_tokens)
    service.on_request = on_request
    started = int(time.time())

    async def health(_: Request) -> Response:
        state = {
            "status": "ok" if service.gate.is_open else "paused",
            "policy_version": engine.policy_version,
            "paused": not service.gate.is_open,
            "in_flight": service.counts["in_flight"],
        }
        return _json_response(state)

    async def models(_: Request) -> Response:
        card = {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "atropos-verl",
            "max_model_len": engine.max_context_len,
            "policy_version": engine.policy_version,
        }
        return _json_response({"object": "list", "data": [card]})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service), media_type="text/plain; version=0.0.4; charset=utf-8")

    gets = {"/health": health, "/v1/models": models, "/metrics": metrics}
    posts: dict[str, Handler] = {
        "/v1/chat/completions": partial(completions, chat=True),
        "/v1/completions": partial(completions, chat=False),
        "/v1/responses": responses,
        "/v1/messages": messages,
        "/v1/messages/count_tokens": count_tokens,
        "/generate": generate,
        "/generate/": generate_trl,
    }
    services = {"": service}
    if evaluated is not None:
        own: dict[str, Any] = {"engine": evaluated, "gate": evaluated.gate, "throttle": None, "on_request": None}
        services[EVALUATION_PATH] = replace(service, **own)
    routes = []
    for prefix, serving in services.items():
        routes += [Route(prefix + path, handler, methods=["GET"]) for path, handler in gets.items()]
        for path, handler in posts.items():
            endpoint = _Endpoint(serving, prefix + path, handler, request_timeout, sessions)
            routes.append(Route(prefix + path, endpoint, methods=["POST"]))
    if sessions is not None:
        service.more_figures = sessions.figures
        routes += _session_routes(sessions, advertise_url)

    async def refused(request: Request, error: Exception) -> Response:
        """Atropos clients swallow 404 and 405."""
        if isinstance(error, HTTPException):
            what = f"{request.method} {request.url.path[:200]}: no such endpoint ({_ROUTES_HINT})"
            error = ApiError(error.status_code, what)
        return _error_response(_told(service, request.url.path, error))

    who: dict[str, Any] = {"key": api_key, "hosts": allowed_hosts, "sessions": sessions}
    entrance = Middleware(_Entrance, service=service, evaluates=evaluated is not None, **who)
    errors = dict.fromkeys((HTTPException, ApiError, Exception), refused)
    return Starlette(routes=routes, middleware=[entrance], exception_handlers=errors)


def _json_response(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type=_JSON)


def _error_response(error: ApiError, path: str = "") -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return Response(error.body(path), status_code=error.status, media_type=_JSON, headers=headers)


def _told(service: GatewayService, path: str, error: Exception) -> ApiError:
    """What the client is told of an error. The log is told too: Atropos clients show a status, not its reason."""
    refusal = to_api_error(error)
    if refusal.status >= 500:
        # 503 and 504 say all there is to say; a traceback is of use where something broke
        trace = error if refusal.status == 500 else None
        logger.error("%s: %s", path[:200], printable(refusal.message), exc_info=trace)
    else:
        key = f"refused {path[:200]} {refusal.param} {refusal.code}"
        service.warn(key, "%s: a client was refused: %s", path[:200], refusal.message, again=True)
    return refusal


class _Reply:
    """The answer to one request: headers go out with the first piece, so that an early error still gets its status."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._started = self.finished = False
        self.status = 500

    async def write(self, piece: bytes, *, more: bool = False, status: int = 200, media_type: str = _JSON) -> None:
        """Send ``piece`` of the body; without ``more`` it is the last one."""
        if not self._started:
            length = (b"cache-control", b"no-cache") if more else (b"content-length", str(len(piece)).encode())
            headers = [(b"content-type", media_type.encode()), length]
            self._started, self.status = True, status
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self.finished = not more
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def fail(self, error: ApiError) -> None:
        """The error as the answer, or as the last event of a stream that has begun."""
        if not self.finished:
            self.status = error.status
            await self.write(error.body(self._path, streamed=self._started), status=error.status)


@dataclass(eq=False)
class _Entrance:
    """Refuses who may not call. /health needs no key: supervisors probe it before they know any."""

    app: ASGIApp
    key: str | None
    hosts: Collection[str]
    service: GatewayService
    sessions: SessionStore | None
    evaluates: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"].startswith("//"):
                # What Atropos clients make of a base_url that ends in /v1/. Leading ones only: a model may be a path.
                scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
            try:
                path, session = self._admit(scope["path"], Headers(scope=scope))
            except ApiError as error:
                refusal = _told(self.service, scope["path"], error)
                await _error_response(refusal, scope["path"])(scope, receive, send)
                return
            scope = {**scope, "path": path, "session": session}
        with contextlib.suppress(ClientDisconnect):
            await self.app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> tuple[str, Session | None]:
        """The route, and the session whose agent calls it. Raises ``ApiError`` 401, 403, 404, 415."""
        if (reason := foreign_page(headers, self.hosts)) is not None:
            raise ApiError(403, f"{reason} (gateway.host, gateway.advertise_url)", code="forbidden")
        sent = [sent_token(headers), headers.get("x-api-key", "").encode()]
        found = () if self.sessions is None else (self.sessions.of_key(token.decode("latin-1")) for token in sent)
        session = next(filter(None, found), None)
        is_open = not self.key or path in ("/health", f"{EVALUATION_PATH}/health") or session is not None
        if not is_open and not any(hmac.compare_digest(token, str(self.key).encode()) for token in sent):
            message = "missing or wrong API key; send 'Authorization: Bearer KEY' (gateway.api_key)"
            raise ApiError(401, message, code="invalid_api_key")
        media_type = headers.get("content-type", _JSON).partition(";")[0].strip().lower()
        if media_type != _JSON and not media_type.endswith("+json"):
            raise ApiError(415, f"Content-Type {media_type[:100]!r} is not taken; send {_JSON}")
        if self.sessions is not None and path.startswith("/s/"):
            session_id, _, rest = path.removeprefix("/s/").partition("/")
            path, addressed = f"/{rest.lstrip('/')}", self.sessions.find(session_id)
            if session is not None and session is not addressed:
                raise ApiError(403, "this is the key of another session", code="forbidden")
            if not path.startswith(_AGENT_ROUTES):
                text = f"an agent calls routes below {_AGENT_ROUTES}, not {path[:100]!r}; its base_url is …/s/ID/v1"
                raise ApiError(404, text)
            session = addressed
        elif session is not None:
            own = f"/sessions/{session.record.id}"
            if path not in ("/health", own) and not path.startswith((_AGENT_ROUTES, f"{own}/")):
                raise ApiError(403, f"the key of a session opens {_AGENT_ROUTES} and its own session", code="forbidden")
        if session is not None and session.record.opening.group.startswith(EVALUATION_GROUP) and self.evaluates:
            path = EVALUATION_PATH + path if path.startswith(_AGENT_ROUTES) else path
        return path, session


@dataclass(eq=False)
class _Endpoint:
    """One POST endpoint as an ASGI application: it must see the client leave, which a plain handler cannot."""

    service: GatewayService
    path: str
    handler: Handler
    request_timeout: float | None
    sessions: SessionStore | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, reply, body = self.service, _Reply(send, self.path), bytearray()
        service.counts["in_flight"] += 1
        try:
            async for piece in Request(scope, receive).stream():
                body += piece
                service.counts["unread_bytes"] += len(piece)
                if len(body) > _MAX_BODY_BYTES:
                    text = f"the body is larger than {_MAX_BODY_BYTES} bytes; send fewer prompts per request"
                    raise ApiError(413, text)
                if service.counts["unread_bytes"] > _MAX_UNREAD_BYTES:
                    raise ApiError(503, "too many large requests at once; send it again later", code="overloaded")
            await self._serve(scope, body, receive, reply)
        except ClientDisconnect:
            reply.status = _CLIENT_GONE
        except ApiError as error:
            await reply.fail(error)
        finally:
            self._forget(body)
            service.counts["in_flight"] -= 1
            service.answered[self.path, reply.status] += 1

    def _forget(self, body: bytearray) -> None:
        self.service.counts["unread_bytes"] -= len(body)
        body.clear()

    async def _serve(self, scope: Scope, body: bytearray, receive: Receive, reply: _Reply) -> None:
        """Raises ``ClientDisconnect``."""
        task, gone = asyncio.current_task(), asyncio.create_task(disconnected(receive))

        def leave(_: object) -> None:
            if task is not None and not (gone.cancelled() or reply.finished):
                task.cancel()

        gone.add_done_callback(leave)
        service, was_received, limit = self.service, False, asyncio.timeout(self.request_timeout)
        try:
            async with limit:
                if self.sessions is not None and (session := scope["session"]) is not None:
                    service = self.sessions.begin(service, session, (self.path, body), Headers(scope=scope))
                # In a thread, long ones in threads of their own: a client's long request must not hold up the others.
                readers = _LONG_READERS if len(body) > _LONG_BODY_BYTES else None
                answer = (await asyncio.get_running_loop().run_in_executor(readers, self._read, service, body))()
                self._forget(body)
                last = b""
                if isinstance(answer, AsyncGenerator):
                    async with aclosing(answer):
                        async for event in answer:
                            await reply.write(event, more=True, media_type="text/event-stream; charset=utf-8")
                else:
                    last = await answer
                was_received = not gone.done()
                await reply.write(last)
        except asyncio.CancelledError:
            if gone.done():
                raise ClientDisconnect from None
            raise  # the server is being stopped
        except Exception as error:  # noqa: BLE001 - the client is told of it, and the log
            text = f"not finished within {self.request_timeout} s, the request_timeout of this gateway"
            late = ApiError(504, text, code="timeout") if limit.expired() else None
            await reply.fail(_told(self.service, self.path, late or error))
        finally:
            gone.cancel()
            if isinstance(service, SessionService):
                service.ended(was_received=was_received)

    def _read(self, service: GatewayService, body: bytearray) -> Answer:
        return self.handler(service, parse_body(body))


def _session_routes(sessions: SessionStore, advertise_url: str | None) -> list[Route]:
    async def body_of(request: Request) -> bytes:
        """An empty body is an empty object."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _MAX_SESSION_BODY_BYTES:
                text = f"the body is larger than {_MAX_SESSION_BODY_BYTES} bytes; store large things elsewhere"
                raise ApiError(413, text)
        return body or b"{}"

    async def create(request: Request) -> Response:
        key = request.headers.get("idempotency-key", "").strip() or None
        session = await sessions.create(await body_of(request), key)
        base, record = (advertise_url or str(request.base_url)).rstrip("/"), session.record
        own = {"base_url": f"{base}/s/{record.id}/v1", "api_key": record.api_key}
        return _json_response({**summary_of(session), **own})

    def route(method: str, suffix: str, act: Callable[..., Awaitable[dict[str, Any]]]) -> Route:
        async def answer(request: Request) -> Response:
            session = sessions.find(request.path_params["id"])
            return _json_response(await act(session, *([await body_of(request)] if method == "POST" else [])))

        return Route("/sessions/{id}" + suffix, answer, methods=[method])

    gets = {"": sessions.describe, "/rollout": sessions.rollout}
    posts = {"/reward": sessions.reward, "/abort": sessions.abort}
    routes = [Route("/sessions", create, methods=["POST"])]
    routes += [route("GET", suffix, act) for suffix, act in gets.items()]
    return routes + [route("POST", suffix, act) for suffix, act in posts.items()]
