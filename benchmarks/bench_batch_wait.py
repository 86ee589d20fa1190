"""How long after a batch's last group was accepted the trainer has the batch: waiting at the API against polling it.

    python benchmarks/bench_batch_wait.py [--steps 50]

One API (in a process of its own, durable), one trainer. For each step both ways take a batch in turn: the trainer asks,
and after 0.2 to 2 s (the same for both) the batch's only group is posted. ``wait``: the API answers when the batch is
there. ``poll``: as at an upstream API, with the run's defaults (0.3 s, growing by half). Journalling is left out.
Milliseconds, median and p90; ``ratio``: poll over wait.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.trajectory_server import ServerProcess, group_bytes, registration

from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(Path(directory))
        server.start()
        try:
            print(json.dumps(measure(server.url, options.steps), indent=2))
        finally:
            server.stop()


def measure(url: str, steps: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"wait": [], "poll": []}
    with AtroposClient(url, lease_seconds=60.0) as trainer, AtroposClient(url) as environment:
        trainer.register(TrainerRegistration(**registration(4)))
        features, number = trainer.features, 0
        for step in range(steps):
            delay = random.Random(step).uniform(0.2, 2.0)
            for way in ("wait", "poll") if step % 2 else ("poll", "wait"):
                trainer.features = features if way == "wait" else frozenset()
                number += 1
                accepted: list[float] = []
                thread = threading.Timer(delay, lambda n=number, done=accepted: post(environment, n, done))
                thread.start()
                batch = trainer.get_batch()
                came = time.perf_counter()
                thread.join()
                seconds[way].append(max(came - accepted[0], 0.0))
                trainer.ack(batch.lease_id)
    result = {"steps": float(steps)}
    for way, values in seconds.items():
        result[f"{way}_median_ms"] = 1e3 * statistics.median(values)
        result[f"{way}_p90_ms"] = 1e3 * statistics.quantiles(values, n=10)[-1]
    return result | {"ratio": result["poll_median_ms"] / max(result["wait_median_ms"], 1e-3)}


def post(environment: AtroposClient, number: int, done: list[float]) -> None:
    environment.post_scored_data_list([group_bytes(number)])
    done.append(time.perf_counter())


if __name__ == "__main__":
    main()
