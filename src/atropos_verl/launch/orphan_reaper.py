"""Ends a service when the process that started it is gone, however it went (``kill -9`` included).

Run by path as ``python -I -S orphan_reaper.py TOKEN OWNER_PID GRACE``, one per service, in a session of its own; it
uses the standard library only. Its stdin is a pipe whose other end only the owner holds: ``pgid N`` (the service's
process group), ``done`` (nothing to do), or the end of file (the owner died: SIGTERM, GRACE seconds, SIGKILL)."""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

TOKEN_VARIABLE = "ATROPOS_VERL_SERVICE_TOKEN"
"""Environment variable that marks a service and its descendants."""
_POLL_SECONDS = 0.5


def carriers(token: str) -> list[int]:
    """Living processes of this user that carry ``token``. Empty where there is no ``/proc``."""
    marker = f"{TOKEN_VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):  # a zombie's environ is empty
                found.append(int(entry.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def signal_service(pgid: int | None, token: str, signum: int) -> None:
    if pgid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: only zombies left (macOS)
            os.killpg(pgid, signum)
    for pid in carriers(token):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Once each: a server takes the second SIGTERM as "at once".
            if pgid is None or os.getpgid(pid) != pgid:
                os.kill(pid, signum)


def _is_gone(pgid: int | None, token: str) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if pgid is not None:
            os.killpg(pgid, 0)
            return False
    return not carriers(token)


def watch(token: str, owner: int, grace: float) -> None:
    """Wait for "done" or the owner's death; see the module docstring."""
    text, pgid = b"", None
    while True:
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if readable:
            piece = os.read(0, 4096)
            text += piece
            *lines, text = text.split(b"\n")
            for line in lines:
                if line == b"done":
                    return
                if line.startswith(b"pgid "):
                    pgid = int(line[5:])
            if not piece:
                break
        # A process that the owner forked without exec would hold the pipe open after the owner's death.
        if os.getppid() != owner:
            break
    signal_service(pgid, token, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and not _is_gone(pgid, token):
        time.sleep(0.05)
    if not _is_gone(pgid, token):
        signal_service(pgid, token, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
