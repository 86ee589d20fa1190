"""What a launch shows: one live screen on a terminal, plain lines anywhere else. Drawn from ``state.json``'s content.

The same drawing serves the launcher itself and ``attach`` in a second terminal.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from atropos_verl.report.format import count, decimal, duration, seconds, sparkline

__all__ = ["LaunchView", "render_state"]

_NOTES_SHOWN = 6
_CURVE_WIDTH = 60
_LIVING = ("waiting", "starting", "running", "restarting")
_STYLES = {"running": "green", "ended": "green", "failed": "bold red", "restarting": "yellow", "starting": "cyan"}


class LaunchView:
    """``with LaunchView() as view``: notes and steps as they come, the state as it changes.

    On a terminal the state is one live table and notes scroll above it; elsewhere notes and steps are plain lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._state: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._frame, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def note(self, text: str) -> None:
        """Something that stays on the screen."""
        self._print(text)

    def step(self, line: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """A trained step: a line of ``metrics.jsonl``."""
        self._state = state
        if self._live is None:
            self._print(step_line(line, int(state.get("steps", 0))))

    def update(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def _print(self, text: str) -> None:
        if not self._console.encoding.lower().startswith("utf"):
            text = text.encode("ascii", "backslashreplace").decode()
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _frame(self) -> RenderableType:
        return render_state(self._state, width=self._console.width) if self._state else Text("starting …")


def step_line(line: Mapping[str, Any], steps: int) -> str:
    """``step 3/40  reward 0.512  loss -0.0312  500 tok/s  rollout 0.17s  train 0.40s  sync 0.06s  weights v3``."""
    return (
        f"step {line.get('step')}/{steps}  reward {decimal(line.get('reward/mean'))}  "
        f"loss {decimal(line.get('loss'), 4)}  {count(line.get('perf/trained_tokens_per_second'))} tok/s  "
        f"rollout {seconds(line.get('timing/rollout'))}s  train {seconds(line.get('timing/train'))}s  "
        f"sync {seconds(line.get('timing/sync'))}s  weights v{line.get('policy_version')}"
    )


def render_state(state: Mapping[str, Any], *, width: int = 100, notes: int = 0) -> RenderableType:
    """The screen for one state; ``notes``: how many of the newest notes to add below."""
    parts: list[RenderableType] = [_services(state), Text(_flow(state), no_wrap=True, overflow="ellipsis")]
    recent = deque(state.get("recent") or (), maxlen=1)
    if recent:
        line = step_line(recent[0], int(state.get("steps", 0)))
        # The line above has the policy version too; on a narrow screen it is the one to spare.
        line = line if len(line) <= width else line.rsplit("  ", 1)[0]
        parts.append(Text(line, no_wrap=True, overflow="ellipsis"))
        curve = sparkline(state.get("rewards") or (), min(_CURVE_WIDTH, max(10, width - 20)))
        parts.append(Text(f"reward {curve}", no_wrap=True, overflow="crop"))
    silent = state.get("seconds_since_step")
    since = "" if silent is None else f", last step {duration(silent)} ago"
    parts.append(Text(f"up {duration(state.get('seconds'))}{since}, {state.get('run_dir')}", style="dim"))
    kept = list(state.get("notes") or ())[-notes:] if notes else []
    parts += [Text(note.splitlines()[0], style="dim", no_wrap=True, overflow="ellipsis") for note in kept if note]
    return Group(*parts)


def _services(state: Mapping[str, Any]) -> Table:
    services = state.get("services", [])
    longest = max((len(str(service.get("name"))) for service in services), default=0)
    # The reason takes what the others leave; without their widths it would take theirs.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", expand=True)
    table.add_column("service", no_wrap=True, min_width=min(max(longest, 7), 24))
    table.add_column("state", no_wrap=True, min_width=10)
    table.add_column("pid", justify="right", no_wrap=True, min_width=7)
    table.add_column("up", justify="right", no_wrap=True, min_width=7)
    table.add_column("restarts", justify="right", no_wrap=True, min_width=8)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for service in services:
        word = str(service.get("state"))
        table.add_row(
            Text(str(service.get("name"))),
            Text(word, style=_STYLES.get(word, "")),
            str(service.get("pid") or "-"),
            duration(service.get("seconds")),
            str(service.get("restarts", 0)),
            Text(str(service.get("detail") or "").splitlines()[0] if service.get("detail") else ""),
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


def age(state: Mapping[str, Any]) -> float:
    """Seconds since the state was written."""
    return max(0.0, time.time() - float(state.get("time", 0.0)))
