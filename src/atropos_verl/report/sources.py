"""Reads the groups for ``inspect``: from a file, a directory, or a trajectory API."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from atropos_verl.errors import AtroposProtocolError, ConfigError, DataError
from atropos_verl.protocol.wire import decode_batch, decode_group
from atropos_verl.training.quarantine import parse_quarantine_file
from atropos_verl.types import ScoredGroup

_BATCH_BODY = re.compile(rb'\s*\{\s*"batch"\s*:')
_GROUP_FIELDS = ("tokens", "masks", "scores")
_QUARANTINE_BODY = re.compile(rb'\s*\{\s*"reason"\s*:')


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A group and where it was found."""

    group: ScoredGroup
    origin: str
    """For people: ``group 0``, ``line 3``, ``1f2e3d.json``."""
    recorded_reason: str | None = None
    """The run's reason for refusing it, when it comes from a quarantine file."""


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def read_path(path: Path) -> list[FoundGroup]:
    """Reads the groups of a file; of a directory, those of its ``*.json`` and ``*.jsonl`` files by name.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
        DataError: its content is none of the formats, see ``load_groups``.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
            files = [file for file in files if not file.name.endswith(".meta.json")]  # notes of a batch journal
            if not files:
                raise ConfigError(f"{path}: the directory holds no .json or .jsonl file")
            return [found for file in files for found in load_groups(file.read_bytes(), str(file), prefix=file.name)]
        return load_groups(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def load_groups(content: bytes, name: str, prefix: str = "") -> list[FoundGroup]:
    """Reads the groups in the content of a file.

    Known formats: the body of ``GET /batch``; one ``ScoredData`` object; a list of them (``POST /scored_data_list``);
    one object per line (what an environment's ``process`` writes); a quarantine file.

    Args:
        name: of the file, for messages.
        prefix: put before every origin, for one file of several.

    Raises:
        DataError: none of these. A single bad group in a list is not an error: it has a ``defect``.
    """
    if not content.strip():
        raise DataError(f"{name} is empty")
    if _QUARANTINE_BODY.match(content):
        try:
            entry = parse_quarantine_file(content)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return [FoundGroup(decode_group(entry.raw), prefix or "quarantined group", entry.reason)]
    if content.lstrip().startswith(b"["):
        return _batch(b'{"batch":' + content + b"}", name, prefix)
    if _BATCH_BODY.match(content):
        return _batch(content, name, prefix)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _lines(content, name, prefix)
    if isinstance(value, dict) and "batch" in value:
        return _batch(content, name, prefix)
    if not isinstance(value, dict) or not any(field in value for field in _GROUP_FIELDS):
        raise DataError(f"{name}: neither a batch, a group nor a quarantine file; it begins {content[:80]!r}")
    return [FoundGroup(decode_group(content.strip()), prefix or "group 0")]


def read_url(
    url: str,
    *,
    take_batch: bool = False,
    save: Path | None = None,
    timeout: float = 30.0,
    token: str | None = None,
) -> list[FoundGroup]:
    """Asks a trajectory API for its latest example, or for the next batch.

    Args:
        url: of the API, or of its ``/latest_example`` or ``/batch``.
        take_batch: ``GET /batch``. Destructive: no trainer will see that batch.
        save: a new file for the body, made before anything is asked and written before anything is decoded.
        timeout: seconds.
        token: bearer token.

    Returns:
        The groups; none: the API has nothing yet.

    Raises:
        AtroposAPIError: no connection, no answer in time, an HTTP error, not an Atropos API.
        ConfigError: the URL is wrong, or is that of ``/batch`` without ``take_batch``; ``save`` exists already, or
            cannot be made.
    """
    from atropos_verl.protocol.client import AtroposClient

    base, endpoint = _split_url(url)
    if endpoint == "/batch" and not take_batch:
        raise ConfigError(f"GET {url} takes the batch away from the trainer; if that is meant, add --take-batch")
    with _new_file(save) as file, AtroposClient(base, timeout=timeout, token=token) as client:
        if take_batch:
            fetched = client.poll_batch()
            body = b'{"batch":null}' if fetched is None else fetched.body
        else:
            client.check()
            body = client.latest_example()
        if file is not None:
            file.write(body)
    if take_batch:
        return _numbered(decode_batch(body), "")
    group = decode_group(body)
    empty = group.defect is None and len(group) == 0
    return [] if empty else [FoundGroup(group, "latest example")]


@contextlib.contextmanager
def _new_file(path: Path | None) -> Iterator[BinaryIO | None]:
    """Opens ``path`` for writing; removes it again when nothing was written."""
    if path is None:
        yield None
        return
    try:
        file = path.open("xb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", "--save") from error
    try:
        with file:
            yield file
    finally:
        if path.stat().st_size == 0:
            path.unlink()


def _split_url(url: str) -> tuple[str, str]:
    base = url.rstrip("/")
    for endpoint in ("/latest_example", "/batch"):
        if base.endswith(endpoint):
            return base.removesuffix(endpoint), endpoint
    return base, "/latest_example"


def _numbered(groups: list[ScoredGroup], prefix: str) -> list[FoundGroup]:
    return [FoundGroup(group, f"{prefix} group {i}".strip()) for i, group in enumerate(groups)]


def _batch(content: bytes, name: str, prefix: str) -> list[FoundGroup]:
    try:
        return _numbered(decode_batch(content), prefix)
    except AtroposProtocolError as error:
        raise DataError(f"{name}: {error.reason}") from error


def _lines(content: bytes, name: str, prefix: str) -> list[FoundGroup]:
    lines = [(number, line.strip()) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    found = [FoundGroup(decode_group(line), f"{prefix} line {number}".strip()) for number, line in lines]
    if all(item.group.defect is not None for item in found) and b'"tokens"' not in content:
        raise DataError(f"{name}: neither JSON nor JSON lines ({found[0].origin}: {found[0].group.defect})")
    return found
