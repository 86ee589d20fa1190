"""Imports of heavy libraries without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_collection"]


@contextmanager
def paused_collection() -> Iterator[None]:
    """For imports that last: no collection meanwhile, and what was made is never looked through afterwards.

    torch, verl and transformers make more than a million objects that live as long as the process. Looking through
    them again and again is a quarter of the time their import takes, and most of the time that the interpreter needs
    to end. A block that runs within another changes nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
