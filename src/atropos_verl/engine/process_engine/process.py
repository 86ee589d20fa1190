"""The engine's process itself: started, ended, and what is said when it ended by itself. Imports no torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from atropos_verl.engine.process_engine.messages import Channel, Reply

__all__ = ["EngineProcess", "anonymous_file"]

_CHILD = "atropos_verl.engine.process_engine.child"
_LOG_LINES = 8


def anonymous_file(name: str) -> int:
    """A descriptor of an empty file without a name; the caller closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:  # outside Linux
        return os.dup(file.fileno())


class EngineProcess:
    """A child that ends when the other end of its socket does. It imports what it needs and waits for a
    ``ProcessEngine``.

    Args:
        log_path: where its output goes; None: where this process's goes.
    """

    def __init__(self, log_path: Path | None = None) -> None:
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log_path
        ours, theirs = socket.socketpair()
        self.buffers = [anonymous_file(f"atropos-verl-weights-{i}") for i in range(2)]
        inherited = [theirs.fileno(), *self.buffers]
        # -P: what lies in the working directory is no place to import from.
        command = [sys.executable, "-P", "-m", _CHILD, *map(str, inherited)]
        # A Ctrl-C in the terminal reaches the child too, which ignores it as soon as it can; held back until then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            with contextlib.ExitStack() as stack:
                log = None if log_path is None else stack.enter_context(log_path.open("ab"))
                self._popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=inherited
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.channel = Channel(ours, Reply)
        atexit.register(self.end, 5.0)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def close_buffers(self) -> None:
        """The mappings stay; the descriptors are not needed any more."""
        while self.buffers:
            os.close(self.buffers.pop())

    def end(self, timeout: float) -> None:
        """End it, by force after ``timeout`` seconds. Idempotent."""
        atexit.unregister(self.end)
        self.channel.shut()
        self.close_buffers()
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def how_it_ended(self) -> str:
        """After its end of the socket was closed: waits for it (by force if need be) and says what happened."""
        try:
            code = self._popen.wait(5.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = f"the engine's process (pid {self.pid}) {how}"
        if code == -signal.SIGKILL:
            said += " (which is also what the system does when memory runs out)"
        if self._log_path is None:
            return said
        lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        tail = "".join(f"\n    {line}" for line in lines)
        return f"{said}; its output is in {self._log_path}" + (f", which ends with{tail}" if tail else " (empty)")
