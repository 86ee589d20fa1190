"""``/metrics`` in Prometheus' text format, and the counters behind it and behind the live page."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atropos_verl.server import status
from atropos_verl.server.store import Store

__all__ = ["Counters", "Glimpse", "render"]

_SERIES_SECONDS = 120
_GLIMPSES = 6


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What the live page shows of an accepted group."""

    at: float
    env_id: int | None
    scores: list[float]
    lengths: list[int]
    """Tokens per sequence."""
    text: str
    """The last message, when there is one, else the first token ids."""


@dataclass(slots=True)
class Counters:
    """Since this process started."""

    started_at: float
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(path, HTTP status) → requests."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason → groups or requests refused."""
    tolerated: int = 0
    bytes_in: int = 0
    """Inflated bytes of accepted posts."""
    bytes_out: int = 0
    """Bytes of batches sent."""
    glimpses: deque[Glimpse] = field(default_factory=lambda: deque(maxlen=_GLIMPSES))
    series: deque[tuple[int, int, int, int]] = field(default_factory=lambda: deque(maxlen=_SERIES_SECONDS))
    """(second, groups, tokens, batches) of each second in which anything happened."""

    def happened(self, now: float, *, groups: int = 0, tokens: int = 0, batches: int = 0) -> None:
        second = int(now)
        if self.series and self.series[-1][0] == second:
            _, before_groups, before_tokens, before_batches = self.series.pop()
            groups, tokens, batches = groups + before_groups, tokens + before_tokens, batches + before_batches
        self.series.append((second, groups, tokens, batches))

    def per_second(self, now: float, window: int = 60) -> dict[str, float]:
        """Means over the last ``window`` seconds (fewer when the server is younger)."""
        seconds = max(1.0, min(window, now - self.started_at))
        rows = [row for row in self.series if row[0] > now - window]
        names = ("groups", "tokens", "batches")
        return {name: round(sum(row[i + 1] for row in rows) / seconds, 3) for i, name in enumerate(names)}


def render(store: Store, counters: Counters) -> str:
    """The text of ``/metrics``. Names follow Prometheus' conventions: base units, ``_total`` for counters."""
    lines: list[str] = []
    figures = status.status(store)
    state = store.state
    gauges = {
        "queue_groups": ("Groups that wait for a batch.", state.queue.groups),
        "queue_sequences": ("Sequences that wait for a batch.", state.queue.sequences),
        "held_tokens": ("Tokens held, batches that are out included.", state.held_tokens),
        "held_bytes": ("Bytes of groups held in memory.", state.held_bytes),
        "oldest_group_age_seconds": ("Age of the oldest waiting group.", figures["oldest_age_seconds"] or 0),
        "open_leases": ("Batches handed out under a lease.", figures["open_leases"]),
        "returned_batches": ("Batches that came back and wait to be handed out again.", len(state.returned)),
        "step": ("Batches handed out, plus the trainer's starting step.", state.step),
        "environments_alive": ("Environments heard of lately.", figures["environments_alive"]),
        "log_bytes": ("Bytes of the log on disk.", store.persistence.log_bytes),
    }
    for name, (text, value) in gauges.items():
        _family(lines, name, "gauge", text, [({}, value)])
    totals = {
        "groups": "Groups accepted",
        "sequences": "Sequences accepted",
        "tokens": "Tokens accepted",
        "duplicates": "Groups that came twice and were stored once",
        "batches": "Batches formed",
        "acks": "Batches acked or delivered",
        "returns": "Batches that came back",
    }
    for name, text in totals.items():
        _family(lines, f"{name}_total", "counter", f"{text}, over restarts.", [({}, state.totals[name])])
    _family(
        lines, "refused_total", "counter", "Posts refused.", [({"reason": k}, v) for k, v in counters.refused.items()]
    )
    requests = [({"path": path, "status": str(code)}, count) for (path, code), count in counters.requests.items()]
    _family(lines, "requests_total", "counter", "HTTP requests.", requests)
    _family(lines, "received_bytes_total", "counter", "Bytes of accepted posts.", [({}, counters.bytes_in)])
    _family(lines, "sent_bytes_total", "counter", "Bytes of batches sent.", [({}, counters.bytes_out)])
    _environment_families(lines, status.environments(store))
    return "\n".join(lines) + "\n"


def _environment_families(lines: list[str], rows: list[dict[str, Any]]) -> None:
    families = {
        "env_groups_total": ("counter", "Groups accepted from the environment.", "groups"),
        "env_sequences_total": ("counter", "Sequences accepted from the environment.", "sequences"),
        "env_refused_total": ("counter", "Groups refused from the environment.", "refused"),
        "env_duplicates_total": ("counter", "Groups the environment sent twice.", "duplicates"),
        "env_queue_sequences": ("gauge", "Sequences of the environment that wait.", "waiting_sequences"),
        "env_heard_seconds": ("gauge", "Seconds since the environment was heard of.", "heard_seconds_ago"),
    }
    for name, (kind, text, column) in families.items():
        labelled = [({"env_id": str(row["env_id"]), "name": row["name"]}, row[column]) for row in rows]
        _family(lines, name, kind, text, labelled)


def _family(
    lines: list[str], name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]
) -> None:
    full = f"atropos_{name}"
    lines.append(f"# HELP {full} {text}")
    lines.append(f"# TYPE {full} {kind}")
    for labels, value in samples:
        inside = ",".join([f'{key}="{_escaped(label)}"' for key, label in labels.items()])
        lines.append(f"{full}{{{inside}}} {value}" if inside else f"{full} {value}")


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
