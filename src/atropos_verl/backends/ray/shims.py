"""Workarounds for faults of verl 0.9.1 and its libraries that a Ray run meets, each with its removal condition.

The CPU platform, the process group and the engines are in ``verl_plugin/`` and ``cluster/workers.py``, with theirs.
"""

from __future__ import annotations

import logging

__all__ = ["quiet_transfer_queue"]


class _NotThreadCount(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "target_num_threads" not in record.getMessage()


def quiet_transfer_queue() -> None:
    """TransferQueue 0.1.11 warns of ``target_num_threads`` with every message it serialises: thousands per step.

    Remove when it warns once.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("transfer_queue"):
            logging.getLogger(name).addFilter(_NotThreadCount())
