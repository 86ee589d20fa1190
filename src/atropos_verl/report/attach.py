"""``attach RUN_DIR``: watch a launch from a second terminal. Reads the run directory only, so it disturbs nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from atropos_verl.errors import ConfigError
from atropos_verl.report.launch_view import age, render_state

__all__ = ["attach", "read_state"]

_STALE_SECONDS = 10.0
"""A launcher writes its state twice a second."""
_NOTES = 8


def read_state(run_dir: Path) -> dict[str, Any]:
    """The newest state of a launch.

    Raises:
        ConfigError: ``run_dir`` holds none (it names what is missing).
    """
    path = run_dir / "state.json"
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {run_dir} the run directory of a launch?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path} is not the state of a launch")
    return state


def attach(run_dir: Path, *, console: Console | None = None, once: bool = False, interval: float = 0.5) -> int:
    """Show the launch in ``run_dir`` until it ends; Ctrl-C ends the watching only.

    Args:
        once: show it once; also what happens where standard output is no terminal.
        interval: seconds between looks.

    Returns:
        0; 1 when the launcher is gone without having ended its run in order.
    """
    console = console or Console()
    state = read_state(run_dir)
    if once or not console.is_terminal:
        console.print(render_state(state, width=console.width, notes=_NOTES))
        return _verdict(state, console)
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            live.update(render_state(state, width=console.width, notes=_NOTES))
            if _is_over(state) or age(state) > _STALE_SECONDS:
                break
            time.sleep(interval)
            state = read_state(run_dir)
    return _verdict(state, console)


def _is_over(state: dict[str, Any]) -> bool:
    return all(service.get("state") in ("ended", "stopped", "failed") for service in state.get("services", []))


def _verdict(state: dict[str, Any], console: Console) -> int:
    if _is_over(state):
        console.print(state.get("ending") or "the launch has ended", markup=False, highlight=False)
        return 0
    if age(state) > _STALE_SECONDS:
        text = f"the launcher (pid {state.get('pid')}) has written nothing for {age(state):.0f} s: it was killed"
        console.print(text, markup=False, highlight=False)
        return 1
    return 0
