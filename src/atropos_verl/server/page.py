"""The live page at ``/``: one file of HTML (``page.html``), without anything from the internet."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["page"]


@cache
def page() -> bytes:
    return Path(__file__).with_name("page.html").read_bytes()
