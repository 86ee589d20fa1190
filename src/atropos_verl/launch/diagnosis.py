"""Explains a run that gets no batches: one cause, in the first line, then its facts, and what to change."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atropos_verl.launch.probes import environments_of

_SHOWN = 3
_SHOWN_LENGTH = 300
_KEY_LENGTH = 120
_ERROR = re.compile(r"\b(ERROR|CRITICAL|WARNING)\b|\bskipping\b|^(\w+\.)*\w*(Error|Exception)\b", re.IGNORECASE)
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_FAILURE = re.compile(r"error|exception|fail", re.IGNORECASE)
_FEW = 3
"""Lines of a log that say more than an accident at the start."""
_PREFIX = re.compile(r"^[\d:, .T-]*(?:\w+ - )?\[?(?:ERROR|CRITICAL|WARNING|INFO)\]?(?:[ :][a-z_][\w.]*:)?[: -]*")
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


@dataclass(frozen=True, slots=True)
class LogFacts:
    """What the logs of a run say since its last batch."""

    errors: Mapping[str, Counter[str]] = field(default_factory=dict)
    """Environment → how often each of its error lines came."""
    gateway: Sequence[str] = ()
    """The last refusals of the gateway, with their reasons."""
    api: Sequence[str] = ()
    endings: Mapping[str, str] = field(default_factory=dict)
    """Environment → the last line of its log."""

    def names(self, line: str) -> list[str]:
        """The environments whose logs have this error line."""
        return [name for name, errors in self.errors.items() if line in errors]


def common_errors(text: str) -> Counter[str]:
    """How often each error line of a log came. Lines that differ in numbers and quoted text are one, the first."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line in text.splitlines():
        level = _LEVEL.search(line[:80])
        if _ERROR.search(line) and (level is None or level[1] not in ("DEBUG", "INFO")):
            shown = _PREFIX.sub("", line.strip())[:_SHOWN_LENGTH]
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
    if api and environments_of(api) is None:
        lines.append("  environments: this API does not say who sent what")
    elif api and not rows:
        lines.append("  environments: none is registered")
    said = ("state", "heard_seconds_ago", "groups", "waiting_sequences", "refused", "min_batch_allocation")
    lines += [f"  environment {row.get('name') or row.get('env_id')}: {_figures(row, *said)}" for row in rows]
    lines += [f"    {line}" for line in facts.api]
    seen = {**gateway, **state.get("rates", {}), **state.get("since", {})} if gateway else {}
    figures = ("in_flight", "tokens_per_second", "requests_per_second", "served", "refused", "policy_version", "paused")
    lines += [f"  inference gateway: {_figures(seen, *figures)}", *(f"    {line}" for line in facts.gateway)]
    lines.append(f"  all logs: {state.get('run_dir')}/logs")
    return "\n".join(lines)


def _figures(values: Mapping[str, Any], *names: str) -> str:
    texts = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    known = (f"{name.replace('_', ' ')} {texts[name]}" for name in names if values.get(name) is not None)
    return ", ".join(known) or "does not answer"


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
    if rates.get("tokens_per_second"):
        had = f" after {since['served']} answers" if since.get("served") else ""
        text = f"the policy is being sampled, but {who} sends no group{had}: rollouts are long, scoring is slow, or"
        todo = "wait, or see its log. Many drop a group without a word when its answers are cut off"
        todo += " (max_response_length, --env.max_token_length), are not in their form, or have equal scores: take"
        return f"{text} it drops its groups", f"{todo} easier tasks or another model"
    if gateway.get("in_flight"):
        had = f"{who} had {since['served']} answers and sends no group; " if since.get("served") else ""
        text = "no token is generated: the inference engine hangs"
        if rates.get("tokens_per_second") is None:  # replicas on Ray count tokens when an answer ends
            text = "no answer ends: they are long, or the inference engine hangs"
        return f"{had}requests are in flight but {text}", trainer
    text = "nobody asks the gateway for completions"
    if not running:
        return text, "are the environments elsewhere running, and can they reach it?"
    served = "" if since.get("served") else "; none of its requests has come"
    todo = "is it frozen, still loading, waiting for a resource, or asking another server (its log)?"
    return f"{text}: is {who} stuck{served}?", todo


def _who(names: Sequence[str]) -> str:
    return f"environment {', '.join(names)}" if names and names != ["environment"] else "the environment"


def _no_groups(since: Mapping[str, Any], facts: LogFacts, who: str) -> tuple[str, str] | None:
    """The cause that is counted most often, where groups or requests were refused, dropped or failed."""
    errors, found = sum(facts.errors.values(), Counter[str]()), []
    refused, served = since.get("refused", 0), since.get("served", 0)
    if not refused and not served and "API key" in _reason(facts.gateway):  # these are not counted as requests
        refused = sum(count for line, count in errors.items() if _REFUSED_CLIENT.search(line))
    seen_in_log = sum(count for line, count in errors.items() if _UPSTREAM_REFUSAL.search(line))
    if refused_groups := max(since.get("refused_groups", 0), seen_in_log):
        why = _reason(facts.api) or "(it does not say why)"
        text = f"the trajectory API refuses every group of {who}: {refused_groups} refused, {why}"
        found.append((refused_groups, text, "correct what the environment sends: the reason names field and value"))
    if refused:
        why, part = _reason(facts.gateway), f"{refused} of {refused + served} requests" if served else "every request"
        text = f"the gateway refuses {part} of {who}: {refused} refused, {why or '(see its log)'}"
        todo = "correct what the environment asks for: the reason names the parameter"
        if _TOO_LONG.search(why):
            text = f"the prompts of {who} are too long: the gateway refuses {part}: {refused} refused, {why}"
            todo = "raise data.max_prompt_length (and max_response_length), take a model with more positions, or "
            todo += "shorten them"
        elif "API key" in why:
            todo = "leave --openai.api_key out of the environment's arguments: the run hands its own key over"
        found.append((refused, text, todo))
    others = []
    for line, count in errors.most_common():
        drop = next((item for words, item in _DROPS.items() if words in line), None)
        if drop is not None:
            found.append((count, f"{_who(facts.names(line))} {drop[0]} ({count} groups)", drop[1]))
        elif not _UPSTREAM_REFUSAL.search(line):
            others.append((count, line))
    failed = sum(count for count, _ in others) - refused - refused_groups
    if others and failed > 0 and (failed >= _FEW or not served):
        count, line = others[0]
        what = "fails in its own code" if _FAILURE.search(line) else "sends no group; its log says"
        todo = "correct the environment, or ask less of the model; its log has more"
        if _CONNECTION.search(line) and not served:
            what = "cannot reach what it asks"
            todo = "is it pointed at another address, or does a proxy stand between (HTTP_PROXY, NO_PROXY)?"
        found.append((failed, f"{_who(facts.names(line))} {what}: {line} ({count} times)", todo))
    best = max(found, key=lambda item: item[0], default=(0, "", ""))
    return best[1:] if best[0] > since.get("groups", 0) else None


def _reason(refusals: Sequence[str]) -> str:
    return re.sub(r".*\brefused( at \S+)?: ", "", refusals[0]) if refusals else ""
