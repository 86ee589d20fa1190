"""What ``/status``, ``/status-env`` and the live page report: figures from counts, in time that does not grow with the
queue."""

from __future__ import annotations

import math
from typing import Any

from atropos_verl.protocol.wire_model import Environment
from atropos_verl.server.store import Store

__all__ = ["env_status", "environments", "status"]

_MIN_ENV_WEIGHT = 0.01
"""Upstream's: no environment is starved completely."""


def status(store: Store) -> dict[str, Any]:
    """Upstream's two fields, then ours. ``queue_size`` is in groups, and counts batches that came back."""
    state, now = store.state, store.now()
    oldest = state.queue.oldest()
    leases = [batch for batch in state.outstanding.values() if batch.deadline is not None]
    return {
        "current_step": state.step,
        "queue_size": state.queue.groups,
        "queue_sequences": state.queue.sequences,
        "queue_tokens": state.held_tokens,
        "queue_bytes": state.held_bytes,
        "oldest_age_seconds": None if oldest is None else round(max(0.0, now - oldest.arrived), 3),
        "open_leases": len(leases),
        "returned_batches": len(state.returned),
        "environments": len(state.environments),
        "environments_alive": len(store.batches.alive()),
        "trainer_registered": state.registration is not None,
        "nearly_full": store.nearly_full(),
        "durable": store.persistence.durable,
        "totals": dict(state.totals),
    }


def env_status(store: Store, environment: Environment) -> dict[str, Any]:
    """An environment's view, by upstream's formulas (``atroposlib/api/server.py``, ``get_status_env``).

    ``queue_size`` is in groups of the size it registered with, since it multiplies by that size again: its own
    sequences, and those of the others beyond their minimum shares. When the server is nearly full,
    ``unallocated_fraction`` is 0: an unmodified environment then starts no more rollouts, and does not end either.
    """
    state = store.state
    alive = store.batches.alive()
    minimums = {other.env_id: other.min_batch_allocation for other in alive if other.min_batch_allocation is not None}
    total = sum(other.max_context_len * other.weight for other in alive)
    weight = environment.max_context_len * environment.weight / total if total > 0 else 0.0
    batch_size = 0 if state.registration is None else state.registration.batch_size
    largest = state.queue.largest_group()
    own = state.queue.env_sequences().get(environment.env_id, 0)
    others = 0
    for env_id, waiting in state.queue.env_sequences().items():
        if env_id != environment.env_id and waiting > 0:
            reserved = 0 if env_id is None else int(batch_size * minimums.get(env_id, 0.0))
            others += max(0, math.ceil(waiting / largest) * largest - reserved)
    free = 0.0 if store.nearly_full() else 1.0 - min(sum(minimums.values()), 1.0)
    return {
        "current_step": state.step,
        "queue_size": (own + others) // environment.group_size,
        "unallocated_fraction": free,
        "self_queue_size": own // environment.group_size,
        "max_group_size": largest,
        "env_weight": max(_MIN_ENV_WEIGHT, min(weight, 1.0)),
    }


def environments(store: Store) -> list[dict[str, Any]]:
    """One row per environment, for the live page."""
    now, waiting = store.now(), store.state.queue.env_sequences()
    alive = {environment.env_id for environment in store.batches.alive()}
    return [
        {
            "env_id": environment.env_id,
            "name": environment.real_name,
            "state": "alive" if environment.env_id in alive else "gone" if environment.connected else "disconnected",
            "heard_seconds_ago": round(max(0.0, now - environment.heard_at), 1),
            "group_size": environment.group_size,
            "weight": environment.weight,
            "min_batch_allocation": environment.min_batch_allocation,
            "waiting_sequences": waiting.get(environment.env_id, 0),
            "groups": environment.groups,
            "sequences": environment.sequences,
            "duplicates": environment.duplicates,
            "refused": environment.refused,
        }
        for environment in store.state.environments
    ]
