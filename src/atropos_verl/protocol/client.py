"""``AtroposClient``: the trajectory API of atroposlib 0.4.0 (``atroposlib/api/server.py``) over HTTP.

``GET /batch`` takes a batch from the queue and then sends it, ``GET /reset_data`` forgets everything: what these lose
cannot be had again. So these two, and a POST of data without an idempotency key or of a registration, are tried again
only while nothing of the request can have reached the API. All others are, and ``GET /batch`` of an API with leases,
after refused or broken connections, time-outs, HTTP 429 and 5xx."""

from __future__ import annotations

import errno
import json
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import (
    AtroposAPIError,
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ConfigError,
)
from atropos_verl.http_thread import check_url, is_loopback, printable, reachable, without_password
from atropos_verl.protocol.messages import EnvIdentifier, EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import MAGIC, MEDIA_TYPE

logger = logging.getLogger(__name__)

_JITTER = 0.1
_TRIES_PER_TIMEOUT = 3
_MIN_POLL_SECONDS = 0.01
_WAIT_SECONDS = 0.5
"""What one ``GET /batch`` may wait at the API: so soon a signal, or the end of a process of the run, is noticed."""
_LAST_CONNECT_SECONDS = 1.0
_LAST_STATUS_SECONDS = 5.0
_SLICE_SECONDS = 0.25
_SMALL_ANSWER_BYTES = 16 * 2**20
"""No answer but a batch is ever this long; a server that sends more is something else."""
_TRANSFER_FACTOR = 10
"""A batch that keeps arriving may take this many time-outs: cutting it off loses it at the API for ever."""
_BODY_WITHOUT_BATCH = 4096
"""Bytes. Answers without a batch are shorter; longer ones are left to ``decode_batch``, after they were journalled."""
_SHOWN = 500
_NOTHING_SENT = (
    httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)  # fmt: skip
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class ApiStatus(NamedTuple):
    """Answer of ``/status``."""

    current_step: int  # batches the API has formed, plus the ``starting_step`` of the registration
    queue_size: int  # groups that are in no batch yet
    self_queue_size: int = 0  # those of the environment that asked (``/status-env``)


class ApiInfo(NamedTuple):
    """Answer of ``/info``: fields of ``TrainerRegistration``; both are -1 while no trainer has registered."""

    batch_size: int
    max_token_len: int


class FetchedBatch(NamedTuple):
    """The answer of ``GET /batch``, decompressed and not decoded, and its lease (None at an upstream API)."""

    body: bytes
    lease_id: str | None = None
    earlier_lease_ids: tuple[str, ...] = ()
    """Under which the same batch was out before, and which ended."""


class AtroposClient:
    """A blocking client; one may be shared by several threads. Use it in a ``with`` block, or ``close`` it. Connections
    are not kept alive: of a request written into the moment in which the server closes an idle one nobody can tell
    whether it was carried out. For ``GET /batch`` that is a batch."""

    def __init__(
        self,
        api_url: str,
        *,
        timeout: float = 30.0,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str = True,
        retry_attempts: int = 8,
        retry_delay: float = 0.3,
        max_wait_time: float = 12.0,
        lease_seconds: float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Check URL, headers and certificates (``ConfigError`` names the setting); nothing is sent yet.

        Args:
            api_url: a path prefix (``https://host/api``) is kept.
            timeout: seconds for one call, all its tries together. ``GET /batch``: see ``poll_batch``.
            verify: check TLS certificates; or the path of a file with the certificates to trust.
            retry_attempts: tries before a failing call is given up; quick polls of ``get_batch``.
            lease_seconds: ask for batches that come back to the API unless they are acked or renewed in so many.
            transport: replaces the network, for tests."""
        host = check_url(api_url)
        self.api_url = without_password(api_url)  # as configured, a password left out
        self.timeout, self.max_wait_time = timeout, max_wait_time
        self.retry_attempts, self.retry_delay = retry_attempts, retry_delay
        self.lease_seconds = lease_seconds
        self.leased = False
        """The API has given out a leased batch: a failed ``GET /batch`` loses nothing there, and is tried again."""
        self.features: frozenset[str] = frozenset()
        """Beyond upstream's, known after a registration: ``idempotency``, ``leases``, …"""
        self._batch_headers = {"Accept": f"{MEDIA_TYPE}, application/json"}
        if lease_seconds is not None:
            self._batch_headers["X-Atropos-Lease"] = f"{lease_seconds:g}"
        self._base = api_url.rstrip("/")
        proxied = not is_loopback(reachable(host))  # no proxy stands between this machine and itself
        sent = _check_headers(token, headers, api_url)
        trust = _check_trust(verify, needed=proxied or not api_url.lower().startswith("http:"))
        limits = httpx.Limits(max_keepalive_connections=0)
        try:
            self._http = httpx.Client(headers=sent, verify=trust, trust_env=proxied, limits=limits, transport=transport)
        except (ImportError, ValueError) as error:  # of a SOCKS proxy, or one of a kind that httpx does not know
            raise ConfigError(f"the proxy that ALL_PROXY or HTTP(S)_PROXY names cannot be used: {error}") from error

    def __enter__(self) -> AtroposClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- what the API says about itself ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ``AtroposAPIError`` when no Atropos trajectory API answers at this URL."""
        self.status()
        self.info()

    def status(self) -> ApiStatus:
        return ApiStatus(*self._integers(self._call("GET", "/status"), "current_step", "queue_size"))

    def info(self) -> ApiInfo:
        return ApiInfo(*self._integers(self._call("GET", "/info"), "batch_size", "max_token_len"))

    # --- registration ------------------------------------------------------------------------------------------------

    def register(self, registration: TrainerRegistration) -> str:
        """Register the trainer; returns the uuid the API gives it. Upstream ignores every field of a second
        registration, and lets environments register only after a ``GET /batch``."""
        call = self._call("POST", "/register", registration)
        fields = self._ask(call, repeatable=False)
        if fields.get("uuid") is None:
            raise call.not_atropos("no uuid")
        self.features = frozenset(map(str, fields.get("features") or ()))
        return str(fields["uuid"])

    def register_env(self, registration: EnvRegistration) -> int | None:
        """Register an environment. Returns its ``env_id``; None until a trainer has registered and asked for a batch
        (try again in a second)."""
        call = self._call("POST", "/register-env", registration)
        fields = self._ask(call, repeatable=False)
        self.features = frozenset(map(str, fields.get("features") or ()))
        if fields.get("status") == "success":
            return call.integers(fields, "env_id")[0]
        if not str(fields.get("status", "")).startswith("wait"):
            raise call.not_atropos(f"the status {fields.get('status')!r}")
        return None

    def env_status(self, env_id: int) -> ApiStatus:
        """What the API tells an environment: its queue in groups of that environment's size. The API hears of it."""
        call = self._call("GET", "/status-env", EnvIdentifier(env_id))
        return ApiStatus(*self._integers(call, "current_step", "queue_size", "self_queue_size"))

    def reset_data(self) -> None:
        """Destructive: the API forgets registrations, environments, queue and batches."""
        self._send(self._call("GET", "/reset_data"), repeatable=False)

    # --- data --------------------------------------------------------------------------------------------------------

    def post_scored_data_list(self, groups: Sequence[bytes], idempotency_key: str | None = None) -> None:
        """Post groups (``encode_group`` makes their JSON) in one request; all are refused when one is malformed (HTTP
        422, the body says which field). A trainer must have registered before: upstream breaks for good when data comes
        first. ``idempotency_key`` lets a failed post be repeated, at a server that recognises it (upstream takes the
        groups twice). Groups of another size than their environment's are kept by upstream until others fill them
        up."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        call = self._call("POST", "/scored_data_list", b"[" + b",".join(groups) + b"]", headers)
        fields = self._ask(call, repeatable=idempotency_key is not None)
        if (taken := fields.get("groups_processed", len(groups))) != len(groups):
            raise AtroposProtocolError(f"{call.name}: the API took {taken} of {len(groups)} groups", self.api_url)

    def poll_batch(self) -> FetchedBatch | None:
        """One ``GET /batch``; None when there is no batch yet. Destructive: what it returns exists nowhere else.
        ``timeout`` bounds connecting (tries included), then each silence of the API; a batch that keeps arriving has
        ten times as much. Raises ``AtroposAPIError``, which says, when the request was sent, that the batch may be
        lost."""
        return self._fetch(self.timeout)

    def get_batch(
        self, max_wait_time: float | None = None, should_stop: Callable[[], None] | None = None
    ) -> FetchedBatch:
        """Poll ``GET /batch`` until there is a batch. Destructive, see ``poll_batch``.

        An API with the feature ``wait`` answers when there is a batch, or after ``_WAIT_SECONDS``; elsewhere
        ``retry_interval`` is between polls. No poll starts after ``max_wait_time``; one that was sent before is given
        its time, since a batch may be in it. What ``should_stop``, called between polls, raises (a service has died)
        ends the wait.

        Raises:
            AtroposTimeoutError: no batch in ``max_wait_time`` seconds; says what the API's queue holds.
            AtroposAPIError: as ``poll_batch``."""
        limit = self.max_wait_time if max_wait_time is None else max_wait_time
        started = time.monotonic()
        for attempt in count():
            asked = time.monotonic()
            left = max(limit - (asked - started), 0.0)
            wait = min(_WAIT_SECONDS, self.timeout / 2, left) if "wait" in self.features else 0.0
            found = self._fetch(min(self.timeout, max(left, _LAST_CONNECT_SECONDS)), should_stop, wait)
            if found is not None:
                return found
            waited = time.monotonic() - started
            if waited >= limit:
                raise AtroposTimeoutError(self._why_no_batch(waited, attempt + 1), self.api_url)
            interval = max(retry_interval(attempt, self.retry_attempts, self.retry_delay), _MIN_POLL_SECONDS)
            has_waited = 0.0 < wait <= time.monotonic() - asked
            _pause(0.0 if has_waited else min(interval, limit - waited), should_stop)
        raise AssertionError

    def ack(self, lease_id: str | None) -> str:
        """Tell the API that this trainer keeps a leased batch. Returns ``acked``, ``already`` (acked before) or
        ``late`` (the lease had ended, and nobody else had got the batch); ``none`` without a lease. Raises
        ``AtroposHTTPStatusError``: 409, somebody else has the batch by now; 404, the API knows no such lease."""
        if lease_id is None:
            return "none"
        return str(self._ask(self._call("POST", "/batch/ack", {"lease_id": lease_id})).get("ack", "acked"))

    def renew(self, lease_id: str, seconds: float, should_stop: Callable[[], None] | None = None) -> None:
        """The lease ends ``seconds`` from now. Raises as ``ack``, 409 for a lease that has ended."""
        call = self._call("POST", "/batch/renew", {"lease_id": lease_id, "seconds": seconds})
        self._ask(call, should_stop=should_stop)

    def release(self, lease_id: str) -> None:
        """Give a leased batch back untrained: it is the next to be handed out. Raises as ``renew``."""
        self._ask(self._call("POST", "/batch/release", {"lease_id": lease_id}), repeatable=False)

    # --- how ---------------------------------------------------------------------------------------------------------

    def _call(self, method: str, endpoint: str, content: Any = None, headers: Mapping[str, str] | None = None) -> _Call:
        if content is not None and not isinstance(content, bytes):
            content = msgspec.json.encode(content)
        sent = {**(headers or {}), **({} if content is None else {"content-type": "application/json"})}
        return _Call(method, f"{self._base}{endpoint}", endpoint, self.api_url, self.timeout, content, sent)

    def _integers(self, call: _Call, *names: str) -> list[int]:
        return call.integers(self._ask(call), *names)

    def _ask(
        self, call: _Call, *, repeatable: bool = True, should_stop: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        return call.answered_object(self._send(call, repeatable=repeatable, should_stop=should_stop)[0])

    def _send(
        self,
        call: _Call,
        *,
        repeatable: bool = True,
        seconds: float | None = None,
        should_stop: Callable[[], None] | None = None,
    ) -> tuple[bytes, httpx.Headers]:
        """Body and headers of the answer to ``call``, tried again as the module says. Raises ``AtroposAPIError``, the
        failure of the last try, and what ``should_stop`` raises, called between tries. No try begins after ``seconds``
        (None: ``timeout``). A ``repeatable`` call spends at most a third of them on one try, so that a lost packet does
        not cost it all; any other is tried again only while nothing was sent."""
        seconds = self.timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        longest = seconds / min(_TRIES_PER_TIMEOUT, self.retry_attempts) if repeatable else seconds
        for attempt in count(1):
            try:
                return call.exchange(self._http, max(1e-3, min(longest, deadline - time.monotonic())))
            except _ExchangeError as failure:
                wait = retry_interval(attempt - 1, self.retry_attempts, self.retry_delay)
                wait += random.uniform(0.0, _JITTER * self.retry_delay)
                is_over = attempt >= self.retry_attempts or time.monotonic() + wait >= deadline
                if is_over or not failure.transient or (failure.sent and not repeatable):
                    raise failure.error from failure.__cause__
                level = logging.INFO if attempt == 1 else logging.WARNING
                logger.log(level, "%s: try %d failed (%s); again in %.2f s", call.name, attempt, failure, wait)
            _pause(wait, should_stop)
        raise AssertionError

    def _fetch(
        self, seconds: float, should_stop: Callable[[], None] | None = None, wait: float = 0.0
    ) -> FetchedBatch | None:
        # Less would be sent as 0, which the API refuses.
        waiting = {"X-Atropos-Wait": f"{wait:.3f}"} if wait >= 0.001 else {}
        call = self._call("GET", "/batch", headers={**self._batch_headers, **waiting})
        body, headers = self._send(call, repeatable=self.leased, seconds=seconds, should_stop=should_stop)
        lease_id = None if self.lease_seconds is None else headers.get("X-Atropos-Lease-Id")
        self.leased = self.leased or lease_id is not None
        if not call.holds_batch(body):
            return None
        earlier = headers.get("X-Atropos-Earlier-Lease-Ids", "") if lease_id is not None else ""
        return FetchedBatch(body, lease_id, tuple(filter(None, earlier.split(","))))

    def _why_no_batch(self, waited: float, attempts: int) -> str:
        try:
            call = self._call("GET", "/status")
            fields = call.answered_object(call.exchange(self._http, min(self.timeout, _LAST_STATUS_SECONDS))[0])
            state = f"it is at step {fields.get('current_step')} with {fields.get('queue_size')} groups in its queue"
        except (_ExchangeError, AtroposAPIError):
            state = "its /status does not answer either"
        return (
            f"no batch from Atropos API at {self.api_url} in {waited:.1f} s ({attempts} tries); {state}. "
            "Is an environment running, and pointed at this API and at the gateway? "
            "Do the groups' sizes add up to the batch size?"
        )


def retry_interval(attempt: int, attempts: int, delay: float) -> float:
    """Seconds to wait after try ``attempt`` (from 0): ``delay * 1.5**attempt``, as far as ``attempts``."""
    return float(delay * 1.5 ** min(attempt, attempts - 1))


def _pause(seconds: float, should_stop: Callable[[], None] | None) -> None:
    """Sleep, calling ``should_stop`` at once and every quarter of a second, so that what it raises is raised soon."""
    end = time.monotonic() + seconds
    while True:
        if should_stop is not None:
            should_stop()
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _SLICE_SECONDS) if should_stop is not None else left)


def make_client(config: RunConfig, api_url: str) -> AtroposClient:
    """The client that a run's settings ask for, for the API at ``api_url``."""
    atropos = config.atropos
    return AtroposClient(
        api_url,
        timeout=atropos.timeout,
        token=atropos.token,
        headers=atropos.headers,
        verify=atropos.ca_file or True,
        retry_attempts=config.batch_retry_attempts,
        retry_delay=config.batch_retry_delay,
        max_wait_time=config.batch_max_wait_time,
        lease_seconds=atropos.lease_seconds,
    )


def register_trainer(
    client: AtroposClient,
    config: RunConfig,
    batch_size: int,
    *,
    starting_step: int,
    checkpoint_dir: Path,
    first_poll: Callable[[], None],
) -> None:
    """Register at the API with real values, start it (``first_poll``: one GET /batch), and check that it took them:
    ``AtroposProtocolError`` where it keeps those of an earlier registration."""
    client.check()
    if config.atropos.reset:
        client.reset_data()
    max_token_len = config.max_token_len + 1  # exclusive on the wire, inclusive in a run's settings
    client.register(
        TrainerRegistration(
            wandb_group=config.trainer.experiment_name,
            wandb_project=config.trainer.project_name,
            batch_size=batch_size,
            max_token_len=max_token_len,
            checkpoint_dir=str(checkpoint_dir),
            save_checkpoint_interval=config.save_freq,
            starting_step=starting_step,
            num_steps=config.steps,
        )
    )
    first_poll()
    info = client.info()
    if (info.batch_size, info.max_token_len) != (batch_size, max_token_len):
        raise AtroposProtocolError(
            f"the API keeps an earlier registration (batch_size {info.batch_size}, max_token_len "
            f"{info.max_token_len}) and ignores ours (batch_size {batch_size}, max_token_len {max_token_len}); "
            "restart it, or set atropos.reset=true to clear it",
            client.api_url,
        )


def _check_headers(token: str | None, headers: Mapping[str, str] | None, api_url: str) -> dict[str, str]:
    """The headers of every request. Raises ``ConfigError``, never showing a value: it may be a secret."""
    found = dict(headers or {})
    for name, value in found.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise ConfigError(f"{name!r} or its value cannot be an HTTP header", "atropos.headers")
    if token is None:
        return found
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError("a bearer token is visible ASCII characters without spaces or line ends", "atropos.token")
    if any(name.lower() == "authorization" for name in found) or "@" in urlsplit(api_url).netloc:
        raise ConfigError("there is another authorization in atropos.headers or atropos.api_url", "atropos.token")
    return {**found, "Authorization": f"Bearer {token}"}


def _check_trust(verify: bool | str, *, needed: bool) -> bool | ssl.SSLContext:
    """The ``verify`` of httpx. Not ``needed`` (plain http): False, because loading the system's certificates takes 0.2
    s. Raises ``ConfigError`` for a certificate file that cannot be read."""
    if isinstance(verify, bool):
        return verify and needed
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{verify!r} holds no certificates that can be read: {error}", "atropos.ca_file") from None


class _ExchangeError(Exception):
    """A try failed. ``error`` is what the user gets in the end."""

    def __init__(self, error: AtroposAPIError, *, sent: bool, transient: bool) -> None:
        super().__init__(error.reason)
        self.error = error
        self.sent = sent  # bytes of the request may have reached the API
        self.transient = transient  # the same request may succeed later


@dataclass(frozen=True, slots=True)
class _Call:
    """One request: bounded in time, its failures translated into ``errors``."""

    method: str
    url: str
    # For messages: the path without the prefix of the API's URL, and that URL as the user configured it.
    endpoint: str
    base_url: str
    timeout: float  # seconds for the whole call, all tries together
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

    def exchange(self, client: httpx.Client, seconds: float) -> tuple[bytes, httpx.Headers]:
        """Send the request once. Returns the decompressed body of a 2xx answer and its headers. Raises
        ``_ExchangeError``, whatever failed; also for another answer. ``seconds`` bounds connecting, each silence of the
        server, and the answer as a whole. For a batch each silence has ``timeout``, and the whole transfer ten times as
        much. Not bounded: the look-up of a host name, which has the time-out of the system's resolver, and a server
        that never ends its headers but sends some now and then."""
        timeout = httpx.Timeout(self.timeout if self.is_batch else seconds, connect=seconds, pool=seconds)
        end = time.monotonic() + seconds
        body = bytearray()
        is_answering = False
        sent: dict[str, Any] = {"content": self.content, "headers": dict(self.headers)}
        try:
            with client.stream(self.method, self.url, **sent, timeout=timeout) as response:
                is_answering = True
                if self.is_batch:
                    end = time.monotonic() + _TRANSFER_FACTOR * self.timeout
                for chunk in response.iter_bytes():
                    body += chunk
                    if not self.is_batch and len(body) > _SMALL_ANSWER_BYTES:
                        raise self._no_api(f"more than {_SMALL_ANSWER_BYTES} bytes")
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout("the answer goes on and on")
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise self._translated(error, seconds, is_answering=is_answering) from error
        if not response.is_success:
            transient = response.status_code == 429 or response.status_code >= 500
            raise _ExchangeError(self._status_error(response, bytes(body)), sent=True, transient=transient)
        return bytes(body), response.headers

    def _translated(self, error: Exception, seconds: float, *, is_answering: bool) -> _ExchangeError:
        sent = not isinstance(error, _NOTHING_SENT)
        kind: type[AtroposAPIError] = AtroposConnectionError
        transient = True
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            kind = AtroposTimeoutError
            if not sent:
                limit = seconds if self.is_batch else self.timeout
                reason = f"Cannot connect to {self.api} - no answer within {limit:.3g} s"
            elif self.is_batch and is_answering:
                reason = f"{self.api} - {self.name} stopped arriving for {self.timeout:g} s{self.loss}"
            else:
                reason = f"{self.api} - no answer to {self.name} within {self.timeout:g} s{self.loss}"
        elif not sent:
            why, transient = self._why_no_connection(error)
            reason = f"Cannot connect to {self.api} - {why}"
        elif isinstance(error, httpx.DecodingError):
            return self._no_api(f"a body that cannot be decompressed: {error}")
        elif isinstance(error, httpx.RemoteProtocolError) and not is_answering and "disconnected" not in str(error):
            return self._no_api(f"something that is not HTTP ({error})")
        else:
            where = f"{'while reading the' if is_answering else 'before an'} answer to {self.name}"
            how = "closed" if isinstance(error, httpx.RemoteProtocolError) else "reset"
            reason = f"{self.api} - connection {how} {where}{self.loss}"
        return _ExchangeError(kind(reason, self.base_url), sent=sent, transient=transient)

    def _why_no_connection(self, error: Exception) -> tuple[str, bool]:
        """The reason, and whether the same request may succeed later."""
        host = httpx.URL(self.url).host
        cause: BaseException | None = error
        while cause is not None:
            match cause:
                case ssl.SSLCertVerificationError(verify_message=said):
                    why = f"TLS handshake failed: certificate of {host!r} not accepted ({said}); "
                    return f"{why}set atropos.ca_file if the API has a certificate of its own", False
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

    def _status_error(self, response: httpx.Response, body: bytes) -> AtroposHTTPStatusError:
        status_code = response.status_code
        text = printable(body[:_SHOWN].decode("utf-8", "replace").strip())
        reason = f"{self.api} answered {self.name} with HTTP {status_code}"
        if status_code in (401, 403):
            reason += " - check atropos.token"
        elif status_code in (404, 405):
            reason += " - is the path prefix right?"
        elif 300 <= status_code < 400:
            location = printable(response.headers.get("location", "?"))
            reason += f", a redirect to {location} - set atropos.api_url to the final address"
        else:
            reason += f": {text or 'empty answer'}"
            if self.is_batch and status_code >= 500:
                reason += " (the batch may be lost: the API takes it from its queue first, then fails to encode NaN)"
        return AtroposHTTPStatusError(reason, self.base_url, status_code, text)

    def _no_api(self, what: str) -> _ExchangeError:
        return _ExchangeError(self.not_atropos(what), sent=True, transient=False)

    def not_atropos(self, what: str) -> AtroposProtocolError:
        """``what``: it gave this."""
        who = f"The server at {self.base_url} answers, but is not an Atropos trajectory API"
        return AtroposProtocolError(f"{who}: {self.name} gave {what}", self.base_url)

    def answered_object(self, body: bytes) -> dict[str, Any]:
        """The answer's JSON object. Raises ``AtroposProtocolError`` for anything else, and for a status of failure."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise self.not_atropos(f"{body[:120]!r}, which is not JSON") from None
        if not isinstance(fields, dict):
            raise self.not_atropos(f"{body[:120]!r}, which is not a JSON object")
        if fields.get("status") in ("error", "failure"):
            why = fields.get("message") or fields.get("error") or fields.get("detail") or "no explanation"
            said = f"with status {fields['status']!r}: {printable(str(why)[:_SHOWN])}"
            raise AtroposProtocolError(f"{self.api} answered {self.name} {said}", self.base_url)
        return fields

    def integers(self, fields: Mapping[str, Any], *names: str) -> list[int]:
        """The values of ``names``. Raises ``AtroposProtocolError`` when one of them is no integer."""
        for name in names:
            if not isinstance(fields.get(name), int) or isinstance(fields[name], bool):
                raise self.not_atropos(f"no integer {name!r} but {str(dict(fields))[:120]}")
        return [fields[name] for name in names]

    def holds_batch(self, body: bytes) -> bool:
        """True when the answer to ``GET /batch`` is a batch; False: there is none yet. Raises ``AtroposProtocolError``
        where it is neither, or is cut off."""
        if body.startswith(MAGIC):  # complete: its length was announced, or it was sent in chunks with an end
            return True
        if not body[:64].lstrip().startswith(b"{"):
            raise self.not_atropos(f"{body[:120]!r}, which is not a JSON object")
        if not body[-64:].rstrip().endswith(b"}"):
            reason = f"{self.api} - the answer to {self.name} is cut off after {len(body)} bytes{self.loss}"
            raise AtroposProtocolError(reason, self.base_url)
        if len(body) > _BODY_WITHOUT_BATCH:
            return True
        fields = self.answered_object(body)
        if "batch" not in fields:
            raise self.not_atropos(f"{body[:120]!r}, which has no 'batch'")
        return bool(fields["batch"])
