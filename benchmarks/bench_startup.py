"""Start-up: from the start of ``main_atropos.py`` to the end of the first optimiser step, and where the time goes.

    python benchmarks/bench_startup.py [--rounds 3] [--against DIRECTORY] [words of main_atropos.py ...]

Each round runs in turn: the training command for one step without evaluation (API, environment, gateway, trainer and
all), and the two things that no such run can do without and that can at best happen side by side: the imports of torch
and verl's worker; and the environment's imports plus the 5 s that atroposlib sleeps after registering. The longer of
the two is the floor. ``--against``: another checkout of this project (``git worktree add /tmp/before COMMIT``), whose
command is run in every round too. Words given are added to both commands. Prints JSON, medians in seconds: phases as
the command tells them, from its start to their beginnings; ``end`` is the end of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINER_IMPORTS = (
    "from atropos_verl.backends.local.run import paused_collection\n"
    "with paused_collection():\n"
    "    from atropos_verl import verl_plugin; verl_plugin.activate('cpu')\n"
    "    import torch; from verl.workers.engine_workers import TrainingWorker"
)
ENVIRONMENT_IMPORTS = (
    "import sys, gc; gc.disable(); sys.modules['torch'] = None; import reasoning_gym, atroposlib.envs.base; gc.freeze()"
)
SLEEP = 5.0
"""Seconds, ``env_manager`` of atroposlib 0.4.0."""

Phases = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    options, words = parser.parse_known_args()
    checkouts = {"now": REPOSITORY, **({"before": options.against.resolve()} if options.against else {})}
    runs: dict[str, list[Phases]] = {name: [] for name in checkouts}
    floors: dict[str, list[float]] = {"trainer_imports": [], "environment_imports_and_sleep": []}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(_first_step(checkout, words))
        floors["trainer_imports"].append(_seconds(TRAINER_IMPORTS))
        floors["environment_imports_and_sleep"].append(_seconds(ENVIRONMENT_IMPORTS) + SLEEP)
    medians = {
        name: {phase: statistics.median(run[phase] for run in found) for phase in found[0]}
        for name, found in runs.items()
    }
    floor = max(statistics.median(values) for values in floors.values())
    first_step = {name: found["first_step"] for name, found in medians.items()}
    result = {
        "rounds": options.rounds,
        "words": words,
        "seconds_to_end_of_first_step": first_step,
        "floor_seconds": floor,
        "distance_to_floor_seconds": {name: seconds - floor for name, seconds in first_step.items()},
        "floors": {name: statistics.median(values) for name, values in floors.items()},
        "phases": medians,
        "every_round": {name: [run["first_step"] for run in found] for name, found in runs.items()},
    }
    if options.against:
        result["now_over_before"] = statistics.median(
            now["first_step"] / before["first_step"] for now, before in zip(runs["now"], runs["before"], strict=True)
        )
    print(json.dumps(result, indent=2))


def _seconds(program: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def _first_step(checkout: Path, words: list[str]) -> Phases:
    with tempfile.TemporaryDirectory(prefix="atropos-verl-startup-") as directory:
        metrics = Path(directory) / "run" / "metrics.jsonl"
        script = str(checkout / "recipe" / "atropos" / "main_atropos.py")
        settings = ["steps=1", "save_freq=-1", "eval.before=false", "eval.after=false", f"run_dir={metrics.parent}"]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
        phases: Phases = {}
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, script, *settings, *words], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_note_phases, args=(process.stdout, started, phases), daemon=True)
        reader.start()
        try:
            while not (metrics.is_file() and metrics.stat().st_size > 0):
                if process.poll() not in (None, 0):
                    raise SystemExit(f"the training command failed with code {process.returncode}")
                if time.perf_counter() - started > 300:
                    raise SystemExit("no first step within 300 s")
                time.sleep(0.01)
            first_step = time.perf_counter() - started
            process.wait(timeout=60)
            end = time.perf_counter() - started
        finally:
            process.terminate()
            process.wait(timeout=60)
        reader.join(timeout=10)
    return {**phases, "first_step": first_step, "end": end}


def _note_phases(stdout: IO[str], started: float, phases: Phases) -> None:
    for line in stdout:
        if line.rstrip().endswith(" ..."):
            phases.setdefault(line.rstrip().removesuffix(" ..."), time.perf_counter() - started)


if __name__ == "__main__":
    main()
