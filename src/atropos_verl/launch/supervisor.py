"""Starts the services of a plan in order, watches them, restarts them, and ends them all; nothing in its loop waits."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from atropos_verl.config.schema import SuperviseConfig
from atropos_verl.errors import ServiceError
from atropos_verl.launch.evaluation import EvaluationWatch
from atropos_verl.launch.plan import DISK_FULL_BYTES, LaunchPlan
from atropos_verl.launch.probes import (
    LogFacts,
    Poller,
    StepWatch,
    common_errors,
    connected_entries,
    diagnose,
    environments_of,
    last_refusals,
    request_json,
)
from atropos_verl.launch.process import GRACE_SECONDS, ManagedProcess, ServiceSpec, describe_exit, read_tail, stop_all
from atropos_verl.storage import write_atomic

if TYPE_CHECKING:
    from atropos_verl.report.console import LaunchView

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_API_POLL_SECONDS = 0.05
_AFTERMATH_SECONDS = 20.0
"""Seconds after an absence of the API in which others' deaths are its fault."""
_KEPT_NOTES = 30
_FIRST_STALL_SECONDS = 20.0
"""Without a first batch the diagnosis is shown after these, or after ``supervise.stall_after`` where that is less."""
_TRAINER_CONFIG_ERROR = 2
_LETTER = re.compile(r"[^\W\d_]")


class WatchedService:
    """One service over all its lives: waiting, starting, running, after a death restarting; at the end failed (given
    up), ended (exit 0) or stopped (by us)."""

    def __init__(self, spec: ServiceSpec, policy: SuperviseConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self.state = "waiting"
        self.detail = ""
        self.starts = 0
        self.deaths = 0
        self.returncode: int | None = None
        self.started_at = 0.0
        self.process: ManagedProcess | None = None
        self.log_path: Path | None = None
        self._policy = policy
        self._clock = clock
        self._streak = 0
        self._due = 0.0
        self._was_ready = False
        self._last_error: int | None = None
        self.cannot_start = False
        """It exited with the same error twice in a row, and never was ready."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_alive(self) -> bool:
        return self.state in ("starting", "running")

    @property
    def has_future(self) -> bool:
        return self.is_alive or self.state in ("waiting", "restarting")

    @property
    def is_due(self) -> bool:
        return self.state == "waiting" or (self.state == "restarting" and self._clock() >= self._due)

    def start(self) -> None:
        """Start it (again). Raises ``ServiceError`` as ``ManagedProcess``."""
        self.starts += 1
        path = self.spec.log_path
        if path.suffixes[-2:] == [".1", ".log"]:  # a run that is resumed keeps the logs of the launch before
            numbered = (path.with_name(f"{self.name}.{number}.log") for number in itertools.count(1))
            path = next(place for place in numbered if not place.exists())
        self.log_path = path
        command = (*self.spec.command, *(self.spec.restart_words if self.starts > 1 else ()))
        self.process = ManagedProcess(replace(self.spec, command=command, log_path=path))
        self.state, self.detail = "starting", ""
        self.started_at = self._clock()
        self.process.start()

    def set_ready(self) -> None:
        if self.state == "starting":
            self.state, self._was_ready = "running", True

    def has_died(self) -> bool:
        """True when it has died since the last call; ``returncode`` is then set. Call ``plan_restart`` next."""
        if self.process is not None:
            self.process.bound_log(self._policy.log_bytes)
        if not self.is_alive or self.process is None or self.process.is_running():
            return False
        self.returncode = self.process.returncode
        self.deaths += 1
        self.state = "failed"
        self.detail = self.death()
        return True

    def death(self) -> str:
        if self.returncode == 0 and self.spec.kind == "environment" and not self._was_ready:
            return "ended with code 0 without having registered (does it end with MyEnv.cli()?)"
        return "" if self.returncode is None else describe_exit(self.returncode)

    def plan_restart(self, *, excused: bool = False) -> float | None:
        """After a death: seconds until the next start; None: it is given up, restarted too often or unable to start.
        A death that is ``excused``, since another service caused it, does not count."""
        if self._clock() - self.started_at >= self._policy.healthy_after:
            self._streak, self._last_error = 0, None
        error = self.returncode if self.returncode and self.returncode > 0 and not excused else None
        self.cannot_start = error is not None and error == self._last_error and not self._was_ready
        self._last_error = error
        self._streak += not excused
        if self.spec.restarts == 0 or self._streak > self.spec.restarts or self.cannot_start:
            self.state = "failed"
            return None
        delay: float = min(self._policy.backoff * 2.0 ** max(0, self._streak - 1), self._policy.max_backoff)
        self._due = self._clock() + delay
        self.state = "restarting"
        return delay

    def end(self, state: str, detail: str = "") -> None:
        """End its process; ``state``: failed (given up), or waiting (it is to be started as soon as it may)."""
        if self.process is not None:
            self.process.stop()
        self.state, self.detail = state, detail

    def log_tail(self, lines: int = 12) -> str:
        return "" if self.process is None else self.process.log_tail(lines)

    def error(self, message: str) -> ServiceError:
        return ServiceError(message, self.name, self.returncode, self.log_tail())

    def describe(self) -> dict[str, Any]:
        process = self.process
        return {
            "name": self.name,
            "kind": self.spec.kind,
            "state": self.state,
            "pid": process.pid if process and self.is_alive else None,
            "restarts": max(0, self.starts - 1),
            "seconds": round(self._clock() - self.started_at, 1) if process and self.is_alive else None,
            "detail": self.detail,
            "log": str(self.log_path) if process else None,
        }


class Supervisor:
    """The life of a launch, which calls ``run()``, and ``interrupt()`` from its signal handlers. A process that trains
    itself has no ``view``, and calls ``start_api()``, ``start()``, ``check()`` while it waits for batches, and
    ``stop()``."""

    def __init__(self, plan: LaunchPlan, tell: Callable[[str], None], view: LaunchView | None = None) -> None:
        self.plan = plan
        self._tell = tell
        self._view = view
        self.services = [WatchedService(spec, plan.config.supervise) for spec in plan.services]
        by_kind = {watched.spec.kind: watched for watched in self.services}
        self._api, self._trainer = by_kind.get("api"), by_kind.get("trainer")
        self._environments = [watched for watched in self.services if watched.spec.kind == "environment"]
        self._poller = Poller(plan.config, plan.probe_url, generates=not plan.trains_here)
        self._evaluations = EvaluationWatch(plan.run_dir)
        self._steps = StepWatch(plan.run_dir / "metrics.jsonl")
        self._interrupts = 0
        self._wake = threading.Event()
        self._notes: deque[str] = deque(maxlen=_KEPT_NOTES)
        self._started = time.monotonic()
        self._api_lost_at = 0.0
        self._said: set[str] = set()
        self._evaluated_at = 0.0
        """When a held-out evaluation was last seen to be waited for."""
        self._stall_since = 0.0
        self._stall_wait = 0.0
        self._counted: dict[str, int] = {}
        # Its gateway's warnings are in its own log; on Ray, in the task runner's.
        self._trainer_logs = [plan.run_dir / "logs" / name for name in ("trainer.log", "task_runner.log")]
        self._log_sizes = {path: path.stat().st_size for path in self._trainer_logs if path.exists()}
        """Where a diagnosis begins to read: an earlier run in this directory is not to blame."""
        self._is_over = False
        self.diagnosis = ""
        """Why no batch has come; "" while they come."""
        self._ending = ""
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._failure: BaseException | None = None
        self._note(f"to see it in a browser: atropos-verl view {shlex.quote(str(plan.run_dir))}")
        for warning in plan.warnings:
            self._note(f"warning: {warning}")

    def run(self) -> int:
        """Returns the exit code: 0 done, 2 the trainer refused its configuration, 130 interrupted. Raises
        ``ServiceError`` when a service is gone for good that the run needs, ``KeyboardInterrupt`` at the second."""
        self._poller.start()
        try:
            while (code := self._tick()) is None:
                self._wake.wait(_TICK_SECONDS)
            return code
        except ServiceError as error:
            self._ending = str(error)
            raise
        finally:
            self._end()

    def interrupt(self) -> None:
        """Ctrl-C: the first time a clean stop with a checkpoint, the second time at once (``KeyboardInterrupt``)."""
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._wake.set()

    def start_api(self) -> None:
        """Start the trajectory API and wait until it answers. Raises ``ServiceError`` when it does not."""
        assert self._api is not None
        self._start(self._api)
        while not self._poller.ask_api():
            if self._api.has_died():
                raise self._api.error(f"{self._api.name} {self._api.death()}")
            self._advance()
            time.sleep(_API_POLL_SECONDS)
        self._advance()

    def start(self) -> None:
        """Start the environments, then watch everything from a thread."""
        self._tick()
        self._poller.start()
        self._thread.start()

    def check(self) -> None:
        """Raise what ended the watching: a service that the run cannot do without is gone for good."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the watching, then every service. Safe at any time, and again."""
        self._wake.set()
        try:
            if self._thread.is_alive():
                self._thread.join()
        finally:
            self._end()

    def _watch(self) -> None:
        try:
            while not self._wake.wait(_TICK_SECONDS):
                self._tick()
        except BaseException as error:  # noqa: BLE001 - raised by check(), in the trainer's thread
            logger.error("the supervisor gives up: %s", error)
            self._failure = error

    def _tick(self) -> int | None:
        if self._interrupts:
            self._note("stopping: the trainer writes its checkpoint (interrupt again to end at once)")
            return 130
        self._show_news()
        if (code := self._handle_deaths()) is not None:
            return code
        self._advance()
        self._start_due()
        self._watch_for_stall()
        self._publish()
        return None

    def _show_news(self) -> None:
        if lines := self._steps.poll():
            self._counted, self.diagnosis = self._counts(), ""
            logs = [watched.log_path for watched in self._environments]
            self._log_sizes |= {path: path.stat().st_size for path in logs if path is not None and path.exists()}
        for line in lines:
            if self._view is not None:
                self._view.step(line, self.state())
        for text in self._evaluations.poll():
            self._inform(text)

    def _end(self) -> None:
        """Trainer first, which may take its time for a checkpoint, then all others together."""
        try:
            silent, was_over, self._is_over = self._silent_seconds(), self._is_over, True
            if self.diagnosis and silent and not was_over:  # for the final error, while what it looks at is there
                self.diagnosis = diagnose(self.state(), silent, self._facts(), going_on=False)
            self._stop_trainer()
            self._poller.stop()
        finally:
            _stop(self.services, 0.0 if self._interrupts > 1 else GRACE_SECONDS)
            for watched in self.services:
                if watched.has_future:
                    watched.state = "stopped"
            self._show_news()
            self._publish()

    def _stop_trainer(self) -> None:
        if self._trainer is not None and self._trainer.process is not None:
            self._trainer.process.stop(self.plan.launch.trainer_process.stop_grace)

    def _start_due(self) -> None:
        if self._api_answers():
            for watched in (*self._environments, *filter(None, [self._trainer])):
                if watched.is_due:
                    self._start(watched)
            return
        if "api" in self._said:
            self._api_lost_at = time.monotonic()
        if self._api is not None and self._api.is_due:
            self._start(self._api)

    def _start(self, watched: WatchedService) -> None:
        if watched is self._api:
            self._poller.api = None
        if watched is self._trainer:
            self._poller.expect_new_gateway()
            self._said -= {"gateway", "generation"}
        watched.start()
        assert watched.process is not None and watched.log_path is not None
        self._log_sizes.setdefault(watched.log_path, watched.process.log_start)
        self._inform(f"{'restarting' if watched.starts > 1 else 'starting'} {watched.name} (log {watched.log_path})")

    def _api_answers(self) -> bool:
        return self._poller.api is not None and (self._api is None or self._api.is_alive)

    def _advance(self) -> None:
        """Move services from starting to running by what the probes saw; fail what takes too long."""
        seen, now = self._poller, time.monotonic()
        if self._api is not None and self._api.state == "starting":
            if seen.api is not None:
                self._api.set_ready()
                if "api" not in self._said and self._environments:
                    # A resumed API remembers environments, which ended with the run before. Until it misses them the
                    # new ones would be given a share beside them.
                    self._disconnect(environments_of(seen.api) or [])
                self._say("api", f"trajectory API ready at {self.plan.api_url}")
            elif now - self._api.started_at > self._api.spec.startup_timeout:
                raise self._api.error(_late(self._api, "/status does not answer"))
        never_seen = self._api is None and not seen.api_at
        if never_seen and now - self._started > self.plan.launch.api.startup_timeout:
            raise ServiceError(f"no trajectory API answers at {self.plan.api_url}", "trajectory_api")
        self._advance_trainer(now)
        if seen.generated_at or not (self._trainer or self.plan.trains_here):
            for watched in self._environments:
                self._advance_environment(watched, now)

    def _advance_trainer(self, now: float) -> None:
        trainer, seen = self._trainer, self._poller
        if trainer is None or trainer.state != "starting":
            return
        settings = self.plan.launch.trainer_process
        limit, why = settings.startup_timeout, f"no gateway at {self.plan.gateway_url}"
        if seen.gateway_at:
            self._say("gateway", f"inference gateway ready at {self.plan.gateway_url}")
            limit, why = limit + settings.generation_timeout, "the gateway is up but generates nothing"
        if seen.generated_at or self._has_trained_since(trainer.started_at):
            trainer.set_ready()
            self._say("generation", "the policy answers: first generation done")
        elif now - trainer.started_at > limit:
            raise trainer.error(_late(trainer, why))

    def _advance_environment(self, watched: WatchedService, now: float) -> None:
        if watched.state != "starting":
            return
        api = self._poller.api or {}
        # Upstream's API does not say who is there; groups of anybody are the only sign of life.
        is_there = bool(api and (api.get("queue_size") or self._has_trained_since(watched.started_at)))
        if environments_of(api) is not None:
            is_there = bool(connected_entries(api, watched.spec.registers_as))
        if is_there:
            watched.set_ready()
            self._say(f"registered {watched.name} {watched.starts}", f"environment {watched.name} takes part")
        elif now - max(watched.started_at, self._poller.generated_at) > watched.spec.startup_timeout:
            why, tail = _late(watched, "it has not registered at the API"), watched.log_tail()
            watched.end("failed", why)
            if not any(other.has_future for other in self._environments):
                raise ServiceError(f"{why}, and no other environment is left", watched.name, None, tail)
            self._note(f"{why}; the run goes on with the others\n{tail}")

    def _has_trained_since(self, moment: float) -> bool:
        return self._steps.last_at is not None and self._steps.last_at > moment

    def _handle_deaths(self) -> int | None:
        """Decide what follows from each death. Returns an exit code when the run is over."""
        for watched in filter(WatchedService.has_died, self.services):
            if watched is self._trainer and watched.returncode == 0:
                watched.state, watched.detail = "ended", ""
                return 0
            if watched is self._trainer and watched.returncode == _TRAINER_CONFIG_ERROR:
                self._note(f"the trainer refuses its configuration\n{watched.log_tail()}")
                return 2
            if watched.spec.kind == "environment":
                # A dead environment would keep its share of every batch at the API until that gives it up.
                self._disconnect(connected_entries(self._poller.api, watched.spec.registers_as))
            if (free := shutil.disk_usage(self.plan.run_dir).free) < DISK_FULL_BYTES:
                text = f"the disk of {self.plan.run_dir} is full ({free} bytes free); make room, and start it again"
                raise watched.error(f"{watched.name} {watched.death()}: {text}")
            if watched is self._api and self.plan.config.atropos.server == "upstream":
                self._forget(watched)
            self._plan_restart(watched, excused=watched is not self._api and self._api_is_to_blame())
        return None

    def _api_is_to_blame(self) -> bool:
        """True when the API went away just now: environments end when it does, and the trainer may."""
        if "api" not in self._said:
            return False
        gone = not self._api_answers() or (self._api is not None and self._api.state != "running")
        return gone or (self._api_lost_at > 0 and time.monotonic() - self._api_lost_at < _AFTERMATH_SECONDS)

    def _plan_restart(self, watched: WatchedService, *, excused: bool) -> None:
        tail = watched.log_tail(6)
        delay = watched.plan_restart(excused=excused)
        if delay is not None:
            resume = ", to go on from its newest checkpoint" if watched is self._trainer else ""
            text = f"{watched.name} {watched.death()}; restarting it in {delay:g} s{resume}"
            self._note(f"{text}\n{indent(tail, '    ')}" if tail else text)
            return
        message = f"{watched.name} {watched.death()}" + (f" ({watched.deaths} deaths)" if watched.deaths > 1 else "")
        if watched.spec.kind != "environment":
            limit = "its policy allows no further restart (max_restarts, on_death)"
            raise watched.error(f"{message}; {'it cannot start' if watched.cannot_start else limit}")
        if not any(other.has_future for other in self._environments):
            raise watched.error(f"{message} and is given up; no environment is left")
        self._note(f"{message} and is given up; the run goes on with the others\n{indent(tail, '    ')}")

    def _forget(self, api: WatchedService) -> None:
        """Upstream's API comes back knowing nobody, and groups that reach it before the trainer registers brick it for
        good: so those that it knew end before it is restarted, and are started again when it answers."""
        if api.spec.restarts:
            self._note("upstream's API forgets everything when it dies: trainer and environments start anew")
        _stop(self._environments)
        self._stop_trainer()
        for watched in (*self._environments, *filter(None, [self._trainer])):
            if watched.is_alive or watched.state == "restarting":
                watched.end("waiting")

    def _disconnect(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Tell the API that environments are gone: a dead one keeps its weight and its allocation."""
        for item in entries:
            if isinstance(item.get("env_id"), int):
                url, token = f"{self.plan.api_url}/disconnect-env", self.plan.config.atropos.token
                request_json(url, token=token, body={"env_id": item["env_id"]})

    def _watch_for_stall(self) -> None:
        silent, limit = self._silent_seconds(), self.plan.config.supervise.stall_after
        if silent is None:
            return
        since = time.monotonic() - silent
        if since > self._stall_since + _TICK_SECONDS:
            came = max(self._poller.batch_at, self._steps.last_at or 0.0)
            if came > self._stall_since:
                self.diagnosis = ""
            self._stall_since = since
            self._stall_wait = limit if came else min(limit, _FIRST_STALL_SECONDS)
        if silent >= self._stall_wait:
            self._stall_wait *= 2  # a long stall shall not fill the screen
            self.diagnosis = diagnose(self.state(), silent, self._facts())
            self._note(self.diagnosis)

    def _silent_seconds(self) -> float | None:
        """Seconds for which a batch has been awaited; None: none is."""
        seen, trainer = self._poller, self._trainer
        is_awaited = seen.generated_at > 0 if self.plan.trains_here else trainer and trainer.state == "running"
        if not is_awaited:
            return None
        if self._evaluations.running:
            self._evaluated_at = time.monotonic()
            return 0.0
        started = self._started if trainer is None else trainer.started_at
        last_step = self._steps.last_at or 0.0
        return time.monotonic() - max(seen.generated_at, started, seen.batch_at, last_step, self._evaluated_at)

    def _counts(self) -> dict[str, int]:
        api = self._poller.api or {}
        rows = sum(int(item.get("refused") or 0) for item in environments_of(api) or ())
        return {
            "groups": int((api.get("totals") or {}).get("groups") or 0),
            "refused_groups": max(rows, sum((api.get("refused") or {}).values())),
            "served": self._poller.served,
            "refused": self._poller.refused,
        }

    def _facts(self) -> LogFacts:
        def read(path: Path | None) -> str:
            return "" if path is None else read_tail(path, self._log_sizes.get(path, 0))

        errors = {watched.name: common_errors(read(watched.log_path)) for watched in self._environments}
        # Of a pretty-printed value that ends in lone brackets, the last line with a letter.
        lines = {
            watched.name: [*filter(_LETTER.search, watched.log_tail().splitlines())] for watched in self._environments
        }
        endings = {name: found[-1] for name, found in lines.items() if found}
        of_api = last_refusals(read(None if self._api is None else self._api.log_path))
        return LogFacts(errors, last_refusals("".join(map(read, self._trainer_logs))), of_api, endings)

    def state(self) -> dict[str, Any]:
        """The state that a view shows, ``run_dir/state.json`` holds and a diagnosis rests on."""
        seen, steps, now = self._poller, self._steps, time.monotonic()
        services = [watched.describe() for watched in self.services]
        before, counts = self._counted, self._counts()
        # A counter that is less than before has begun at 0 again.
        since = {
            name: count - (before.get(name, 0) if count >= before.get(name, 0) else 0) for name, count in counts.items()
        }
        if self.plan.trains_here:
            word = "ended" if self._is_over else "running"
            services.append({"name": "trainer", "kind": "trainer", "state": word, "pid": os.getpid(), "restarts": 0})
        return {
            "time": time.time(),
            "pid": os.getpid(),
            "run_dir": str(self.plan.run_dir),
            "seconds": round(now - self._started, 1),
            "steps": self.plan.config.steps,
            "batch_size": self.plan.config.batch_size,
            "services": services,
            "api_url": self.plan.api_url,
            "gateway_url": self.plan.gateway_url,
            "api": seen.api,
            "gateway": seen.gateway,
            "rates": {"tokens_per_second": seen.tokens_per_second, "requests_per_second": seen.requests_per_second},
            "since": since,
            "step": steps.step,
            "recent": list(steps.recent),
            "rewards": list(steps.rewards),
            "seconds_since_step": None if steps.last_at is None else round(now - steps.last_at, 1),
            "notes": list(self._notes),
            "diagnosis": self.diagnosis,
            "ending": self._ending,
        }

    def _publish(self) -> None:
        """Show the state, if there is a view; replace ``state.json``: a reader sees the old one or the new one."""
        state = self.state()
        if self._view is not None:
            self._view.update(state)
        path = self.plan.run_dir / "state.json"
        try:
            write_atomic(path, json.dumps(state, default=str), private=True)
        except OSError as error:
            self._say("state.json", f"cannot write {path}: {error.strerror or error}")

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._inform(text)

    def _inform(self, text: str) -> None:
        """Note what goes as it should. A trainer of this process says that itself."""
        (logger.info if self.plan.trains_here else self._note)(text)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        logger.info("%s", text)
        self._tell(text)


def _stop(services: Sequence[WatchedService], grace: float = GRACE_SECONDS) -> None:
    stop_all([watched.process for watched in services[::-1] if watched.process is not None], grace)


def _late(watched: WatchedService, what: str) -> str:
    return f"{watched.name} was not ready {watched.spec.startup_timeout:g} s after its start: {what}"
