"""Shows a launch: the launcher's own view, and ``attach``, which reads ``state.json`` in a second terminal."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from atropos_verl.errors import ConfigError
from atropos_verl.report.console import CURVE_WIDTH, LiveScreen, step_line
from atropos_verl.report.format import count, duration, sparkline
from atropos_verl.report.trace_reader import TraceReader

_NOTES = 8
_LIVING = ("waiting", "starting", "running", "restarting")
_STYLES = {"running": "green", "ended": "green", "failed": "bold red", "restarting": "yellow", "starting": "cyan"}


class LaunchView(LiveScreen):
    """On a terminal the state is one live table, and notes scroll above it; elsewhere notes and steps are lines."""

    _state: Mapping[str, Any] | None = None

    def step(self, line: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Shows a trained step, which is a line of ``metrics.jsonl``."""
        self._state = state
        if self._live is None:
            self.note(_step_line(line, state))

    def update(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def _frame(self) -> RenderableType:
        return _render_state(self._state, width=self._console.width) if self._state else Text("starting …")


def _render_state(state: Mapping[str, Any], *, width: int, notes: int = 0) -> RenderableType:
    """Draws the screen for one state, with the newest ``notes`` notes below."""
    parts: list[RenderableType] = [_services(state), Text(_flow(state), no_wrap=True, overflow="ellipsis")]
    if recent := state.get("recent"):
        line = _step_line(recent[-1], state)
        # The line above has the policy version too; on a narrow screen it is the one to spare.
        line = line if len(line) <= width else line.rsplit("  ", 1)[0]
        parts.append(Text(line, no_wrap=True, overflow="ellipsis"))
        curve = sparkline(state.get("rewards") or (), min(CURVE_WIDTH, max(10, width - 20)))
        parts.append(Text(f"reward {curve}", no_wrap=True, overflow="crop"))
    silent = state.get("seconds_since_step")
    since = "" if silent is None else f", last step {duration(silent)} ago"
    parts.append(Text(f"up {duration(state.get('seconds'))}{since}, {state.get('run_dir')}", style="dim"))
    kept = list(state.get("notes") or ())[-notes:] if notes else []
    parts += [Text(note.splitlines()[0], style="dim", no_wrap=True, overflow="ellipsis") for note in kept if note]
    return Group(*parts)


def _step_line(line: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    return step_line(line, int(state.get("steps", 0)), without=("wait", "stale"))


def _services(state: Mapping[str, Any]) -> Table:
    services = state.get("services", [])
    longest = max((len(str(service.get("name"))) for service in services), default=0)
    # The reason takes what the others leave; without their widths it would take theirs.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", expand=True)
    table.add_column("service", no_wrap=True, min_width=min(max(longest, 7), 24))
    table.add_column("state", no_wrap=True, min_width=10)
    for name, least in (("pid", 7), ("up", 7), ("restarts", 8)):
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for service in services:
        word = str(service.get("state"))
        table.add_row(
            Text(str(service.get("name"))),
            Text(word, style=_STYLES.get(word, "")),
            str(service.get("pid") or "-"),
            duration(service.get("seconds")),
            str(service.get("restarts", 0)),
            Text(str(service.get("detail") or "").partition("\n")[0]),
        )
    return table


def _flow(state: Mapping[str, Any]) -> str:
    api, gateway, rates = state.get("api"), state.get("gateway"), state.get("rates") or {}
    left = f"queue {api.get('queue_size')} groups" if api else "API does not answer"
    if not any(service.get("state") in _LIVING for service in state.get("services", [])):
        return f"{left}  |  all ended"
    if not gateway:
        return f"{left}  |  gateway does not answer"
    speed = rates.get("tokens_per_second")
    return (
        f"{left}  |  gateway {'paused' if gateway.get('paused') else 'open'}, "
        f"{gateway.get('in_flight', 0)} in flight, {count(speed)} tok/s, policy v{gateway.get('policy_version')}"
    )


def attach(run_dir: Path, *, console: Console | None = None, once: bool = False, interval: float = 0.5) -> int:
    """Shows a launch until it ends, or ``once``, as without a terminal; ``interval``: seconds between looks.

    Returns 0; 1 when the launcher is gone without having ended its run in order. Raises ``ConfigError``: it is none.
    """
    console, reader = console or Console(), TraceReader(run_dir)

    def look() -> tuple[dict[str, Any], RenderableType]:
        live, path = reader.live(), run_dir / "state.json"
        if live["state"] is None:
            problem = "cannot be read" if path.exists() else "does not exist"
            raise ConfigError(f"{path} {problem}; is {run_dir} the run directory of a launch?")
        return live, _render_state(live["state"], width=console.width, notes=_NOTES)

    live, screen = look()
    if once or not console.is_terminal:
        console.print(screen)
    else:
        with Live(screen, console=console, refresh_per_second=4) as shown:
            while live["running"]:
                time.sleep(interval)
                live, screen = look()
                shown.update(screen)
    text, code, state = None, 0, live["state"]
    if live["ended"]:
        text = state.get("ending") or "the launch has ended"
    elif not live["running"]:
        text = f"the launcher (pid {state.get('pid')}) has written nothing for {live['age']:.0f} s: it was killed"
        code = 1
    if text is not None:
        console.print(text, markup=False, highlight=False)
    return code
