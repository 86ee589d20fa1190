"""A seeded fuzzer of HTTP requests: valid ones of each route, with one thing changed or several, and an ASGI client.

The same seed gives the same requests.
"""

import asyncio
import gc
import gzip
import json
import logging
import random
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import psutil

Headers = dict[str, str]

_NUMBERS = [0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324]
_TEXTS = ["", "\n", "\x1b[2J", "\x00", "\ud800", "é世", "{{ 9 ** 9 }}", "a" * 3000, "5", "1e999", "nan", "../.."]
_VALUES: list[Any] = [None, True, False, [], {}, [[]], [None], {"": ""}, *_NUMBERS, *_TEXTS]
_LITERALS = [b"NaN", b"-Infinity", b"1e999", b"01", b"9" * 5000, b'"\\ud800"', b'"\\x"', b'"\xff"', b"[" * 3000, b"{"]
_SPACES = [gzip.compress(b" " * count) for count in (10, 3_000_000)]
_HEADERS: dict[str, list[str]] = {
    "host": ["evil.example", "", "[", "localhost:1", "127.0.0.1"],
    "origin": ["http://evil.example", "null", "http://localhost", "://"],
    "referer": ["http://evil.example/x", "x"],
    "sec-fetch-site": ["cross-site", "same-site", "same-origin", "none", "?"],
    "authorization": ["Bearer x", "Basic x", "Basic eDp5", "Bearer", "\xff", "Digest " + "y" * 500],
    "content-type": ["text/plain", "application/json; charset=utf-16", "multipart/form-data", ""],
    "content-length": ["0", "-1", "²", "9" * 30, "x"],
    "content-encoding": ["gzip", "deflate", "br", "identity", "gzip, gzip", "\n"],
    "accept": ["application/vnd.atropos+packed", "text/html", "*/*", "", "text/event-stream"],
    "accept-encoding": ["gzip", "zstd", "gzip;q=0", ";;q=,", "*"],
    "idempotency-key": ["a", "b", "", "k" * 300, "\xe9"],
    "x-atropos-lease": ["5", "0", "-1", "nan", "inf", "1e400", "x", "1_0"],
}
_METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW"]


@dataclass(frozen=True)
class FuzzedRoute:
    """A route and what a good request to it looks like."""

    method: str
    path: str
    bodies: Sequence[Any] = ()
    """JSON values; none: no body."""
    headers: Headers = field(default_factory=dict)
    queries: Sequence[str] = ("",)


@dataclass(frozen=True)
class FuzzedRequest:
    method: str
    target: str
    """Path and query."""
    headers: Headers
    body: bytes


class RequestFuzzer:
    def __init__(self, seed: int, routes: Sequence[FuzzedRoute]) -> None:
        self._rng = random.Random(seed)
        self._routes = routes
        self._most = 1000

    def request(self) -> FuzzedRequest:
        rng = self._rng
        route, self._most = rng.choice(self._routes), 1000
        method, path, headers = route.method, route.path, {"host": "localhost", **route.headers}
        value = json.loads(json.dumps(rng.choice(route.bodies))) if route.bodies else None
        if value is not None:
            for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
                value = self._changed(value)
        elif rng.random() < 0.2:
            value = rng.choice(_VALUES)
        body = b"" if value is None and not route.bodies else json.dumps(value).encode()
        if rng.random() < 0.2:
            body = self._damaged(body)
        if rng.random() < 0.15:
            body, headers["content-encoding"] = self._encoded(body)
        for name in rng.sample(list(_HEADERS), rng.choice([0, 0, 0, 1, 1, 2])):
            headers[name] = rng.choice(_HEADERS[name])
        if rng.random() < 0.05:
            method = rng.choice(_METHODS)
        if rng.random() < 0.05:
            path = rng.choice(
                [f"/{path}", f"{path}/", f"{path}%00", path.upper(), quote(rng.choice(_TEXTS[:3])), "//", "*"]
            )
        query = rng.choice(route.queries)
        if rng.random() < 0.1:
            query = f"?{rng.choice(['env_id', 'x', ''])}={quote(str(rng.choice(_VALUES)), errors='replace')}"
        return FuzzedRequest(method, path + query, headers, body)

    def _changed(self, value: Any) -> Any:
        """One place of ``value`` replaced, removed, added, repeated, or put deep inside lists."""
        rng, target = self._rng, value
        while True:
            keys = list(target) if isinstance(target, dict) else range(len(target)) if isinstance(target, list) else ()
            if not keys:
                return self._value()
            key = rng.choice(list(keys))
            if isinstance(target[key], dict | list) and target[key] and rng.random() < 0.7:
                target = target[key]
                continue
            match rng.randrange(8):
                case 0:
                    del target[key]
                case 1 if isinstance(target, list):
                    target.insert(rng.randrange(len(target) + 1), self._value())
                case 1:
                    target[rng.choice([*_TEXTS[:6], "self", "__class__", "unknown"])] = self._value()
                case 2 if isinstance(target, list):
                    times = rng.choice([1, 5, self._most])
                    self._most = min(self._most, 1000 // times)  # a list inside lists grows with all of them
                    target.extend(deepcopy(target[:1]) * times)
                case 3:
                    for _ in range(rng.choice([1, 60, 70, 150])):
                        target[key] = [target[key]]
                case 4:
                    target[key] = {"a": target[key], "b": self._value()}
                case _:
                    target[key] = self._value()
            return value

    def _value(self) -> Any:
        rng = self._rng
        several = [rng.choice(_VALUES)] * rng.choice([1, 3])
        return deepcopy(rng.choice([rng.choice(_VALUES), rng.randrange(-5, 200), rng.random(), several]))

    def _damaged(self, body: bytes) -> bytes:
        rng, at = self._rng, self._rng.randrange(len(body) + 1)
        number = rng.choice([i for i, byte in enumerate(body) if chr(byte).isdigit()] or [at])
        kinds = [
            body[:at],
            body[:at] + rng.randbytes(rng.randrange(1, 20)) + body[at:],
            b"\xef\xbb\xbf" + body,
            body.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"])),
            body + body,
            rng.randbytes(rng.randrange(200)),
            *[body[:number] + rng.choice(_LITERALS) + body[number + 1 :]] * 2,
        ]
        return rng.choice(kinds)

    def _encoded(self, body: bytes) -> tuple[bytes, str]:
        rng, packed = self._rng, gzip.compress(body, 1)
        kinds = [
            (packed[: rng.randrange(len(packed))], "gzip"),
            (gzip.compress(b"", 1) * rng.choice([1, 50]) + packed, "gzip"),
            (zlib.compress(body), "deflate"),
            (packed + b"\0" * rng.randrange(9), "x-gzip"),
            (rng.choice(_SPACES), "gzip"),
            (body, "gzip"),
            (packed, "gzip"),
        ]
        return rng.choice(kinds)


async def answer_of(app: Any, request: FuzzedRequest) -> tuple[int, bytes]:
    """Status and body of an ASGI application's answer. Raises what the application raises."""
    path, _, query = request.target.partition("?")
    pieces = [request.body[:7], request.body[7:]]
    status, answer = 0, b""

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Future()  # the client waits for its answer
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in request.headers.items()],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
    }
    await asyncio.wait_for(app(scope, receive, send), 60.0)
    return status, answer


async def fuzzed(
    app: Any, seed: int, routes: Sequence[FuzzedRoute], count: int, look: Callable[[], None] = lambda: None
) -> AsyncIterator[tuple[FuzzedRequest, int]]:
    """``count`` requests and the status of each, none of which is a failure of the server: 503 and 507 say why.
    ``look`` is called now and then. Of more than 100 000, the memory is looked at as well."""
    fuzzer, sizes, measured = RequestFuzzer(seed, routes), list[float](), count > 100_000
    logging.disable(logging.CRITICAL if measured else logging.NOTSET)  # pytest keeps every record
    for number in range(count):
        request = fuzzer.request()
        status, answer = await answer_of(app, request)
        assert status in (503, 507) or 200 <= status < 500, f"{request}: {status} {answer[:300]!r}"
        assert status < 500 or len(answer) > 20, f"{request}: {status} without a reason"
        yield request, status
        if number % max(100, count // 50) == 0:
            look()
            if measured:
                gc.collect()
                sizes.append(psutil.Process().memory_info().rss / 2**20)
    look()
    logging.disable(logging.NOTSET)
    assert not measured or sizes[-1] - sizes[len(sizes) // 5] < 50, f"memory grows (MiB): {sizes}"
