"""``mode=overlap`` against ``mode=sync`` on the demo task, with an environment whose scoring takes time.

    python benchmarks/bench_overlap.py [--seeds 0,1,2,3,4] [--steps 24] [--batch-size 256] [--latency 0.344]

For each seed both modes run ``main_atropos.py`` in turn (the order alternates). ``--env.latency`` is how long scoring
a group takes (it sleeps, as slow tools and reward models on other machines do): 0.344 s, with which generation and
training took equal time in 0.1.0. ``auto`` finds that time in one short run; with shared prefixes training takes less
time than generation even at 0, so it finds 0 today. Figures count from the end of step ``--skip`` on, by the times at
which lines appear in ``metrics.jsonl``: groups per second, idle share (time the trainer waited for rollouts), reward
of the last steps, held-out score after the same number of groups. ``ratio`` is the median over seeds of overlap's
groups per second over sync's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAIN = Path(__file__).resolve().parents[1] / "recipe" / "atropos" / "main_atropos.py"
SIDES: dict[str, tuple[str, ...]] = {"sync": ("mode=sync",), "overlap": ("mode=overlap",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--skip", type=int, default=4, help="steps before the measurement: start-up, a full pipeline")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--latency", default="0.344", help="seconds, or auto")
    parser.add_argument("--no-eval", action="store_true", help="leave the held-out score out")
    parser.add_argument("words", nargs="*", help="further key=value words for both modes")
    options = parser.parse_args()
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="atropos-verl-overlap-") as directory:
        root = Path(directory)
        latency = _calibrate(options, root) if options.latency == "auto" else float(options.latency)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number, seed in enumerate(options.seeds.split(",")):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                run = _run(options, root / f"{side}-{seed}", SIDES[side], int(seed), latency, options.steps)
                print(f"seed {seed} {side}: {json.dumps(run)}", file=sys.stderr, flush=True)
                runs[side].append(run)
    first, second = runs.values()
    pairs = list(zip(first, second, strict=True))
    return {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "latency_seconds": round(latency, 3),
        "words": options.words,
        "medians": {
            side: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for side, found in runs.items()
        },
        "ratio": statistics.median(b["groups_per_second"] / a["groups_per_second"] for a, b in pairs),
        "reward_difference": _differences(pairs, "reward_last"),
        "held_out_difference": None if options.no_eval else _differences(pairs, "held_out_after"),
        "runs": runs,
    }


def _differences(pairs: list[tuple[dict[str, float], dict[str, float]]], key: str) -> dict[str, float | None]:
    """The second side minus the first over seeds, beside how much seeds differ among themselves."""
    differences = [b[key] - a[key] for a, b in pairs]
    several = len(pairs) > 1
    return {
        "mean": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / len(pairs) ** 0.5 if several else None,
        "standard_deviation_of_first": statistics.stdev(a[key] for a, _ in pairs) if several else None,
    }


def _calibrate(options: argparse.Namespace, root: Path) -> float:
    """Seconds of latency that make generation take as long as training, when they take turns."""
    run = _run(options, root / "calibration", SIDES["sync"], 0, 0.0, 14, evaluate=False)
    return max(0.0, run["train_seconds"] + run["sync_seconds"] - run["rollout_seconds"])


def _run(
    options: argparse.Namespace,
    run_dir: Path,
    side: tuple[str, ...],
    seed: int,
    latency: float,
    steps: int,
    *,
    evaluate: bool = True,
) -> dict[str, float]:
    words = [
        *side,
        *(f"seed={seed}", f"steps={steps}", f"batch_size={options.batch_size}", "save_freq=-1"),
        *("eval.before=false", f"eval.after={str(evaluate and not options.no_eval).lower()}", f"run_dir={run_dir}"),
        # By default Atropos lets 8 groups be in the making; here a whole batch is asked for at once in both modes.
        f'env.args=["--env.latency","{latency}","--env.max_num_workers_per_node","{options.batch_size}"]',
        *options.words,
    ]
    metrics = run_dir / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, str(MAIN), *words], stdout=subprocess.DEVNULL)
    seen: list[float] = []
    try:
        while process.poll() is None:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            seen += [time.perf_counter()] * (lines - len(seen))
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait()
    if process.returncode != 0 or len(seen) != steps:
        raise SystemExit(
            f"{' '.join(side)} run failed with code {process.returncode} after {len(seen)} steps; see {run_dir}"
        )
    steady = [json.loads(line) for line in metrics.read_text().splitlines()][options.skip :]
    wall = seen[-1] - seen[options.skip - 1]
    summary = json.loads((run_dir / "summary.json").read_text())
    last = steady[-5:]
    return {
        "groups_per_second": round(sum(line["data/groups"] for line in steady) / wall, 3),
        "idle_share": round(sum(line["timing/rollout"] for line in steady) / wall, 4),
        "step_seconds": round(wall / len(steady), 4),
        "rollout_seconds": round(statistics.median(line["timing/rollout"] for line in steady), 4),
        "train_seconds": round(statistics.median(line["timing/train"] for line in steady), 4),
        "sync_seconds": round(statistics.median(line["timing/sync"] for line in steady), 4),
        "reward_last": round(statistics.mean(line["reward/mean"] for line in last), 4),
        "held_out_after": round(summary["held_out_after"], 4) if summary["held_out_after"] is not None else 0.0,
    }


if __name__ == "__main__":
    main()
