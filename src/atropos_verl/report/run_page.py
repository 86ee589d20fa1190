"""A run, or several side by side, as one HTML file that needs neither internet nor a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from atropos_verl.report.charts import line_chart
from atropos_verl.report.console import summary_rows
from atropos_verl.report.run_data import RunData

__all__ = ["render_page"]

# What a reader looks for first, and what belongs into one picture. The other metrics follow by themselves.
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean",)),
    ("loss", ("loss",)),
    ("gradient norm", ("actor/grad_norm",)),
    ("seconds per step", ("timing/step", "timing/rollout", "timing/wait", "timing/train", "timing/sync")),
    ("trained tokens per second", ("perf/trained_tokens_per_second",)),
    ("largest logprob difference of trainer and engine after the sync", ("sync/canary_max_abs_logprob_diff",)),
    ("groups and sequences refused", ("data/quarantined", "data/dropped_overlong", "data/truncated")),
)


class _Chart(NamedTuple):
    title: str
    svg: Markup


def render_page(runs: Sequence[RunData]) -> str:
    """The page of ``runs`` (at least one). Several runs share every chart, one curve each."""
    environment = Environment(
        loader=PackageLoader("atropos_verl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = _distinct_names(runs)
    return environment.get_template("run_page.html.j2").render(
        runs=[
            {
                "name": name,
                "path": str(run.run_dir),
                "is_finished": run.is_finished,
                "rows": [(label, text) for label, text in summary_rows(run.summary, ascii_only=False) if label],
                "samples": run.samples,
                "quarantined": run.quarantined,
                "quarantined_total": run.quarantined_total,
                "config": json.dumps(run.config, indent=2) if run.config is not None else None,
            }
            for name, run in zip(names, runs, strict=True)
        ],
        charts=_curated(names, runs),
        more=_others(names, runs),
    )


def _curated(names: Sequence[str], runs: Sequence[RunData]) -> list[_Chart]:
    charts = [_chart(title, names, runs, keys) for title, keys in _CHARTS]
    environments = sorted({key for run in runs for key in run.metric_names() if _is_environment_reward(key)})
    if len(environments) > 1:
        charts.insert(1, _chart("reward per environment", names, runs, environments))
    return [chart for chart in charts if chart.svg]


def _others(names: Sequence[str], runs: Sequence[RunData]) -> list[_Chart]:
    shown = {key for _, keys in _CHARTS for key in keys} | {"policy_version"}
    keys = sorted({key for run in runs for key in run.metric_names()} - shown)
    return [chart for key in keys if (chart := _chart(key, names, runs, [key])).svg]


def _chart(title: str, names: Sequence[str], runs: Sequence[RunData], keys: Sequence[str]) -> _Chart:
    series = {}
    for name, run in zip(names, runs, strict=True):
        for key in keys:
            label = " ".join(part for part in (name if len(runs) > 1 else "", key if len(keys) > 1 else "") if part)
            series[label or key] = run.series(key)
    return _Chart(title, Markup(line_chart(series)))  # line_chart escapes what it is given


def _is_environment_reward(key: str) -> bool:
    return key.startswith("env/") and key.endswith("/reward")


def _distinct_names(runs: Sequence[RunData]) -> list[str]:
    """Directory names; whole paths where two are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(Path(run.run_dir).absolute()) for run in runs]
