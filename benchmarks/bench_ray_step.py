"""A training step on Ray beside one of the local backend: the same model, task, batch and bound on staleness, in turn.

    python benchmarks/bench_ray_step.py [--model smollm2-135m] [--seeds 0,1,2] [--steps 12] [--skip 2]

For each seed both backends run ``main_atropos.py`` (the order alternates); without ``--model`` on the demo's task,
with ``smollm2-135m`` on sums. A step lasts from one line of ``metrics.jsonl`` to the next; the first ``--skip`` do not
count. Both train on what the newest weights wrote (``max_staleness=0 on_stale=wait``). ``ratio``: the median step on
Ray over the local one, all seeds together. ``parts``: medians of what the backends say of a step. ``reward``: mean of
the second half of the steps, by seed; ``difference``: Ray minus local, and its standard error over seeds.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "recipe" / "atropos" / "main_atropos.py"
STALENESS = "off_policy.max_staleness=0", "off_policy.on_stale=wait"
WORDS: dict[str, dict[str, list[str]]] = {
    "demo": {"local": [], "ray": []},
    "smollm2-135m": {"local": ["--config-name", "smollm2"], "ray": ["--config-name", "ray_smollm2"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORDS, default="demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="atropos-verl-ray-step-") as directory:
        for number, seed in enumerate(options.seeds.split(",")):
            for side in runs if number % 2 == 0 else reversed(runs):
                run = _run(options, side, int(seed), Path(directory) / f"{side}-{seed}")
                print(f"seed {seed} {side}: {json.dumps(run)}", file=sys.stderr, flush=True)
                runs[side].append(run)
    steps = {side: statistics.median(step for run in found for step in run["steps"]) for side, found in runs.items()}
    rewards = {side: [run["reward"] for run in found] for side, found in runs.items()}
    differences = [ray - local for local, ray in zip(*rewards.values(), strict=True)]
    several = len(differences) > 1
    error = statistics.stdev(differences) / len(differences) ** 0.5 if several else None
    parts = {
        side: {name: statistics.median(run["parts"][name] for run in found) for name in found[0]["parts"]}
        for side, found in runs.items()
    }
    result = {
        "model": options.model,
        "step_seconds": steps | {"ratio": steps["ray"] / steps["local"]},
        "parts": parts,
        "reward": rewards | {"difference": statistics.mean(differences), "standard_error": error},
    }
    print(json.dumps(result, indent=2))


def _run(options: argparse.Namespace, side: str, seed: int, run_dir: Path) -> dict[str, Any]:
    common = [f"run_dir={run_dir}", *WORDS[options.model][side]]
    if side == "local":
        words = [*common, f"seed={seed}", f"steps={options.steps}", "save_freq=-1", *STALENESS]
        words += ["eval.before=false", "eval.after=false", "eval.every=null"]
    else:
        block = [f"seed={seed}", *STALENESS, "eval.before=false", "eval.after=false", "eval.every=null"]
        words = ["backend=ray", *common, *(f"atropos.{word}" for word in block), "trainer.save_freq=-1"]
        words += [f"trainer.total_training_steps={options.steps}", f"actor_rollout_ref.rollout.seed={seed}"]
    metrics, seen = run_dir / "metrics.jsonl", []
    output = run_dir.with_suffix(".log")
    with output.open("wb") as log:
        process = subprocess.Popen([sys.executable, str(MAIN), *words], stdout=log, stderr=log, start_new_session=True)
    try:
        while process.poll() is None:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            seen += [time.perf_counter()] * (lines - len(seen))
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
    if process.returncode != 0 or len(seen) != options.steps:
        raise SystemExit(f"{' '.join(words)}: code {process.returncode}\n{output.read_text()[-3000:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steady = lines[options.skip :]
    names = [name for name in ("rollout", "wait", "train", "sync", "step") if f"timing/{name}" in steady[0]]
    names += [name for name in ("timing_s/old_log_prob", "timing_s/update_actor") if name in steady[0]]
    key = {name: name if "/" in name else f"timing/{name}" for name in names}
    times = [after - before for before, after in zip(seen[options.skip - 1 :], seen[options.skip :], strict=False)]
    return {
        "steps": [round(value, 4) for value in times],
        "parts": {n: round(statistics.median(line[key[n]] or 0.0 for line in steady), 4) for n in names},
        "reward": round(statistics.mean(line["reward/mean"] for line in lines[options.steps // 2 :]), 4),
    }


if __name__ == "__main__":
    main()
