"""Run directories with a trace: of steps that a test takes, and one whose figures are known, some of them hostile."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.report.trace_reader import TraceReader
from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import Applied
from atropos_verl.training.trace import TraceWriter
from atropos_verl.types import NOT_TRAINED, SampleSettings, ScoredGroup, SequenceMatch

SCRIPT = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
HOSTILE = f"{SCRIPT}\x00\x1b[2J\u202egnp.exe\ud800 "
PROMPT, A, B, C, END = [64, 65], 64, 65, 66, 258
"""Ids of the demo model's tokenizer."""


def group(
    *answers: Sequence[int], scores: Sequence[float] = (1.0, 0.0), env_id: int | None = 0, name: str = "g", **more: Any
) -> ScoredGroup:
    return ScoredGroup(
        token_ids=tuple(np.array([*PROMPT, *answer]) for answer in answers),
        masks=tuple(np.array([NOT_TRAINED, NOT_TRAINED, *answer]) for answer in answers),
        scores=np.array(scores[: len(answers)]),
        env_id=env_id,
        group_id=name,
        **more,
    )


class Run:
    """A writer, and the steps that a backend takes with it."""

    def __init__(self, run_dir: Path, step: int | None = None, most_bytes: int = 1 << 30) -> None:
        (run_dir / "config.json").write_text(json.dumps({"model": {"path": None}}))
        self.dir = run_dir
        self.writer = TraceWriter(run_dir, most_bytes)
        self.writer.begin(step)

    def collect(
        self, batch: int, *groups: ScoredGroup, matches: Any = None, stale: Sequence[int] = (), **settings: Any
    ) -> None:
        self.writer.arrived(batch, groups)
        kept = [i for i in range(len(groups)) if i not in stale]
        applied = Applied([groups[i] for i in kept], kept, {})
        report = build_samples(applied.groups, SampleSettings(**settings))
        matches = matches or [[None] * len(one) for one in groups]
        self.writer.collected([(batch, i) for i in range(len(groups))], groups, matches, applied, report)

    def step(self, batch: int, *groups: ScoredGroup, **more: Any) -> None:
        self.collect(batch, *groups, **more)
        self.writer.ended([(batch, i) for i in range(len(groups))], batch)

    def read(self) -> TraceReader:
        self.writer.close()
        return TraceReader(self.dir)


def write_run(run_dir: Path, *, steps: int = 12, long_text: int = 0) -> Path:
    """Writes ``steps`` steps of one group of two answers each. In step 1 the first answer is "c<|im_end|>", its second
    token is in no ledger; the advantages are 1 and 0. The last group is refused with a hostile reason."""
    run_dir.mkdir(parents=True)
    run, hostile = Run(run_dir), HOSTILE + "x" * long_text
    lines = []
    for step in range(1, steps + 1):
        _write_step(run, step, hostile if step == steps else None)
        rows = {"reward/mean": step / steps, "perf/idle_share": 0.25, "off_policy/staleness_mean": step % 2}
        lines.append({"step": step, "policy_version": step, "loss": 1 / step, **rows, f"env/{SCRIPT}/reward": 0.5})
    run.writer.close()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row: dict[str, Any] = {"env_id": 0, "name": HOSTILE, "state": "alive", "groups": 3, "min_batch_allocation": 0.5}
    state = {
        "time": 4e9,  # it goes on
        "steps": steps,
        "step": steps,
        "services": [{"name": HOSTILE, "kind": "environment", "state": "running", "restarts": 2, "detail": hostile}],
        "api": {"queue_size": 4, "open_leases": 1, "environments": [row]},
        "gateway": {"paused": False, "in_flight": 7, "policy_version": steps},
        "rates": {"tokens_per_second": 123.0},
        "notes": [HOSTILE],
        "diagnosis": f"no batch for 30 s: {HOSTILE}",
    }
    (run_dir / "state.json").write_text(json.dumps(state))
    return run_dir


def _write_step(run: Run, step: int, reason: str | None) -> None:
    versions = np.array([-2, -2, step, -2])
    known = {"inference_logprobs": (np.array([1.0, 1.0, -0.5, -0.25]), None), "token_versions": (versions, None)}
    found = np.array([False, False, True, False])
    match = SequenceMatch(found=found, versions=versions, logprobs=np.full(4, np.nan), unmatched_tokens=1)
    run.collect(step, group([C, END], [A, END], name=f"g{step}", **known), matches=[[match, None]], estimator="plain")
    own = {(step, 0, 0): np.array([0.0, 0.0, -0.75, -0.25])}
    state: Any = "trained" if reason is None else "quarantined"
    run.writer.ended([(step, 0)], step, state, reason=reason, trainer_logprobs=own)
