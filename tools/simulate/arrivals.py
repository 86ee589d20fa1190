"""Reads when the groups of a recorded run came: ``arrivals.jsonl`` of the trajectory API (``server/batcher.py``)."""

import json
from dataclasses import dataclass
from pathlib import Path

from atropos_verl.errors import ConfigError
from atropos_verl.server.store import ARRIVALS_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One group. Seconds since the epoch."""

    at: float
    environment: int | None
    size: int
    """Sequences."""
    tokens: int
    """Of all its sequences, prompts included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBatch:
    """One batch that the API handed out."""

    step: int
    """From 1."""
    at: float
    groups: tuple[Arrival, ...]


def read_arrivals(path: Path, *, option: str) -> list[HandedBatch]:
    """Of a run directory, a data directory of the API, or the file itself; in order of their steps.

    Raises:
        ConfigError: there is no such record, or it cannot be read; names ``option``.
    """
    candidates = [path / "api" / ARRIVALS_FILE, path / ARRIVALS_FILE] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ConfigError(
            f"{path} has no record of arrivals ({ARRIVALS_FILE}): it is written by the trajectory API that a run "
            "starts itself (atropos.server=embedded), or by serve-api with --data-dir; an upstream API keeps none",
            option,
        )
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what has no end is a torn write
    try:
        batches = [_batch(line) for line in lines if line]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a record of arrivals: {error}", option) from None
    if not batches:
        raise ConfigError(f"{file} is empty: no batch was handed out", option)
    return sorted(batches, key=lambda batch: batch.step)


def _batch(line: str) -> HandedBatch:
    found = json.loads(line)
    groups = tuple(
        Arrival(at=float(at), environment=environment, size=int(size), tokens=int(tokens))
        for at, environment, size, tokens in found["groups"]
    )
    return HandedBatch(step=int(found["step"]), at=float(found["at"]), groups=groups)
