"""Power cuts at every system call of a run's journal and checkpoints: no acknowledged step is lost or there twice.

``ATROPOS_POWER_CUTS=full`` tries every call with 6 disks each, not every third with 3.
"""

import os
import random
import shutil
import sys
from pathlib import Path

from support.power_cut import lay_out, needs_strace, record

from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.training.checkpoint_state import RunState, find_checkpoint

STEP, DISKS = (1, 6) if os.environ.get("ATROPOS_POWER_CUTS") == "full" else (3, 3)

PROGRAM = """
import sys
from pathlib import Path

from atropos_verl.config.schema import RunConfig
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.training.checkpoint_state import RunState, new_checkpoint

run_dir = Path(sys.argv[1])
journal, config = BatchJournal(run_dir / "journal", keep=1), RunConfig()

def train(step):
    entry = journal.record(b"batch %d" % step)
    journal.change(entry, step=step)
    print("trained", step, flush=True)

def save(step):
    with new_checkpoint(run_dir / "checkpoints", step, 2) as directory:
        (directory / "actor" / "huggingface").mkdir(parents=True)
        (directory / "actor" / "model.pt").write_bytes(b"%d" % step * 9000)  # not synced by who writes it
        (directory / "actor" / "huggingface" / "config.json").write_text("{}")
        RunState(step=step, policy_version=step).save(directory, config)
    journal.discard_through(step)
    print("saved", step, flush=True)

for step in range(1, 9):
    train(step)
    if step % 2 == 0:
        save(step)
save(8)  # once more, in the place of the one before
"""


@needs_strace
def test_a_power_cut_loses_no_step(tmp_path: Path) -> None:
    live, rng = tmp_path / "live", random.Random(0)
    live.mkdir()
    recording = record([sys.executable, "-c", PROGRAM, str(live)], live)
    cuts = 0
    for cut in recording.cuts(STEP):
        said = [line.split() for line in cut.said.decode().split("\n")[:-1]]
        trained, saved = ([int(step) for word, step in said if word == kind] for kind in ("trained", "saved"))
        for disk in cut.disks(rng, DISKS):
            cuts += 1
            run_dir = lay_out(disk, tmp_path / "disk")
            told: list[str] = []
            directory = find_checkpoint(run_dir / "checkpoints", "auto", told.append)
            state = RunState()
            if directory is not None:
                state.restore(directory)
                assert (directory / "actor" / "model.pt").read_bytes() == b"%d" % state.step * 9000
            assert state.step >= max(saved, default=0), (cut, told)
            journal = BatchJournal(run_dir / "journal")
            journal.bring_back(state.step)
            bodies = [journal.read(entry) for entry in journal.pending(state.step)]
            owed = [b"batch %d" % step for step in trained if step > state.step]
            assert bodies[: len(owed)] == owed, (cut, told)
            # One more may be there whose acknowledgement was not seen any more.
            assert len(bodies) <= len(owed) + 1 and len(set(bodies)) == len(bodies), (cut, bodies)
            shutil.rmtree(run_dir)
    assert cuts > 50
