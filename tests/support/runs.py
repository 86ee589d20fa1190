"""Training runs and launches as users start them: a script in a process of its own, watched from outside.

Every process of a run inherits a mark in its environment, so that those whose parent died are found as well.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = REPOSITORY / "recipe" / "atropos" / "main_atropos.py"
LAUNCH = REPOSITORY / "recipe" / "atropos" / "launch_atropos_verl.py"
LIMIT = 1000.0
"""Seconds after which a wait fails the test; nothing that works comes near it."""

SMALL = ("batch_size=16", "group_size=4", "supervise.backoff=0.2", "eval.before=false", "eval.after=false")
"""Steps of about 0.3 s on two cores."""

_MARK = "ATROPOS_VERL_TEST_RUN"


class TrainingRun:
    """One run. Leaving the ``with`` block kills whatever of it is left, whether the test passed or not.

    ``launcher`` stands between the interpreter and the script, such as torchrun's module and options; ``prefix`` before
    the interpreter. ``env`` is added to the environment; the variables that the run itself reads are not inherited.
    """

    script = MAIN

    def __init__(
        self,
        words: Sequence[str],
        *,
        run_dir: Path | None = None,
        prefix: Sequence[str] = (),
        launcher: Sequence[str] = (),
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.run_dir = run_dir or Path("no directory was given")
        self._token = secrets.token_hex(8)
        self._seen: dict[int, psutil.Process] = {}
        place = [] if run_dir is None else [f"run_dir={run_dir}"]
        self.command = [*prefix, sys.executable, *launcher, str(self.script), *words, *place]
        path = os.pathsep.join(p for p in (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")) if p)
        own = {_MARK: self._token, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("ATROPOS_")} | own
        self._cwd = cwd or (REPOSITORY if run_dir is None else run_dir.parent)
        # Files rather than pipes: nobody has to read them while the run goes on, and a dead run's are still there.
        self._files = [self._cwd / f"output_{self._token}.{kind}" for kind in ("out", "err")]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stdout, stderr = (stack.enter_context(file.open("wb")) for file in self._files)
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            options = {"cwd": self._cwd, "env": self._environment, "start_new_session": True}
            self.popen = subprocess.Popen(self.command, **options, **streams)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the time of creation: never a process that reuses the id
        self.popen.kill()
        self.popen.wait(timeout=20.0)

    @property
    def stdout(self) -> str:
        return _text(self._files[0])

    @property
    def stderr(self) -> str:
        return _text(self._files[1])

    def log(self, name: str) -> str:
        """The log of one of its processes, ``""`` when there is none yet."""
        return _text(self.run_dir / "logs" / f"{name}.log")

    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.run_dir)

    def trained(self) -> int:
        """The newest trained step."""
        lines = self.metrics()
        return int(lines[-1]["step"]) if lines else 0

    # ------------------------------------------------------------------ waiting

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll; a run that ends first, or takes longer, fails the test with all that it said."""
        deadline = time.monotonic() + LIMIT
        while True:
            # Before the condition: what a run leaves with its last breath counts, also when it dies between the two.
            code = self.popen.poll()
            if condition():
                return
            self._note_processes()
            assert code is None, f"it ended with code {code} before {what}\n{self._said()}"
            assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}\n{self._said()}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until this process has written the line of ``step`` (lines that an earlier run left are older than it)."""
        self.wait_until(lambda: f"\nstep {step}/" in f"\n{self.stdout}", f"step {step}")

    def wait_for_trained(self, step: int) -> None:
        """Until ``step`` is in ``metrics.jsonl``, whoever trained it."""
        self.wait_until(lambda: self.trained() >= step, f"step {step} in metrics.jsonl")

    def wait_for_more(self, steps: int) -> None:
        """Until ``steps`` more steps than now are trained."""
        self.wait_for_trained(self.trained() + steps)

    def wait_for_output(self, text: str, since: int = 0) -> None:
        """Until ``text`` is in the standard output, after its first ``since`` characters."""
        self.wait_until(lambda: text in self.stdout[since:], f"the output {text!r}")

    def must_end(self, code: int) -> None:
        """Wait for its end with this exit code; no process of it may be left."""
        self.wait_until(lambda: self.popen.poll() is not None, "its end")
        assert self.popen.returncode == code, self._said()
        deadline = time.monotonic() + 60.0
        while (alive := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive, "after the end of the run these are alive:\n" + "\n".join(alive)

    # ------------------------------------------------------------------ its processes

    def state(self) -> dict[str, Any]:
        """The newest ``state.json``; {} before the first."""
        return json.loads(_text(self.run_dir / "state.json") or "{}")

    def service(self, name: str) -> dict[str, Any]:
        """Reads the launcher's state of one service; {} before it says anything."""
        return next((entry for entry in self.state().get("services", []) if entry["name"] == name), {})

    def send(self, name: str, signum: signal.Signals) -> None:
        """Send a signal to the living process of a service."""
        self.wait_until(lambda: bool(self.service(name).get("pid")), f"a process of {name}")
        os.kill(int(self.service(name)["pid"]), signum)

    def kill_and_wait_for_restart(self, name: str) -> None:
        """SIGKILL a service, and wait until its successor runs."""
        before = self.service(name).get("restarts", 0)
        self.send(name, signal.SIGKILL)
        self.wait_until(
            lambda: self.service(name).get("restarts", 0) > before and self.service(name)["state"] == "running",
            f"a restart of {name}",
        )

    def kill_actor(self, name: str, number: int = 0) -> None:
        """SIGKILL to a Ray actor of this class, by age where there are several; waits for one."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [process for process, words in _alive(self._marked()) if words.startswith(f"ray::{name}")]
            return bool(found)

        self.wait_until(look, f"a process of {name}")
        victim = sorted(found, key=psutil.Process.create_time)[number % len(found)]
        victim.kill()
        victim.wait(timeout=60.0)

    def ctrl_c(self) -> None:
        """SIGINT to the whole process group, as a terminal sends it."""
        os.killpg(self.popen.pid, signal.SIGINT)

    def living(self) -> list[str]:
        """Every process of the run that is alive, in words."""
        return [f"{process.pid}: {words}" for process, words in _alive(self._processes())]

    @property
    def processes_seen(self) -> int:
        """Counts the different processes that this run had while it was watched."""
        return len(self._seen)

    def _note_processes(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.popen.pid)
            for process in [root, *root.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)

    def _processes(self) -> set[psutil.Process]:
        return {*self._seen.values(), *self._marked()}

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._token:
                    yield process

    def _said(self) -> str:
        return f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-3000:]}"


class LaunchRun(TrainingRun):
    script = LAUNCH


def _alive(processes: Iterable[psutil.Process]) -> Iterator[tuple[psutil.Process, str]]:
    """Each with its command."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                yield process, " ".join(process.cmdline())


def refused(script: Path, *words: str) -> str:
    """What a command that is refused before anything starts says."""
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a number that is not finite is not JSON and fails here."""

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} in metrics.jsonl")

    lines = _text(run_dir / "metrics.jsonl").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def journalled(run_dir: Path) -> list[str]:
    """Names of the batches that were fetched and that no checkpoint covers."""
    return sorted(path.name for path in (run_dir / "journal").glob("batch_0?????.json"))


def checkpointed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 when there is none."""
    return int(_text(run_dir / "checkpoints" / "latest_checkpointed_iteration.txt") or 0)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
