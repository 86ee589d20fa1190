"""Counters of the gateway in the Prometheus text format, version 0.0.4.

Hand-written: a dozen lines of text do not justify a process-wide registry (several gateways may live in one process).
"""

from __future__ import annotations

from collections import Counter

from atropos_verl.provenance.ledger import LedgerStats

__all__ = ["CONTENT_TYPE", "GatewayMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "atropos_verl_gateway"


class GatewayMetrics:
    """Counters since the start. Used from the gateway's event loop only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """(endpoint, HTTP status) → requests answered; 499 = the client went away."""
        self.in_flight = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0

    def render(
        self, *, policy_version: int, paused: bool, paused_seconds: float, ledger: LedgerStats | None = None
    ) -> str:
        lines = [
            f"# HELP {_PREFIX}_requests_total Requests answered, by endpoint and HTTP status (499: client went away).",
            f"# TYPE {_PREFIX}_requests_total counter",
        ]
        for (endpoint, status), count in sorted(self.requests.items()):
            lines.append(f'{_PREFIX}_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}')
        figures: list[tuple[str, str, str, float]] = [
            ("requests_in_flight", "gauge", "Generation requests being served or waiting.", self.in_flight),
            ("prompt_tokens_total", "counter", "Prompt tokens of served requests.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens generated for clients.", self.generated_tokens),
            (
                "policy_version",
                "gauge",
                "Version of the weights the engine holds; -1 before the first.",
                policy_version,
            ),
            ("paused", "gauge", "1 while new requests wait for a weight sync.", int(paused)),
            ("paused_seconds_total", "counter", "Seconds spent paused for weight syncs.", paused_seconds),
        ]
        if ledger is not None:
            figures += [
                ("ledger_spans", "gauge", "Completions that the ledger holds.", ledger.spans),
                ("ledger_prompts", "gauge", "Different prompts of these.", ledger.prompts),
                ("ledger_bytes", "gauge", "Memory of the ledger in bytes.", ledger.bytes),
                ("ledger_recorded_spans_total", "counter", "Completions written down.", ledger.recorded_spans),
                ("ledger_recorded_tokens_total", "counter", "Tokens of these.", ledger.recorded_tokens),
                ("ledger_restored_spans", "gauge", "Completions of before a restart.", ledger.restored_spans),
                ("ledger_evicted_spans_total", "counter", "Completions forgotten again.", ledger.evicted_spans),
            ]
        for name, kind, text, value in figures:
            lines += [f"# HELP {_PREFIX}_{name} {text}", f"# TYPE {_PREFIX}_{name} {kind}", f"{_PREFIX}_{name} {value}"]
        return "\n".join(lines) + "\n"
