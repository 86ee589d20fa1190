"""Completions as a gateway records them, sequences as they are scored, and what a ledger says of these."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import Generation, SequenceMatch

Runs = tuple[tuple[int, int], ...]


def wrote(tokens: Sequence[int], version: int = 0, *, runs: Runs = (), logprob: float = -1.0) -> Generation:
    """A completion whose k-th logprob is ``logprob - k / 8``."""
    return Generation(
        token_ids=tuple(tokens),
        logprobs=tuple(logprob - k / 8 for k in range(len(tokens))),
        finish_reason="stop",
        policy_version_runs=runs or ((version, len(tokens)),),
    )


def query(*parts: Sequence[int], logprobs: Sequence[float] | None = None, **fields: Any) -> SequenceQuery:
    """Parts in turn not trained, trained, not trained, …; ``logprobs`` of the trained tokens in order."""
    tokens = np.array([token for part in parts for token in part], dtype=np.int64)
    mask = np.array([bool(index % 2) for index, part in enumerate(parts) for _ in part])
    sent = None
    if logprobs is not None:
        sent = np.full(len(tokens), np.nan)
        sent[mask] = logprobs
    return SequenceQuery(token_ids=tokens, loss_mask=mask, logprobs=sent, **fields)


def holding(prompt: Sequence[int], *made: Generation, temperature: float = 1.0) -> Ledger:
    ledger = Ledger()
    ledger.record(prompt, made, temperature)
    return ledger


def one(ledger: Ledger, *parts: Sequence[int]) -> SequenceMatch:
    [match] = look_up(ledger, [query(*parts)])
    return match
