"""Shows a training run or a launch: a live table on a terminal, plain lines anywhere else, and a summary at the end."""

import itertools
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Self, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from atropos_verl.training.step import NO_SIGNAL
from atropos_verl.types import StepReport

logger = logging.getLogger(__name__)

CURVE_WIDTH = 60
_LOG_BYTES = 64 << 20
_RECENT_STEPS = 8
"""Rows of the live table."""
_ETA_STEPS = 20
"""Steps whose median time the estimate rests on."""


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drops what a full disk does not take. logging itself would print a traceback for each record."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def log_to_file(path: Path) -> None:
    """From now on our log goes to ``path``, from INFO on; what is older than 64 MB to ``path.1``, then nowhere."""
    handler = _LogFile(path, maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("atropos_verl").setLevel(logging.INFO)


class _Output:
    """A standard stream that goes on without its reader: what is written after that is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._or_drop(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._or_drop(self._stream.flush)

    def _or_drop(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:  # the reader of a pipe has ended, the terminal was closed, the disk is full
            logger.warning("%s cannot be written any more (%s): it is dropped", self._stream.name, error)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # what it has buffered, and what children write, goes there as well
            os.close(null)


@contextmanager
def output_may_close() -> Iterator[None]:
    """While the block runs, standard output and error may be closed, or have been: that ends nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # a file opened later would get its number, and all that children print
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Output(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class LiveScreen:
    """A screen that subclasses draw in ``_frame`` while its ``with`` block runs on a terminal; elsewhere there are
    plain lines only. What others print meanwhile appears above it: rich redirects stdout and stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._ascii_only = not self._console.encoding.lower().startswith("utf")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._live = Live(get_renderable=self._frame, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_live()

    def _stop_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def note(self, text: str) -> None:
        """Shows a text that stays on the screen."""
        if self._ascii_only:
            text = text.encode("ascii", "backslashreplace").decode()
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _frame(self) -> RenderableType:
        raise NotImplementedError


_COLUMNS = {
    "step": "step {}",
    "reward": "reward {}",
    "loss": "loss {}",
    "tok/s": "{} tok/s",
    "rollout": "rollout {}s",
    "train": "train {}s",
    "sync": "sync {}s",
    "wait": "wait {}s",
    "stale": "stale {}",
    "weights": "weights v{}",
}
"""Of the table → the cell in a plain line."""


def step_line(line: Mapping[str, Any], steps: int, *, without: tuple[str, ...] = ()) -> str:
    """Formats a line of ``metrics.jsonl`` as ``step 3/40  reward 0.512  loss -0.0312  …``, some columns left out."""
    cells = zip(_COLUMNS.items(), _cells(line, steps), strict=True)
    shown = [plain.format(cell) for (name, plain), cell in cells if name not in without]
    shown += [f"quarantined {line['data/quarantined']}"] if line.get("data/quarantined") else []
    return "  ".join([*shown, *(["every advantage is 0"] if teaches_nothing(line) else [])])


def teaches_nothing(line: Mapping[str, Any]) -> bool:
    """True for a step with trained tokens whose advantages are all 0."""
    return line.get("advantage/mean_abs") == 0 and bool(line.get("data/trained_tokens"))


def _cells(line: Mapping[str, Any], steps: int) -> list[str]:
    return [
        f"{line.get('step')}/{steps}",
        decimal(line.get("reward/mean")),
        decimal(line.get("loss"), 4),
        count(line.get("perf/trained_tokens_per_second")),
        *(seconds(line.get(f"timing/{phase}")) for phase in ("rollout", "train", "sync", "wait")),
        decimal(line.get("off_policy/staleness_mean"), 1),
        str(line.get("policy_version")),
    ]


class ProgressReporter(LiveScreen):
    """Shows a run while it goes on; without ``with``, on a dumb terminal, in a pipe or a file as plain lines without
    escape sequences. ``NO_COLOR`` and ``TERM`` are obeyed (by rich)."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        super().__init__(console)
        self.total_steps = total_steps
        self._recent: deque[list[str]] = deque(maxlen=_RECENT_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=_ETA_STEPS)
        self._curves: dict[str, list[float | None]] = {"reward": [], "held-out": []}
        self._quarantined = self._without_signal = 0
        self._done = 0
        self._phase = "starting"
        self._phase_since = time.monotonic()
        self._phases_said: set[str] = set()
        self._spinner = Spinner("line" if self._ascii_only else "dots")

    def phase(self, name: str) -> None:
        """Says what the run is doing now. As a plain line only the first time: phases recur with every step."""
        self._phase, self._phase_since = name, time.monotonic()
        if self._live is None and name not in self._phases_said:
            self._phases_said.add(name)
            self.note(f"{name} ...")

    def step(self, report: StepReport) -> None:
        """Shows a finished optimiser step."""
        self._done = report.step
        line = {**report.metrics, "step": report.step, "loss": report.loss, "policy_version": report.policy_version}
        self._recent.append(_cells(line, self.total_steps))
        self._curves["reward"].append(report.metrics.get("reward/mean"))
        if (score := report.metrics.get("held_out/score")) is not None:
            self._curves["held-out"].append(score)
        self._quarantined += int(line.get("data/quarantined") or 0)
        self._without_signal = self._without_signal + 1 if teaches_nothing(line) else 0
        if self._without_signal in (1, 10, 100):
            self.note(f"step {report.step}: {NO_SIGNAL} (steps in a row: {self._without_signal})")
        took = report.metrics.get("timing/step")
        if took is not None and math.isfinite(took):
            self._step_seconds.append(took)
        if self._live is None:
            self.note(f"{step_line(line, self.total_steps)}  eta {duration(self.eta())}")

    def eta(self) -> float | None:
        """Returns the seconds to the last step, by the median of the newest steps; None before the first."""
        if not self._step_seconds:
            return None
        # The median: the first step waits for the environment to start, which says nothing about the others.
        return statistics.median(self._step_seconds) * max(self.total_steps - self._done, 0)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Shows the result of the run, as in ``summary.json``; a figure that is not there is left out."""
        self._stop_live()
        self.note("training finished")
        rows = summary_rows(summary, ascii_only=self._ascii_only)
        if summary.get("run_dir") is not None:
            root = Path(summary["run_dir"])
            names = ("metrics.jsonl", "summary.json", "checkpoints", "logs", "quarantine")
            rows += [("run", str(root)), *((n.split(".")[0], str(root / n)) for n in names if (root / n).exists())]
        for label, value in rows:
            self.note(f"  {label:<11} {value}")

    def _frame(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._recent:
            parts = [self._table()]
            for name, values in self._curves.items():
                if values:
                    curve = sparkline(values, min(CURVE_WIDTH, self._console.width - 20), ascii_only=self._ascii_only)
                    parts.append(Text(f"{name} {curve} {decimal(values[-1])}", no_wrap=True, overflow="crop"))
        refused = f"  {self._quarantined} groups quarantined" if self._quarantined else ""
        done = f"{self._done}/{self.total_steps}  eta {duration(self.eta())}{refused}"
        now = f"{self._phase} {duration(time.monotonic() - self._phase_since)}"
        bar = ProgressBar(total=max(self.total_steps, 1), completed=self._done, width=20)
        for first, text in ((bar, done), (self._spinner, now)):
            row = Table.grid(padding=(0, 1))
            row.add_row(first, Text(text, no_wrap=True, overflow="ellipsis"))
            parts.append(row)
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name in _COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for cells in list(self._recent):  # a copy: the refreshing thread draws while the run appends
            table.add_row(*cells)
        return table


def summary_rows(summary: Mapping[str, Any], *, ascii_only: bool) -> list[tuple[str, str]]:
    """Returns the rows of a summary as ``(label, text)``; absent figures have no row."""
    get = summary.get
    rows: list[tuple[str, str]] = []

    def change(label: str, first: str, last: str, meaning: str = "") -> None:
        if get(first) is not None or get(last) is not None:
            arrow = "->" if ascii_only else "→"
            rows.append((label, f"{decimal(get(first))} {arrow} {decimal(get(last))}{meaning}"))

    window = get("reward_window") or 1
    of_steps = f"  (means of the first and last {window} steps)" if window > 1 else ""
    change("reward", "reward_first", "reward_last", of_steps)
    if get("rewards"):
        rows.append(("", sparkline(get("rewards") or (), CURVE_WIDTH, ascii_only=ascii_only)))
    change("held-out", "held_out_before", "held_out_after")
    if known := {step: score for step, score in (get("held_out_steps") or {}).items() if score is not None}:
        scores = known if get("held_out_after") is None else {**known, get("steps"): get("held_out_after")}
        best = max(scores, key=lambda step: scores[step])
        curve = sparkline(list(known.values()), CURVE_WIDTH, ascii_only=ascii_only)
        label = "" if rows and rows[-1][0] == "held-out" else "held-out"
        steps = f"{len(known)} step{'s' * (len(known) > 1)}"
        rows.append((label, f"{curve}  at {steps}, best {decimal(scores[best])} at step {best}"))
    lines = (
        ("steps", (("", "steps"), ("policy version ", "policy_version"), ("weights synced ", "weights_synced"))),
        ("groups", (("used ", "groups_used"), ("dropped ", "groups_dropped"), ("quarantined ", "groups_quarantined"))),
        ("sequences", (("trained ", "sequences_trained"), ("dropped as overlong ", "sequences_dropped_overlong"))),
        ("tokens", (("trained ", "tokens_trained"),)),
    )
    for label, fields in lines:
        if found := [f"{words}{get(key):,}" for words, key in fields if get(key) is not None]:
            rows.append((label, ", ".join(found)))
    if get("spans_repaired"):
        turns = f"{get('spans_repaired'):,} of {get('spans_looked_up'):,} turns"
        rows.append(("repaired", f"{turns} had been tokenised anew; they are trained with the ids that were sampled"))
    if get("steps_without_data"):
        rows.append(("no data", f"steps {get('steps_without_data'):,}"))
    if get("idle_share") is not None:
        rows.append(("trainer", f"idle {get('idle_share'):.0%} of the time (mode={get('mode')})"))
    if get("seconds") is not None:
        rows.append(("time", duration(get("seconds"))))
    return rows


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
        if not (state := self._state):
            return Text("starting …")
        parts: list[RenderableType] = [_services(state), Text(_flow(state), no_wrap=True, overflow="ellipsis")]
        if recent := state.get("recent"):
            parts.append(Text(_step_line(recent[-1], state), no_wrap=True, overflow="ellipsis"))
            curve = sparkline(state.get("rewards") or (), min(CURVE_WIDTH, max(10, self._console.width - 20)))
            parts.append(Text(f"reward {curve}", no_wrap=True, overflow="crop"))
        silent = state.get("seconds_since_step")
        since = "" if silent is None else f", last step {duration(silent)} ago"
        parts.append(Text(f"up {duration(state.get('seconds'))}{since}, {state.get('run_dir')}", style="dim"))
        return Group(*parts)


def _step_line(line: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    return step_line(line, int(state.get("steps", 0)), without=("wait", "stale"))


def _services(state: Mapping[str, Any]) -> Table:
    services = state.get("services", [])
    longest = max((len(str(service.get("name"))) for service in services), default=0)
    # The reason takes what the others leave; without their widths it would take theirs.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", expand=True)
    for name, least in (("service", min(max(longest, 7), 24)), ("state", 10), ("pid", 7), ("up", 7), ("restarts", 8)):
        table.add_column(name, justify="left" if name in "service state" else "right", no_wrap=True, min_width=least)
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


_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"
_NONE = "-"


def decimal(value: float | None, digits: int = 3) -> str:
    """Formats 0.4118 as ``0.412``, tiny and huge values as ``1.2e-05``, no value as ``-``, NaN as ``nan``."""
    if value is None:
        return _NONE
    if value == 0 or 10**-digits <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def count(value: float | None) -> str:
    """Formats a count as ``1,234``."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Formats seconds as ``0.41``."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def duration(value: float | None) -> str:
    """Formats seconds as ``4.2s``, ``59s``, ``1m 05s``, ``3h 07m``, ``2d 04h``."""
    if value is None or not math.isfinite(value):
        return _NONE
    if value < 9.95:
        return f"{value:.1f}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(value / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(value / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def sparkline(values: Sequence[float | None], width: int = 60, *, ascii_only: bool = False) -> str:
    """Draws a curve of one character per value; more than ``width`` are averaged in buckets. A bucket of nothing but
    None and values that are not finite is a space."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    number = min(len(values), width)
    edges = [len(values) * i // number for i in range(number + 1)] if number else []
    pieces = ([x for x in values[a:b] if x is not None and math.isfinite(x)] for a, b in itertools.pairwise(edges))
    means = [sum(piece) / len(piece) if piece else None for piece in pieces]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(blocks) - 1
    return "".join(
        " " if mean is None else blocks[round((mean - low) / span * top) if span > 0 else top // 2] for mean in means
    )
