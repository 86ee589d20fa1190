"""A run directory whose trace and figures are known, some of them hostile, for the tests of the page."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import Applied
from atropos_verl.training.trace import TraceWriter
from atropos_verl.types import NOT_TRAINED, SampleSettings, ScoredGroup, SequenceMatch

SCRIPT = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
HOSTILE = f"{SCRIPT}\x00\x1b[2J\u202egnp.exe\ud800 "
PROMPT, A, B, C, END = [64, 65], 64, 65, 66, 258
"""Ids of the demo model's tokenizer."""


def write_run(run_dir: Path, *, steps: int = 12, long_text: int = 0) -> Path:
    """Writes ``steps`` steps of one group of two answers each. In step 1 the first answer is "c<|im_end|>", its second
    token is in no ledger; the advantages are 1 and 0. The last group is refused with a hostile reason."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"model": {"path": None}}))
    writer = TraceWriter(run_dir, 1 << 30)
    hostile = HOSTILE + "x" * long_text
    writer.begin(None)
    lines = []
    for step in range(1, steps + 1):
        _write_step(writer, step, hostile if step == steps else None)
        rows = {"reward/mean": step / steps, "perf/idle_share": 0.25, "off_policy/staleness_mean": step % 2}
        lines.append({"step": step, "policy_version": step, "loss": 1 / step, **rows, f"env/{SCRIPT}/reward": 0.5})
    writer.close()
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


def _write_step(writer: TraceWriter, step: int, reason: str | None) -> None:
    answers = [[C, END], [A, END]]
    group = ScoredGroup(
        token_ids=tuple(np.array([*PROMPT, *answer]) for answer in answers),
        masks=tuple(np.array([NOT_TRAINED, NOT_TRAINED, *answer]) for answer in answers),
        scores=np.array([1.0, 0.0]),
        env_id=0,
        group_id=f"g{step}",
        inference_logprobs=(np.array([1.0, 1.0, -0.5, -0.25]), None),
        token_versions=(np.array([-2, -2, step, -2]), None),
    )
    found = np.array([False, False, True, False])
    versions = np.array([-2, -2, step, -2])
    match = SequenceMatch(found=found, versions=versions, logprobs=np.full(4, np.nan), unmatched_tokens=1)
    writer.arrived(step, [group])
    report = build_samples([group], SampleSettings(estimator="plain"))
    writer.collected([(step, 0)], [group], [[match, None]], Applied([group], [0], {}), report)
    own = {(step, 0, 0): np.array([0.0, 0.0, -0.75, -0.25])}
    state: Any = "trained" if reason is None else "quarantined"
    writer.ended([(step, 0)], step, state, reason=reason, trainer_logprobs=own)
