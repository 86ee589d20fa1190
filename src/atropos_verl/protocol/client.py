"""``AtroposClient``: the trajectory API of atroposlib 0.4.0 (``atroposlib/api/server.py``) over HTTP.

Destructive endpoints, whose loss cannot be made good by asking again: ``GET /batch`` (takes the batch from the queue,
then sends it) and ``GET /reset_data`` (forgets everything). How each call is retried: ``api/retry.py``. How it is
bounded in time, and how failures are translated: ``api/exchange.py``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import httpx

from atropos_verl.errors import AtroposAPIError, AtroposProtocolError, AtroposTimeoutError, ConfigError
from atropos_verl.protocol.answers import answered_object, holds_batch, integers
from atropos_verl.protocol.checks import (
    at_least,
    check_headers,
    check_trust,
    check_url,
    is_this_machine,
    without_password,
)
from atropos_verl.protocol.exchange import Answer, Call, ExchangeError, exchange, not_atropos
from atropos_verl.protocol.messages import (
    ApiInfo,
    ApiStatus,
    EnvRegistration,
    EnvRegistrationResult,
    EnvStatus,
    FetchedBatch,
    PostReceipt,
    TrainerRegistration,
    WandbInfo,
)
from atropos_verl.protocol.packed import MEDIA_TYPE
from atropos_verl.protocol.retry import RetryPolicy, Rule, pause

__all__ = [
    "ApiInfo",
    "ApiStatus",
    "AtroposClient",
    "EnvRegistration",
    "EnvRegistrationResult",
    "EnvStatus",
    "FetchedBatch",
    "PostReceipt",
    "TrainerRegistration",
    "WandbInfo",
]

logger = logging.getLogger(__name__)

_LEASE_ID = "X-Atropos-Lease-Id"
_EARLIER_LEASE_IDS = "X-Atropos-Earlier-Lease-Ids"
_LAST_CONNECT_SECONDS = 1.0
_LAST_STATUS_SECONDS = 5.0
_MIN_POLL_SECONDS = 0.01
_JSON = {"content-type": "application/json"}


class AtroposClient:
    """A blocking client; one may be shared by several threads. Use it in a ``with`` block, or ``close`` it.

    Connections are not kept alive: a server closes an idle one at a moment of its choice, and a request written into
    that moment fails in a way in which nobody can tell whether it was carried out. For ``GET /batch`` that is a batch.
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
        packed: bool = True,
        transport: httpx.BaseTransport | None = None,
        trust_env: bool | None = None,
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            api_url: ``http://`` or ``https://``; a path prefix (``https://host/api``) is kept.
            timeout: seconds for one call, all its tries together. ``GET /batch``: see ``fetch_batch``.
            token: bearer token.
            headers: sent with every request.
            verify: check TLS certificates; or the path of a file with the certificates to trust.
            retry_attempts: tries before a failing call is given up; quick polls of ``get_batch``.
            retry_delay: seconds after the first try; grows by 1.5 with each.
            max_wait_time: seconds that ``get_batch`` waits for a batch.
            lease_seconds: ask for batches that come back to the API unless they are acked or renewed in so many
                seconds (an API without leases ignores it).
            packed: offer to take batches as arrays (``api/packed.py``); an API that does not know them sends JSON.
            transport: replaces the network, for tests.
            trust_env: use proxies from the environment; None: for every host but this machine.

        Raises:
            ConfigError: a value is out of range; it names the setting.
        """
        host = check_url(api_url)
        self.api_url = without_password(api_url)
        """As configured, a password left out."""
        self.timeout = at_least(timeout, "atropos.timeout", 0.0, exclusive=True)
        self.max_wait_time = at_least(max_wait_time, "batch_max_wait_time", 0.0)
        at_least(retry_attempts, "batch_retry_attempts", 1)
        self.retry = RetryPolicy(int(retry_attempts), at_least(retry_delay, "batch_retry_delay", 0.0))
        self.lease_seconds = lease_seconds
        if lease_seconds is not None:
            at_least(lease_seconds, "atropos.lease_seconds", 0.0, exclusive=True)
        self.leased = False
        """The API has given out a leased batch: a failed ``GET /batch`` loses nothing there, and is tried again."""
        self.features: frozenset[str] = frozenset()
        """What the API can do beyond upstream's, known after ``register``: ``idempotency``, ``leases``, …"""
        self._batch_headers = {"Accept": f"{MEDIA_TYPE}, application/json"} if packed else {}
        if lease_seconds is not None:
            self._batch_headers["X-Atropos-Lease"] = f"{lease_seconds:g}"
        self._base = api_url.rstrip("/")
        proxied = not is_this_machine(host) if trust_env is None else trust_env  # a proxy may be reached by TLS, too
        trust = check_trust(verify, needed=proxied or not api_url.lower().startswith("http:"))
        self._http = httpx.Client(
            headers=check_headers(token, headers, api_url),
            verify=trust,
            trust_env=proxied,
            limits=httpx.Limits(max_keepalive_connections=0),
            transport=transport,
            follow_redirects=False,
        )

    def __enter__(self) -> AtroposClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- what the API says about itself: retried freely ------------------------------------------------------------

    def check(self) -> None:
        """Verify that an Atropos trajectory API answers at this URL.

        Raises:
            AtroposAPIError: no connection, no answer in time, or an HTTP error.
            AtroposProtocolError: something else answers.
        """
        self.status()
        self.info()

    def status(self) -> ApiStatus:
        call = self._call("GET", "/status")
        fields = answered_object(call, self._send(call, Rule.FREELY))
        environments = fields.get("environments")
        step, queue_size = integers(call, fields, "current_step", "queue_size")
        return ApiStatus(step, queue_size, environments if isinstance(environments, int) else 0)

    def info(self) -> ApiInfo:
        call = self._call("GET", "/info")
        fields = answered_object(call, self._send(call, Rule.FREELY))
        return ApiInfo(*integers(call, fields, "batch_size", "max_token_len"))

    def wandb_info(self) -> WandbInfo:
        call = self._call("GET", "/wandb_info")
        fields = answered_object(call, self._send(call, Rule.FREELY))
        return WandbInfo(group=fields.get("group"), project=fields.get("project"))

    def status_env(self, env_id: int) -> EnvStatus:
        """An environment's view of the queue. Upstream answers HTTP 500 for an environment it does not know."""
        call = self._call("GET", "/status-env", _json({"env_id": env_id}))
        fields = answered_object(call, self._send(call, Rule.FREELY))
        step, queue_size = integers(call, fields, "current_step", "queue_size")
        known = {name: fields[name] for name in EnvStatus.__dataclass_fields__ if name in fields}
        return EnvStatus(**{"env_weight": 0.0, **known, "current_step": step, "queue_size": queue_size})

    # --- registration: retried only while nothing was sent -----------------------------------------------------------

    def register(self, registration: TrainerRegistration) -> str:
        """Register the trainer; returns the uuid the API gives it.

        Upstream ignores every field of a second registration: compare ``info()`` with what you sent. It lets
        environments register only after a ``GET /batch``.
        """
        call = self._call("POST", "/register", _json(asdict(registration)))
        fields = answered_object(call, self._send(call, Rule.UNSENT))
        if fields.get("uuid") is None:
            raise not_atropos(call, f"{call.name} gave no uuid")
        self.features = frozenset(map(str, fields.get("features") or ()))
        return str(fields["uuid"])

    def register_env(self, registration: EnvRegistration) -> EnvRegistrationResult:
        """Register an environment. The result is ``waiting`` until a trainer has registered and asked for a batch."""
        call = self._call("POST", "/register-env", _json(asdict(registration)))
        fields = answered_object(call, self._send(call, Rule.UNSENT))
        if fields.get("status") == "success":
            integers(call, fields, "env_id")
        elif not str(fields.get("status", "")).startswith("wait"):
            raise not_atropos(call, f"{call.name} gave the status {fields.get('status')!r}")
        known = {name: fields[name] for name in EnvRegistrationResult.__dataclass_fields__ if name in fields}
        return EnvRegistrationResult(**known)

    def disconnect_env(self, env_id: int) -> None:
        """Take an environment out of the weighting.

        Raises:
            ConfigError: ``env_id`` is negative (upstream would disconnect another environment, counted from the end).
            AtroposProtocolError: the API does not know it.
        """
        if env_id < 0:
            raise ConfigError(f"{env_id} must not be negative", "env_id")
        call = self._call("POST", "/disconnect-env", _json({"env_id": env_id}))
        answered_object(call, self._send(call, Rule.UNSENT))

    def reset_data(self) -> None:
        """Destructive: the API forgets registrations, environments, queue and batches."""
        self._send(self._call("GET", "/reset_data"), Rule.UNSENT)

    # --- data --------------------------------------------------------------------------------------------------------

    def post_scored_data(self, group_json: bytes, idempotency_key: str | None = None) -> PostReceipt:
        """Post one group (``encode_group`` makes its JSON). A trainer must have registered before: upstream breaks
        for good when data comes first.

        Args:
            idempotency_key: lets a failed post be repeated. Only for a server that recognises the key: upstream
                takes the group twice.

        Raises:
            AtroposHTTPStatusError: 422, the API refuses the group; the body says which field.
        """
        call = self._call("POST", "/scored_data", group_json, _key(idempotency_key))
        fields = answered_object(call, self._send(call, Rule.FREELY if idempotency_key else Rule.UNSENT))
        return PostReceipt(groups=1, buffered=1 if fields.get("status") == "buffered" else 0)

    def post_scored_data_list(self, groups: Sequence[bytes], idempotency_key: str | None = None) -> PostReceipt:
        """Post several groups in one request; all of them are refused when one is malformed."""
        body = b"[" + b",".join(groups) + b"]"
        call = self._call("POST", "/scored_data_list", body, _key(idempotency_key))
        fields = answered_object(call, self._send(call, Rule.FREELY if idempotency_key else Rule.UNSENT))
        taken = fields.get("groups_processed", len(groups))
        if taken != len(groups):
            raise AtroposProtocolError(f"{call.name}: the API took {taken} of {len(groups)} groups", self.api_url)
        return PostReceipt(groups=len(groups), buffered=int(fields.get("buffered", 0)))

    def fetch_batch(self) -> bytes | None:
        """One ``GET /batch``; None when there is no batch yet. Destructive: what it returns exists nowhere else.

        ``timeout`` bounds connecting (tries included), then each silence of the API; a batch that keeps arriving is
        not cut off before ten times ``timeout``, because that would lose it. Once the request may have reached the
        API it is never repeated.

        Raises:
            AtroposAPIError: says, when the request was sent, that the batch may be lost.
        """
        found = self.poll_batch()
        return None if found is None else found.body

    def poll_batch(self) -> FetchedBatch | None:
        """``fetch_batch`` with the lease."""
        started = time.monotonic()
        found = self._fetch(self.timeout, None)
        return None if found is None else self._fetched(found, 1, time.monotonic() - started)

    def get_batch(
        self, max_wait_time: float | None = None, should_stop: Callable[[], None] | None = None
    ) -> FetchedBatch:
        """Poll ``GET /batch`` until there is a batch. Destructive, see ``fetch_batch``.

        The interval after poll i (from 0) is ``retry_delay * 1.5**i`` seconds; after ``retry_attempts`` polls it stays.
        No poll starts after ``max_wait_time``; one that was sent before is given its time, since a batch may be in it.

        Args:
            max_wait_time: seconds; None: the client's.
            should_stop: called between polls; what it raises ends the wait (a service has died).

        Raises:
            AtroposTimeoutError: no batch in ``max_wait_time`` seconds; says what the API's queue holds.
            AtroposAPIError: as ``fetch_batch``.
        """
        limit = self.max_wait_time if max_wait_time is None else at_least(max_wait_time, "max_wait_time", 0.0)
        started = time.monotonic()
        attempts = 0
        while True:
            left = limit - (time.monotonic() - started)
            found = self._fetch(min(self.timeout, max(left, _LAST_CONNECT_SECONDS)), should_stop)
            attempts += 1
            waited = time.monotonic() - started
            if found is not None:
                return self._fetched(found, attempts, waited)
            if waited >= limit:
                raise AtroposTimeoutError(self._why_no_batch(waited, attempts), self.api_url)
            interval = max(self.retry.interval(attempts - 1), _MIN_POLL_SECONDS)
            pause(min(interval, limit - waited), should_stop)

    def ack(self, lease_id: str | None) -> str:
        """Tell the API that this trainer keeps a leased batch. Returns ``acked``, ``already`` (acked before) or
        ``late`` (the lease had ended, and nobody else had got the batch); ``none`` without a lease.

        Raises:
            AtroposHTTPStatusError: 409, somebody else has the batch by now; 404, the API knows no such lease.
        """
        if lease_id is None:
            return "none"
        call = self._call("POST", "/batch/ack", _json({"lease_id": lease_id}))
        return str(answered_object(call, self._send(call, Rule.FREELY)).get("ack", "acked"))

    def renew(self, lease_id: str, seconds: float, should_stop: Callable[[], None] | None = None) -> None:
        """The lease ends ``seconds`` from now. Raises as ``ack``, 409 for a lease that has ended."""
        call = self._call("POST", "/batch/renew", _json({"lease_id": lease_id, "seconds": seconds}))
        answered_object(call, self._send(call, Rule.FREELY, should_stop=should_stop))

    def release(self, lease_id: str) -> None:
        """Give a leased batch back untrained: it is the next to be handed out. Raises as ``renew``."""
        call = self._call("POST", "/batch/release", _json({"lease_id": lease_id}))
        answered_object(call, self._send(call, Rule.UNSENT))

    # --- how ---------------------------------------------------------------------------------------------------------

    def _call(
        self, method: str, endpoint: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Call:
        return Call(
            method=method,
            url=f"{self._base}{endpoint}",
            endpoint=endpoint,
            base_url=self.api_url,
            timeout=self.timeout,
            content=content,
            headers={**(headers or {}), **(_JSON if content is not None else {})},
            is_batch=endpoint == "/batch",
        )

    def _send(
        self, call: Call, rule: Rule, seconds: float | None = None, should_stop: Callable[[], None] | None = None
    ) -> Answer:
        return self.retry.call(
            lambda left: exchange(self._http, call, left),
            name=call.name,
            rule=rule,
            seconds=self.timeout if seconds is None else seconds,
            should_stop=should_stop,
        )

    def _fetch(self, seconds: float, should_stop: Callable[[], None] | None) -> Answer | None:
        call = self._call("GET", "/batch", headers=self._batch_headers)
        answer = self._send(call, Rule.FREELY if self.leased else Rule.UNSENT, seconds, should_stop)
        self.leased = self.leased or (self.lease_seconds is not None and _LEASE_ID in answer.headers)
        return answer if holds_batch(call, answer) else None

    def _fetched(self, answer: Answer, attempts: int, waited: float) -> FetchedBatch:
        if self.lease_seconds is None:
            return FetchedBatch(answer.body, attempts, waited)
        earlier = tuple(filter(None, answer.headers.get(_EARLIER_LEASE_IDS, "").split(",")))
        return FetchedBatch(answer.body, attempts, waited, answer.headers.get(_LEASE_ID), earlier)

    def _why_no_batch(self, waited: float, attempts: int) -> str:
        try:
            call = self._call("GET", "/status")
            fields = answered_object(call, exchange(self._http, call, min(self.timeout, _LAST_STATUS_SECONDS)))
            state = f"it is at step {fields.get('current_step')} with {fields.get('queue_size')} groups in its queue"
        except (ExchangeError, AtroposAPIError):
            state = "its /status does not answer either"
        return (
            f"no batch from Atropos API at {self.api_url} in {waited:.1f} s ({attempts} tries); {state}. "
            "Is an environment running, and pointed at this API and at the gateway? "
            "Do the groups' sizes add up to the batch size?"
        )


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, allow_nan=False).encode()


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
