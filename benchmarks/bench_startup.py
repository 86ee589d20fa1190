"""Start-up: from the start of ``main_atropos.py`` to the end of the first optimiser step, against bare imports.

    python benchmarks/bench_startup.py [--rounds 3]

Each round runs, one after the other: the training command for one step without evaluation (API, environment, gateway,
trainer and all), and ``import torch`` plus verl's worker, which no training on verl can do without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTS = (
    "from atropos_verl import verl_plugin; verl_plugin.activate('cpu'); "
    "import torch; from verl.workers.engine_workers import TrainingWorker"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    first_step, imports = [], []
    for _ in range(options.rounds):
        first_step.append(_seconds_to_first_step())
        imports.append(_seconds([sys.executable, "-W", "ignore", "-c", IMPORTS]))
    print(
        json.dumps(
            {
                "rounds": options.rounds,
                "median_seconds": {
                    "to_end_of_first_step": statistics.median(first_step),
                    "bare_imports": statistics.median(imports),
                },
                "seconds": {"to_end_of_first_step": first_step, "bare_imports": imports},
                "ratio": statistics.median(a / b for a, b in zip(first_step, imports, strict=True)),
            },
            indent=2,
        )
    )


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def _seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory(prefix="atropos-verl-startup-") as directory:
        metrics = Path(directory) / "run" / "metrics.jsonl"
        script = str(REPOSITORY / "recipe" / "atropos" / "main_atropos.py")
        words = ["steps=1", "save_freq=-1", "eval.before=false", "eval.after=false", f"run_dir={metrics.parent}"]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.DEVNULL)
        try:
            while not (metrics.is_file() and metrics.stat().st_size > 0):
                if process.poll() not in (None, 0):
                    raise SystemExit(f"the training command failed with code {process.returncode}")
                if time.perf_counter() - started > 300:
                    raise SystemExit("no first step within 300 s")
                time.sleep(0.02)
            elapsed = time.perf_counter() - started
            process.wait(timeout=60)
        finally:
            process.terminate()
    return elapsed


if __name__ == "__main__":
    main()
