"""Explains a run that gets no batches: one cause, in the first line, then its facts, and what to change."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atropos_verl.launch.probes import environments_of

_LOG_BYTES = 1 << 20
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
    "Group structure invalid": (
        "drops every group, since it holds another number of sequences than --env.group_size",
        "set group_size to the number that the environment makes",
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
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Environment → what stands between it and the gateway, where something is seen to."""
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


def read_tail(path: Path, start: int = 0) -> str:
    """The log from byte ``start`` on, its last MB; all of it where it is shorter, and so was begun anew; "": none."""
    try:
        with path.open("rb") as log:
            size = path.stat().st_size
            log.seek(max(start if start <= size else 0, size - _LOG_BYTES))
            return log.read().decode("utf-8", "replace")
    except OSError:
        return ""


def diagnose(state: Mapping[str, Any], silent: float, facts: LogFacts, *, going_on: bool = True) -> str:
    """The diagnosis after ``silent`` seconds without a batch; ``since`` of the ``state`` counts from the last one."""
    cause, remedies = _cause(state, facts)
    lines = [f"no batch for {silent:.0f} s: {cause}"]
    lines += [f"  what to change: {remedy}" for remedy in remedies]
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
    lines += [*_api_lines(state), *(f"    {line}" for line in facts.api)]
    lines += [*_gateway_lines(state), *(f"    {line}" for line in facts.gateway)]
    lines.append(f"  all logs: {state.get('run_dir')}/logs")
    return "\n".join(lines)


def _api_lines(state: Mapping[str, Any]) -> list[str]:
    api = state.get("api")
    if not api:
        return ["  trajectory API: does not answer"]
    leased = "" if api.get("open_leases") is None else f", {api['open_leases']} leased"
    lines = [f"  trajectory API: step {api.get('current_step')}, {api.get('queue_size')} groups in the queue{leased}"]
    if refused := api.get("refused"):
        lines.append(f"    refused: {', '.join(f'{count} x {reason}' for reason, count in refused.items())}")
    listed = environments_of(api)
    if listed is None:
        return [*lines, "  environments: this API does not say who sent what"]
    listed = [item for item in listed if item.get("state") != "disconnected"]
    for item in listed:
        share = item.get("min_batch_allocation")
        least = "" if share is None else f", least share {share:.2f}"
        lines.append(
            f"  environment {item.get('name') or item.get('env_id')}: {item.get('state', 'registered')}, heard "
            f"{item.get('heard_seconds_ago', '?')} s ago, {item.get('groups', '?')} groups sent, "
            f"{item.get('waiting_sequences', '?')} sequences waiting, {item.get('refused', 0)} refused{least}"
        )
    return lines if listed else [*lines, "  environments: none is registered"]


def _gateway_lines(state: Mapping[str, Any]) -> list[str]:
    gateway, since = state.get("gateway"), state.get("since", {})
    if not gateway:
        return ["  inference gateway: does not answer"]
    rates = state.get("rates", {})
    tokens, requests = rates.get("tokens_per_second"), rates.get("requests_per_second")
    speed = "" if tokens is None else f", {tokens:.0f} tokens/s, {requests or 0.0:.1f} requests/s"
    paused = ", paused for a weight sync" if gateway.get("paused") else ""
    served = f"{since.get('served', 0)} requests served and {since.get('refused', 0)} refused since the last batch"
    return [
        f"  inference gateway: {gateway.get('in_flight', 0)} requests in flight{speed}, {served}, "
        f"policy version {gateway.get('policy_version')}{paused}"
    ]


def _cause(state: Mapping[str, Any], facts: LogFacts) -> tuple[str, list[str]]:
    """The likeliest cause in one sentence, and what to change."""
    api, gateway = state.get("api"), state.get("gateway")
    environments = [service for service in state.get("services", []) if service["kind"] == "environment"]
    logs = f"{state.get('run_dir')}/logs"
    if not api:
        todo = "see its log, and whether its process runs (kill -CONT wakes a stopped one)"
        return f"the trajectory API at {state.get('api_url')} does not answer: it is gone or frozen", [todo]
    running = [service["name"] for service in environments if service["state"] == "running"]
    if environments and not running:
        return _not_running(environments, facts)
    if not gateway and state.get("gateway_url"):
        todo = f"see {logs}/trainer.log, and its CPU use (kill -CONT wakes a stopped one)"
        return "the trainer's gateway does not answer: the trainer is gone, busy or frozen", [todo]
    waiting = api.get("queue_sequences", api.get("queue_size")) or 0
    if waiting >= state.get("batch_size", 1):
        return f"{waiting} sequences wait at the API but make no batch of {state.get('batch_size')}", [
            "do the group sizes add up to batch_size, and does every environment with a min_batch_allocation send?"
        ]
    who = _who(running)
    return _no_groups(state, facts, who) or _silence(state, facts, who, running)


def _who(names: Sequence[str]) -> str:
    return f"environment {', '.join(names)}" if names and names != ["environment"] else "the environment"


def _not_running(environments: Sequence[Mapping[str, Any]], facts: LogFacts) -> tuple[str, list[str]]:
    texts = {
        "failed": ("was given up", "the end of its log says why"),
        "restarting": ("has just died", "the end of its log says why"),
        "starting": ("is starting, and has not registered at the API yet", "is it loading something? See its log"),
    }
    service = environments[0]
    what, todo = texts.get(service["state"], (f"is {service['state']}", "see its log"))
    detail = service.get("detail") or facts.endings.get(service["name"])
    return f"environment {service['name']} {what}" + (f": {detail}" if detail else ""), [todo]


def _no_groups(state: Mapping[str, Any], facts: LogFacts, who: str) -> tuple[str, list[str]] | None:
    """The cause that is counted most often, where groups or requests were refused, dropped or failed."""
    since, errors = state.get("since", {}), sum(facts.errors.values(), Counter[str]())
    refused, found = since.get("refused", 0), []
    served = since.get("served", 0)
    if not refused and not served and "API key" in _reason(facts.gateway):  # these are not counted as requests
        refused = sum(count for line, count in errors.items() if _REFUSED_CLIENT.search(line))
    seen_in_log = sum(count for line, count in errors.items() if _UPSTREAM_REFUSAL.search(line))
    refused_groups = max(since.get("refused_groups", 0), seen_in_log)
    if refused_groups:
        why = _reason(facts.api) or "(it does not say why)"
        text = f"the trajectory API refuses every group of {who}: {refused_groups} refused, {why}"
        found.append((refused_groups, text, ["correct what the environment sends: the reason names field and value"]))
    if refused:
        found.append((refused, *_refused_by_gateway(refused, served, facts, who)))
    others = []
    for line, count in errors.most_common():
        drop = next((item for words, item in _DROPS.items() if words in line), None)
        if drop is not None:
            found.append((count, f"{_who(facts.names(line))} {drop[0]} ({count} groups)", [drop[1]]))
        elif not _UPSTREAM_REFUSAL.search(line):
            others.append((count, line))
    failed = sum(count for count, _ in others) - refused - refused_groups
    if others and failed > 0 and (failed >= _FEW or not served):
        count, line = others[0]
        who = _who(facts.names(line))
        if _CONNECTION.search(line) and not served:
            text = f"{who} cannot reach what it asks: {line} ({count} times)"
            todo = "is it pointed at another address, or does a proxy stand between (HTTP_PROXY, NO_PROXY)?"
            found.append((failed, text, [*facts.addresses.values(), todo]))
        else:
            what = "fails in its own code" if _FAILURE.search(line) else "sends no group; its log says"
            text = f"{who} {what}: {line} ({count} times)"
            found.append((failed, text, ["correct the environment, or ask less of the model; its log has more"]))
    best = max(found, key=lambda item: item[0], default=None)
    return None if best is None or best[0] <= since.get("groups", 0) else best[1:]


def _refused_by_gateway(refused: int, served: int, facts: LogFacts, who: str) -> tuple[str, list[str]]:
    why = _reason(facts.gateway)
    part = "every request" if not served else f"{refused} of {refused + served} requests"
    if _TOO_LONG.search(why):
        todo = (
            "raise data.max_prompt_length (and max_response_length), take a model with more positions, or shorten them"
        )
        return f"the prompts of {who} are too long: the gateway refuses {part}: {refused} refused, {why}", [todo]
    todo = "correct what the environment asks for: the reason names the parameter"
    if "API key" in why:
        todo = "leave --openai.api_key out of the environment's arguments: the run hands its own key over"
    return f"the gateway refuses {part} of {who}: {refused} refused, {why or '(see its log)'}", [todo]


def _silence(state: Mapping[str, Any], facts: LogFacts, who: str, running: Sequence[str]) -> tuple[str, list[str]]:
    """The cause where nothing is refused and nothing fails."""
    gateway, rates, since = state.get("gateway") or {}, state.get("rates", {}), state.get("since", {})
    todo = f"see {state.get('run_dir')}/logs/trainer.log"
    if gateway.get("paused"):
        return "the gateway is paused: the trainer is in a step or a weight sync that does not end", [todo]
    if gateway.get("in_flight") and not rates.get("tokens_per_second"):
        had = f"{who} had {since['served']} answers and sends no group; " if since.get("served") else ""
        text = "no token is generated: the inference engine hangs"
        if rates.get("tokens_per_second") is None:  # replicas on Ray count tokens when an answer ends
            text = "no answer ends: they are long, or the inference engine hangs"
        return f"{had}requests are in flight but {text}", [todo]
    if rates.get("tokens_per_second"):
        return f"the policy is being sampled, but {who} sends no group: rollouts are long, or scoring is slow", [
            "wait, ask for fewer tokens, or see the environment's log"
        ]
    if hindered := [facts.addresses[name] for name in running if name in facts.addresses]:
        todo = f"the gateway is at {state.get('gateway_url')}; leave the address to the run"
        return f"{who} does not reach the gateway: {'; '.join(hindered)}", [todo]
    if not running:
        text = "nobody asks the gateway for completions"
        return text, ["are the environments elsewhere running, and can they reach it?"]
    served = "" if since.get("served") else "; none of its requests has come"
    return f"nobody asks the gateway for completions: is {who} stuck{served}?", [
        "is it frozen, still loading, waiting for a resource, or asking another server (its log)?"
    ]


def _reason(refusals: Sequence[str]) -> str:
    return re.sub(r".*\brefused( at \S+)?: ", "", refusals[0]) if refusals else ""
