"""The result of a simulated run."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of one configuration. Shares are of the whole time."""

    mode: str
    seconds: float
    """Virtual."""
    steps: int
    groups_per_second: float
    """Trained on."""
    trained_tokens_per_second: float
    generated_tokens_per_second: float | None
    """This and the next figures that may be None: not known of recorded arrivals."""
    trainer_idle_share: float
    """The trainer waits for a batch."""
    generation_idle_share: float | None
    """No sequence is being generated: the gate is shut, or nobody asks."""
    generation_load: float | None
    """Tokens generated over the tokens that full load would give."""
    staleness: Mapping[int, int]
    """Policy versions that a trained group was behind → groups."""
    staleness_mean: float
    dropped_stale_groups: int
    stale_batches: int
    """Given up as a whole."""
    cancelled_groups: int | None
    """Begun, and given up by their environment because the queue was full."""
    step_seconds: float
    """Mean."""
    events: int
    """Of the simulation itself."""
    held_back_share: float | None = None
    """Of recorded arrivals: the queue is so full that environments would have paused."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "staleness": {str(age): count for age, count in sorted(self.staleness.items())}}


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """Means over runs with other seeds; staleness is the sum of all."""
    if len(outcomes) == 1:
        return outcomes[0]
    found: dict[str, Any] = {}
    for name, value in asdict(outcomes[0]).items():
        if isinstance(value, int | float):
            mean = statistics.fmean(getattr(outcome, name) for outcome in outcomes)
            found[name] = round(mean) if isinstance(value, int) else mean
    staleness = sum((Counter(outcome.staleness) for outcome in outcomes), Counter[int]())
    return Outcome(mode=outcomes[0].mode, staleness=dict(staleness), **found)


_ROWS = (
    ("groups/s", "groups_per_second", "{:.3g}"),
    ("trained tokens/s", "trained_tokens_per_second", "{:,.0f}"),
    ("generated tokens/s", "generated_tokens_per_second", "{:,.0f}"),
    ("seconds per step", "step_seconds", "{:.3g}"),
    ("trainer idle", "trainer_idle_share", "{:.1%}"),
    ("generation idle", "generation_idle_share", "{:.1%}"),
    ("generation load", "generation_load", "{:.1%}"),
    ("staleness, mean", "staleness_mean", "{:.2f}"),
    ("groups dropped as stale", "dropped_stale_groups", "{}"),
    ("groups given up (queue full)", "cancelled_groups", "{}"),
    ("environments held back", "held_back_share", "{:.1%}"),
)


def _cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def table(outcomes: list[Outcome]) -> str:
    """For people: one column for each configuration."""
    lines = [f"{'':30}" + "".join(f"{outcome.mode:>16}" for outcome in outcomes)]
    for title, name, form in _ROWS:
        if all(getattr(outcome, name) is None for outcome in outcomes):
            continue
        lines.append(f"{title:30}" + "".join(f"{_cell(form, getattr(outcome, name)):>16}" for outcome in outcomes))
    ages = sorted({age for outcome in outcomes for age in outcome.staleness})
    for age in ages:
        cells = []
        for outcome in outcomes:
            total = sum(outcome.staleness.values())
            cells.append(f"{outcome.staleness.get(age, 0) / total if total else 0.0:>16.1%}")
        lines.append(f"{f'groups {age} versions behind':30}" + "".join(cells))
    if len(outcomes) == 2 and outcomes[0].groups_per_second:
        ratio = outcomes[1].groups_per_second / outcomes[0].groups_per_second
        lines.append(f"{outcomes[1].mode} trains {ratio:.2f} times the groups per second of {outcomes[0].mode}")
    return "\n".join(lines)
