"""``atropos-verl simulate`` against real runs of the demo: is the share of time that the trainer waits predicted?

    python benchmarks/bench_simulator.py [--keep DIR] [--reuse] [--seeds 20]

One sync run (``calibration``) says how fast this machine generates and posts. Three other runs, with other seeds and
other latencies of scoring, are then predicted from it: ``sync``, ``overlap_short`` and ``overlap_long`` (scoring takes
longer than the two batches ahead can hide: the trainer waits for a part of the time). Of a predicted run itself only
the seconds of its optimiser steps and weight syncs are used, because generation and training share this machine's cores
and the simulator does not know of that; its waiting, its arrivals and its staleness are not.

Each prediction is the mean over ``--seeds`` seeds: ``same_steps`` begins with an empty queue and has the steps of the
run, ``steady`` is 300 steps. Both leave the first three out, and so does what was measured. ``difference_points``:
predicted minus measured, in percentage points. About 7 minutes on two idle cores.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_verl.cli import main as command

MAIN = Path(__file__).resolve().parents[1] / "recipe" / "atropos" / "main_atropos.py"
GROUPS_AT_A_TIME = 256
"""As many as the environment is allowed: the bound is then max_batches_offpolicy."""
KEPT_METRICS = ("step", "data/groups", "data/sequences")
KEPT_SETTINGS = ("mode", "seed", "batch_retry_delay", "batch_retry_attempts", "batch_max_wait_time")


@dataclass(frozen=True)
class Run:
    """One run of the demo, 256 sequences a step."""

    mode: str
    seed: int
    steps: int
    latency: float
    """Of scoring a group: seconds for the calibrating run, for the others in steps (training and sync) of that run, so
    that the trainer waits for about as much of the time on any machine."""


CALIBRATION = "calibration"
RUNS = {
    CALIBRATION: Run("sync", 0, 20, 2.0),
    "sync": Run("sync", 1, 16, 1.5),
    "overlap_short": Run("overlap", 2, 20, 0.4),
    "overlap_long": Run("overlap", 3, 30, 2.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="keep the runs' directories here")
    parser.add_argument("--reuse", action="store_true", help="with --keep: runs that are there are not made again")
    parser.add_argument("--seeds", type=int, default=20, help="of the simulator")
    parser.add_argument("--record", type=Path, help="write what a test needs of the runs into this directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atropos-verl-simulator-") as temporary:
        root = options.keep or Path(temporary)
        for name, run in RUNS.items():
            if not (options.reuse and (root / name / "summary.json").exists()):
                _make(root / name, run, _latency(root, name))
        if options.record is not None:
            _record(root, options.record)
        print(json.dumps(compare(root, options.seeds), indent=2))


def compare(root: Path, seeds: int) -> dict[str, Any]:
    """Measured and predicted figures of every run that was not calibrated on."""
    found: dict[str, Any] = {}
    worst = 0.0
    for name, run in RUNS.items():
        if name == CALIBRATION:
            continue
        words = _words(root, name, seeds)
        same, steady = _simulated(words), _simulated([*words, "--steps", "300", "--seeds", "3"])
        measured = same["recorded"]["trainer_idle_share"]
        by_seed = same["runs"][0]["trainer_idle_share_by_seed"]
        found[name] = {
            "run": {**vars(run), "latency": _made_with(root / name)},
            "measured": _figures(same["recorded"], None),
            "same_steps": _figures(same["runs"][0], measured),
            "lowest_and_highest_seed": [min(by_seed), max(by_seed)],
            "steady": _figures(steady["runs"][0], measured),
        }
        worst = max(worst, *(abs(found[name][kind]["difference_points"]) for kind in ("same_steps", "steady")))
        calibration = same["calibration"]
    return {
        "cpus": os.cpu_count(),
        "load_at_the_end": os.getloadavg(),
        "calibration": calibration,
        "largest_difference_points": worst,
        "runs": found,
    }


def _words(root: Path, name: str, seeds: int) -> list[str]:
    run = RUNS[name]
    return [
        *("simulate", "--mode", run.mode, "--replay", str(root / name), "--generation-from", str(root / CALIBRATION)),
        *("--latency", str(_made_with(root / name)), "--latency-spread", "0"),
        *("--generation-latency", str(_made_with(root / CALIBRATION)), "--environments", "1"),
        *("--workers", str(GROUPS_AT_A_TIME), "--seeds", str(seeds), "--json"),
    ]


def _simulated(words: list[str]) -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = command(words)
    if code != 0:
        raise SystemExit(f"atropos-verl {' '.join(words)} failed with code {code}")
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def _figures(found: dict[str, Any], measured: float | None) -> dict[str, Any]:
    total = sum(found["staleness"].values())
    figures = {
        "trainer_idle_percent": round(100 * found["trainer_idle_share"], 1),
        "groups_per_second": round(found["groups_per_second"], 2),
        "staleness_percent": {age: round(100 * count / total, 1) for age, count in found["staleness"].items()},
    }
    if measured is not None:
        figures["difference_points"] = round(100 * (found["trainer_idle_share"] - measured), 1)
        figures["groups_given_up"] = found["cancelled_groups"]
    return figures


def _latency(root: Path, name: str) -> float:
    """Seconds."""
    if name == CALIBRATION:
        return RUNS[name].latency
    lines = [json.loads(line) for line in (root / CALIBRATION / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(line["timing/train"] + line["timing/sync"] for line in lines[3:])
    return float(round(RUNS[name].latency * step, 1))


def _made_with(run_dir: Path) -> float:
    """The latency of a run that was made, in seconds."""
    words = json.loads((run_dir / "config.json").read_text())["env"]["args"]
    return float(words[words.index("--env.latency") + 1])


def _make(run_dir: Path, run: Run, latency: float) -> None:
    if run_dir.exists():
        shutil.rmtree(run_dir)
    words = [
        *(f"mode={run.mode}", f"seed={run.seed}", f"steps={run.steps}", "batch_size=256", "save_freq=-1"),
        *("eval.before=false", "eval.after=false", f"run_dir={run_dir}"),
        # Four passes over a batch: training takes long enough that latencies of seconds can be hidden by it, or not.
        *("loss.type=grpo", "loss.ppo_epochs=4"),
        f'env.args=["--env.latency","{latency}","--env.max_num_workers_per_node","{GROUPS_AT_A_TIME}"]',
    ]
    print(f"{run_dir.name}: {' '.join(words)} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, str(MAIN), *words], stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"the run failed with code {done.returncode}; see {run_dir}")


def _record(root: Path, directory: Path) -> None:
    """The few figures that predictions need, and of two runs when their groups came."""
    for name in RUNS:
        (directory / name).mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {key: _short(value) for key, value in line.items() if key in KEPT_METRICS or key.startswith(_KEPT_PREFIXES)}
            for line in lines
        ]
        (directory / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        settings = json.loads((root / name / "config.json").read_text())
        config = {key: settings[key] for key in KEPT_SETTINGS}
        config["env"] = {"args": settings["env"]["args"]}
        config["inference"] = {"max_running": settings["inference"]["max_running"]}
        (directory / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in (CALIBRATION, "overlap_long"):  # a test replays the second one
        arrivals = [json.loads(line) for line in (root / name / "api" / "arrivals.jsonl").read_text().splitlines()]
        begin = arrivals[0]["groups"][0][0]
        for line in arrivals:
            line["at"] = round(line["at"] - begin, 3)
            line["groups"] = [[round(at - begin, 3), *rest] for at, *rest in line["groups"]]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in arrivals)
        (directory / name / "arrivals.jsonl").write_text(text)


_KEPT_PREFIXES = ("timing/", "off_policy/groups_at_staleness/")


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
