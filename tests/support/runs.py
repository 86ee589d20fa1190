"""Training runs as users start them: ``main_atropos.py`` in a process of its own, watched from outside.

::

    with TrainingRun(["steps=1000", *SMALL], run_dir=tmp_path / "run") as run:
        run.wait_for_step(3)
        run.process_of("environment").kill()
        assert run.wait() == 1
        run.assert_nothing_left()

Every process of a run inherits a mark in its environment, so that those whose parent died are found as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = REPOSITORY / "recipe" / "atropos" / "main_atropos.py"

SMALL = ("batch_size=16", "group_size=4", "eval.before=false", "eval.after=false")
"""Steps of about 0.3 s on two cores."""

_MARK = "ATROPOS_VERL_TEST_RUN"
_COMMANDS = {
    "trajectory_api": ("atropos_verl.cli serve-api", "atroposlib.cli.run_api"),
    "environment": ("spell_backward.py",),
}


class TrainingRun:
    """One run. Leaving the ``with`` block kills whatever of it is left, whether the test passed or not.

    ``launcher`` stands between the interpreter and the script, such as torchrun's module and options. ``env`` is added
    to the environment; the variables that the run itself reads are not inherited.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        run_dir: Path | None = None,
        launcher: Sequence[str] = (),
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._token = secrets.token_hex(8)
        self._seen: dict[int, psutil.Process] = {}
        place = [] if run_dir is None else [f"run_dir={run_dir}"]
        self.command = [sys.executable, *launcher, str(MAIN), *words, *place]
        own = {_MARK: self._token, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), **(env or {})}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ATROPOS_")}
        self._environment = {**inherited, **own}
        self._cwd = cwd or (run_dir.parent if run_dir is not None else REPOSITORY)
        # Files rather than pipes: nobody has to read them while the run goes on, and a dead run's are still there.
        self._stem = self._cwd / f"output_{self._token}"

    def __enter__(self) -> Self:
        with self._file("out").open("wb") as out, self._file("err").open("wb") as err:
            self.popen = subprocess.Popen(
                self.command,
                cwd=self._cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._seen.values(), *self._marked()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the time of creation: never a process that reuses the id
        self.popen.kill()
        self.popen.wait(timeout=20.0)

    @property
    def stdout(self) -> str:
        return _text(self._file("out"))

    @property
    def stderr(self) -> str:
        return _text(self._file("err"))

    def log(self, name: str) -> str:
        """The log of one of its processes, ``""`` when there is none yet."""
        assert self.run_dir is not None
        return _text(self.run_dir / "logs" / f"{name}.log")

    def metrics(self) -> list[dict[str, Any]]:
        assert self.run_dir is not None
        return metrics_of(self.run_dir)

    # ------------------------------------------------------------------ waiting, each with its limit in seconds

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        """Poll; a run that ends first, or takes longer, fails the test with all that it said."""
        deadline = time.monotonic() + timeout
        while True:
            # Before the condition: what a run leaves with its last breath counts, also when it dies between the two.
            code = self.popen.poll()
            if condition():
                return
            self._note_processes()
            assert code is None, f"it ended with code {code} before {what}\n{self._said()}"
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}\n{self._said()}"
            time.sleep(0.05)

    def wait_for_step(self, step: int, timeout: float = 120.0) -> None:
        """Until this process has written the line of ``step`` (lines that an earlier run left are older than it)."""
        self.wait_until(lambda: f"\nstep {step}/" in f"\n{self.stdout}", f"step {step}", timeout)

    def wait_for_output(self, text: str, timeout: float = 120.0) -> None:
        self.wait_until(lambda: text in self.stdout, f"the output {text!r}", timeout)

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code. Fails the test when it does not end within ``timeout`` seconds."""
        self.wait_until(lambda: self.popen.poll() is not None, "its end", timeout)
        return self.popen.returncode

    # ------------------------------------------------------------------ its processes

    def process_of(self, service: str) -> psutil.Process:
        """The living process of ``trajectory_api`` or ``environment``: the one that leads its session."""
        for process in self._marked():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                command = " ".join(process.cmdline())
                if any(part in command for part in _COMMANDS[service]) and os.getsid(process.pid) == process.pid:
                    return process
        raise AssertionError(f"no process of {service}\n{self._said()}")

    def interrupt(self, signum: signal.Signals) -> None:
        """To the trainer alone, as ``kill`` does."""
        self.popen.send_signal(signum)

    def interrupt_group(self, signum: signal.Signals) -> None:
        """To its whole process group, as a Ctrl-C in a terminal does."""
        os.killpg(self.popen.pid, signum)

    def living(self) -> list[str]:
        """Every process of the run that is alive, in words."""
        found = {process.pid: process for process in [*self._seen.values(), *self._marked()]}
        alive = []
        for process in found.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(f"{process.pid}: {' '.join(process.cmdline())[:160]}")
        return alive

    def assert_nothing_left(self, within: float = 10.0) -> None:
        """No process of this run is alive, by pid; ``within`` seconds for what ends by itself. None was overlooked:
        at least the trainer was seen."""
        deadline = time.monotonic() + within
        while (alive := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive, f"{within:g} s after the end of the run these are alive:\n" + "\n".join(alive)
        assert self.popen.poll() is not None

    @property
    def processes_seen(self) -> int:
        """Counts the different processes that this run had while it was watched."""
        return len(self._seen)

    def _note_processes(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.popen.pid)
            for process in [root, *root.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._token:
                    found.append(process)
        return found

    def _file(self, kind: str) -> Path:
        return self._stem.with_suffix(f".{kind}")

    def _said(self) -> str:
        return f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-3000:]}"


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a number that is not finite is not JSON and fails here."""

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} in metrics.jsonl")

    lines = _text(run_dir / "metrics.jsonl").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def checkpointed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 when there is none."""
    return int(_text(run_dir / "checkpoints" / "latest_checkpointed_iteration.txt") or 0)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _python_path() -> str:
    return os.pathsep.join(p for p in (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")) if p)
