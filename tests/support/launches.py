"""Launches as users start them: ``launch_atropos_verl.py`` in a process of its own, watched from outside.

::

    with LaunchRun([*SMALL_LAUNCH, "steps=60"], run_dir=tmp_path / "run") as run:
        run.wait_for_trained(3)
        os.kill(run.pid_of("demo"), signal.SIGKILL)
        assert run.wait() == 0
        run.assert_nothing_left()
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.runs import REPOSITORY, TrainingRun

LAUNCH = REPOSITORY / "recipe" / "atropos" / "launch_atropos_verl.py"

SMALL_LAUNCH = ("batch_size=16", "group_size=4", "supervise.backoff=0.2", "eval.before=false", "eval.after=false")
"""Steps of about 0.3 s on two cores."""


class LaunchRun(TrainingRun):
    """One launch; what ``TrainingRun`` offers, and a look into ``state.json``."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        run_dir: Path,
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        super().__init__(words, run_dir=run_dir, env=env, cwd=cwd)
        self.command = [*prefix, self.command[0], str(LAUNCH), *words, f"run_dir={run_dir}"]

    def state(self) -> dict[str, Any]:
        """The newest ``state.json``; {} before the first."""
        assert self.run_dir is not None
        path = self.run_dir / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def service(self, name: str) -> dict[str, Any]:
        """Reads the launcher's state of one service; {} before it says anything."""
        return next((entry for entry in self.state().get("services", []) if entry["name"] == name), {})

    def pid_of(self, name: str) -> int:
        """The living process of a service."""
        self.wait_until(lambda: bool(self.service(name).get("pid")), f"a process of {name}", 60.0)
        return int(self.service(name)["pid"])

    def wait_for_state(self, name: str, state: str, timeout: float = 60.0) -> None:
        self.wait_until(lambda: self.service(name).get("state") == state, f"{name} {state}", timeout)

    def wait_for_restart(self, name: str, count: int, timeout: float = 60.0) -> None:
        """Until ``name`` was restarted ``count`` times and is running again."""
        self.wait_until(
            lambda: self.service(name).get("restarts", 0) >= count and self.service(name)["state"] == "running",
            f"restart {count} of {name}",
            timeout,
        )

    def trained(self) -> int:
        """The newest trained step."""
        lines = self.metrics()
        return int(lines[-1]["step"]) if lines else 0

    def wait_for_trained(self, step: int, timeout: float = 120.0) -> None:
        self.wait_until(lambda: self.trained() >= step, f"step {step} in metrics.jsonl", timeout)

    def wait_for_more(self, steps: int, timeout: float = 120.0) -> None:
        """Until ``steps`` more steps than now are trained."""
        self.wait_for_trained(self.trained() + steps, timeout)
