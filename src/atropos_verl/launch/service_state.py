"""One service of a launch over all its lives: start, death, backoff, the next start, giving up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from atropos_verl.config.schema import SuperviseConfig
from atropos_verl.errors import ServiceError
from atropos_verl.launch.process import GRACE_SECONDS, ManagedProcess, describe_exit
from atropos_verl.launch.spec import Service

__all__ = ["WatchedService"]

logger = logging.getLogger(__name__)


_EXCUSED = 4
"""Times ``max_restarts`` after which deaths that others caused count as well."""


class WatchedService:
    """States::

        waiting ── start() ──► starting ── is_ready() ──► running
           ▲                      │ dies                     │ dies
           │  backoff over        ▼                          ▼
           └────────────────── restarting ◄──────────────────┘
                                  │ too often
                                  ▼
        ended (exit 0)         failed              stopped (by us)

    ``log_path`` of the Nth start is ``logs/NAME.N.log``.
    """

    def __init__(self, service: Service, policy: SuperviseConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.service = service
        self.state = "waiting"
        self.detail = ""
        self.starts = 0
        self.deaths = 0
        self.returncode: int | None = None
        self.started_at = 0.0
        """``clock()`` of the last start, seconds."""
        self.process: ManagedProcess | None = None
        self._policy = policy
        self._clock = clock
        self._streak = 0
        self._due = 0.0
        self._number_logs()

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def lives(self) -> bool:
        """A process of it exists."""
        return self.state in ("starting", "running")

    @property
    def has_future(self) -> bool:
        """It lives, or will be started (again)."""
        return self.state in ("waiting", "starting", "running", "restarting")

    @property
    def is_due(self) -> bool:
        return self.state == "waiting" or (self.state == "restarting" and self._clock() >= self._due)

    def start(self, extra: tuple[str, ...] = ()) -> None:
        """Start it, with ``extra`` words at the end of its command. Raises ``ServiceError`` as ``ManagedProcess``."""
        self.starts += 1
        spec = replace(
            self.service.spec,
            command=(*self.service.spec.command, *extra),
            log_path=self._log_path(self.starts + self._earlier_logs),
        )
        self.process = ManagedProcess(spec)
        self.state, self.detail = "starting", ""
        self.started_at = self._clock()
        self.process.start()

    def set_ready(self) -> None:
        if self.state == "starting":
            self.state = "running"

    def has_died(self) -> bool:
        """Whether it has died since the last call; ``returncode`` is then set. Call ``plan_restart`` next."""
        if not self.lives or self.process is None or self.process.is_running():
            return False
        self.returncode = self.process.returncode
        self.deaths += 1
        self.state = "failed"
        self.detail = self.death()
        return True

    def death(self) -> str:
        """How its last life ended, in words."""
        return "" if self.returncode is None else describe_exit(self.returncode)

    def plan_restart(self, *, excused: bool = False) -> float | None:
        """After a death: seconds until the next start; None: it was restarted too often, and is given up.

        Args:
            excused: another service caused it; does not count (within reason).
        """
        if self._clock() - self.started_at >= self._policy.healthy_after:
            self._streak = 0
        if not excused or self.deaths > _EXCUSED * (self.service.restarts + 1):
            self._streak += 1
        if self.service.restarts == 0 or self._streak > self.service.restarts:
            self.state = "failed"
            return None
        delay: float = min(self._policy.backoff * 2.0 ** max(0, self._streak - 1), self._policy.max_backoff)
        self._due = self._clock() + delay
        self.state = "restarting"
        return delay

    def start_anew(self) -> None:
        """It is to be started as soon as it may; no death of it is counted. Its process must have been ended."""
        if self.lives or self.state == "restarting":
            self.state, self.detail = "waiting", ""

    def fail(self, why: str) -> None:
        """Give it up: end its process, never start it again."""
        self.stop()
        self.state, self.detail = "failed", why

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End its process, if there is one."""
        if self.process is not None:
            self.process.stop(grace)
        if self.has_future:
            self.state = "stopped"

    def log_tail(self, lines: int = 12) -> str:
        return "" if self.process is None else self.process.log_tail(lines)

    def error(self, message: str) -> ServiceError:
        """``message`` with the last lines of its log."""
        return ServiceError(message, self.name, self.returncode, self.log_tail())

    def describe(self) -> dict[str, Any]:
        """For the state file."""
        lives = self.lives and self.process is not None
        return {
            "name": self.name,
            "kind": self.service.kind,
            "state": self.state,
            "pid": self.process.pid if lives and self.process else None,
            "restarts": max(0, self.starts - 1),
            "seconds": round(self._clock() - self.started_at, 1) if lives else None,
            "detail": self.detail,
            "log": str(self.process.spec.log_path) if self.process else None,
        }

    def _number_logs(self) -> None:
        # A run that is resumed keeps the logs of the launch before.
        self._earlier_logs = 0
        while self._log_path(self._earlier_logs + 1).exists():
            self._earlier_logs += 1

    def _log_path(self, number: int) -> Path:
        return self.service.spec.log_path.with_name(f"{self.name}.{number}.log")
