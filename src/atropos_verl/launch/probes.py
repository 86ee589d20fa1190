"""A look at a running system from outside: ports, API, gateway, steps, logs; and why no batch comes."""

import logging
import re
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from atropos_verl.config.schema import RunConfig
from atropos_verl.training.step import StepTail

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 2.0
_GENERATION_SECONDS = 10.0
_INTERVAL = 0.5
_RATED = 21
"""Looks over which rates are taken, ten seconds: one step of a slow engine takes longer than one interval."""
_PREFIX = "atropos_verl_gateway_"
_KEPT_STEPS = 8
_KEPT_REWARDS = 400
_SHOWN = 3
_SHOWN_LENGTH = 300
_KEY_LENGTH = 120
_ERROR = re.compile(r"\b(ERROR|CRITICAL|WARNING)\b|\bskipping\b|^(\w+\.)*\w*(Error|Exception)\b", re.IGNORECASE)
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_FAILURE = re.compile(r"error|exception|fail", re.IGNORECASE)
_SILENT = "does not answer"
_FEW = 3
"""Lines of a log that say more than an accident at the start."""
_LINE_PREFIX = re.compile(r"^[\d:, .T-]*(?:\w+ - )?\[?(?:ERROR|CRITICAL|WARNING|INFO)\]?(?:[ :][a-z_][\w.]*:)?[: -]*")
_VARYING = re.compile(r"0x[0-9a-f]+|[0-9a-f-]{36}|\d+|'[^']*'|\"[^\"]*\"")
"""What may differ between two lines that say the same."""
_REFUSAL = re.compile(r"(?:WARNING|ERROR) \S+: (.*(?:\brefused\b|no such endpoint).*)")
_REFUSED_CLIENT = re.compile(r"BadRequestError|AuthenticationError|PermissionDenied|NotFoundError|ClientResponseError")
"""What a client raises whose request was refused."""
_UPSTREAM_REFUSAL = re.compile(r"Client error: (\d+), not retrying")
_CONNECTION = re.compile(
    r"APIConnectionError|Connection error|Cannot connect|Connect(ion)?Error|ProxyError|getaddrinfo", re.IGNORECASE
)
_TOO_LONG = re.compile(r"position|context|too long|longer than|max_model_len|leaves no room", re.IGNORECASE)
_DROPS = {
    "Scores are the same": (
        "drops every group, since all scores of a group are equal",
        "Is the task too hard, too easy, or scored wrongly? --env.ensure_scores_are_not_same false sends such groups",
    ),
    "Token length is too long": (
        "drops every group, since a sequence of it has --env.max_token_length tokens or more",
        "raise max_response_length or data.max_prompt_length, or have the environment ask for fewer tokens",
    ),
}
"""What atroposlib logs when it drops a group instead of sending it → what that means, what to do."""


_HELD = list[socket.socket]()


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """``port``, or any free one for 0, which no other program then gets. Raises ``OSError`` where it cannot be had."""
    host = host.strip("[]")
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        if port == 0:
            _HELD.append(probe.dup())  # bound, and not listening: our process that is told of it can listen there
        return int(probe.getsockname()[1])


@cache
def _http() -> httpx.Client:
    """For all threads: a client reads the system's certificates, for 20 ms. None is kept: its service may have died."""
    return httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def request_json(
    url: str, *, token: str | None = None, body: Mapping[str, Any] | None = None, timeout: float = _PROBE_SECONDS
) -> Any:
    """The JSON answer to a GET, or a POST of ``body``, without a proxy; text if it is none; None when it fails."""
    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        answer = _http().request("GET" if body is None else "POST", url, json=body, headers=headers, timeout=timeout)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    try:
        return answer.json()
    except ValueError:
        return answer.text


class Poller:
    """Asks API and gateway every half second from threads of its own, so that a frozen one blocks nobody. Times are
    ``time.monotonic()`` seconds of the last answer, 0.0: none yet. It ``generates`` once through a gateway that is up;
    otherwise its health is believed."""

    def __init__(self, config: RunConfig, gateway_url: str | None, *, generates: bool = True) -> None:
        self._config, self._gateway_url, self._generates = config, gateway_url, generates
        self._model_name = str(config.resolve_model_path())
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
        self.served = self.refused = 0
        """Requests of others that the gateway has answered with 200, and with an error."""
        self.tokens_per_second: float | None = None
        self.requests_per_second: float | None = None
        self._ended = threading.Event()
        self._rated: deque[tuple[float, float, float]] = deque(maxlen=_RATED)
        asks = [self.ask_api, *([self._ask_gateway] if gateway_url else [])]
        self._threads = [threading.Thread(target=self._loop, args=(ask,), daemon=True) for ask in asks]

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
        url, token = self._config.atropos.api_url, self._config.atropos.token
        status = request_json(f"{url}/status", token=token)
        if not isinstance(status, dict) or "current_step" not in status:
            self.api = None
            return False
        if isinstance(status.get("environments"), int):  # ours: the number here, one row each there
            page = request_json(f"{url}/page-data", token=token)
            page = page if isinstance(page, dict) else {}
            status = {**status, "environments": page.get("environments"), "refused": page.get("refused")}
        now = time.monotonic()
        if self.api is not None and status["current_step"] > self.api["current_step"]:
            self.batch_at = now
        self.api, self.api_at = status, now
        return True

    def _ask_gateway(self) -> None:
        url, key = self._gateway_url, self._config.gateway.api_key
        health = request_json(f"{url}/health")
        if not isinstance(health, dict):
            self.gateway = self.tokens_per_second = self.requests_per_second = None
            return
        was_paused = self.gateway is not None and self.gateway.get("paused")
        self.gateway, self.gateway_at = health, time.monotonic()
        # The step of a busy machine may begin while the API does not answer.
        if self.generated_at and health.get("paused") and not was_paused:
            self.batch_at = self.gateway_at
        text = request_json(f"{url}/metrics", token=key)
        self._count(_counters(text) if isinstance(text, str) else {})
        if not self.generated_at and not health.get("paused") and health.get("policy_version", -1) >= 0:
            if self._generates:
                body = {"model": self._model_name, "prompt": "a", "max_tokens": 1, "temperature": 1.0}
                answer = request_json(f"{url}/v1/completions", token=key, body=body, timeout=_GENERATION_SECONDS)
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


def _counters(text: str) -> Mapping[str, float]:
    """Prometheus text → values by name without our prefix, ``served_total`` and ``refused_total`` by status."""
    from prometheus_client.parser import text_string_to_metric_families

    found = defaultdict[str, float](float)
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        names, status = [sample.name.removeprefix(_PREFIX)], int(sample.labels.get("status", 0))
        if names == ["requests_total"] and (status == 200 or status >= 400) and status != 499:  # a client that left
            names.append("served_total" if status == 200 else "refused_total")
        for name in names:
            found[name] += sample.value
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


class StepWatch:
    """The steps of a run. Of a resumed one, which takes some again, only what goes beyond the last step is news."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=_KEPT_STEPS)
        self.rewards: deque[float | None] = deque(maxlen=_KEPT_REWARDS)
        self.last_at: float | None = None
        """``clock()`` when the last new line was seen; None: none yet."""
        self._tail, self._clock, self._is_first = StepTail(path), clock, path.exists()

    @property
    def step(self) -> int:
        return int(self.recent[-1]["step"]) if self.recent else 0

    def poll(self) -> list[dict[str, Any]]:
        """Steps taken since the last call (those that were there before the first call are not)."""
        before, (is_new, found) = self.step, self._tail.read()
        if is_new:
            self.recent.clear()
            self.rewards.clear()
        self.recent.extend(found)
        self.rewards.extend(line.get("reward/mean") for line in found)
        fresh = [line for line in found if not self._is_first and (not is_new or line["step"] > before)]
        self._is_first = False
        if fresh:
            self.last_at = self._clock()
        return fresh


@dataclass(frozen=True, slots=True)
class LogFacts:
    errors: Mapping[str, Counter[str]] = field(default_factory=dict)
    """Environment → how often each of its error lines came."""
    gateway: Sequence[str] = ()
    api: Sequence[str] = ()
    endings: Mapping[str, str] = field(default_factory=dict)
    """Environment → the last line of its log."""


def common_errors(text: str) -> Counter[str]:
    """How often each error line of a log came. Lines that differ in numbers and quoted text are one, the first."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line in text.splitlines():
        level = _LEVEL.search(line[:80])
        if _ERROR.search(line) and (level is None or level[1] not in ("DEBUG", "INFO")):
            shown = _LINE_PREFIX.sub("", line.strip())[:_SHOWN_LENGTH]
            found[first.setdefault(_VARYING.sub("…", shown)[:_KEY_LENGTH], shown)] += 1
    return found


def last_refusals(text: str) -> list[str]:
    """The last different refusals that a server has logged, the newest first."""
    found = [match[1][:_SHOWN_LENGTH] for match in map(_REFUSAL.search, text.splitlines()) if match]
    return list(dict.fromkeys(reversed(found)))[:_SHOWN]


def diagnose(state: Mapping[str, Any], silent: float, facts: LogFacts, *, going_on: bool = True) -> str:
    """The diagnosis after ``silent`` seconds without a batch; ``since`` of the ``state`` counts from the last one."""
    cause, remedy = _cause(state, facts)
    lines = [f"no batch for {silent:.0f} s: {cause}", f"  what to change: {remedy}"]
    lines.append("  what is known" + ("; the run goes on waiting:" if going_on else ":"))
    for service in state.get("services", []):
        pid = f", pid {service['pid']}" if service.get("pid") else ""
        detail = f": {service['detail']}" if service.get("detail") else ""
        lines.append(f"  {service['name']}: {service['state']}{pid}, {service['restarts']} restarts{detail}")
        errors = facts.errors.get(service["name"], Counter())
        lines += [f"    {count} x {line}" for line, count in errors.most_common(_SHOWN)]
        if service.get("log") and service["kind"] == "environment":
            ending = facts.endings.get(service["name"])
            lines.append(f"    its log: {service['log']}" + (f", which ends: {ending}" if ending else ""))
    api, gateway = state.get("api") or {}, state.get("gateway") or {}
    lines.append(f"  trajectory API: {_figures(api, 'current_step', 'queue_size', 'open_leases', 'refused')}")
    rows = [row for row in environments_of(api) or () if row.get("state") != "disconnected"]
    if api and not rows:
        known = environments_of(api) is not None
        lines.append(f"  environments: {'none is registered' if known else 'this API does not say who sent what'}")
    said = ("state", "heard_seconds_ago", "groups", "waiting_sequences", "refused", "min_batch_allocation")
    lines += [f"  environment {row.get('name') or row.get('env_id')}: {_figures(row, *said)}" for row in rows]
    lines += [f"    {line}" for line in facts.api]
    seen = {**gateway, **state.get("rates", {}), **state.get("since", {})} if gateway else {}
    figures = ("in_flight", "tokens_per_second", "requests_per_second", "served", "refused", "policy_version", "paused")
    lines += [f"  inference gateway: {_figures(seen, *figures)}", *(f"    {line}" for line in facts.gateway)]
    return "\n".join([*lines, f"  all logs: {state.get('run_dir')}/logs"])


def _figures(values: Mapping[str, Any], *names: str) -> str:
    known = {name: value for name in names if (value := values.get(name)) is not None}
    texts = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in known.values())
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in zip(known, texts, strict=True)) or _SILENT


def _cause(state: Mapping[str, Any], facts: LogFacts) -> tuple[str, str]:
    """The likeliest cause in one sentence, and what to change."""
    api, gateway, rates, since = (state.get(name) or {} for name in ("api", "gateway", "rates", "since"))
    environments = [service for service in state.get("services", []) if service["kind"] == "environment"]
    running = [service["name"] for service in environments if service["state"] == "running"]
    trainer = f"see {state.get('run_dir')}/logs/trainer.log, and its CPU use (kill -CONT wakes a stopped one)"
    waiting, who = api.get("queue_sequences", api.get("queue_size")) or 0, _who(running)
    if not api:
        todo = "see its log, and whether its process runs (kill -CONT wakes a stopped one)"
        return f"the trajectory API at {state.get('api_url')} does not answer: it is gone or frozen", todo
    if environments and not running:
        service = environments[0]
        texts = {"failed": "was given up", "restarting": "has just died", "starting": "has not registered at the API"}
        detail = service.get("detail") or facts.endings.get(service["name"])
        what = f"environment {service['name']} {texts.get(service['state'], 'does not run')}"
        return what + (f": {detail}" if detail else ""), "see the end of its log"
    if not gateway and state.get("gateway_url"):
        return "the trainer's gateway does not answer: the trainer is gone, busy or frozen", trainer
    if waiting >= state.get("batch_size", 1):
        todo = "do the group sizes add up to batch_size, and does every environment with a min_batch_allocation send?"
        return f"{waiting} sequences wait at the API but make no batch of {state.get('batch_size')}", todo
    if found := _no_groups(since, facts, who):
        return found
    if gateway.get("paused"):
        return "the gateway is paused: the trainer is in a step or a weight sync that does not end", trainer
    served = since.get("served")
    if rates.get("tokens_per_second"):
        had = f" after {served} answers" if served else ""
        text = f"the policy is being sampled, but {who} sends no group{had}: rollouts are long, scoring is slow, or"
        todo = "wait, or see its log. Many drop a group without a word when its answers are cut off"
        todo += " (max_response_length, --env.max_token_length), are not in their form, or have equal scores: take"
        return f"{text} it drops its groups", f"{todo} easier tasks or another model"
    if gateway.get("in_flight"):
        had = f"{who} had {served} answers and sends no group; " if served else ""
        text = "no token is generated: the inference engine hangs"
        if rates.get("tokens_per_second") is None:  # replicas on Ray count tokens when an answer ends
            text = "no answer ends: they are long, or the inference engine hangs"
        return f"{had}requests are in flight but {text}", trainer
    text = "nobody asks the gateway for completions"
    if not running:
        return text, "are the environments elsewhere running, and can they reach it?"
    todo = "is it frozen, still loading, waiting for a resource, or asking another server (its log)?"
    return f"{text}: is {who} stuck{'' if served else '; none of its requests has come'}?", todo


def _who(names: Sequence[str]) -> str:
    return f"environment {', '.join(names)}" if names and names != ["environment"] else "the environment"


def _no_groups(since: Mapping[str, Any], facts: LogFacts, who: str) -> tuple[str, str] | None:
    """The cause that is counted most often, where groups or requests were refused, dropped or failed."""
    errors, found = sum(facts.errors.values(), Counter[str]()), list[tuple[int, str, str]]()
    why_group, why = (
        re.sub(r".*\brefused( at \S+)?: ", "", next(iter(said), "")) for said in (facts.api, facts.gateway)
    )

    def count(pattern: re.Pattern[str]) -> int:
        return sum(number for line, number in errors.items() if pattern.search(line))

    refused, served = since.get("refused", 0), since.get("served", 0)
    if not refused and not served and "API key" in why:  # these are not counted as requests
        refused = count(_REFUSED_CLIENT)
    if refused_groups := max(since.get("refused_groups", 0), count(_UPSTREAM_REFUSAL)):
        text = f"the trajectory API refuses every group of {who}: {refused_groups} refused"
        todo = "correct what the environment sends: the reason names field and value"
        found.append((refused_groups, f"{text}, {why_group or '(it does not say why)'}", todo))
    if refused:
        part = f"{refused} of {refused + served} requests" if served else "every request"
        text, todo = f"the gateway refuses {part} of {who}", "correct what it asks for: the reason names the parameter"
        if _TOO_LONG.search(why):
            text = f"the prompts of {who} are too long: the gateway refuses {part}"
            todo = "raise data.max_prompt_length (and max_response_length), take a model with more positions, or "
            todo += "shorten them"
        elif "API key" in why:
            todo = "leave --openai.api_key out of the environment's arguments: the run hands its own key over"
        found.append((refused, f"{text}: {refused} refused, {why or '(see its log)'}", todo))
    others, failed = list[tuple[str, str, int]](), -refused - refused_groups
    for line, number in errors.most_common():
        names = _who([name for name, lines in facts.errors.items() if line in lines])
        if drop := next((item for words, item in _DROPS.items() if words in line), None):
            found.append((number, f"{names} {drop[0]} ({number} groups)", drop[1]))
        elif not _UPSTREAM_REFUSAL.search(line):
            others.append((names, line, number))
            failed += number
    if others and failed > 0 and (failed >= _FEW or not served):
        names, line, number = others[0]
        what = "fails in its own code" if _FAILURE.search(line) else "sends no group; its log says"
        todo = "correct the environment, or ask less of the model; its log has more"
        if _CONNECTION.search(line) and not served:
            what = "cannot reach what it asks"
            todo = "is it pointed at another address, or does a proxy stand between (HTTP_PROXY, NO_PROXY)?"
        found.append((failed, f"{names} {what}: {line} ({number} times)", todo))
    best = max(found, key=lambda item: item[0], default=(0, "", ""))
    return best[1:] if best[0] > since.get("groups", 0) else None
