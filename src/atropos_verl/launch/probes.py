"""A look at a running system from outside: ports, the API's status, the gateway's health, new lines of the metrics."""

import http.client
import json
import logging
import os
import re
import socket
import threading
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atropos_verl.config.schema import RunConfig

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 2.0
_GENERATION_SECONDS = 10.0
_INTERVAL = 0.5
_RATED = 21
"""Looks over which rates are taken, ten seconds: one step of a slow engine takes longer than one interval."""
_PREFIX = "atropos_verl_gateway_"
_KEPT_STEPS = 8
_KEPT_REWARDS = 400


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """``port``, or any free one for 0. Raises ``OSError`` when it cannot be listened on at this moment."""
    host = host.strip("[]")
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen()
        return int(probe.getsockname()[1])


def request_json(
    url: str, *, token: str | None = None, body: Mapping[str, Any] | None = None, timeout: float = _PROBE_SECONDS
) -> Any:
    """The JSON answer to a GET, or a POST of ``body``, without a proxy; text if it is none; None when it fails."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=timeout) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException):  # HTTPError (4xx, 5xx) and timeouts are OSErrors
        return None
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


class Poller:
    """Asks API and gateway every half second from threads of its own, so that a frozen one blocks nobody.

    Times are ``time.monotonic()`` seconds of the last answer, 0.0: none yet. It ``generates`` once through a gateway
    that is up; otherwise its health is believed.
    """

    def __init__(self, config: RunConfig, gateway_url: str | None, *, generates: bool = True) -> None:
        self._api_url = config.atropos.api_url
        self._api_token = config.atropos.token
        self._gateway_url = gateway_url
        self._gateway_key = config.gateway.api_key
        self._model_name = str(config.resolve_model_path())
        self._generates = generates
        self.api: Mapping[str, Any] | None = None
        """``/status``; None: does not answer now."""
        self.api_at = 0.0
        self.batch_at = 0.0
        """Time at which the API was last seen to have handed out a batch, or the gateway to pause for its step."""
        self.gateway: Mapping[str, Any] | None = None
        """``/health``; None: does not answer now."""
        self.gateway_at = 0.0
        self.generated_at = 0.0
        """Time of the first generation through the gateway that succeeded, since the trainer's last start."""
        self.served = 0
        """Requests of others that the gateway has answered with 200."""
        self.refused = 0
        """Requests that the gateway has answered with an error."""
        self.tokens_per_second: float | None = None
        self.requests_per_second: float | None = None
        self._ended = threading.Event()
        self._rated: deque[tuple[float, float, float]] = deque(maxlen=_RATED)
        asked = {"api": self.ask_api} | ({"gateway": self._ask_gateway} if gateway_url else {})
        self._threads = [
            threading.Thread(target=self._loop, args=(ask,), name=f"poll-{name}", daemon=True)
            for name, ask in asked.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the asking, with one last look at the API. The threads are daemons and hold nothing."""
        self._ended.set()
        if self.api is not None:
            self.ask_api()

    def expect_new_gateway(self) -> None:
        """The trainer is started anew: what was seen of the one before does not count."""
        self.gateway, self.gateway_at, self.generated_at = None, 0.0, 0.0
        self.served = self.refused = 0
        self._rated.clear()

    def _loop(self, ask: Callable[[], object]) -> None:
        while not self._ended.wait(_INTERVAL):
            try:
                ask()
            except Exception:  # what a strange service answers must not end the watching
                logger.exception("a look at a service of the run failed")

    def ask_api(self) -> bool:
        """Ask for the API's status now; whether it answered."""
        status = request_json(f"{self._api_url}/status", token=self._api_token)
        good = isinstance(status, dict) and "current_step" in status
        if good and isinstance(status.get("environments"), int):  # ours: the number here, one row each there
            page = request_json(f"{self._api_url}/page-data", token=self._api_token)
            page = page if isinstance(page, dict) else {}
            status = {**status, "environments": page.get("environments"), "refused": page.get("refused")}
        if good and self.api is not None and status["current_step"] > self.api["current_step"]:
            self.batch_at = time.monotonic()
        self.api = status if good else None
        if good:
            self.api_at = time.monotonic()
        return good

    def _ask_gateway(self) -> None:
        health = request_json(f"{self._gateway_url}/health")
        if not isinstance(health, dict):
            self.gateway = self.tokens_per_second = self.requests_per_second = None
            return
        was_paused = self.gateway is not None and self.gateway.get("paused")
        self.gateway, self.gateway_at = health, time.monotonic()
        # The step of a busy machine may begin while the API does not answer.
        if self.generated_at and health.get("paused") and not was_paused:
            self.batch_at = self.gateway_at
        text = request_json(f"{self._gateway_url}/metrics", token=self._gateway_key)
        self._count(_counters(text) if isinstance(text, str) else {})
        if not self.generated_at and not health.get("paused") and health.get("policy_version", -1) >= 0:
            body = {"model": self._model_name, "prompt": "a", "max_tokens": 1, "temperature": 1.0}
            url = f"{self._gateway_url}/v1/completions"
            if self._generates:
                answer = request_json(url, token=self._gateway_key, body=body, timeout=_GENERATION_SECONDS)
                if not isinstance(answer, dict) or not answer.get("choices"):
                    return
            self.generated_at = time.monotonic()

    def _count(self, counters: Mapping[str, float]) -> None:
        """Takes the gateway's counters, and the rates of tokens and requests since the last ones."""
        own = int(self._generates and self.generated_at > 0)
        self.served = max(0, int(counters.get("served_total", 0)) - own)
        self.refused = int(counters.get("refused_total", 0))
        self.tokens_per_second = self.requests_per_second = None
        if not counters:
            return
        tokens = counters.get("sampled_tokens_total", counters.get("generated_tokens_total", 0.0))
        self._rated.append((time.monotonic(), tokens, counters.get("requests_total", 0.0)))
        if len(self._rated) > 1:
            seconds, tokens, requests = (new - old for new, old in zip(self._rated[-1], self._rated[0], strict=True))
            self.requests_per_second = max(0.0, requests) / seconds
            if tokens > 0 or "sampled_tokens_total" in counters:  # others count when an answer ends, after minutes
                self.tokens_per_second = max(0.0, tokens) / seconds


def _counters(text: str) -> dict[str, float]:
    """Prometheus text → name without our prefix → value, labels summed up; ``served_total``: answers of 200,
    ``refused_total``: of errors."""
    from prometheus_client.parser import text_string_to_metric_families

    found: defaultdict[str, float] = defaultdict(float)
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        name = sample.name.removeprefix(_PREFIX)
        found[name] += sample.value
        status = int(sample.labels.get("status", 0)) if name == "requests_total" else 0
        if status == 200:
            found["served_total"] += sample.value
        elif status >= 400 and status != 499:  # 499 is a client that went away
            found["refused_total"] += sample.value
    return found


def environments_of(status: Mapping[str, Any] | None) -> list[Mapping[str, Any]] | None:
    """The API's row of each environment; None where it (upstream's) says nothing of them."""
    listed = (status or {}).get("environments")
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else None


def connected_entries(status: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The API's entries for the process called ``name`` that count as connected; restarts leave older ones behind."""
    pattern = re.compile(rf"{re.escape(name)}(_\d+)?")
    return [
        item
        for item in environments_of(status) or ()
        if pattern.fullmatch(str(item.get("name") or item.get("real_name") or item.get("desired_name")))
        and item.get("state", "alive") == "alive"
        and item.get("connected", True)
    ]


class StepTail:
    """Reads the new lines of ``metrics.jsonl`` at each ``poll``.

    A resumed run replaces the file by one without the steps that it will take again: that one is read anew, and only
    what goes beyond the last step is news.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.recent: deque[dict[str, Any]] = deque(maxlen=_KEPT_STEPS)
        self.rewards: deque[float | None] = deque(maxlen=_KEPT_REWARDS)
        self.last_at: float | None = None
        """``clock()`` when the last new line was seen; None: none yet."""
        self._clock = clock
        self._file: tuple[int, int] | None = None
        self._position = 0
        self._rest = b""
        self._is_first = path.exists()

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.recent[-1]["step"]) if self.recent else 0

    def poll(self) -> list[dict[str, Any]]:
        """Steps taken since the last call (those that were there before the first call are not)."""
        before = self.step
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                key = (status.st_dev, status.st_ino)
                if replaced := key != self._file or status.st_size < self._position:
                    self._file, self._position, self._rest = key, 0, b""
                    self.recent.clear()
                    self.rewards.clear()
                file.seek(self._position)
                content = file.read()
        except OSError:
            return []
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        found = [line for line in map(_step, lines) if line is not None]
        self.recent.extend(found)
        self.rewards.extend(line.get("reward/mean") for line in found)
        if self._is_first:
            self._is_first = False
            return []
        fresh = [line for line in found if not replaced or line["step"] > before]
        if fresh:
            self.last_at = self._clock()
        return fresh


def _step(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
