"""``metrics.jsonl`` as it grows: what a run has trained, seen from outside the trainer."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["StepTail"]

_KEPT = 8
_CURVE = 400


class StepTail:
    """Reads new lines at each ``poll``.

    A resumed run replaces the file by one without the steps that it will take again: that one is read anew, and only
    what goes beyond the last step is news.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.recent: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.rewards: deque[float | None] = deque(maxlen=_CURVE)
        self.last_at: float | None = None
        """``clock()`` when the last new line was seen; None: none yet."""
        self._clock = clock
        self._file: tuple[int, int] | None = None
        self._position = 0
        self._rest = b""
        self._old = path.exists()

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.recent[-1]["step"]) if self.recent else 0

    def poll(self) -> list[dict[str, Any]]:
        """Steps taken since the last call (those that were there before the first call are not)."""
        before = self.step
        try:
            with self.path.open("rb") as file:
                replaced = self._open(os.fstat(file.fileno()))
                file.seek(self._position)
                content = file.read()
        except OSError:
            return []
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        found = [line for line in map(_step, lines) if line is not None]
        self.recent.extend(found)
        self.rewards.extend(line.get("reward/mean") for line in found)
        if self._old:
            self._old = False
            return []
        fresh = [line for line in found if line["step"] > before] if replaced else found
        if fresh:
            self.last_at = self._clock()
        return fresh

    def _open(self, status: os.stat_result) -> bool:
        key = (status.st_dev, status.st_ino)
        if key == self._file and status.st_size >= self._position:
            return False
        self._file, self._position, self._rest = key, 0, b""
        self.recent.clear()
        self.rewards.clear()
        return True


def _step(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
