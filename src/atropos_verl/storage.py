"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path``: a reader, and a machine that stops half-way, sees the old file or the new one.

    Args:
        durable: wait until it is on the disk.

    Raises:
        OSError: the disk is full, the directory missing or not writable; nothing is left behind then.
    """
    # In the same directory: a rename is atomic within one file system only. Not tempfile, whose files are private.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
