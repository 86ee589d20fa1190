"""``AtroposClient``: the trajectory API of atroposlib 0.4.0 (``atroposlib/api/server.py``) over HTTP.

``GET /batch`` takes a batch from the queue and then sends it, ``GET /reset_data`` forgets everything: what these lose
cannot be had again. So these two, and a POST of data without an idempotency key or of a registration, are tried again
only while nothing of the request can have reached the API. All others are, and ``GET /batch`` of an API with leases,
after refused or broken connections, time-outs, HTTP 429 and 5xx.
"""

from __future__ import annotations

import logging
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposAPIError, AtroposProtocolError, AtroposTimeoutError, ConfigError
from atropos_verl.http_thread import is_loopback, reachable
from atropos_verl.protocol.exchange import (
    Call,
    ExchangeError,
    answered_object,
    exchange,
    holds_batch,
    integers,
    not_atropos,
    pause,
    retry_interval,
)
from atropos_verl.protocol.messages import EnvIdentifier, EnvRegistration, TrainerRegistration
from atropos_verl.protocol.wire import MEDIA_TYPE

logger = logging.getLogger(__name__)

_JITTER = 0.1
_TRIES_PER_TIMEOUT = 3
_MIN_POLL_SECONDS = 0.01
_WAIT_SECONDS = 0.5
"""What one ``GET /batch`` may wait at the API: so soon a signal, or the end of a process of the run, is noticed."""
_LAST_CONNECT_SECONDS = 1.0
_LAST_STATUS_SECONDS = 5.0
_LEASE_ID = "X-Atropos-Lease-Id"
_EARLIER_LEASE_IDS = "X-Atropos-Earlier-Lease-Ids"


class ApiStatus(NamedTuple):
    """Answer of ``/status``."""

    current_step: int
    """Batches the API has formed, plus the ``starting_step`` of the registration."""
    queue_size: int
    """Groups that are in no batch yet."""
    self_queue_size: int = 0
    """Those of the environment that asked (``/status-env``)."""


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
    """A blocking client; one may be shared by several threads. Use it in a ``with`` block, or ``close`` it.

    Connections are not kept alive: of a request written into the moment in which the server closes an idle one nobody
    can tell whether it was carried out. For ``GET /batch`` that is a batch.
    """

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
            transport: replaces the network, for tests.
        """
        host = _check_url(api_url)
        self.api_url = _without_password(api_url)
        """As configured, a password left out."""
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
            raise not_atropos(call, "no uuid")
        self.features = frozenset(map(str, fields.get("features") or ()))
        return str(fields["uuid"])

    def register_env(self, registration: EnvRegistration) -> int | None:
        """Register an environment. Returns its ``env_id``; None until a trainer has registered and asked for a batch
        (try again in a second)."""
        call = self._call("POST", "/register-env", registration)
        fields = self._ask(call, repeatable=False)
        self.features = frozenset(map(str, fields.get("features") or ()))
        if fields.get("status") == "success":
            return integers(call, fields, "env_id")[0]
        if not str(fields.get("status", "")).startswith("wait"):
            raise not_atropos(call, f"the status {fields.get('status')!r}")
        return None

    def env_status(self, env_id: int) -> ApiStatus:
        """What the API tells an environment: its queue in groups of that environment's size. The API hears of it."""
        call = self._call("GET", "/status-env", EnvIdentifier(env_id))
        return ApiStatus(*self._integers(call, "current_step", "queue_size", "self_queue_size"))

    def reset_data(self) -> None:
        """Destructive: the API forgets registrations, environments, queue and batches."""
        self._send(self._call("GET", "/reset_data"), repeatable=False)

    # --- data --------------------------------------------------------------------------------------------------------

    def post_scored_data_list(self, groups: Sequence[bytes], idempotency_key: str | None = None) -> int:
        """Post groups (``encode_group`` makes their JSON) in one request; all are refused when one is malformed (HTTP
        422, the body says which field).

        A trainer must have registered before: upstream breaks for good when data comes first. ``idempotency_key`` lets
        a failed post be repeated, at a server that recognises it (upstream takes the groups twice). Returns how many
        groups have not the size of their environment: upstream keeps them until others fill them up.
        """
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        call = self._call("POST", "/scored_data_list", b"[" + b",".join(groups) + b"]", headers)
        fields = self._ask(call, repeatable=idempotency_key is not None)
        if (taken := fields.get("groups_processed", len(groups))) != len(groups):
            raise AtroposProtocolError(f"{call.name}: the API took {taken} of {len(groups)} groups", self.api_url)
        return int(fields.get("buffered", 0))

    def poll_batch(self) -> FetchedBatch | None:
        """One ``GET /batch``; None when there is no batch yet. Destructive: what it returns exists nowhere else.

        ``timeout`` bounds connecting (tries included), then each silence of the API; a batch that keeps arriving has
        ten times as much. Raises ``AtroposAPIError``, which says, when the request was sent, that the batch may be
        lost.
        """
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
            AtroposAPIError: as ``poll_batch``.
        """
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
            pause(0.0 if has_waited else min(interval, limit - waited), should_stop)
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

    def _call(
        self,
        method: str,
        endpoint: str,
        content: bytes | Mapping[str, Any] | msgspec.Struct | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Call:
        if content is not None and not isinstance(content, bytes):
            content = msgspec.json.encode(content)
        sent = {**(headers or {}), **({} if content is None else {"content-type": "application/json"})}
        return Call(method, f"{self._base}{endpoint}", endpoint, self.api_url, self.timeout, content, sent)

    def _integers(self, call: Call, *names: str) -> list[int]:
        return integers(call, self._ask(call), *names)

    def _ask(
        self, call: Call, *, repeatable: bool = True, should_stop: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        return answered_object(call, self._send(call, repeatable=repeatable, should_stop=should_stop)[0])

    def _send(
        self,
        call: Call,
        *,
        repeatable: bool = True,
        seconds: float | None = None,
        should_stop: Callable[[], None] | None = None,
    ) -> tuple[bytes, httpx.Headers]:
        """Body and headers of the answer to ``call``, tried again as the module says. Raises ``AtroposAPIError``, the
        failure of the last try, and what ``should_stop`` raises, called between tries.

        No try begins after ``seconds`` (None: ``timeout``). A ``repeatable`` call spends at most a third of them on one
        try, so that a lost packet does not cost it all; any other is tried again only while nothing was sent.
        """
        seconds = self.timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        longest = seconds / min(_TRIES_PER_TIMEOUT, self.retry_attempts) if repeatable else seconds
        for attempt in count(1):
            try:
                return exchange(self._http, call, max(1e-3, min(longest, deadline - time.monotonic())))
            except ExchangeError as failure:
                wait = retry_interval(attempt - 1, self.retry_attempts, self.retry_delay)
                wait += random.uniform(0.0, _JITTER * self.retry_delay)
                is_over = attempt >= self.retry_attempts or time.monotonic() + wait >= deadline
                if is_over or not failure.transient or (failure.sent and not repeatable):
                    raise failure.error from failure.__cause__
                level = logging.INFO if attempt == 1 else logging.WARNING
                logger.log(level, "%s: try %d failed (%s); again in %.2f s", call.name, attempt, failure, wait)
            pause(wait, should_stop)
        raise AssertionError

    def _fetch(
        self, seconds: float, should_stop: Callable[[], None] | None = None, wait: float = 0.0
    ) -> FetchedBatch | None:
        # Less would be sent as 0, which the API refuses.
        waiting = {"X-Atropos-Wait": f"{wait:.3f}"} if wait >= 0.001 else {}
        call = self._call("GET", "/batch", headers={**self._batch_headers, **waiting})
        body, headers = self._send(call, repeatable=self.leased, seconds=seconds, should_stop=should_stop)
        lease_id = None if self.lease_seconds is None else headers.get(_LEASE_ID)
        self.leased = self.leased or lease_id is not None
        if not holds_batch(call, body):
            return None
        earlier = headers.get(_EARLIER_LEASE_IDS, "") if lease_id is not None else ""
        return FetchedBatch(body, lease_id, tuple(filter(None, earlier.split(","))))

    def _why_no_batch(self, waited: float, attempts: int) -> str:
        try:
            call = self._call("GET", "/status")
            fields = answered_object(call, exchange(self._http, call, min(self.timeout, _LAST_STATUS_SECONDS))[0])
            state = f"it is at step {fields.get('current_step')} with {fields.get('queue_size')} groups in its queue"
        except (ExchangeError, AtroposAPIError):
            state = "its /status does not answer either"
        return (
            f"no batch from Atropos API at {self.api_url} in {waited:.1f} s ({attempts} tries); {state}. "
            "Is an environment running, and pointed at this API and at the gateway? "
            "Do the groups' sizes add up to the batch size?"
        )


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


def _check_url(api_url: str) -> str:
    """The URL's host. Raises ``ConfigError`` for what is not the address of an API."""
    key = "atropos.api_url"
    try:
        parts = urlsplit(api_url)
        host = parts.hostname or ""
        httpx.URL(api_url)
        valid = parts.scheme in ("http", "https") and host != "" and parts.port != 0 and not re.search(r"\s", api_url)
    except (ValueError, TypeError, AttributeError, httpx.InvalidURL) as error:
        # The error may quote a piece of the password.
        advice = "check its port, and write /, ?, # and @ of a password as %2F, %3F, %23 and %40"
        why = advice if "@" in str(api_url) else error
        raise ConfigError(f"{_without_password(str(api_url))!r} is not a URL: {why}", key) from None
    if not valid:
        raise ConfigError(f"{_without_password(api_url)!r} is not an http:// or https:// URL with a host", key)
    if parts.query or parts.fragment:
        raise ConfigError(f"{_without_password(api_url)!r} must not hold a query or a fragment", key)
    return host


def _without_password(api_url: str) -> str:
    """The URL as it may be shown: user and password left out, also of one that holds a ``/`` or ``@`` of its own."""
    return re.sub(r"(?s)//.*@", "//***@", api_url)


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
