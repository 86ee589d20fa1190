"""Bodies of requests and answers: read within bounds, decoded; joined from what is stored, compressed, and delivered.

gzip at level 1, but to a client on this machine. A batch without a lease counts as delivered when its connection ends
in order or is used again, or after ``delivery_grace`` seconds (docs/internals.md).
"""

import asyncio
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atropos_verl.http_thread import is_loopback
from atropos_verl.protocol.schema import Refusal
from atropos_verl.protocol.wire import join_packed, pack_json
from atropos_verl.server.batcher import StoredGroup
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Batch, Counters, RequestError, Store

_T = TypeVar("_T", bound=msgspec.Struct)
_GZIP = 16 + zlib.MAX_WBITS
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_IN_THREAD = 16 * 2**10
"""Compressed bytes from which inflating is left to a thread (zlib lets the event loop run meanwhile)."""
_INFLATED_AT_ONCE = 4 * 2**20  # bytes that are not counted yet
LARGE = 2**20
"""Bytes that no body without groups exceeds. A longer one is not looked at in this process, and stays a ``bytearray``:
copying it would take too long."""
_MAX_KEY = 255
_SHOWN = 80
_MIN_COMPRESSED = 1000  # bytes; upstream's bound
_NO_WEIGHT = ("q=", "q=0.")  # 0 in Accept-Encoding, without its zeros
_CHUNK = 512 * 2**10  # bytes sent at once, so that small groups do not cost a write each
PATIENCE = 0.25
"""Seconds. atroposlib takes a few milliseconds, more where its processor is busy."""
_STATUSES = 2
"""Unread answers of ``/status-env`` for one environment, which asks one after the other; with more a client floods."""
SETTLING = 0.02
"""Seconds from the end of a connection until the environment has acted on what it read there."""


async def read_body(request: Request, settings: ServerSettings, counters: Counters, *, is_data: bool = False) -> bytes:
    """The whole body, decompressed; one that ``is_data`` (groups) may be long. Raises ``ClientDisconnect``, or
    ``RequestError``: 408 (silent for ``body_timeout`` seconds), 413 (longer than a bound), 415 (an encoding that is not
    gzip), 400 (not the encoding it says), 503 (too many others are being read)."""
    longest = settings.max_body_bytes if is_data else min(LARGE, settings.max_body_bytes)
    inflated = settings.max_inflated_bytes if is_data else min(LARGE, settings.max_inflated_bytes)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20:
        _check_length(int(announced), longest, "body", "max_body_bytes")
    body: Any = bytearray()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(settings.body_timeout) as silence:
            async for part in request.stream():
                _check_length(len(body) + len(part), longest, "body", "max_body_bytes")
                _hold(request, len(part), settings, counters)
                body += part
                silence.reschedule(loop.time() + settings.body_timeout)
    except TimeoutError:
        text = f"no data for {settings.body_timeout:g} s (body_timeout), {len(body)} bytes came"
        raise RequestError(408, "body_timeout", text) from None
    if encoding in ("gzip", "x-gzip", "deflate"):
        whole: Any = bytearray()
        steps, held = _inflate(body, whole, inflated), 0
        while (await asyncio.to_thread(next, steps, 0) if len(body) >= _IN_THREAD else next(steps, 0)) is None:
            _hold(request, len(whole) - held, settings, counters)
            held = len(whole)
        body = whole
    elif encoding not in ("", "identity"):
        raise RequestError(
            415, "encoding", f"content-encoding {encoding[:_SHOWN]!r} is not supported; send gzip, or none"
        )
    _check_length(len(body), inflated, "inflated body", "max_inflated_bytes")
    return body if len(body) > LARGE else bytes(body)


def _hold(request: Request, length: int, settings: ServerSettings, counters: Counters) -> None:
    if counters.bytes_held + length > settings.max_bytes_at_once:
        text = f"{counters.bytes_held} bytes of other requests are being read (max_bytes_at_once); send it again later"
        raise RequestError(503, "busy", text)
    counters.bytes_held += length
    request.scope["bytes_held"] = request.scope.get("bytes_held", 0) + length


def _check_length(length: int, limit: int, what: str, name: str) -> None:
    if length > limit:
        raise RequestError(413, "too_long", f"the {what} is longer than {limit} bytes ({name})")


def _inflate(body: bytearray, inflated: bytearray, limit: int) -> Iterator[None]:
    """A gzip (or zlib) body of one member is added to ``inflated``. Stops beyond ``limit`` bytes. Yields after each
    step, of ``_INFLATED_AT_ONCE`` of them at most, so that they can be counted."""
    inflater, at = zlib.decompressobj(_GZIP_OR_ZLIB), 0
    while not inflater.eof and len(inflated) <= limit:
        chunk, before = inflater.unconsumed_tail or body[at : at + _CHUNK], len(inflated)
        at += 0 if inflater.unconsumed_tail else len(chunk)
        try:
            inflated += inflater.decompress(chunk, min(limit + 1 - before, _INFLATED_AT_ONCE))
        except zlib.error as error:
            raise RequestError(400, "encoding", f"Invalid gzip payload: {error}") from None
        if not chunk and len(inflated) == before and not inflater.eof:
            raise RequestError(400, "encoding", "Invalid gzip payload: it is cut off")
        yield
    if inflater.eof and (inflater.unused_data or at < len(body)):
        raise RequestError(400, "encoding", "Invalid gzip payload: something follows its first member")


def decoded(body: bytes, kind: type[_T]) -> _T:
    """The JSON of a body as a ``kind``, numbers converted as upstream does. Raises ``Refusal`` that names the field."""
    try:
        try:
            return msgspec.json.decode(body, type=kind, strict=False)
        except msgspec.ValidationError as error:
            if "got `bool`" not in str(error):
                raise
            fields = msgspec.json.decode(body, type=dict[str, Any])
            plain = {name: int(value) if isinstance(value, bool) else value for name, value in fields.items()}
            return msgspec.convert(plain, kind, strict=False)
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].strip("`") if "$." in str(error) else ""
        raise Refusal("type", str(error), field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("malformed_json", f"the body is not JSON: {error}") from None


def lease_seconds(value: object, longest: float, name: str) -> float:
    """The seconds that a request names. Raises ``Refusal`` unless they are a number above 0 and at most ``longest``."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds <= longest:
        text = f"{name} = {repr(value)[:_SHOWN]} must be a number of seconds above 0 and at most {longest:g}"
        raise Refusal("lease", text, name, value=str(value)[:_SHOWN])
    return seconds


async def idempotency(request: Request, body: bytes) -> tuple[str | None, bytes]:
    """The Idempotency-Key and the digest of its request; (None, b"") without one. Raises ``Refusal``."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None, b""
    key = key.strip()
    if not 0 < len(key) <= _MAX_KEY:
        raise Refusal("idempotency", f"Idempotency-Key must have 1 to {_MAX_KEY} characters, not {len(key)}")
    digest = hashlib.sha256(request.scope["path"].encode() + b"\n")
    await asyncio.to_thread(digest.update, body)
    return key, digest.digest()[:16]


def batch_parts(groups: Iterable[StoredGroup], *, packed: bool) -> list[bytes]:
    """A batch in the packed wire, or as ``{"batch": [...]}`` with the groups as received, in the pieces that are sent.
    The packed wire holds as JSON what was not packed ahead."""
    pieces: list[bytes | memoryview]
    if packed:
        pieces = [*join_packed([group.packed or pack_json(b"".join(group.json_parts())) for group in groups])]
    else:
        pieces = [piece for group in groups for piece in (b",", *group.json_parts())]
        pieces = [b'{"batch":[', *pieces[1:], b"]}"]
    parts: list[bytes] = []
    start = length = 0
    for end, piece in enumerate(pieces, 1):
        length += len(piece)
        if length >= _CHUNK or end == len(pieces):
            parts.append(b"".join(pieces[start:end]))
            start, length = end, 0
    return parts


def is_compressed(policy: str, request: Request, length: int) -> bool:
    """By what the client accepts and what pays."""
    here = is_loopback(request.client.host if request.client else "")
    if policy == "never" or length < _MIN_COMPRESSED or (policy == "auto" and here):
        return False
    offers = [part.partition(";") for part in request.headers.get("accept-encoding", "").lower().split(",")]
    accepted = {name.strip() for name, _, weight in offers if weight.replace(" ", "").rstrip("0") not in _NO_WEIGHT}
    return bool(accepted & {"gzip", "x-gzip", "*"})


class Connection:
    def __init__(self) -> None:
        self.lost = False
        self.reset = False  # it ended with an error: the client did not read everything
        self._when_done: list[Callable[[bool], None]] = []

    def when_done(self, action: Callable[[bool], None]) -> None:
        """Call ``action`` when the client has done with the last answer: it closes the connection or uses it again.
        The argument tells whether it has read the answer."""
        self._when_done.append(action)

    def done(self, read: bool = True) -> None:
        actions, self._when_done = self._when_done, []
        for action in actions:
            action(read)

    def end(self, error: Exception | None) -> None:
        self.lost, self.reset = True, error is not None
        self.done(read=error is None)


class Connections(dict[Any, Connection]):
    """The open ones, by the client's address. Empty under a server that tells nothing."""

    def opened(self, client: Any) -> None:
        self[client] = Connection()

    def ended(self, client: Any, error: Exception | None) -> None:
        if (connection := self.pop(client, None)) is not None:
            connection.end(error)


class _Unread:
    """Answers of one kind that an environment has not done with yet, and a wait until there are none."""

    def __init__(self) -> None:
        self._answers: set[asyncio.Future[None]] = set()
        self._read_at = float("-inf")

    def add(self, connection: Connection) -> Callable[[], None]:
        """One more, on ``connection``. Returns what ends it, too; to end it again does nothing."""
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._answers.add(answer)

        def end() -> None:
            if not answer.done():
                answer.set_result(None)
                self._answers.remove(answer)
                self._read_at = loop.time()

        connection.when_done(lambda _: end())
        return end

    async def all_read(self, most: int | None = None) -> None:
        """With more than ``most`` nobody waits."""
        if most is not None and len(self._answers) > most:
            return
        if self._answers:
            await asyncio.wait(self._answers, timeout=PATIENCE)
        settling = self._read_at + SETTLING - asyncio.get_running_loop().time()
        if settling > 0:
            await asyncio.sleep(settling)


class StatusBarrier:
    """Keeps ``/status-env`` true: what an environment learns of its queue fits what it knows of its own groups. Its
    status requests and its posts wait for each other, until it has done with the answer before, for about ``PATIENCE``
    seconds at most. Otherwise atroposlib counts a group twice, gives up another one (docs/internals.md). Belongs to the
    event loop. A connection of None (a server that does not tell of them) passes at once."""

    def __init__(self) -> None:
        self._posts: dict[int, _Unread] = {}
        self._statuses: dict[int, _Unread] = {}

    async def before_accept(self, env_id: int | None) -> None:
        """A group of this environment waits here before it is accepted."""
        if env_id in self._statuses:
            await self._statuses[env_id].all_read(_STATUSES)

    def accepted(self, env_id: int | None, connection: Connection | None) -> None:
        if env_id is not None and connection is not None and not connection.lost:
            end = self._posts.setdefault(env_id, _Unread()).add(connection)
            asyncio.get_running_loop().call_later(PATIENCE, end)

    async def before_status(self, env_id: int, connection: Connection | None) -> None:
        """Its question waits here; from now on its posts do, until it has the answer."""
        if connection is None or connection.lost:
            return
        end = self._statuses.setdefault(env_id, _Unread()).add(connection)
        if env_id in self._posts:
            await self._posts[env_id].all_read()
        asyncio.get_running_loop().call_later(PATIENCE, end)


class BatchResponse(Response):
    """A batch, sent in the pieces it is stored in. Afterwards it settles what becomes of the batch."""

    def __init__(
        self,
        batch: Batch,
        parts: list[bytes],
        media_type: str,
        zipped: bool,
        store: Store,
        counters: Counters,
        connection: Connection | None,
    ) -> None:
        self._batch, self._parts, self._zipped = batch, parts, zipped
        self._store, self._counters, self._connection = store, counters, connection
        headers = {"content-type": media_type, "x-atropos-step": str(batch.step)}
        headers["x-atropos-delivery"] = str(batch.deliveries)
        if batch.deadline is not None:
            headers["x-atropos-lease-id"] = batch.lease_id
            if batch.earlier:
                headers["x-atropos-earlier-lease-ids"] = ",".join(batch.earlier)
        if zipped:
            headers |= {"content-encoding": "gzip", "vary": "Accept-Encoding"}
        else:
            headers["content-length"] = str(sum(map(len, parts)))
        self.raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, connection = False, self._connection
        made = zlib.compressobj(1, zlib.DEFLATED, _GZIP) if self._zipped else None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for part in [*self._parts, b""]:
                if connection is not None and connection.lost:
                    return
                if made is not None:  # in a thread: zlib lets the event loop run meanwhile
                    part = await (asyncio.to_thread(made.compress, part) if part else asyncio.to_thread(made.flush))
                if part:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    self._counters.bytes_out += len(part)
            lost = await Request(scope, receive).is_disconnected() if connection is None else connection.lost
            arrived = not lost
            if arrived:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._settle(arrived)

    def _settle(self, arrived: bool) -> None:
        store, lease_id, connection = self._store, self._batch.lease_id, self._connection

        def read(was_read: bool = True) -> None:
            store.settle(lease_id, None if was_read else "the client closed the connection without reading the batch")

        if not arrived:
            store.settle(lease_id, "the response could not be delivered")
        elif self._batch.deadline is not None:
            return
        elif connection is None or connection.lost:
            read(connection is None or not connection.reset)
        else:
            connection.when_done(read)
            asyncio.get_running_loop().call_later(store.settings.delivery_grace, read)
