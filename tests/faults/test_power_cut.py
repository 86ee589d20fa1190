"""Power cuts at every system call: what was acknowledged before is there after (by the store: with ``fsync``).

``ATROPOS_POWER_CUTS=full`` tries every call with 6 disks each, not every eleventh (checkpoints: third) with 3.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.power_cut import STRACE, Recording, lay_out, needs_strace, record
from support.trajectory_server import ServerProcess, group, registration

from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store
from atropos_verl.training.checkpoint_state import RunState, find_checkpoint

FULL = os.environ.get("ATROPOS_POWER_CUTS") == "full"
TESTS = Path(__file__).parents[1]
ORDERED = ("fsync", "rename")
SAY = """
import os, sys
from pathlib import Path
directory = Path(sys.argv[1])
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
STORE = """
import asyncio
import atropos_verl.storage
from support.trajectory_server import post, registration
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store
atropos_verl.storage._CHECKPOINT_BYTES = 60_000  # several times

async def main():
    for life in range(2):
        store = Store(ServerSettings(data_dir=directory / "run" / "api", fsync=True))
        if not life:
            store.register(TrainerRegistration(**registration(8)))
        for number in range(life * 10, life * 10 + 10):
            post(store, number, 2, key=f"key{number}")
            await store.synced()
            say("group", number)
            batch = store.next_batch(60.0) if number % 5 == 4 else None
            if batch is not None:
                await store.synced()
                seqs = [str(seq) for seq in batch.seqs]
                say("acking", *seqs)
                store.ack(batch.lease_id)
                await store.synced()
                say("acked", *seqs)
        store.close()
asyncio.run(main())
"""
JOURNAL = """
from atropos_verl.protocol.journal import BatchJournal
journal = BatchJournal(directory / "run" / "journal", keep=KEEP)
for step in range(1, 7):
    entry = journal.record(b"batch %d " % step * 3000, {"after_step": step - 1}, f"lease{step}")
    say("recorded", step)
    entry = journal.change(entry, step=step)
    say("assigned", step)
    journal.note_acked(entry)
    if step % 3 == 0:
        say("dropping", step - 1)
        journal.discard_through(step - 1)
"""
CHECKPOINTS = """
from atropos_verl.config.schema import RunConfig
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.training.checkpoint_state import RunState, new_checkpoint
journal = BatchJournal(directory / "journal", keep=1)

def save(step):
    with new_checkpoint(directory / "checkpoints", step, 2) as checkpoint:
        (checkpoint / "actor" / "huggingface").mkdir(parents=True)
        (checkpoint / "actor" / "model.pt").write_bytes(b"%d" % step * 9000)  # not synced by who writes it
        (checkpoint / "actor" / "huggingface" / "config.json").write_text("{}")
        RunState(step=step, policy_version=step).save(checkpoint, RunConfig())
    journal.discard_through(step)
    say("saved", step)

for step in range(1, 9):
    journal.change(journal.record(b"batch %d" % step), step=step)
    say("trained", step)
    if step % 2 == 0:
        save(step)
save(8)  # once more, in the place of the one before
"""


def recorded(live: Path, program: str) -> Recording:
    live.mkdir(exist_ok=True)
    path = os.pathsep.join([str(TESTS), *sys.path])
    return record([sys.executable, "-c", SAY + program, str(live)], live, PYTHONPATH=path)


def said(cut: Recording, word: str) -> set[int]:
    lines = [line.split() for line in cut.said.decode().splitlines()]
    return {int(number) for line in lines if line[0] == word for number in line[1:]}


def try_every_cut(memory: Path, program: str, check: Callable[[Recording, Path], None], step: int = 11) -> None:
    cuts = 0
    for cut in recorded(memory / "live", program).cuts(1 if FULL else step):
        for number, disk in enumerate(cut.disks(random.Random(cut.number), 6 if FULL else 3)):
            try:
                check(cut, lay_out(disk, memory / "disk"))
            except Exception as error:
                raise AssertionError(f"cut {cut.number} after {cut.call}, disk {number}: {error}") from error
            shutil.rmtree(memory / "disk")
            cuts += 1
    assert cuts > 40


@needs_strace
@pytest.mark.timeout(1800)
def test_the_store_holds_every_group_whose_answer_was_sent(memory: Path) -> None:
    def check(cut: Recording, disk: Path) -> None:
        accepted, acking, acked = said(cut, "group"), said(cut, "acking"), said(cut, "acked")
        store = Store(ServerSettings(data_dir=disk / "run" / "api", fsync=True))
        held = set(store.groups)
        assert all(b'"tokens": [[%d,' % seq in group.raw for seq, group in store.groups.items())
        store.close()
        assert accepted - acking <= held, f"lost: {accepted - acking - held}"
        assert not acked & held, f"come again: {acked & held}"

    try_every_cut(memory, STORE, check)


@needs_strace
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.timeout(1800)
def test_the_journal_holds_every_recorded_batch_and_the_step_that_took_it(memory: Path, keep: int) -> None:
    def check(cut: Recording, disk: Path) -> None:
        recorded, assigned = said(cut, "recorded"), said(cut, "assigned")
        dropping = max(said(cut, "dropping"), default=0)
        journal = BatchJournal(disk / "run" / "journal")
        found = {entry.sequence: entry for entry in journal.pending(-1)}
        assert {step for step in recorded if step > dropping} <= set(found)
        for sequence, entry in found.items():
            assert journal.read(entry) == b"batch %d " % sequence * 3000
            # A batch whose note went before it would be trained on a second time.
            assert entry.step == sequence or sequence not in assigned

    try_every_cut(memory, JOURNAL.replace("KEEP", str(keep)), check)


@needs_strace
def test_no_step_is_lost_by_journal_and_checkpoints(memory: Path) -> None:
    def check(cut: Recording, disk: Path) -> None:
        state, told = RunState(), list[str]()
        directory = find_checkpoint(disk / "checkpoints", "auto", told.append)
        if directory is not None:
            state.restore(directory)
            assert (directory / "actor" / "model.pt").read_bytes() == b"%d" % state.step * 9000
        assert state.step >= max(said(cut, "saved"), default=0), told
        journal = BatchJournal(disk / "journal")
        journal.bring_back(state.step)
        bodies = [journal.read(entry) for entry in journal.pending(state.step)]
        owed = [b"batch %d" % step for step in sorted(said(cut, "trained")) if step > state.step]
        assert bodies[: len(owed)] == owed, told
        # One more may be there whose acknowledgement was not seen any more.
        assert len(bodies) <= len(owed) + 1 and len(set(bodies)) == len(bodies), bodies

    try_every_cut(memory, CHECKPOINTS, check, step=3)


@needs_strace
def test_the_harness_tells_a_program_that_does_not_wait_from_one_that_does(memory: Path) -> None:
    lost = {}
    for durable in (False, True):
        live = memory / f"live{durable}"
        live.mkdir()
        (live / "file").write_bytes(b"old")
        write = f"write_atomic(directory / 'file', b'new' * 5000, durable={durable})"
        recording = recorded(live, f"from atropos_verl.storage import write_atomic\n{write}\nsay('done')")
        *_, end = recording.cuts()
        assert end.said == b"done\n"
        lost[durable] = [disk["file"] != b"new" * 5000 for disk in end.disks(random.Random(1), 20)]
        calls = [name for name, arguments, _ in recording.calls if str(live) in arguments[0] and name in ORDERED]
        assert calls == (["fsync", "rename", "fsync"] if durable else ["rename"])
    assert lost[False][0] and not lost[False][1] and True in lost[False][2:]
    assert not any(lost[True])


@needs_strace
@pytest.mark.parametrize("which", [6, 7, 8])
def test_after_a_sync_that_failed_nothing_is_answered_200_until_a_restart(tmp_path: Path, which: int) -> None:
    """Syncs are of large values and of the WAL, in turns; that number ``which`` fails, no other."""
    server = ServerProcess(tmp_path, "--data-dir", str(tmp_path / "data"), "--fsync")
    inject = ("-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={which}")
    server.prefix = (str(STRACE), "-f", "-qq", "-o", os.devnull, *inject)
    with server:
        httpx.post(f"{server.url}/register", json=registration(64))
        answers = [httpx.post(f"{server.url}/scored_data", json=group(number, 8)) for number in range(5)]
        codes = [answer.status_code for answer in answers]
        accepted = codes.count(200)
        assert codes == [200] * accepted + [507] * (5 - accepted) and accepted < 5
        assert all("the disk did not confirm a write" in answer.text for answer in answers[accepted:])
        assert httpx.get(f"{server.url}/batch").status_code == 507
        server.kill()
        server.prefix = ()
        server.start()
        waiting = httpx.get(f"{server.url}/status").json()["queue_size"]
        assert accepted <= waiting <= accepted + 1
        assert httpx.post(f"{server.url}/scored_data", json=group(9, 8)).status_code == 200
