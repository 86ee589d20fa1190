"""Starts the services of a plan in order, watches them, restarts them, and ends them all.

One loop, a tick every fifth of a second, nothing in it waits; what asks over HTTP is the ``Poller``'s thread.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from atropos_verl.errors import ServiceError
from atropos_verl.launch.diagnosis import diagnose
from atropos_verl.launch.evaluation import EvaluationWatch
from atropos_verl.launch.probes import Poller, connected_entries, disconnect_environment, environments_of
from atropos_verl.launch.process import ProcessSet
from atropos_verl.launch.progress import StepTail
from atropos_verl.launch.rundir import DISK_FULL_BYTES, compose_state, write_state
from atropos_verl.launch.service_state import WatchedService
from atropos_verl.launch.spec import LaunchPlan

__all__ = ["Supervisor", "View"]

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_STATE_SECONDS = 0.5
_AFTERMATH_SECONDS = 20.0
"""Seconds after an absence of the API in which others' deaths are its fault."""
_KEPT_NOTES = 30
_TRAINER_CONFIG_ERROR = 2


class View(Protocol):
    """Where a launch is shown."""

    def note(self, text: str) -> None: ...

    def step(self, line: Mapping[str, Any], state: Mapping[str, Any]) -> None: ...

    def update(self, state: Mapping[str, Any]) -> None: ...


class Supervisor:
    """``run()`` is the whole life of a launch; ``interrupt()`` may come from a signal handler."""

    def __init__(self, plan: LaunchPlan, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.view = view
        supervise = plan.config.supervise
        self.services = [WatchedService(service, supervise, clock) for service in plan.services]
        self._api = self._one("api")
        self._trainer = self._one("trainer")
        self._environments = [watched for watched in self.services if watched.service.kind == "environment"]
        config = plan.config
        self._poller = Poller(
            plan.addresses.api_url,
            plan.addresses.probe_url,
            api_token=config.atropos.token,
            gateway_key=config.gateway.api_key,
            model_name=plan.model_name,
        )
        self._evaluations = EvaluationWatch(plan.run_dir)
        self._steps = StepTail(plan.run_dir / "metrics.jsonl", clock)
        self._clock = clock
        self._interrupts = 0
        self._wake = threading.Event()
        self._notes: deque[str] = deque(maxlen=_KEPT_NOTES)
        self._started = clock()
        self._api_lost_at = 0.0
        self._said: set[str] = set()
        self._stall_since = 0.0
        self._stall_wait = 0.0
        self._state_at = 0.0
        self._state_writable = True
        self._ending = ""

    # ------------------------------------------------------------------ the life of a launch

    def run(self) -> int:
        """Returns the exit code: 0 done, 2 the trainer refused its configuration, 130 interrupted.

        Raises:
            ServiceError: a service that the run cannot do without is gone for good. All others are ended then.
            KeyboardInterrupt: a second interrupt; everything was killed.
        """
        for warning in self.plan.warnings:
            self._note(f"warning: {warning}")
        self._poller.start()
        try:
            while True:
                code = self._tick()
                if code is not None:
                    return code
                self._wake.wait(_TICK_SECONDS)
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

    def _tick(self) -> int | None:
        if self._interrupts:
            self._note("stopping: the trainer writes its checkpoint (interrupt again to end at once)")
            return 130
        for line in self._steps.poll():
            self.view.step(line, self.state())
        for text in self._evaluations.poll():
            self._note(text)
        code = self._bury()
        if code is not None:
            return code
        self._advance()
        self._start_due()
        self._watch_for_stall()
        if self._clock() - self._state_at >= _STATE_SECONDS:
            self._publish()
        return None

    def _end(self) -> None:
        """Trainer first, which may take its time for a checkpoint, then all others together."""
        try:
            if self._trainer is not None:
                self._trainer.stop(self.plan.launch.trainer_process.stop_grace)
            self._poller.stop()
        finally:
            remaining = ProcessSet()
            for watched in self.services:
                if watched.process is not None and watched.process.returncode is None:
                    remaining.add(watched.process)
            remaining.stop_all(0.0 if self._interrupts > 1 else 5.0)
            for watched in self.services:
                if watched.has_future:
                    watched.state = "stopped"
            for line in self._steps.poll():
                self.view.step(line, self.state())
            for text in self._evaluations.poll():
                self._note(text)
            self._publish()

    # ------------------------------------------------------------------ starting

    def _start_due(self) -> None:
        if not self._api_answers():
            if "api" in self._said:
                self._api_lost_at = self._clock()
            if self._api is not None and self._api.is_due:
                self._start(self._api)
            return
        for watched in (*self._environments, *([self._trainer] if self._trainer else [])):
            if watched.is_due:
                self._start(watched)

    def _start(self, watched: WatchedService) -> None:
        again = watched.starts > 0
        if watched is self._api:
            self._poller.expect_new_api()
        extra: tuple[str, ...] = ()
        if watched is self._trainer:
            self._poller.expect_new_gateway()
            self._said -= {"gateway", "generation"}
            extra = watched.service.restart_words if again else ()
        watched.start(extra)
        self._note(
            f"{'restarting' if again else 'starting'} {watched.name} (log {watched.process.spec.log_path})"
            if watched.process
            else watched.name
        )

    def _api_answers(self) -> bool:
        if self._api is not None and not self._api.lives:
            return False
        return self._poller.seen.api is not None

    # ------------------------------------------------------------------ readiness

    def _advance(self) -> None:
        """Move services from starting to running by what the probes saw; fail what takes too long."""
        seen, now = self._poller.seen, self._clock()
        if self._api is not None and self._api.state == "starting":
            if seen.api is not None:
                self._api.set_ready()
                self._say("api", f"trajectory API ready at {self.plan.addresses.api_url}")
            elif now - self._api.started_at > self._api.service.startup_timeout:
                raise self._api.error(_late(self._api, "/status does not answer"))
        never_seen = self._api is None and not seen.api_at
        if never_seen and now - self._started > self.plan.launch.api.startup_timeout:
            raise ServiceError(f"no trajectory API answers at {self.plan.addresses.api_url}", "trajectory_api")
        self._advance_trainer(now)
        if self._trainer is None or seen.generated_at:
            for watched in self._environments:
                self._advance_environment(watched, now)

    def _advance_trainer(self, now: float) -> None:
        trainer, seen = self._trainer, self._poller.seen
        if trainer is None or trainer.state != "starting":
            return
        settings = self.plan.launch.trainer_process
        if seen.gateway_at and "gateway" not in self._said:
            self._say("gateway", f"inference gateway ready at {self.plan.addresses.gateway_url}")
        if seen.generated_at or self._has_trained_since(trainer.started_at):
            trainer.set_ready()
            self._say("generation", "the policy answers: first generation done")
        elif not seen.gateway_at:
            if now - trainer.started_at > settings.startup_timeout:
                raise trainer.error(_late(trainer, f"no gateway at {self.plan.addresses.gateway_url}"))
        elif now - trainer.started_at > settings.startup_timeout + settings.generation_timeout:
            raise trainer.error(_late(trainer, "the gateway is up but generates nothing"))

    def _advance_environment(self, watched: WatchedService, now: float) -> None:
        if watched.state != "starting":
            return
        if self._is_registered(watched):
            watched.set_ready()
            self._say(f"registered {watched.name} {watched.starts}", f"environment {watched.name} takes part")
            return
        since = max(watched.started_at, self._poller.seen.generated_at)
        if now - since <= watched.service.startup_timeout:
            return
        why = _late(watched, "it has not registered at the API")
        tail = watched.log_tail()
        watched.fail(why)
        if not any(other.has_future for other in self._environments):
            raise ServiceError(f"{why}, and no other environment is left", watched.name, None, tail)
        self._note(f"{why}; the run goes on with the others\n{tail}")

    def _is_registered(self, watched: WatchedService) -> bool:
        api = self._poller.seen.api
        if environments_of(api) is not None:
            return bool(connected_entries(api, watched.name))
        # Upstream's API does not say who is there; groups of anybody are the only sign of life.
        return bool(api and (api.get("queue_size") or self._has_trained_since(watched.started_at)))

    def _has_trained_since(self, moment: float) -> bool:
        return self._steps.last_at is not None and self._steps.last_at > moment

    # ------------------------------------------------------------------ deaths

    def _bury(self) -> int | None:
        """See who has died and decide what follows. Returns an exit code when the run is over."""
        for watched in self.services:
            if not watched.has_died():
                continue
            if watched is self._trainer:
                if watched.returncode == 0:
                    watched.state, watched.detail = "ended", ""
                    return 0
                if watched.returncode == _TRAINER_CONFIG_ERROR:
                    self._note(f"the trainer refuses its configuration\n{watched.log_tail()}")
                    return 2
            if watched.service.kind == "environment":
                self._disconnect(watched)
            self._check_disk(watched)
            if watched is self._api and self.plan.config.atropos.server == "upstream":
                self._forget(watched)
            self._plan_restart(watched, excused=watched is not self._api and self._api_is_to_blame())
        return None

    def _api_is_to_blame(self) -> bool:
        """Whether the API went away just now: environments end when it does, and the trainer may."""
        if "api" not in self._said:
            return False
        gone = not self._api_answers() or (self._api is not None and self._api.state != "running")
        return gone or (self._api_lost_at > 0 and self._clock() - self._api_lost_at < _AFTERMATH_SECONDS)

    def _plan_restart(self, watched: WatchedService, *, excused: bool) -> None:
        tail = watched.log_tail(6)
        delay = watched.plan_restart(excused=excused)
        if delay is not None:
            resume = ", to go on from its newest checkpoint" if watched is self._trainer else ""
            text = f"{watched.name} {watched.death()}; restarting it in {delay:g} s{resume}"
            self._note(f"{text}\n{_indented(tail)}" if tail else text)
            return
        count = f" for the {_ordinal(watched.deaths)} time" if watched.deaths > 1 else ""
        message = f"{watched.name} {watched.death()}{count}"
        if watched.service.kind != "environment":
            raise watched.error(f"{message}; its policy allows no further restart (max_restarts, on_death)")
        if not any(other.has_future for other in self._environments):
            raise watched.error(f"{message} and is given up; no environment is left")
        self._note(f"{message} and is given up; the run goes on with the others\n{_indented(tail)}")

    def _forget(self, api: WatchedService) -> None:
        """Upstream's API comes back knowing nobody, and groups that reach it before the trainer registers brick it for
        good: so those that it knew end before it is restarted, and are started again when it answers."""
        if api.service.restarts:
            self._note("upstream's API forgets everything when it dies: trainer and environments start anew")
        known = ProcessSet()
        for watched in self._environments:
            if watched.lives and watched.process is not None:
                known.add(watched.process)
        known.stop_all()
        for watched in self._environments:
            watched.start_anew()
        if self._trainer is not None:
            if self._trainer.process is not None:
                self._trainer.process.stop(self.plan.launch.trainer_process.stop_grace)
            self._trainer.start_anew()

    def _disconnect(self, watched: WatchedService) -> None:
        """A dead environment would keep its share of every batch at the API until that gives it up."""
        for item in connected_entries(self._poller.seen.api, watched.name):
            if isinstance(item.get("env_id"), int):
                disconnect_environment(self.plan.addresses.api_url, item["env_id"], self.plan.config.atropos.token)

    def _check_disk(self, watched: WatchedService) -> None:
        try:
            free = shutil.disk_usage(self.plan.run_dir).free
        except OSError as error:
            raise watched.error(f"{watched.name} {watched.death()}: {self.plan.run_dir}: {error}") from error
        if free < DISK_FULL_BYTES:
            raise watched.error(
                f"{watched.name} {watched.death()}: the disk of {self.plan.run_dir} is full ({free} bytes free). "
                "Make room; the same command with the same run_dir goes on"
            )

    # ------------------------------------------------------------------ stalls, state

    def _watch_for_stall(self) -> None:
        if self._trainer is None or self._trainer.state != "running":
            return
        now, limit = self._clock(), self.plan.config.supervise.stall_after
        since = max(self._poller.seen.generated_at, self._trainer.started_at, self._steps.last_at or 0.0)
        if self._evaluations.running:
            since = now
        if since > self._stall_since:
            self._stall_since, self._stall_wait = since, limit
        if now - since >= self._stall_wait:
            self._stall_wait *= 2  # a long stall shall not fill the screen
            self._note(diagnose(self.state(), now - since))

    def state(self) -> dict[str, Any]:
        """What is shown, and written to ``run_dir/state.json`` for ``attach``."""
        return compose_state(
            self.plan,
            services=[watched.describe() for watched in self.services],
            seen=self._poller.seen,
            steps=self._steps,
            notes=self._notes,
            ending=self._ending,
            seconds=self._clock() - self._started,
            clock=self._clock,
        )

    def _publish(self) -> None:
        self._state_at = self._clock()
        state = self.state()
        self.view.update(state)
        try:
            write_state(self.plan.run_dir, state)
            self._state_writable = True
        except OSError as error:
            if self._state_writable:
                self._note(f"cannot write {self.plan.run_dir}/state.json: {error.strerror or error}")
            self._state_writable = False

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._note(text)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        logger.info("%s", text)
        self.view.note(text)

    def _one(self, kind: str) -> WatchedService | None:
        return next((watched for watched in self.services if watched.service.kind == kind), None)


def _late(watched: WatchedService, what: str) -> str:
    return f"{watched.name} was not ready {watched.service.startup_timeout:g} s after its start: {what}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
