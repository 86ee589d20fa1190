"""A trainer without a model: it "trains" by noting group numbers, and checkpoints them every few steps.

``python -m support.light_trainer URL RUN_DIR LEASE_SECONDS``. What a run ends up with is ``RUN_DIR/checkpoint.json``:
the state of its last checkpoint, as the weights of a real one would be. It stops when ``RUN_DIR/stop`` exists and
nothing is left.
"""

import json
import sys
from pathlib import Path
from typing import Any

from atropos_verl.errors import AtroposAPIError, AtroposTimeoutError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches
from atropos_verl.protocol.messages import TrainerRegistration
from support.trajectory_server import registration

SAVE_EVERY = 3


class LightTrainer:
    def __init__(self, url: str, run_dir: Path, lease_seconds: float) -> None:
        self.run_dir = run_dir
        self.client = AtroposClient(
            url, timeout=10.0, retry_attempts=30, retry_delay=0.02, max_wait_time=0.3, lease_seconds=lease_seconds
        )
        self.client._batch_headers.pop("Accept", None)  # JSON, which this reads itself
        self.batches = LeasedBatches(self.client, BatchJournal(run_dir / "journal"))
        self.path = run_dir / "checkpoint.json"
        saved: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"step": 0, "trained": []}
        self.step: int = saved["step"]
        self.trained: list[int] = saved["trained"]

    def run(self) -> None:
        replayed = self.batches.resume(self.step)
        self.client.register(TrainerRegistration(**registration(starting_step=self.step, num_steps=10**6)))
        for held in replayed:
            self.train(held)
        while True:
            try:
                self.train(self.batches.fetch())
            except AtroposTimeoutError:
                if (self.run_dir / "stop").exists() and self.client.status().queue_size == 0:
                    break
        self.save()

    def train(self, held: HeldBatch) -> None:
        self.trained += [group["tokens"][0][0] for group in json.loads(held.body)["batch"]]
        self.step += 1
        self.batches.trained(held.entry, self.step)
        self.batches.ack(held.entry)
        if self.step % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": self.step, "trained": self.trained}))
        temporary.replace(self.path)
        self.batches.discard_through(self.step)


if __name__ == "__main__":
    try:
        LightTrainer(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])).run()
    except AtroposAPIError as error:
        sys.exit(str(error))
