"""The ASGI application: routes, key, errors, and clients that go away.

The life of a generation request::

    body read → parsed (400) → admitted by the gate → generated → encoded → sent
                                    └── waits while weights are swapped; the client notices nothing
    client gone, or timeout, at any point → the task is cancelled → the engine frees its slots
"""

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from atropos_verl.engine.gate import RequestGate
from atropos_verl.engine.pinned import PinnedEngine
from atropos_verl.engine.protocol import GenerationEngine
from atropos_verl.engine.requests import eos_token_ids
from atropos_verl.gateway.fields import ApiError, Fields, parse_body, to_api_error
from atropos_verl.gateway.native import generate, generate_trl
from atropos_verl.gateway.openai import completions
from atropos_verl.gateway.service import Answer, GatewayService
from atropos_verl.gateway.text import TextCodec
from atropos_verl.http_thread import (
    EVALUATION_PATH,
    Listener,
    ServerThread,
    disconnected,
    foreign_page,
    has_token,
    printable,
)
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle

logger = logging.getLogger(__name__)

Handler = Callable[[GatewayService, Fields], Answer]
"""Reads a request; it may take a while for a long one, so it runs in a thread."""

_CANCEL_TIMEOUT = 10.0
"""Seconds a cancelled request may take to let go of the engine before that is logged and left to it."""
_MAX_BODY_BYTES = 16 << 20
"""Largest request body: about two million prompt tokens as JSON."""
_LONG_BODY_BYTES = 128 << 10
_LONG_READERS = ThreadPoolExecutor(2, "gateway-long-request")
_MAX_UNREAD_BYTES = 256 << 20
"""Bodies in memory that are not read yet, together."""
_ROUTES_HINT = "chat and completions are under /v1; /generate, /health and /metrics are not"
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
    allow_client_templates: bool = False,
    request_timeout: float | None = 1200.0,
) -> Starlette:
    """The HTTP surface that Atropos environments call.

    Args:
        tokenizer: a Hugging Face tokenizer with the model's chat template.
        gate: admits requests and makes them wait while weights are swapped.
        ledger: is told of every completion before the client sees the end of it.
        throttle: makes new prompts wait that would be trained on too late.
        evaluated: answers what held-out evaluations ask, under ``/evaluation`` (None: there are none).
        max_new_tokens: of one completion at most, whatever a request asks for (None: the rest of the context).
        api_key: required on every route but /health, as bearer or basic key or ``x-api-key`` (None or "": no key).
        allowed_hosts: names that a request's ``Host`` may have (none: any).
        allow_client_templates: run a ``chat_template`` that a request brings.
        request_timeout: seconds a request may take in all, waiting included (None: no bound); then HTTP 504.
    """
    eos = getattr(engine, "eos_token_ids", None) or eos_token_ids(tokenizer)  # another engine may not say
    codec = TextCodec(tokenizer, eos, allows_client_templates=allow_client_templates)
    service = GatewayService(engine, codec, model_name, gate or RequestGate(), ledger, throttle, max_new_tokens)
    started = int(time.time())

    def model_card() -> dict[str, Any]:
        return {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "atropos-verl",
            "max_model_len": engine.max_context_len,
            "policy_version": engine.policy_version,
        }

    async def health(_: Request) -> Response:
        state = {
            "status": "ok" if service.gate.is_open else "paused",
            "policy_version": engine.policy_version,
            "paused": not service.gate.is_open,
            "in_flight": service.counts["in_flight"],
        }
        return _json_response(state)

    async def models(_: Request) -> Response:
        return _json_response({"object": "list", "data": [model_card()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model_name:
            return _error_response(ApiError(404, f"no model {name!r} here; this gateway serves {model_name!r}"))
        return _json_response(model_card())

    async def metrics(_: Request) -> Response:
        return Response(service.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    gets = {"/health": health, "/v1/models": models, "/v1/models/{name:path}": model, "/metrics": metrics}
    posts: dict[str, Handler] = {
        "/v1/chat/completions": partial(completions, chat=True),
        "/v1/completions": partial(completions, chat=False),
        "/generate": generate,
        "/generate/": generate_trl,
    }
    services = {"": service}
    if evaluated is not None:
        services[EVALUATION_PATH] = replace(service, engine=evaluated, gate=evaluated.gate, throttle=None)
    routes = []
    for prefix, serving in services.items():
        routes += [Route(prefix + path, handler, methods=["GET"]) for path, handler in gets.items()]
        for path, handler in posts.items():
            endpoint = _Endpoint(serving, prefix + path, handler, request_timeout)
            routes.append(Route(prefix + path, endpoint, methods=["POST"]))

    async def routing_error(request: Request, error: Exception) -> Response:
        """404 and 405 in the error format of everything else, and in our log: Atropos clients swallow theirs."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        what = f"{request.method} {request.url.path[:200]}: no such endpoint ({_ROUTES_HINT})"
        service.warn_refused(f"route {request.url.path[:200]}", "a client calls %s", what)
        return _error_response(ApiError(status, what))

    entrance = Middleware(_Entrance, key=api_key, hosts=allowed_hosts, service=service)
    return Starlette(routes=routes, middleware=[entrance], exception_handlers={HTTPException: routing_error})


def _json_response(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type=_JSON)


def _error_response(error: ApiError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return Response(error.body(), status_code=error.status, media_type=_JSON, headers=headers)


class _Reply:
    """The answer to one request: headers go out with the first piece, so that an early error still gets its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._finished = False
        self.status = 500

    async def write(self, piece: bytes, *, more: bool = False, status: int = 200, media_type: str = _JSON) -> None:
        """Send ``piece`` of the body; without ``more`` it is the last one."""
        if not self._started:
            length = (b"cache-control", b"no-cache") if more else (b"content-length", str(len(piece)).encode())
            headers = [(b"content-type", media_type.encode()), length]
            self._started, self.status = True, status
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._finished = not more
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def fail(self, error: ApiError) -> None:
        """The error as the answer, or as the last event of a stream that has begun."""
        if not self._finished:
            body = b"data: " + error.body() + b"\n\n" if self._started else error.body()
            self.status = error.status
            await self.write(body, status=error.status)


class _Entrance:
    """Every request comes through it: collapses leading slashes of the path, and refuses who may not call.

    ``//generate`` is what Atropos clients make of a base_url that ends in ``/v1/``: they would otherwise wait for a
    healthy server for ever. /health needs no key: supervisors probe it before they know any.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str], service: GatewayService) -> None:
        self._app, self._key, self._hosts, self._service = app, key, hosts, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"].startswith("//"):
                # leading ones only: a model's name in /v1/models/{name} may be an absolute path
                scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
            if (refusal := self._refusal(scope["path"], Headers(scope=scope))) is not None:
                text = "a client was refused at %s: %s"
                self._service.warn_refused(f"entrance {refusal.status}", text, scope["path"][:200], refusal.message)
                await _error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if (reason := foreign_page(headers, self._hosts)) is not None:
            return ApiError(403, f"{reason} (gateway.host, gateway.advertise_url)", code="forbidden")
        if self._key and path not in ("/health", f"{EVALUATION_PATH}/health"):
            sent = headers.get("x-api-key", "").encode()
            if not has_token(headers, self._key) and not hmac.compare_digest(sent, self._key.encode()):
                message = "missing or wrong API key; send 'Authorization: Bearer KEY' (gateway.api_key)"
                return ApiError(401, message, code="invalid_api_key")
        media_type = headers.get("content-type", _JSON).partition(";")[0].strip().lower()
        if media_type != _JSON and not media_type.endswith("+json"):
            return ApiError(415, f"Content-Type {media_type[:100]!r} is not taken; send {_JSON}")
        return None


class _Endpoint:
    """One POST endpoint as an ASGI application: it must see the client leave, which a plain handler cannot."""

    def __init__(self, service: GatewayService, path: str, handler: Handler, request_timeout: float | None) -> None:
        self._service = service
        self._path = path
        self._handler = handler
        self._request_timeout = request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        reply = _Reply(send)
        service.counts["in_flight"] += 1
        body = bytearray()
        try:
            async for piece in Request(scope, receive).stream():
                body += piece
                service.counts["unread_bytes"] += len(piece)
                if len(body) > _MAX_BODY_BYTES:
                    text = f"the body is larger than {_MAX_BODY_BYTES} bytes; send fewer prompts per request"
                    raise ApiError(413, text)
                if service.counts["unread_bytes"] > _MAX_UNREAD_BYTES:
                    raise ApiError(503, "too many large requests at once; send it again later", code="overloaded")
            await self._serve_while_connected(body, receive, reply)
        except ClientDisconnect:
            reply.status = _CLIENT_GONE
        except ApiError as error:
            await reply.fail(error)
        finally:
            self._forget(body)
            service.counts["in_flight"] -= 1
            service.answered[self._path, reply.status] += 1

    def _forget(self, body: bytearray) -> None:
        self._service.counts["unread_bytes"] -= len(body)
        body.clear()

    async def _serve_while_connected(self, body: bytearray, receive: Receive, reply: _Reply) -> None:
        """Raises ``ClientDisconnect``, or ``ApiError`` 504."""
        work = asyncio.create_task(self._serve(body, reply))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({work, gone}, timeout=self._request_timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            left = gone.done()
            work.cancel()
            await asyncio.wait({work}, timeout=_CANCEL_TIMEOUT)
            if not work.done():
                text = "%s: the engine still holds a cancelled request after %.0f s"
                logger.warning(text, self._path, _CANCEL_TIMEOUT)
            if left:
                raise ClientDisconnect
            if not work.done() or work.cancelled():
                message = f"not finished within {self._request_timeout} s, the request_timeout of this gateway"
                raise ApiError(504, message, code="timeout")
        finally:
            gone.cancel()
            work.cancel()  # also when the server itself is being stopped

    async def _serve(self, body: bytearray, reply: _Reply) -> None:
        abandoned = threading.Event()
        try:
            # In a thread, long ones in threads of their own: a client's long request must not hold up the others.
            readers = _LONG_READERS if len(body) > _LONG_BODY_BYTES else None
            loop = asyncio.get_running_loop()
            answer = (await loop.run_in_executor(readers, self._read, body, abandoned))()
            self._forget(body)
            if not isinstance(answer, AsyncGenerator):
                await reply.write(await answer)
                return
            async with aclosing(answer):
                async for event in answer:
                    await reply.write(event, more=True, media_type="text/event-stream; charset=utf-8")
            await reply.write(b"")
        except asyncio.CancelledError:
            abandoned.set()
            raise
        except Exception as error:
            refusal = to_api_error(error)
            if refusal.status >= 500:
                # 503 and 504 say all there is to say; a traceback is of use where something broke
                text, trace = printable(refusal.message), error if refusal.status == 500 else None
                logger.error("%s: %s", self._path, text, exc_info=trace)
            else:  # Atropos clients show its status only, not its reason
                key = f"refused {self._path} {refusal.param} {refusal.code}"
                self._service.warn_refused(key, "%s: a client was refused: %s", self._path, refusal.message)
            await reply.fail(refusal)
            del refusal  # its traceback holds this frame, and so a circle of it and the whole body would be kept

    def _read(self, body: bytearray, abandoned: threading.Event) -> Answer:
        return self._handler(self._service, parse_body(body, abandoned))
