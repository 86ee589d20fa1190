"""Serves ASGI applications from a thread of this process: connections are bounded, pages of other sites kept out.

A page of any site can make the browser of whoever works on this machine send requests. ``foreign_page`` finds them by
what a browser says of itself; programs say nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import hmac
import ipaddress
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import urlsplit

from atropos_verl.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

EVALUATION_PATH = "/evaluation"
"""What requests of held-out evaluations have before every other path of the gateway."""
EVALUATION_GROUP = "evaluation "
"""What the group of a session begins with whose rollout is an evaluation's."""
_KEEP_ALIVE_TIMEOUT = 75
"""Seconds an idle connection is kept: longer than a client's pool keeps it, so that no request meets a closing one."""
_BACKLOG = 2048
"""Connections waiting to be accepted: environments open up to 576 at once each."""
_MAX_CONNECTIONS = 16_384
_MAX_FILES = 65_536
_OTHER_FILES = 256
"""File descriptors that are left to the rest of the process."""
_EVICTED_AT_ONCE = 16
_NO_FILES_SECONDS = 0.01
_SECONDS, _BYTES = 60.0, 64 << 10
"""Within each such time a request that is not complete must bring so many bytes (more than a header may have), and who
is answered must read on."""
_SAME_LINE_SECONDS = 10.0
_SHOWN = 200


class ServerThread:
    """uvicorn in its own thread and event loop. Also a context manager (start / stop). It can be started again after
    ``stop``, on the same port.

    Args:
        service: its name in messages; ``advice``: what to do when the port is taken.
        port: 0 takes a free one.
        listener: from ``listen``, for the first start: who connects before waits in it. The server closes it.
        options: for ``uvicorn.Config``."""

    def __init__(
        self,
        app: Any,
        *,
        service: str,
        advice: str,
        host: str,
        port: int,
        listener: Listener | None = None,
        **options: Any,
    ) -> None:
        self._app, self._options = app, options
        self._service, self._advice = service, advice
        self._host, self._port, self._listener = host, port, listener
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` without a path, to be called from this machine. Raises ``ServiceError`` before start."""
        if self._server is None:
            raise ServiceError(f"{self._service}: not started; call start() first", self._service)
        return f"http://{bracketed(reachable(self._host))}:{self._port}"

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def check_alive(self) -> None:
        """Raise ``ServiceError`` with the cause when its thread has ended by itself."""
        if self._thread is not None and not self._thread.is_alive():
            text = f"{self._service}: its thread has ended: {self._failure!r}"
            raise ServiceError(text, self._service) from self._failure

    def start(self, timeout: float = 10.0) -> str:
        """Listen, and return ``url`` once requests are answered. Starting a running server returns its url. Raises
        ``ServiceError``: the port is taken, or the application does not start in ``timeout`` seconds."""
        import uvicorn

        if self.is_running:
            return self.url
        listener = self._listener or listen(self._host, self._port, self._service, self._advice)
        self._server = server = uvicorn.Server(uvicorn_config(self._app, listener, **self._options))
        self._port, self._listener, self._failure = int(listener.getsockname()[1]), None, None
        name = self._service.replace(" ", "-")
        self._thread = threading.Thread(target=self._serve, args=(server, listener), name=name, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + timeout
        while not server.started:
            is_late = time.monotonic() > deadline
            if is_late or not self.is_running:
                self.stop(timeout=2.0)
                why = f"not within {timeout} s (start timeout)" if is_late else repr(self._failure)
                raise ServiceError(f"{self._service}: failed to start: {why}", self._service) from self._failure
            time.sleep(0.005)
        logger.info("%s: serving at %s", self._service, self.url)
        return self.url

    def stop(self, timeout: float = 10.0) -> None:
        """Stop listening, let running requests finish for half of ``timeout`` seconds, then cancel them. Idempotent.
        Raises ``ServiceError`` when the thread has not ended within ``timeout`` seconds."""
        thread, server = self._thread, self._server
        if thread is None or server is None:
            return
        server.config.timeout_graceful_shutdown = max(timeout / 2, 0.1)
        server.should_exit = True
        thread.join(timeout)
        server.force_exit = True
        thread.join(1.0)
        if thread.is_alive():
            text = f"{self._service}: its thread did not end within {timeout} s; is a request stuck?"
            raise ServiceError(text, self._service)
        self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, server: uvicorn.Server, listener: Listener) -> None:
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except (Exception, SystemExit) as error:  # the thread's boundary; start() and the log report it
            self._failure = error
            logger.error("%s: the server thread failed", self._service, exc_info=error)
        finally:
            listener.close()


async def disconnected(receive: Any) -> None:
    """Returns when the client of an ASGI request goes away (or when its response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


def check_url(api_url: str, key: str = "atropos.api_url") -> str:
    """The URL's host. Raises ``ConfigError`` for what is not the address of an API or a gateway."""
    import httpx

    try:
        parts = urlsplit(api_url)
        host = parts.hostname or ""
        httpx.URL(api_url)
        valid = parts.scheme in ("http", "https") and host != "" and parts.port != 0 and not re.search(r"\s", api_url)
    except (ValueError, TypeError, AttributeError, httpx.InvalidURL) as error:
        # The error may quote a piece of the password.
        advice = "check its port, and write /, ?, # and @ of a password as %2F, %3F, %23 and %40"
        why = advice if "@" in str(api_url) else error
        raise ConfigError(f"{without_password(str(api_url))!r} is not a URL: {why}", key) from None
    if not valid:
        raise ConfigError(f"{without_password(api_url)!r} is not an http:// or https:// URL with a host", key)
    if parts.query or parts.fragment:
        raise ConfigError(f"{without_password(api_url)!r} must not hold a query or a fragment", key)
    return host


def without_password(api_url: str) -> str:
    """The URL as it may be shown: user and password left out, also of one that holds a ``/`` or ``@`` of its own."""
    return re.sub(r"(?s)//.*@", "//***@", api_url)


def foreign_page(headers: Mapping[str, str], hosts: Collection[str] = (), origins: Collection[str] = ()) -> str | None:
    """Why a request is refused that a web page of another site may have made a browser send; None: it is not.

    ``headers``: by names in lower case; ``hosts``: names that ``Host`` may have (against DNS rebinding), empty: any;
    ``origins``: further sites whose pages may send requests, ``*``: any."""
    host, site, name = headers.get("host", ""), headers.get("sec-fetch-site", ""), None
    with contextlib.suppress(ValueError):  # "[" without "]"
        name = urlsplit(f"//{host}").hostname  # in lower case
    if hosts and name not in hosts:
        return f"host {host[:_SHOWN]!r} is not allowed"
    sender = headers.get("origin") or "/".join(headers.get("referer", "").split("/", 3)[:3])
    if "*" in origins or sender in origins:
        return None
    if sender and sender.partition("://")[2] != host:
        return f"origin {sender[:_SHOWN]!r} is not allowed"
    if site not in ("", "none", "same-origin"):
        return f"a page of another site is not allowed (Sec-Fetch-Site: {site[:_SHOWN]!r})"
    return None


def has_token(headers: Mapping[str, str], *tokens: str) -> bool:
    """The request carries one of ``tokens``, as ``sent_token`` finds it."""
    sent = sent_token(headers)
    return any(hmac.compare_digest(sent, token.encode()) for token in tokens if token)


def sent_token(headers: Mapping[str, str]) -> bytes:
    """What the request carries as ``Bearer TOKEN`` or as ``Basic base64(anything:TOKEN)`` (as Atropos's client sends a
    password that stands in the API's URL); empty: nothing."""
    scheme, _, sent = headers.get("authorization", "").encode("latin-1", "replace").partition(b" ")
    sent = sent.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(sent, validate=True).partition(b":")[2]
        except ValueError:  # no base64
            return b""
    return sent if scheme.lower() == b"bearer" else b""


def environment_token(token: str) -> str:
    """What a run with this ``token`` may give to its environments: it allows everything but ``/reset_data``."""
    return hmac.new(token.encode(), b"environment", hashlib.sha256).hexdigest()


class Listener(socket.socket):
    """A listening socket whose connections leave file descriptors to the rest of the process: beyond their limit, the
    one that has waited longest for a request, or for more of one, makes room for the next one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        files, wanted = (_MAX_FILES if n == resource.RLIM_INFINITY else min(n, _MAX_FILES) for n in (files, most))
        if files < wanted:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
                files = wanted
        self.limit = max(1, min(_MAX_CONNECTIONS, files - min(_OTHER_FILES, files // 2)))
        self.count = 0
        """Accepted and not closed yet."""
        self.settling = 0
        """Of these, those that asyncio has not handed to a protocol yet, or that were told to close."""
        self.waiting: dict[Any, None] = {}
        """Protocols that wait for a request, or for more of one; those that have waited longest first."""
        self._refusals = SameLines()

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises ``BlockingIOError`` where there is no room: asyncio then asks again in its next turn."""
        if self.count >= self.limit:
            if not self.settling:
                for protocol in [*islice(self.waiting, min(_EVICTED_AT_ONCE, 1 + len(self.waiting) // 8))]:
                    del self.waiting[protocol]
                    protocol.is_evicted = True
                    protocol.transport.abort()
                    self.settling += 1
            if self.settling:
                raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(_NO_FILES_SECONDS)  # the loop would turn as fast as it can, and asyncio would log each turn
            self._refuse("wait: this process has no file descriptor left")
        if self.count >= self.limit:
            connection.close()
            self._refuse(f"are refused: {self.count} are open and have requests under way")
        self.count += 1
        self.settling += 1
        return connection, address

    def _refuse(self, why: str) -> NoReturn:
        if self._refusals.is_new(""):
            logger.warning("connections %s (ulimit -n)", why)
        raise BlockingIOError


def _watched(listener: Listener, connections: Any) -> type[Any]:
    """uvicorn's protocol, whose connections ``listener`` counts, and which does not wait for ever. ``connections``,
    unless None, is told of each (``opened``, ``ended``)."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class WatchedProtocol(base):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            self._timer: Any = None
            self._writing: Any = None
            self._received = 0
            self.is_evicted = False
            listener.settling -= 1
            super().connection_made(transport)
            self._watch(waits=True)
            if connections is not None:
                connections.opened(self.client)

        def data_received(self, data: bytes) -> None:
            self._received += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            # What is left of a body that was answered unread is no header.
            has_body = self.cycle is not None and self.cycle.more_body
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and not has_body and self._received > _BYTES:
                self.send_400_response(f"The header is longer than {_BYTES} bytes.")
            self._watch(waits=is_idle or has_body)

        def on_response_complete(self) -> None:
            if not self.transport.is_closing():
                listener.waiting[self] = None
            self._received = 0
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._writing = self._writing and self._writing.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            listener.count -= 1
            listener.settling -= self.is_evicted
            self._watch(waits=False)
            self._writing = self._writing and self._writing.cancel()
            super().connection_lost(exc)
            if connections is not None:
                connections.ended(self.client, exc)

        def _watch(self, *, waits: bool) -> None:
            """It waits for a request, or for more of one, and is now the last of those; or it has no need to."""
            listener.waiting.pop(self, None)
            if waits:
                listener.waiting[self] = None
                self._timer = self._timer or self.loop.call_later(_SECONDS, self._check)
            else:
                self._timer = self._timer and self._timer.cancel()

        def _check(self) -> None:
            self._timer = None
            if self._received < _BYTES and not self.flow.read_paused:
                self.transport.abort()
            else:
                self._received = 0
                self._watch(waits=True)

    return WatchedProtocol


class SameLines(logging.Filter):
    """Lets a line through once in ``_SAME_LINE_SECONDS``: what clients do wrong does not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        return self.is_new(f"{record.msg} {record.exc_info and record.exc_info[1]!r}")

    def is_new(self, line: str) -> bool:
        now = time.monotonic()
        if now - self._shown.get(line, float("-inf")) < _SAME_LINE_SECONDS:
            return False
        self._shown = {**self._shown, line: now} if len(self._shown) < 100 else {line: now}
        return True


_SAME_LINES = SameLines()


def uvicorn_config(app: Any, listener: Listener, connections: Any = None, **options: Any) -> uvicorn.Config:
    """uvicorn's settings that every server of this project shares."""
    import uvicorn

    logging.getLogger("uvicorn.error").addFilter(_SAME_LINES)
    return uvicorn.Config(
        app,
        http=_watched(listener, connections),
        log_config=None,  # uvicorn's loggers propagate to the application's logging like everybody else's
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_TIMEOUT,
        backlog=_BACKLOG,
        ws="none",
        **options,
    )


def listen(host: str, port: int, service: str, advice: str) -> Listener:
    """A listening socket: a second process learns here, and not later, that the port is taken. Raises ``ServiceError``
    with address, cause and ``advice``, and ``ConfigError`` for what is no port: the system takes it modulo 65,536."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is no port: give one from 1 to 65535, or 0 for any free one", "--port")
    listener = None
    try:
        found = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        # The protocol by name: asyncio sends at once (TCP_NODELAY) only on sockets that say it.
        listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rebind at once after a restart
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = f"{service}: cannot listen on {host}:{port}: {error.strerror or error}. {advice}"
        raise ServiceError(reason, service) from error
    return listener


def bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def reachable(host: str) -> str:
    """An address at which this machine reaches what listens on ``host``, which may be a wildcard."""
    host = host.strip("[]")
    try:
        address = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:  # a name
        return host
    return ("127.0.0.1" if address.version == 4 else "::1") if address.is_unspecified else host


def is_loopback(host: str) -> bool:
    """True when what listens on ``host`` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def printable(text: str) -> str:
    """Without what a terminal obeys: line ends, escapes, marks that turn the text around."""
    return "".join([mark if mark.isprintable() else "?" for mark in text])
