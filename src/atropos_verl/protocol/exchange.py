"""One HTTP request and its answer: bounded in time, and every failure translated into ``errors`` here and only here.

An attempt runs in a thread of its own, because no setting of a socket bounds all of its phases: name resolution has no
time-out at all, and a server that sends a byte now and then never lets a read time-out expire.

::

    connecting ──send──▶ sent ──headers──▶ answering ──▶ done
        │                  │                   │
        └── deadline ──────┴───────────────────┴──▶ abandoned: the socket is shut down, and an attempt that
                                                    still connects is refused the permission to send
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
)

__all__ = ["Answer", "Call", "ExchangeError", "exchange", "not_atropos", "what_is_lost"]

logger = logging.getLogger(__name__)

SMALL_ANSWER_BYTES = 16 * 2**20
"""No answer but a batch is ever this long; a server that sends more is something else."""
TRANSFER_FACTOR = 10
"""A batch that keeps arriving may take this many time-outs: cutting it off loses it at the API for ever."""
_SHOWN = 500
_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is asked, and how patiently."""

    method: str
    url: str
    endpoint: str
    """Path without the prefix of the API's URL, for messages: ``/status``."""
    base_url: str
    """The API as the user configured it, for messages."""
    timeout: float
    """Seconds for the whole call, all tries together; what messages say."""
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    is_batch: bool = False
    """The answer is a batch, which the API has already forgotten: of any length, and never cut off while it arrives."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.endpoint}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful (2xx) answer; ``body`` is decompressed."""

    headers: httpx.Headers
    body: bytes


class ExchangeError(Exception):
    """An attempt failed. Carries what the retry rules need; ``error`` is what the user gets in the end."""

    def __init__(self, error: AtroposAPIError, *, sent: bool, transient: bool) -> None:
        super().__init__(error.reason)
        self.error = error
        self.sent = sent
        """Bytes of the request may have reached the API."""
        self.transient = transient
        """The same request may succeed later."""


class _AbandonedError(Exception):
    """Raised inside the attempt's thread once nobody waits for it any more."""


def exchange(client: httpx.Client, call: Call, seconds: float) -> Answer:
    """Send ``call`` once; the answer within ``seconds``.

    For a batch, ``seconds`` bounds connecting; after that ``call.timeout`` bounds each silence of the API, and ten
    times as much the whole transfer.

    Raises:
        ExchangeError: with the translated error; also for an answer that is not 2xx.
    """
    attempt = _Attempt(client, call, seconds)
    status_code, headers, body = attempt.run()
    if not 200 <= status_code < 300:
        error = _status_error(call, status_code, headers, body)
        raise ExchangeError(error, sent=True, transient=status_code == 429 or status_code >= 500)
    return Answer(headers, body)


class _Attempt:
    """One request in a daemon thread. ``run`` waits for it, and leaves it behind at the deadline."""

    def __init__(self, client: httpx.Client, call: Call, seconds: float) -> None:
        self._client = client
        self._call = call
        self._seconds = seconds
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._deadline = time.monotonic() + seconds
        self._end = self._deadline
        self._phase = "sent"  # until the transport reports that it connects: nothing unsafe is assumed
        self._abandoned = False
        self._socket: socket.socket | None = None
        self._result: tuple[int, httpx.Headers, bytes] | None = None
        self._failure: BaseException | None = None

    def run(self) -> tuple[int, httpx.Headers, bytes]:
        threading.Thread(target=self._work, name=f"atropos {self._call.name}", daemon=True).start()
        try:
            self._wait()
        except BaseException:  # Ctrl-C: the request must not go out after its caller has gone
            self._abandon(at_deadline=False)
            raise
        if self._result is not None:
            return self._result
        if self._failure is None:
            raise self._timed_out(connecting=self._phase == "connecting")
        if isinstance(self._failure, httpx.HTTPError | httpx.StreamError | OSError):
            raise self._translated(self._failure) from self._failure
        if isinstance(self._failure, ExchangeError):
            raise self._failure
        raise RuntimeError(f"{self._call.name}: unexpected failure of the HTTP client") from self._failure

    def _wait(self) -> None:
        while not self._done.wait(max(0.0, self._deadline - time.monotonic())):
            if self._abandon(at_deadline=True):
                return

    def _abandon(self, *, at_deadline: bool) -> bool:
        with self._lock:
            if self._done.is_set() or (at_deadline and time.monotonic() < self._deadline):
                return False
            self._abandoned = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it may have been closed, or wrapped for TLS, this moment
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        return True

    def _work(self) -> None:
        result: tuple[int, httpx.Headers, bytes] | None = None
        failure: BaseException | None = None
        try:
            result = self._receive()
        except BaseException as error:  # noqa: BLE001 - the end of a thread: ``run`` raises it in the caller's
            failure = error
        with self._lock:
            if self._abandoned:
                if result is not None and self._call.is_batch:
                    logger.warning("%s was answered after the time-out: that batch is lost", self._call.name)
                return
            self._result, self._failure = result, failure
            self._done.set()

    def _receive(self) -> tuple[int, httpx.Headers, bytes]:
        call = self._call
        silence = call.timeout if call.is_batch else self._seconds
        with self._client.stream(
            call.method,
            call.url,
            content=call.content,
            headers=dict(call.headers or {}),
            timeout=httpx.Timeout(silence, connect=self._seconds),
            extensions={"trace": self._trace},
        ) as response:
            self._phase = "answering"
            body = b"".join(self._chunks(response))
            return response.status_code, response.headers, body

    def _chunks(self, response: httpx.Response) -> Iterator[bytes]:
        received = 0
        for chunk in response.iter_bytes():
            received += len(chunk)
            if not self._call.is_batch and received > SMALL_ANSWER_BYTES:
                reason = f"{self._call.name} gave more than {SMALL_ANSWER_BYTES} bytes"
                raise ExchangeError(not_atropos(self._call, reason), sent=True, transient=False)
            self._extend()
            yield chunk

    def _extend(self) -> None:
        """A batch that arrives is waited for."""
        with self._lock:
            if self._abandoned:
                raise _AbandonedError
            if self._call.is_batch:
                self._deadline = min(time.monotonic() + self._call.timeout, self._end)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore says how far it is (https://www.encode.io/httpcore/extensions/#trace)."""
        if event == "connection.connect_tcp.started":
            self._phase = "connecting"
        elif event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
        elif event.endswith("send_request_headers.started"):
            with self._lock:
                if self._abandoned:
                    raise _AbandonedError
                self._phase = "sent"
                if self._call.is_batch:
                    now = time.monotonic()
                    self._end = now + TRANSFER_FACTOR * self._call.timeout
                    self._deadline = now + self._call.timeout

    def _timed_out(self, *, connecting: bool) -> ExchangeError:
        call = self._call
        if connecting:
            limit = self._seconds if call.is_batch else call.timeout
            reason = f"Cannot connect to Atropos API at {call.base_url} - no answer within {limit:.3g} s"
        else:
            reason = f"Atropos API at {call.base_url} - no answer to {call.name} within {call.timeout:g} s"
            if call.is_batch and self._phase == "answering":
                reason = f"Atropos API at {call.base_url} - {call.name} stopped arriving for {call.timeout:g} s"
            reason += what_is_lost(call)
        return ExchangeError(AtroposTimeoutError(reason, call.base_url), sent=not connecting, transient=True)

    def _translated(self, error: Exception) -> ExchangeError:
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return self._timed_out(connecting=isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout))
        sent = not isinstance(error, _NOTHING_SENT)
        translated, transient = _transport_error(self._call, error, answering=self._phase == "answering")
        return ExchangeError(translated, sent=sent, transient=transient)


def _transport_error(call: Call, error: Exception, *, answering: bool) -> tuple[AtroposAPIError, bool]:
    """The error for a foreign one, and whether the same request may succeed later."""
    if isinstance(error, _NOTHING_SENT):
        reason, transient = _why_no_connection(call, error)
        cannot = f"Cannot connect to Atropos API at {call.base_url} - {reason}"
        return AtroposConnectionError(cannot, call.base_url), transient
    if isinstance(error, httpx.DecodingError):
        return not_atropos(call, f"{call.name} gave a body that cannot be decompressed: {error}"), False
    if isinstance(error, httpx.RemoteProtocolError) and not answering and "disconnected" not in str(error):
        return not_atropos(call, f"{call.name} gave something that is not HTTP ({error})"), False
    where = f"while reading the answer to {call.name}" if answering else f"before an answer to {call.name}"
    how = "closed" if isinstance(error, httpx.RemoteProtocolError) else "reset"
    reason = f"Atropos API at {call.base_url} - connection {how} {where}{what_is_lost(call)}"
    return AtroposConnectionError(reason, call.base_url), True


def _why_no_connection(call: Call, error: Exception) -> tuple[str, bool]:
    host = httpx.URL(call.url).host
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "set atropos.ca_file if the API has a certificate of its own"
            return f"TLS handshake failed: certificate of {host!r} not accepted ({cause.verify_message}); {hint}", False
        if isinstance(cause, ssl.SSLError):
            return f"TLS handshake failed: {cause.reason or cause} - is it an http:// API?", False
        if isinstance(cause, socket.gaierror):
            return f"host name {host!r} cannot be resolved (DNS)", True
        if isinstance(cause, ConnectionRefusedError):
            return "ensure server is running", True
        if isinstance(cause, OSError) and cause.errno in _UNREACHABLE:
            return f"network unreachable ({cause.strerror})", True
        if isinstance(cause, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
            return "connection reset while connecting", True
    if isinstance(error, httpx.ProxyError):
        return f"the proxy refused ({error})", False
    return str(error) or type(error).__name__, isinstance(error, httpx.ConnectError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status_error(call: Call, status_code: int, headers: httpx.Headers, body: bytes) -> AtroposHTTPStatusError:
    text = body[:_SHOWN].decode("utf-8", "replace").strip()
    answer = f"Atropos API at {call.base_url} answered {call.name} with HTTP {status_code}"
    if status_code in (401, 403):
        reason = f"{answer} - check atropos.token"
    elif status_code in (404, 405):
        reason = f"{answer} - is the path prefix right?"
    elif 300 <= status_code < 400:
        reason = f"{answer}, a redirect to {headers.get('location', '?')} - set atropos.api_url to the final address"
    else:
        reason = f"{answer}: {text or 'empty answer'}"
        if call.is_batch and status_code >= 500:
            reason += " (the batch may be lost: the API takes it from its queue first, then fails to encode NaN)"
    return AtroposHTTPStatusError(reason, call.base_url, status_code, text)


def not_atropos(call: Call, detail: str) -> AtroposProtocolError:
    return AtroposProtocolError(
        f"The server at {call.base_url} answers, but is not an Atropos trajectory API: {detail}", call.base_url
    )


def what_is_lost(call: Call) -> str:
    if not call.is_batch:
        return ""
    return "; the batch may be lost: the API takes it from its queue before it sends it"
