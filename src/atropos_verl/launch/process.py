"""One child process and its descendants: started with a log, watched, ended without leaving anything behind."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from atropos_verl.errors import ServiceError
from atropos_verl.launch import orphan_reaper as watcher
from atropos_verl.storage import write_atomic

__all__ = ["ManagedProcess", "ProcessSet", "ServiceSpec", "describe_exit"]

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
_KILL_SECONDS = 5.0
"""How long the kernel gets to end a process after SIGKILL (it may hang in a device or network file system)."""
_ORPHAN_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.02
_TAIL_BYTES = 65536
_TAIL_LINE_LENGTH = 500
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """A command to run as a service."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    cwd: Path
    log_path: Path
    """stdout and stderr are appended to it; its directory is made."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Written before each start, readable by the owner only: keys that shall not stand in the command."""


def describe_exit(returncode: int) -> str:
    """``exited with code 3``, ``was killed by SIGKILL``: the end of a process in words."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (by hand, or by the kernel for want of memory: see dmesg)" if -returncode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


class ManagedProcess:
    """A service: a child in a session of its own, together with everything it starts.

    States: new → ``start()`` → running → (dies, or ``stop()``) → ended; ``returncode`` is then set. When this process
    dies without ``stop()``, even by ``kill -9``, or drops this object, a watcher ends the service (see
    ``launch.watcher``). Not thread-safe: use it from one thread.
    """

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self._token = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id, which is also the id of its process group; None before ``start()``."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; negative: minus the signal's number; None: not started, or still running."""
        return None if self._process is None else self._process.returncode

    def start(self) -> None:
        """Start it, stdin from ``/dev/null``.

        Raises:
            ServiceError: the command or the directory does not exist, or cannot be used; or it was started before.
        """
        if self._process is not None:
            raise ServiceError(f"{self.spec.name} was already started", self.spec.name)
        try:
            # First the watcher: from the first moment of its life the service carries the token it looks for.
            self._start_watcher()
            self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            for path, content in self.spec.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content, private=True)
            with open(self.spec.log_path, "ab", opener=_private) as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    self.spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.spec.cwd,
                    env={**os.environ, **self.spec.env, watcher.TOKEN_VARIABLE: self._token},
                    start_new_session=True,
                )
        except OSError as error:
            self._release_watcher()
            where = f" {error.filename}" if error.filename else ""
            raise ServiceError(
                f"cannot start {self.spec.name}: {error.strerror}:{where} (command {self.spec.command[0]}, "
                f"directory {self.spec.cwd})",
                self.spec.name,
            ) from error
        self._tell_watcher(f"pgid {self._process.pid}\n")
        logger.info("%s started with pid %d, log %s", self.spec.name, self._process.pid, self.spec.log_path)

    def is_running(self) -> bool:
        """Whether it lives. When it has died, what it had started is killed, and ``returncode`` is set."""
        if self._process is None or self._process.returncode is not None:
            return False
        if not self._leader_has_ended():
            return True
        self._reap()
        return False

    def check(self) -> None:
        """Raise ``ServiceError`` (exit status in words, last log lines) if it has died. Nothing before ``start()``."""
        if self._process is None or self.is_running():
            return
        code = self._process.returncode
        raise ServiceError(
            f"{self.spec.name} (pid {self._process.pid}) {describe_exit(code)}; its log is {self.spec.log_path}",
            self.spec.name,
            code,
            self.log_tail(),
        )

    def log_tail(self, lines: int = 20) -> str:
        """The last ``lines`` lines that it wrote since ``start()``, without terminal escapes, long lines cut."""
        try:
            with self.spec.log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError as error:
            return f"(no log: {error})"
        kept = [_ESCAPES.sub("", line).rstrip() for line in text.replace("\r\n", "\n").splitlines()[-lines:]]
        return "\n".join(line if len(line) <= _TAIL_LINE_LENGTH else f"{line[:_TAIL_LINE_LENGTH]}…" for line in kept)

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """SIGTERM to it and all it started, up to ``grace`` seconds, SIGKILL, reap. Safe at any time, and again."""
        _stop_together([self], grace)

    # ------------------------------------------------------------------ the steps of stopping

    def _terminate(self) -> None:
        if self._process is not None and self._process.returncode is None:
            watcher.signal_service(self._process.pid, self._token, signal.SIGTERM)

    def _has_ended(self) -> bool:
        """The leader has, and no descendant is left."""
        if self._process is None or self._process.returncode is not None:
            return True
        return self._leader_has_ended() and not _members(self._process.pid) and not watcher.carriers(self._token)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            watcher.signal_service(self._process.pid, self._token, signal.SIGKILL)

    def _reap(self) -> None:
        """Kill what is left, then collect the exit status: in this order, the group's id cannot have been reused."""
        self._kill()
        if self._process is not None:
            try:
                self._process.wait(timeout=_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                logger.error("%s (pid %d) does not end after SIGKILL", self.spec.name, self._process.pid)
                return
        self._release_watcher()

    def _leader_has_ended(self) -> bool:
        assert self._process is not None
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else reaped it
            return self._process.poll() is not None

    # ------------------------------------------------------------------ the watcher

    def _start_watcher(self) -> None:
        # Without the token that we ourselves may carry: who ends us by it must not end what cleans up after us.
        environment = {name: value for name, value in os.environ.items() if name != watcher.TOKEN_VARIABLE}
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, self._token, str(os.getpid()), str(_ORPHAN_GRACE_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )

    def _tell_watcher(self, line: str) -> None:
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        try:
            self._watcher.stdin.write(line.encode())
            self._watcher.stdin.flush()
        except OSError as error:
            logger.warning("the watcher of %s is gone (%s): it would survive a kill -9", self.spec.name, error)

    def _release_watcher(self) -> None:
        if self._watcher is None:
            return
        self._tell_watcher("done\n")
        assert self._watcher.stdin is not None
        with contextlib.suppress(OSError):  # closing flushes once more into a pipe that may be broken
            self._watcher.stdin.close()
        try:
            self._watcher.wait(timeout=_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait(timeout=_KILL_SECONDS)
        self._watcher = None


class ProcessSet:
    """Several services that live and end together. As a context manager it ends them on the way out."""

    def __init__(self) -> None:
        self._processes: list[ManagedProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_all()

    def start(self, spec: ServiceSpec) -> ManagedProcess:
        """Add a service and start it. Raises ``ServiceError`` as ``ManagedProcess.start``."""
        process = ManagedProcess(spec)
        self.add(process)
        process.start()
        return process

    def add(self, process: ManagedProcess) -> None:
        """Take over a process, started or not. Raises ``ValueError`` when a service of that name is in the set."""
        if any(known.spec.name == process.spec.name for known in self._processes):
            raise ValueError(f"a service named {process.spec.name!r} is already in the set")
        self._processes.append(process)

    def check_all(self) -> None:
        """Raise ``ServiceError`` for the first service, in order of starting, that has died."""
        for process in self._processes:
            process.check()

    def pids(self) -> dict[str, int]:
        """Name → process id of every service that was started and not yet reaped."""
        return {p.spec.name: p.pid for p in self._processes if p.pid is not None and p.returncode is None}

    def stop_all(self, grace: float = GRACE_SECONDS) -> None:
        """End all, last started first; they share one wait of ``grace`` seconds. Safe at any time, and again.

        A ``KeyboardInterrupt`` while waiting means "now": the rest is killed at once, then it goes on up.
        """
        _stop_together(self._processes[::-1], grace)


def _stop_together(processes: list[ManagedProcess], grace: float) -> None:
    try:
        for process in processes:
            process._terminate()
        _wait(lambda: all(process._has_ended() for process in processes), grace)
    finally:  # also when Ctrl-C ends the wait
        for process in processes:
            process._kill()
        for process in processes:
            process._reap()


def _private(name: str, flags: int) -> int:
    # Atropos prints its whole configuration, the gateway's key included.
    return os.open(name, flags, 0o600)


def _wait(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _members(pgid: int) -> list[int]:
    """Living processes of a group; zombies do not count, nobody can end them but their parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found
