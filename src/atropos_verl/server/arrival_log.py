"""``arrivals.jsonl`` beside the log: when the groups of every batch came. Kept for the whole run, unlike the log, whose
old files are deleted; ``atropos-verl simulate --arrivals`` replays it.

One line a batch, about 30 bytes a group::

    {"step": 3, "at": 1764034.2181, "groups": [[1764031.4092, 0, 8, 181], …]}

``at`` is when the batch was handed out; a group is [when it came, its environment (null: unnamed), sequences, tokens].
Seconds since the epoch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from atropos_verl.protocol.wire_model import StoredGroup

__all__ = ["ARRIVALS_FILE", "ArrivalRecord"]

logger = logging.getLogger(__name__)

ARRIVALS_FILE = "arrivals.jsonl"


class ArrivalRecord:
    """Appends to the file. A disk that refuses is reported once: no batch fails for want of a record."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / ARRIVALS_FILE
        self._failed = False

    def add(self, step: int, at: float, groups: Iterable[StoredGroup]) -> None:
        """Note the batch of ``step`` (from 1), handed out ``at``."""
        if self._failed:
            return
        rows = [[round(group.arrived, 4), group.env_id, group.size, group.tokens] for group in groups]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "at": round(at, 4), "groups": rows}, separators=(",", ":")) + "\n")
        except OSError as error:
            self._failed = True
            logger.warning("cannot write %s: %s; arrivals are not recorded any more", self.path, error.strerror)
