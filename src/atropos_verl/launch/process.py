"""Runs one child process with its descendants: a log, its exit status, an end that leaves nothing behind."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from atropos_verl.errors import ServiceError
from atropos_verl.launch import orphan_reaper
from atropos_verl.storage import write_atomic
from atropos_verl.verl_plugin import RANK_VARIABLES

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
_KILL_SECONDS = 5.0
"""Time that the kernel gets to end a process after SIGKILL (it may hang in a device or network file system)."""
_ORPHAN_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.02
_LOG_BYTES = 1 << 20
_TAIL_LINE_LENGTH = 500
_KEY_VARIABLES = ("ATROPOS_API_TOKEN", "ATROPOS_GATEWAY_KEY")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """A command to run as a service, and when to start it again."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path
    log_path: Path
    """stdout and stderr are appended to it; its directory is made. A supervisor numbers ``NAME.1.log``."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Written before each start, readable by the owner only: for keys, which must not show in the process list."""
    kind: Literal["api", "trainer", "environment", "evaluation"] = "evaluation"
    restarts: int = 0
    startup_timeout: float = 60.0
    restart_words: tuple[str, ...] = ()
    registers_as: str = ""
    """The name under which an environment registers at the trajectory API."""
    secrets: tuple[str, ...] = ()
    """Blotted out in its log: Atropos prints its whole configuration."""


def describe_exit(returncode: int) -> str:
    """Says how a process ended: ``exited with code 3``, ``was killed by SIGKILL``."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    name = next((known.name for known in signal.Signals if known == -returncode), f"signal {-returncode}")
    hint = " (by hand, or by the kernel for want of memory: see dmesg)" if -returncode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _inherited() -> dict[str, str]:
    """The environment without what torchrun, or another launcher, said of ranks to this process: a library of a child
    that reads them would wait for the others. Nor has it keys of the shell's: who needs one is given it."""
    hidden = (*RANK_VARIABLES, *_KEY_VARIABLES)
    return {
        name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("TORCHELASTIC_")
    }


class ManagedProcess:
    """A service: a child in a session of its own, together with everything it starts. When this process dies without
    ``stop()``, even by ``kill -9``, or drops this object, the orphan reaper ends the service. Not thread-safe: use it
    from one thread at a time."""

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self._token = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._checked = 0
        self.log_start = 0
        """Where the log of this life begins, in bytes."""

    @property
    def pid(self) -> int | None:
        """Also the id of its process group; None before ``start()``."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; negative: minus the signal's number; None: not started, or still running."""
        return None if self._process is None else self._process.returncode

    def start(self) -> None:
        """Start it, stdin from ``/dev/null``. Raises ``ServiceError`` when that cannot be done, or was before."""
        if self._process is not None:
            raise ServiceError(f"{self.spec.name} was already started", self.spec.name)
        try:
            # First the reaper: from the first moment of its life the service carries the token it looks for.
            self._start_reaper()
            self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            for path, content in self.spec.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content, private=True)
            with open(self.spec.log_path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as log:
                self.log_start = self._checked = log.tell()
                self._process = subprocess.Popen(
                    self.spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.spec.cwd,
                    env={**_inherited(), **self.spec.env, orphan_reaper.TOKEN_VARIABLE: self._token},
                    start_new_session=True,
                )
        except OSError as error:
            self._release_reaper()
            where = f" {error.filename}" if error.filename else ""
            text = f"{error.strerror}:{where} (command {self.spec.command[0]}, directory {self.spec.cwd})"
            raise ServiceError(f"cannot start {self.spec.name}: {text}", self.spec.name) from error
        assert self._reaper is not None and self._reaper.stdin is not None
        try:
            self._reaper.stdin.write(f"pgid {self._process.pid}\n".encode())
        except OSError as error:
            logger.warning("the orphan reaper of %s is gone (%s): it would survive a kill -9", self.spec.name, error)
        logger.info("%s started with pid %d, log %s", self.spec.name, self._process.pid, self.spec.log_path)

    def is_running(self) -> bool:
        """True while it lives; else its descendants are killed. Also blots secrets out of what was written since."""
        self._checked = blot_out(self.spec.log_path, self.spec.secrets, self._checked)
        if self._process is None or self._process.returncode is not None:
            return False
        if has_ended := self._leader_has_ended():
            self._reap()
        return not has_ended

    def log_tail(self, lines: int = 20) -> str:
        """The last ``lines`` lines that it wrote since ``start()``, without terminal escapes, long lines cut."""
        blot_out(self.spec.log_path, self.spec.secrets, self._checked)
        text = read_tail(self.spec.log_path, self.log_start)
        kept = [_ESCAPES.sub("", line).rstrip() for line in text.replace("\r\n", "\n").splitlines()[-lines:]]
        return "\n".join(line if len(line) <= _TAIL_LINE_LENGTH else f"{line[:_TAIL_LINE_LENGTH]}…" for line in kept)

    def bound_log(self, most: int) -> None:
        """Move the log to ``LOG.old`` when it has more than ``most`` bytes. What is written meanwhile may be lost."""
        path = self.spec.log_path
        old = path.with_name(f"{path.name}.old")
        try:
            if path.stat().st_size > most:
                blot_out(path, self.spec.secrets, self._checked)
                old.touch(0o600)
                shutil.copyfile(path, old)
                os.truncate(path, 0)  # the service appends
                self.log_start = self._checked = 0
        except OSError as error:
            logger.warning("%s cannot be shortened: %s", path, error)

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """SIGTERM to it and all it started, up to ``grace`` seconds, SIGKILL, reap. Safe at any time, and again."""
        stop_all([self], grace)

    def _signal(self, signum: int) -> None:
        if self._process is not None and self._process.returncode is None:
            orphan_reaper.signal_service(self._process.pid, self._token, signum)

    def _has_ended(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            return True
        if not self._leader_has_ended() or orphan_reaper.carriers(self._token):
            return False
        for process in psutil.process_iter():  # those of the group whose variables are their own carry no token
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                is_member = os.getpgid(process.pid) == self._process.pid
                if is_member and process.status() != psutil.STATUS_ZOMBIE:  # nobody can end that but its parent
                    return False
        return True

    def _reap(self) -> None:
        """Kill what is left, then collect the exit status: in this order, the group's id cannot have been reused."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            try:
                self._process.wait(timeout=_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                logger.error("%s (pid %d) does not end after SIGKILL", self.spec.name, self._process.pid)
                return
        blot_out(self.spec.log_path, self.spec.secrets, self._checked)
        self._release_reaper()

    def _leader_has_ended(self) -> bool:
        assert self._process is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else reaped it
            return self._process.poll() is not None

    def _start_reaper(self) -> None:
        arguments = (self._token, str(os.getpid()), str(_ORPHAN_GRACE_SECONDS))
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", orphan_reaper.__file__, *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Without the token that we ourselves may carry: who ends us by it must not end what cleans up after us.
            env={name: value for name, value in os.environ.items() if name != orphan_reaper.TOKEN_VARIABLE},
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )

    def _release_reaper(self) -> None:
        if self._reaper is not None:
            try:
                self._reaper.communicate(b"done\n", timeout=_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                self._reaper.kill()
                self._reaper.wait(timeout=_KILL_SECONDS)
        self._reaper = None


@contextlib.contextmanager
def ended_with_this_process() -> Iterator[None]:
    """What the block starts by other means than ``ManagedProcess`` (Ray) is ended when this process is killed."""
    if orphan_reaper.TOKEN_VARIABLE in os.environ:  # somebody does that for this process and all that it starts
        yield
        return
    guard = ManagedProcess(ServiceSpec(name="what this process started", command=(), cwd=Path(), log_path=Path()))
    guard._start_reaper()
    os.environ[orphan_reaper.TOKEN_VARIABLE] = guard._token
    try:
        yield
    finally:
        del os.environ[orphan_reaper.TOKEN_VARIABLE]
        guard._release_reaper()


def stop_all(processes: Sequence[ManagedProcess], grace: float = GRACE_SECONDS) -> None:
    """End all of them in this order; they share one wait of ``grace`` seconds. Safe at any time, and again. A
    ``KeyboardInterrupt`` while waiting means "now": the rest is killed at once, and it is raised."""
    try:
        for process in processes:
            process._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while not all(process._has_ended() for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            process._signal(signal.SIGKILL)
        for process in processes:
            process._reap()


_UNWRITABLE: set[Path] = set()
"""Logs of which it was said that nothing can be blotted out."""


def blot_out(path: Path, secrets: Sequence[str], start: int = 0) -> int:
    """Overwrite ``secrets`` in a file from byte ``start`` on; returns where the next call starts. In place and of the
    same length, since its writer goes on appending. A line break within a secret is looked through: Atropos prints its
    settings with rich, which folds long lines."""
    if not secrets or not path.is_file():
        return start
    try:
        with path.open("r+b") as file:
            file.seek(start)
            content = file.read()
            for secret in secrets:
                for match in re.finditer(rb"\s*".join(re.escape(bytes([byte])) for byte in secret.encode()), content):
                    file.seek(start + match.start())
                    file.write(re.sub(rb"\S", b"*", match[0]))
    except OSError as error:  # tried again at the next look; a log does not end the run
        if path not in _UNWRITABLE:
            logger.warning("keys of the run may be left in %s: %s", path, error)
        _UNWRITABLE.add(path)
        return start
    return max(start, start + len(content) - 2 * max(map(len, secrets)))


def read_tail(path: Path, start: int = 0) -> str:
    """The log from byte ``start`` on, its last MB; all of it where it is shorter, and so was begun anew; "": none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start if start <= size else 0, size - _LOG_BYTES))
            return log.read().decode("utf-8", "replace")
    except OSError:
        return ""
