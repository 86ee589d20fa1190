"""Figures of the API, in time that does not grow with the queue: ``/status``, ``/status-env``, ``/metrics``, the
page."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atropos_verl.server.store import Counters, Environment, Store

_MIN_ENV_WEIGHT = 0.01  # upstream's: no environment is starved completely
_SHOWN_ENVIRONMENTS = 500
_TOTALS = {
    "groups": "Groups accepted",
    "sequences": "Sequences accepted",
    "tokens": "Tokens accepted",
    "duplicates": "Groups that came twice and were stored once",
    "batches": "Batches formed",
    "acks": "Batches acked or delivered",
    "returns": "Batches that came back",
}
_SHOWN_AS_THEY_ARE = "env_id group_size weight min_batch_allocation groups sequences duplicates refused"
_ENV_FIGURES = {
    "env_groups": (CounterMetricFamily, "Groups accepted from the environment.", "groups"),
    "env_sequences": (CounterMetricFamily, "Sequences accepted from the environment.", "sequences"),
    "env_refused": (CounterMetricFamily, "Groups refused from the environment.", "refused"),
    "env_duplicates": (CounterMetricFamily, "Groups the environment sent twice.", "duplicates"),
    "env_queue_sequences": (GaugeMetricFamily, "Sequences of the environment that wait.", "waiting_sequences"),
    "env_heard_seconds": (GaugeMetricFamily, "Seconds since the environment was heard of.", "heard_seconds_ago"),
}


def status(store: Store) -> dict[str, Any]:
    """Upstream's two fields, then ours. ``queue_size`` is in groups, and counts batches that came back."""
    oldest = store.queue.oldest()
    return {
        "current_step": store.step,
        "queue_size": store.queue.groups,
        "queue_sequences": store.queue.sequences,
        "queue_tokens": store.held_tokens,
        "queue_bytes": store.held_bytes,
        "oldest_age_seconds": None if oldest is None else round(max(0.0, store.now() - oldest.arrived), 3),
        "open_leases": sum(batch.deadline is not None for batch in store.outstanding.values()),
        "returned_batches": len(store.returned),
        "environments": len(store.environments),
        "environments_alive": len(store.alive()),
        "trainer_registered": store.registration is not None,
        "nearly_full": store.nearly_full(),
        "durable": store.settings.data_dir is not None,
        "totals": dict(store.totals),
    }


def env_status(store: Store, environment: Environment) -> dict[str, Any]:
    """An environment's view, by upstream's formulas (``atroposlib/api/server.py``, ``get_status_env``). ``queue_size``
    is in groups of the size it registered with, since it multiplies by that size again: its own sequences, and those of
    the others beyond their minimum shares. When the server is nearly full, ``unallocated_fraction`` is 0: an unmodified
    environment then starts no more rollouts, and does not end either."""
    alive = store.alive()
    minimums = {other.env_id: other.min_batch_allocation for other in alive if other.min_batch_allocation is not None}
    total = sum(other.max_context_len * other.weight for other in alive)
    weight = environment.max_context_len * environment.weight / total if total > 0 else 0.0
    batch_size = 0 if store.registration is None else store.registration.batch_size
    largest = store.queue.largest_group()
    own = store.queue.by_env.get(environment.env_id, 0)
    others = 0
    for env_id, waiting in store.queue.by_env.items():
        if env_id != environment.env_id and waiting > 0:
            reserved = 0 if env_id is None else int(batch_size * minimums.get(env_id, 0.0))
            others += max(0, math.ceil(waiting / largest) * largest - reserved)
    return {
        "current_step": store.step,
        "queue_size": (own + others) // environment.group_size,
        "unallocated_fraction": 0.0 if store.nearly_full() else 1.0 - min(sum(minimums.values()), 1.0),
        "self_queue_size": own // environment.group_size,
        "max_group_size": largest,
        "env_weight": max(_MIN_ENV_WEIGHT, min(weight, 1.0)),
    }


def environments(store: Store) -> list[dict[str, Any]]:
    """One row for each of the latest environments, for the live page and the metrics."""
    now, waiting = store.now(), store.queue.by_env
    alive = {environment.env_id for environment in store.alive()}
    return [
        {
            **{name: getattr(environment, name) for name in _SHOWN_AS_THEY_ARE.split()},
            "name": environment.real_name,
            "state": "alive" if environment.env_id in alive else "gone" if environment.connected else "disconnected",
            "heard_seconds_ago": round(max(0.0, now - environment.heard_at), 1),
            "waiting_sequences": waiting.get(environment.env_id, 0),
        }
        for environment in store.environments[-_SHOWN_ENVIRONMENTS:]
    ]


class Metrics(Collector):
    """``/metrics`` of one server. Names follow Prometheus' conventions: base units, ``_total`` for counters."""

    def __init__(self, store: Store, counters: Counters) -> None:
        self._store, self._counters = store, counters

    def collect(self) -> Iterator[Metric]:
        store, figures = self._store, status(self._store)
        gauges = {
            "queue_groups": ("Groups that wait for a batch.", store.queue.groups),
            "queue_sequences": ("Sequences that wait for a batch.", store.queue.sequences),
            "held_tokens": ("Tokens held, batches that are out included.", store.held_tokens),
            "held_bytes": ("Bytes of groups held in memory.", store.held_bytes),
            "oldest_group_age_seconds": ("Age of the oldest waiting group.", figures["oldest_age_seconds"] or 0),
            "open_leases": ("Batches handed out under a lease.", figures["open_leases"]),
            "returned_batches": ("Batches that came back and wait to be handed out again.", len(store.returned)),
            "step": ("Batches handed out, plus the trainer's starting step.", store.step),
            "environments_alive": ("Environments heard of lately.", figures["environments_alive"]),
            "log_bytes": ("Bytes of the store on disk.", store.disk_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"atropos_{name}", text, value=value)
        for name, text in _TOTALS.items():
            yield CounterMetricFamily(f"atropos_{name}", f"{text}, over restarts.", value=store.totals[name])
        refused = [([reason], count) for reason, count in self._counters.refused.items()]
        requests = [([path, str(code)], count) for (path, code), count in self._counters.requests.items()]
        yield _labelled(CounterMetricFamily, "refused", "Posts refused.", ["reason"], refused)
        yield _labelled(CounterMetricFamily, "requests", "HTTP requests.", ["path", "status"], requests)
        yield CounterMetricFamily("atropos_received_bytes", "Bytes of accepted posts.", value=self._counters.bytes_in)
        yield CounterMetricFamily("atropos_sent_bytes", "Bytes of batches sent.", value=self._counters.bytes_out)
        rows = environments(store)
        for name, (family, text, column) in _ENV_FIGURES.items():
            values = [([str(row["env_id"]), row["name"]], row[column]) for row in rows]
            yield _labelled(family, name, text, ["env_id", "name"], values)


def _labelled(family: type[Any], name: str, text: str, labels: list[str], values: Iterable[tuple[Any, int]]) -> Any:
    metric = family(f"atropos_{name}", text, labels=labels)
    for value in values:
        metric.add_metric(*value)
    return metric
