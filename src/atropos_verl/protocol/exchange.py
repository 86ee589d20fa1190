"""One request to a trajectory API: bounded in time, its failures translated into ``errors``."""

import errno
import json
import socket
import ssl
import time
from collections.abc import Callable, Mapping
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
from atropos_verl.http_thread import printable
from atropos_verl.protocol.wire import MAGIC

SMALL_ANSWER_BYTES = 16 * 2**20
"""No answer but a batch is ever this long; a server that sends more is something else."""
TRANSFER_FACTOR = 10
"""A batch that keeps arriving may take this many time-outs: cutting it off loses it at the API for ever."""
_SLICE_SECONDS = 0.25
_BODY_WITHOUT_BATCH = 4096
"""Bytes. Answers without a batch are shorter; longer ones are left to ``decode_batch``, after they were journalled."""
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


def retry_interval(attempt: int, attempts: int, delay: float) -> float:
    """Seconds to wait after try ``attempt`` (from 0): ``delay * 1.5**attempt``, as far as ``attempts``."""
    return float(delay * 1.5 ** min(attempt, attempts - 1))


def pause(seconds: float, should_stop: Callable[[], None] | None) -> None:
    """Sleep, calling ``should_stop`` at once and every quarter of a second, so that what it raises is raised soon."""
    end = time.monotonic() + seconds
    while True:
        if should_stop is not None:
            should_stop()
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _SLICE_SECONDS) if should_stop is not None else left)


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    url: str
    # For messages: the path without the prefix of the API's URL, and that URL as the user configured it.
    endpoint: str
    base_url: str
    timeout: float
    """Seconds for the whole call, all tries together."""
    content: bytes | None
    headers: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.method} {self.endpoint}"

    @property
    def is_batch(self) -> bool:
        """The answer is a batch, which the API has forgotten: of any length, and not cut off while it arrives."""
        return self.endpoint == "/batch"

    @property
    def api(self) -> str:
        return f"Atropos API at {self.base_url}"

    @property
    def loss(self) -> str:
        """Ends the message about a request that may have reached the API."""
        return "; the batch may be lost: the API takes it from its queue before it sends it" if self.is_batch else ""


class ExchangeError(Exception):
    """A try failed. ``error`` is what the user gets in the end."""

    def __init__(self, error: AtroposAPIError, *, sent: bool, transient: bool) -> None:
        super().__init__(error.reason)
        self.error = error
        self.sent = sent
        """Bytes of the request may have reached the API."""
        self.transient = transient
        """The same request may succeed later."""


def exchange(client: httpx.Client, call: Call, seconds: float) -> tuple[bytes, httpx.Headers]:
    """Send ``call`` once. Returns the decompressed body of a 2xx answer and its headers. Raises ``ExchangeError``,
    whatever failed; also for another answer.

    ``seconds`` bounds connecting, each silence of the server, and the answer as a whole. For a batch each silence has
    ``call.timeout``, and the whole transfer ten times as much. Not bounded: the look-up of a host name, which has the
    time-out of the system's resolver, and a server that never ends its headers but sends some of them now and then.
    """
    timeout = httpx.Timeout(call.timeout if call.is_batch else seconds, connect=seconds, pool=seconds)
    end = time.monotonic() + seconds
    chunks: list[bytes] = []
    received = 0
    is_answering = False
    sent: dict[str, Any] = {"content": call.content, "headers": dict(call.headers)}
    try:
        with client.stream(call.method, call.url, **sent, timeout=timeout) as response:
            is_answering = True
            if call.is_batch:
                end = time.monotonic() + TRANSFER_FACTOR * call.timeout
            for chunk in response.iter_bytes():
                received += len(chunk)
                if not call.is_batch and received > SMALL_ANSWER_BYTES:
                    raise _no_api(call, f"more than {SMALL_ANSWER_BYTES} bytes")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the answer goes on and on")
                chunks.append(chunk)
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise _translated(call, error, seconds, is_answering=is_answering) from error
    body = b"".join(chunks)
    if not response.is_success:
        transient = response.status_code == 429 or response.status_code >= 500
        raise ExchangeError(_status_error(call, response, body), sent=True, transient=transient)
    return body, response.headers


def _translated(call: Call, error: Exception, seconds: float, *, is_answering: bool) -> ExchangeError:
    sent = not isinstance(error, _NOTHING_SENT)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        if not sent:
            limit = seconds if call.is_batch else call.timeout
            reason = f"Cannot connect to {call.api} - no answer within {limit:.3g} s"
        elif call.is_batch and is_answering:
            reason = f"{call.api} - {call.name} stopped arriving for {call.timeout:g} s{call.loss}"
        else:
            reason = f"{call.api} - no answer to {call.name} within {call.timeout:g} s{call.loss}"
        return ExchangeError(AtroposTimeoutError(reason, call.base_url), sent=sent, transient=True)
    if not sent:
        why, transient = _why_no_connection(call, error)
        reason = f"Cannot connect to {call.api} - {why}"
        return ExchangeError(AtroposConnectionError(reason, call.base_url), sent=False, transient=transient)
    if isinstance(error, httpx.DecodingError):
        return _no_api(call, f"a body that cannot be decompressed: {error}")
    if isinstance(error, httpx.RemoteProtocolError) and not is_answering and "disconnected" not in str(error):
        return _no_api(call, f"something that is not HTTP ({error})")
    where = f"while reading the answer to {call.name}" if is_answering else f"before an answer to {call.name}"
    how = "closed" if isinstance(error, httpx.RemoteProtocolError) else "reset"
    reason = f"{call.api} - connection {how} {where}{call.loss}"
    return ExchangeError(AtroposConnectionError(reason, call.base_url), sent=True, transient=True)


def _no_api(call: Call, what: str) -> ExchangeError:
    return ExchangeError(not_atropos(call, what), sent=True, transient=False)


def _why_no_connection(call: Call, error: Exception) -> tuple[str, bool]:
    """The reason, and whether the same request may succeed later."""
    host = httpx.URL(call.url).host
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case ssl.SSLCertVerificationError(verify_message=said):
                why = f"certificate of {host!r} not accepted ({said}); "
                return f"TLS handshake failed: {why}set atropos.ca_file if the API has a certificate of its own", False
            case ssl.SSLError():
                return f"TLS handshake failed: {cause.reason or cause} - is it an http:// API?", False
            case socket.gaierror():
                return f"host name {host!r} cannot be resolved (DNS)", True
            case ConnectionRefusedError():
                return "ensure server is running", True
            case ConnectionResetError() | ConnectionAbortedError() | BrokenPipeError():
                return "connection reset while connecting", True
            case OSError(errno=number) if number in _UNREACHABLE:
                return f"network unreachable ({cause.strerror})", True
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ProxyError):
        return f"the proxy refused ({error})", False
    return str(error) or type(error).__name__, isinstance(error, httpx.ConnectError)


def _status_error(call: Call, response: httpx.Response, body: bytes) -> AtroposHTTPStatusError:
    status_code = response.status_code
    text = printable(body[:_SHOWN].decode("utf-8", "replace").strip())
    reason = f"{call.api} answered {call.name} with HTTP {status_code}"
    if status_code in (401, 403):
        reason += " - check atropos.token"
    elif status_code in (404, 405):
        reason += " - is the path prefix right?"
    elif 300 <= status_code < 400:
        location = printable(response.headers.get("location", "?"))
        reason += f", a redirect to {location} - set atropos.api_url to the final address"
    else:
        reason += f": {text or 'empty answer'}"
        if call.is_batch and status_code >= 500:
            reason += " (the batch may be lost: the API takes it from its queue first, then fails to encode NaN)"
    return AtroposHTTPStatusError(reason, call.base_url, status_code, text)


def not_atropos(call: Call, what: str) -> AtroposProtocolError:
    """``what``: it gave this."""
    reason = f"The server at {call.base_url} answers, but is not an Atropos trajectory API: {call.name} gave {what}"
    return AtroposProtocolError(reason, call.base_url)


def answered_object(call: Call, body: bytes) -> dict[str, Any]:
    """The answer's JSON object. Raises ``AtroposProtocolError`` for anything else, and for a status of failure."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise not_atropos(call, f"{body[:120]!r}, which is not JSON") from None
    if not isinstance(fields, dict):
        raise not_atropos(call, f"{body[:120]!r}, which is not a JSON object")
    if fields.get("status") in ("error", "failure"):
        why = fields.get("message") or fields.get("error") or fields.get("detail") or "no explanation"
        reason = f"{call.api} answered {call.name} with status {fields['status']!r}: {printable(str(why)[:_SHOWN])}"
        raise AtroposProtocolError(reason, call.base_url)
    return fields


def integers(call: Call, fields: Mapping[str, Any], *names: str) -> list[int]:
    """The values of ``names``. Raises ``AtroposProtocolError`` when one of them is no integer."""
    for name in names:
        if not isinstance(fields.get(name), int) or isinstance(fields[name], bool):
            raise not_atropos(call, f"no integer {name!r} but {str(dict(fields))[:120]}")
    return [fields[name] for name in names]


def holds_batch(call: Call, body: bytes) -> bool:
    """True when the answer to ``GET /batch`` is a batch; False: there is none yet. Raises ``AtroposProtocolError``
    where it is neither, or is cut off."""
    if body.startswith(MAGIC):  # complete: its length was announced, or it was sent in chunks with an end
        return True
    if not body[:64].lstrip().startswith(b"{"):
        raise not_atropos(call, f"{body[:120]!r}, which is not a JSON object")
    if not body[-64:].rstrip().endswith(b"}"):
        reason = f"{call.api} - the answer to {call.name} is cut off after {len(body)} bytes{call.loss}"
        raise AtroposProtocolError(reason, call.base_url)
    if len(body) > _BODY_WITHOUT_BATCH:
        return True
    fields = answered_object(call, body)
    if "batch" not in fields:
        raise not_atropos(call, f"{body[:120]!r}, which has no 'batch'")
    return bool(fields["batch"])
