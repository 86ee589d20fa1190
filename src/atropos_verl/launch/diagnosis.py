"""Explains a run that gets no batches: the facts, and what to check. Pure: a state in, text out."""

from collections.abc import Mapping
from typing import Any

from atropos_verl.launch.probes import environments_of


def diagnose(state: Mapping[str, Any], silent: float) -> str:
    """The diagnosis of a run that has had no batch for ``silent`` seconds.

    It lists the services, the environments as the API sees them, the queue, the gateway, then what to check, the
    likeliest cause first. ``state`` is the content of ``state.json``.
    """
    lines = [f"no batch for {silent:.0f} s; the run goes on waiting. What is known:"]
    for service in state.get("services", []):
        pid = f", pid {service['pid']}" if service.get("pid") else ""
        detail = f": {service['detail']}" if service.get("detail") else ""
        lines.append(f"  {service['name']}: {service['state']}{pid}, {service['restarts']} restarts{detail}")
    lines += _api_lines(state)
    lines += _gateway_lines(state)
    lines.append("What to check:")
    lines += [f"  {number}. {check}" for number, check in enumerate(_checks(state), start=1)]
    return "\n".join(lines)


def _api_lines(state: Mapping[str, Any]) -> list[str]:
    api = state.get("api")
    if not api:
        return ["  trajectory API: does not answer"]
    leased = "" if api.get("open_leases") is None else f", {api['open_leases']} leased"
    lines = [f"  trajectory API: step {api.get('current_step')}, {api.get('queue_size')} groups in the queue{leased}"]
    listed = environments_of(api)
    if listed is None:
        return [*lines, "  environments: this API does not say who sent what"]
    for item in listed:
        if item.get("state") == "disconnected":
            continue
        share = item.get("min_batch_allocation")
        least = "" if share is None else f", least share {share:.2f}"
        lines.append(
            f"  environment {item.get('name') or item.get('env_id')}: {item.get('state', 'registered')}, heard "
            f"{item.get('heard_seconds_ago', '?')} s ago, {item.get('groups', '?')} groups sent, "
            f"{item.get('waiting_sequences', '?')} sequences waiting, {item.get('refused', 0)} refused{least}"
        )
    return lines if len(lines) > 1 else [*lines, "  environments: none is registered"]


def _gateway_lines(state: Mapping[str, Any]) -> list[str]:
    gateway = state.get("gateway")
    if not gateway:
        return ["  inference gateway: does not answer"]
    rates = state.get("rates", {})
    tokens, requests = rates.get("tokens_per_second"), rates.get("requests_per_second")
    speed = "" if tokens is None else f", {tokens:.0f} tokens/s, {requests or 0.0:.1f} requests/s"
    paused = ", paused for a weight sync" if gateway.get("paused") else ""
    return [
        f"  inference gateway: {gateway.get('in_flight', 0)} requests in flight{speed}, "
        f"policy version {gateway.get('policy_version')}{paused}"
    ]


def _checks(state: Mapping[str, Any]) -> list[str]:
    environments = [service for service in state.get("services", []) if service["kind"] == "environment"]
    api, gateway, rates = state.get("api"), state.get("gateway"), state.get("rates", {})
    checks: list[str] = []
    if not api:
        checks.append(
            "The API is gone or frozen: its log, and whether its process runs (kill -CONT wakes a stopped one)."
        )
    if not gateway:
        checks.append("The trainer is gone, busy or frozen: its log, its CPU use (kill -CONT wakes a stopped one).")
    for word, text in (
        ("failed", "was given up: the end of its log says why"),
        ("restarting", "has just died: the end of its log says why"),
        ("starting", "is starting, and has not registered yet: its log"),
    ):
        checks += [f"{service['name']} {text}." for service in environments if service["state"] == word]
    waiting = (api or {}).get("queue_sequences", (api or {}).get("queue_size")) or 0
    if api and waiting >= state.get("batch_size", 1):
        checks.append(
            f"{waiting} sequences wait but make no batch: do group sizes add up to batch_size "
            f"{state.get('batch_size')}, and does every environment with a min_batch_allocation send?"
        )
    elif gateway and api:
        if state.get("refused") and not rates.get("tokens_per_second"):
            checks.append(
                f"The gateway has refused {state['refused']} requests (too long for the model, a wrong key, a wrong "
                f"parameter): grep 'refused' in {state.get('run_dir')}/logs/trainer.log."
            )
        else:
            checks += _no_groups(gateway, rates, environments)
    checks.append(f"The logs: {state.get('run_dir')}/logs")
    return checks


def _no_groups(gateway: Mapping[str, Any], rates: Mapping[str, Any], environments: list[Any]) -> list[str]:
    if gateway.get("paused"):
        return ["The gateway is paused: the trainer is in a step or a weight sync that does not end; see its log."]
    if gateway.get("in_flight") and not rates.get("tokens_per_second"):
        return ["Requests are in flight but no token is generated: the inference engine hangs; see the trainer's log."]
    if rates.get("tokens_per_second"):
        return [
            "The policy is being sampled but no group arrives: the environment drops its groups (all scores equal with "
            "ensure_scores_are_not_same, sequences of max_token_len or more, scoring errors), or rollouts are long."
        ]
    if not environments:
        return [
            "Nobody asks the gateway for completions: are the environments elsewhere running, and can they reach it?"
        ]
    names = ", ".join(service["name"] for service in environments if service["state"] == "running")
    if not names:
        return []
    return [
        f"Nobody asks the gateway for completions: is {names} stuck (frozen, still loading, waiting for a resource)? "
        "Does it ignore --openai.base_url because config_init returns a bare APIServerConfig?"
    ]
