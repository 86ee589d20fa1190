"""``LedgerLog``: the ledger's records on disk, so that the process that resumes a run still knows who wrote what.

::

    run_dir/ledger/
      segment-000003.log    a ``SegmentLog``; whole files, oldest first, are deleted to stay within the bound

      resumed   a process went on at this policy version: what came before it and names newer ones, names lost weights
      request   the completions of one request: ids, logprobs, version runs; the prompt where this file has not had it
      used      records that a batch is known to hold which was trained on

A record is written before the client can see the completion, by one ``write`` into the page cache: the death of the
process loses nothing that anybody was told; a power cut may. Numbers are little-endian.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from atropos_verl.provenance.ledger_records import Resume, Runs, SpanRecord
from atropos_verl.segment_log import LogDamagedError, LogWriteError, SegmentLog

__all__ = ["LedgerLog", "Logged", "LoggedRequest", "LoggedSpan", "LoggedUse", "open_log"]

logger = logging.getLogger(__name__)

_MAGIC = b"ATRLDG1\n"
_BEGIN, _RESUMED, _REQUEST, _USED = 0, 1, 2, 3
_RESUME_FIELDS = struct.Struct("<BqQ")
"""kind, policy version, records before it."""
_REQUEST_FIELDS = struct.Struct("<BQQdiI")
"""kind, request, key of the prompt, temperature, tokens of the prompt (-1: this file has it), completions."""
_SPAN_FIELDS = struct.Struct("<QQII")
"""record, key of its end, tokens, version runs; then the runs (int64 pairs), ids (int32) and logprobs (float32)."""
_RUN_BYTES, _TOKEN_BYTES = 16, 4
_SEGMENTS = 8
"""Files that the bound is divided into: what is forgotten at once."""
_LEAST_SEGMENT = 1 << 16
_MOST_FILES = 64
"""Each start of a process begins a file, however short the one before."""


@dataclass(frozen=True, slots=True)
class LoggedSpan:
    """A completion as it was read."""

    order: int
    ids: bytes
    logprobs: NDArray[np.float32]
    runs: Runs
    end_key: int


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """The completions of one request."""

    request: int
    prompt_key: int
    prompt_ids: bytes
    temperature: float
    spans: tuple[LoggedSpan, ...]


@dataclass(frozen=True, slots=True)
class LoggedUse:
    """Records that a trained batch holds."""

    orders: tuple[int, ...]


Logged: TypeAlias = LoggedRequest | LoggedUse | Resume


class LedgerLog:
    """Made by ``open_log``. Not thread-safe: the ledger's lock is held."""

    def __init__(self, log: SegmentLog, max_bytes: int) -> None:
        self._log: SegmentLog | None = log
        self._directory = log.directory
        self._max_bytes = max_bytes
        self._segment_bytes = max(max_bytes // _SEGMENTS, _LEAST_SEGMENT)
        self._prompts: set[int] = set()

    def begin(self, resume: Resume | None) -> None:
        """The first file of this process."""
        first = bytes([_BEGIN])
        if resume is not None:
            first = _RESUME_FIELDS.pack(_RESUMED, resume.policy_version, resume.last_order)
        try:
            self._rotate(first)
        except LogWriteError as error:
            self._give_up(error)

    def request(
        self,
        request: int,
        prompt_key: int,
        prompt_ids: bytes,
        temperature: float,
        spans: Sequence[SpanRecord],
        *,
        new_prompt: bool,
    ) -> None:
        """Write one request down. A log that cannot be written is given up, with a warning."""
        known = not new_prompt and prompt_key in self._prompts
        tokens = -1 if known else len(prompt_ids) // _TOKEN_BYTES
        head = _REQUEST_FIELDS.pack(_REQUEST, request, prompt_key, temperature, tokens, len(spans))
        parts: list[bytes | memoryview] = [head]
        if not known:
            parts.append(prompt_ids)
            self._prompts.add(prompt_key)
        for span in spans:
            runs = [number for run in span.runs for number in run]
            head = _SPAN_FIELDS.pack(span.order, span.end_key, len(span.ids) // _TOKEN_BYTES, len(span.runs))
            logprobs = np.ascontiguousarray(span.logprobs, dtype="<f4").view(np.uint8)
            parts += head + struct.pack(f"<{len(runs)}q", *runs), span.ids, logprobs.data
        self._append(*parts)

    def used(self, orders: Sequence[int]) -> None:
        """Note that a batch which holds these records was trained on."""
        self._append(bytes([_USED]) + np.asarray(orders, dtype="<u8").tobytes())

    def close(self) -> None:
        """Idempotent."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _append(self, *parts: bytes | memoryview) -> None:
        log = self._log
        if log is None:
            return
        try:
            log.append(*parts)
            if log.size >= self._segment_bytes:
                self._rotate(bytes([_BEGIN]))
        except LogWriteError as error:
            self._give_up(error)

    def _give_up(self, error: LogWriteError) -> None:
        # Half a log is worse than none: of two alike completions it might know the wrong one only.
        logger.warning(
            "%s: %s. After a restart nobody will know who wrote what was generated up to then", self._directory, error
        )
        _remove_all(self._directory)
        self.close()

    def _rotate(self, first: bytes) -> None:
        assert self._log is not None
        log = self._log
        log.rotate(first)
        self._prompts.clear()
        kept = self._max_bytes - self._segment_bytes  # the file that is begun may grow that long
        while log.sizes and (sum(log.sizes.values()) > kept or len(log.sizes) >= _MOST_FILES):
            log.delete(min(log.sizes))


def open_log(directory: Path, max_bytes: int, *, keep: bool) -> tuple[LedgerLog | None, list[Logged]]:
    """Open the log of a run, and read what earlier processes left there.

    Args:
        max_bytes: that the files may take.
        keep: False: a new run; what is there is removed.

    Returns:
        The log, of which ``begin`` is to be called, or None with a warning when the directory cannot be used; and what
        it held, oldest first: nothing, with a warning that names the file, where any of it is damaged.
    """
    try:
        log = SegmentLog(directory, magic=_MAGIC, owner="ledger")
    except (LogDamagedError, LogWriteError) as error:
        logger.warning("the ledger will not survive a restart of this run: %s", error)
        return None, []
    found: list[Logged] = []
    if keep:
        try:
            found = list(_read(log))
        except (LogDamagedError, OSError) as error:
            logger.warning(
                "%s. The ledger begins empty: who wrote what was generated before this start is not known", error
            )
            found = []
            keep = False
    if not keep:
        _remove_all(directory)
        log.sizes.clear()
    return LedgerLog(log, max_bytes), found


def _remove_all(directory: Path) -> None:
    for path in directory.glob("segment-*.log"):
        try:
            path.unlink()
        except OSError as error:
            logger.warning("cannot delete %s: %s", path, error.strerror)


def _read(log: SegmentLog) -> Iterator[Logged]:
    prompts: dict[int, bytes] = {}
    segment = -1
    for number, payload in log.read():
        if number != segment:
            segment = number
            prompts.clear()
        try:
            found = _decode(payload, prompts)
        except (struct.error, KeyError, ValueError) as error:
            path = log.directory / f"segment-{number:06d}.log"
            raise LogDamagedError(f"{path} holds a record that is not one of a ledger ({error!r})") from error
        if found is not None:
            yield found


def _decode(payload: memoryview, prompts: dict[int, bytes]) -> Logged | None:
    kind = payload[0]
    if kind == _BEGIN:
        return None
    if kind == _RESUMED:
        _, version, orders = _RESUME_FIELDS.unpack(payload)
        return Resume(version, orders)
    if kind == _USED:
        return LoggedUse(tuple(np.frombuffer(payload[1:], dtype="<u8").tolist()))
    if kind != _REQUEST:
        raise ValueError(f"kind {kind}")
    return _decode_request(payload, prompts)


def _decode_request(payload: memoryview, prompts: dict[int, bytes]) -> LoggedRequest:
    _, request, key, temperature, prompt_tokens, count = _REQUEST_FIELDS.unpack_from(payload)
    position = _REQUEST_FIELDS.size

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        if position > len(payload):
            raise ValueError("cut off")
        return bytes(payload[position - size : position])

    if prompt_tokens >= 0:
        prompts[key] = take(_TOKEN_BYTES * prompt_tokens)
    spans = []
    for _ in range(count):
        order, end_key, tokens, runs = _SPAN_FIELDS.unpack(take(_SPAN_FIELDS.size))
        numbers = struct.unpack(f"<{2 * runs}q", take(_RUN_BYTES * runs))
        ids = take(_TOKEN_BYTES * tokens)
        logprobs = np.frombuffer(take(_TOKEN_BYTES * tokens), dtype="<f4")
        spans.append(LoggedSpan(order, ids, logprobs, tuple(zip(numbers[::2], numbers[1::2], strict=True)), end_key))
    if position != len(payload):
        raise ValueError("too long")
    return LoggedRequest(request, key, prompts[key], temperature, tuple(spans))
