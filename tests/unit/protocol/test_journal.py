"""A batch survives whatever happens after it was fetched: kill -9, a full disk, a resume from an older step."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from support.serving import exit_code_in_a_child

from atropos_verl.errors import CheckpointError
from atropos_verl.protocol.journal import BatchJournal, DamagedBatchError, JournalEntry

Log = pytest.LogCaptureFixture
SUFFIXES = ("copy.meta.json", "json", "meta.json")
STEP = int(os.environ.get("ATROPOS_DAMAGE_DRILL", "7"))
BODIES = [b'{"batch":[1]}', b'{"batch": [2] }\n', b"\x00\xff not even JSON"]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def of_batches(*numbers: int) -> list[str]:
    return [f"batch_00000{number}.{suffix}" for number in numbers for suffix in SUFFIXES]


def record_all(directory: Path) -> tuple[BatchJournal, list[JournalEntry]]:
    journal = BatchJournal(directory)
    return journal, [journal.record(body, {"after_step": i}) for i, body in enumerate(BODIES)]


def test_a_new_process_finds_bodies_byte_for_byte_and_in_order(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "journal"
    journal, entries = record_all(directory)
    entries[0] = journal.change(entries[0], step=1)
    assert files(directory) == of_batches(1, 2, 3)
    again = BatchJournal(directory)
    assert again.pending(after_step=0) == entries
    assert [(entry.sequence, entry.step, entry.meta) for entry in entries] == [
        (1, 1, {"after_step": 0}),
        (2, None, {"after_step": 1}),
        (3, None, {"after_step": 2}),
    ]
    assert [entry.path.read_bytes() for entry in entries] == [again.read(entry) for entry in entries] == BODIES
    assert again.record(b"{}").sequence == 4


def test_pending_is_what_no_durable_step_consumed(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    for step, entry in enumerate(entries, start=1):
        journal.change(journal.change(entry, step=8 - step), step=step)  # a batch belongs to the step that took it last
    journal.record(b"{}")  # fetched, and never trained on
    pending = [[entry.sequence for entry in BatchJournal(tmp_path).pending(step)] for step in (0, 1, 2, 3, 9)]
    assert pending == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4], [4]]


def test_a_durable_checkpoint_lets_its_batches_go(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    for step, entry in enumerate(entries[:2], start=1):
        journal.change(entry, step=step)
    assert (journal.discard_through(0), journal.discard_through(1)) == (0, 1)
    assert files(tmp_path) == of_batches(2, 3)
    assert journal.discard_through(2) == 1
    assert files(tmp_path) == of_batches(3)  # never trained on: no checkpoint holds it
    journal.change(entries[2], step=3)
    assert journal.discard_through(3) == 1
    assert journal.record(b"{}").sequence == 4  # this process has used 3 before


def test_the_last_batches_are_kept_and_come_back_when_the_newest_checkpoint_is_lost(tmp_path: Path) -> None:
    journal, kept = BatchJournal(tmp_path, keep=1), tmp_path / "kept"
    for step in range(1, 8):
        entry = journal.change(journal.record(b"%d" % step), step=step)
        journal.attach(entry, "ledger.npz", b"beside")
        if step in (2, 5):
            journal.discard_through(step)
            journal.discard_through(step)  # once more: nothing changes
    assert [entry.step for entry in journal.pending(0)] == [6, 7]
    # Those since the checkpoint of step 2, and one more.
    assert sorted(path.name for path in kept.glob("*[0-9].json")) == [f"batch_00000{n}.json" for n in (2, 3, 4, 5)]
    again = BatchJournal(tmp_path, keep=1)
    assert (again.bring_back(5), again.bring_back(2), again.bring_back(2)) == (0, 3, 0)
    assert [(entry.step, again.read(entry)) for entry in again.pending(2)] == [(n, b"%d" % n) for n in (3, 4, 5, 6, 7)]
    assert again.attachment(again.pending(2)[0], "ledger.npz") == b"beside"
    assert again.record(b"{}").sequence == 8
    again.discard_through(7)
    again.discard_through(8)
    assert files(kept) == [f"batch_000007.{suffix}" for suffix in sorted([*SUFFIXES, "ledger.npz"])]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, caplog: Log) -> None:
    _, entries = record_all(tmp_path)
    torn = [tmp_path / ".batch_000004.json.0123abcd.tmp", tmp_path / "batch_000003.meta.json.tmp"]
    for path in torn:  # the second as a version before wrote them
        path.write_bytes(b"{")
    for suffix in ("", ".copy"):
        (tmp_path / f"batch_000002{suffix}.meta.json").unlink()  # killed between the batch and its note
    (tmp_path / "batch_000009.meta.json").write_bytes(b"{}")  # killed between deleting a batch and its note
    journal = BatchJournal(tmp_path)
    assert torn[0].exists()  # holding a journal touches nothing: another process may be writing
    assert [(entry.sequence, entry.step) for entry in journal.pending(0)] == [(1, None), (2, None), (3, None)]
    assert files(tmp_path) == [*of_batches(1), "batch_000002.json", *of_batches(3)]
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == list(map(str, torn))
    assert journal.read(entries[1]) == BODIES[1]
    missing = BatchJournal(tmp_path / "none")
    assert (missing.pending(0), missing.discard_through(9), (tmp_path / "none").exists()) == ([], 0, False)


def test_notes_of_the_version_before_have_no_checksum(tmp_path: Path, caplog: Log) -> None:
    (tmp_path / "batch_000001.json").write_bytes(b"body")
    note = {"sequence": 1, "bytes": 4, "step": 3, "meta": {"a": 1}, "lease_id": "x", "acked": True}
    (tmp_path / "batch_000001.meta.json").write_text(json.dumps(note))
    journal = BatchJournal(tmp_path)
    [entry] = journal.pending(2)
    assert (entry.step, entry.meta, entry.lease_id, entry.acked) == (3, {"a": 1}, "x", True)
    assert journal.read(entry) == b"body" and journal.change(entry, step=4).step == 4
    assert not caplog.records


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_byte_costs_its_file(tmp_path: Path, caplog: Log, how: str) -> None:
    journal = BatchJournal(tmp_path)
    for number in (1, 2):
        entry = journal.record(b'{"batch":[%d]}' % number, {"after_step": 0}, f"lease{number}")
        entry = journal.note_acked(journal.change(entry, step=number))
        journal.attach(entry, "beside", b"kept %d" % number)
    expected = journal.pending(0)
    for path in sorted(tmp_path.glob("batch_000001*")):
        content = path.read_bytes()
        for position in range(0, len(content), STEP):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged if how == "flip" else content[:position])
            caplog.clear()
            again = BatchJournal(tmp_path)
            assert again.pending(0) == expected, (path.name, position)
            assert (again.read(expected[1]), again.attachment(expected[1], "beside")) == (b'{"batch":[2]}', b"kept 2")
            if path.suffixes == [".json"]:
                with pytest.raises(DamagedBatchError, match=path.name):
                    again.read(expected[0])
            else:
                assert again.read(expected[0]) == b'{"batch":[1]}'
            beside = again.attachment(expected[0], "beside")
            assert beside == (None if path.suffix == ".beside" else b"kept 1")
            if path.suffixes != [".json"] and ".copy" not in path.suffixes:
                assert f"{path} is damaged" in caplog.text
        path.write_bytes(content)


def test_a_batch_that_is_lost_is_named(tmp_path: Path, caplog: Log) -> None:
    journal = BatchJournal(tmp_path)
    entries = [journal.record(b"{}", lease_id=f"lease{number}") for number in (1, 2)]
    journal.note_acked(entries[1])
    for entry in entries:
        entry.path.unlink()
    assert BatchJournal(tmp_path).pending(0) == [] == files(tmp_path)
    assert {record.getMessage().partition(",")[0] for record in caplog.records} == {f"{entries[1].path} is gone"}


def test_a_batch_that_was_changed_or_is_gone_is_not_read(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    entries[0].path.write_bytes(BODIES[0][:5])
    with pytest.raises(DamagedBatchError, match=r"batch_000001\.json has 5 bytes, but 13 were written"):
        journal.read(entries[0])
    assert journal.set_aside(entries[0]) == tmp_path / "damaged" / "batch_000001.json"
    assert files(tmp_path / "damaged") == of_batches(1)
    assert [entry.sequence for entry in BatchJournal(tmp_path).pending(0)] == [2, 3]
    entries[1].path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the journalled batch .*batch_000002\.json: No such file"):
        journal.read(entries[1])
    with pytest.raises(CheckpointError, match=r"no journalled batch .*batch_000002\.json"):
        journal.change(entries[1], step=1)


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL], ids=["the disk is full", "killed"])
@pytest.mark.parametrize("call", ["record", "change"])
def test_a_write_cut_off_in_the_middle_changes_nothing(tmp_path: Path, action: signal.Handlers, call: str) -> None:
    limit, torn = (1000, "batch_000002.json") if call == "record" else (10, "batch_000001.meta.json")

    def write() -> int:
        journal = BatchJournal(tmp_path)
        entry = journal.record(b"first")
        signal.signal(signal.SIGXFSZ, action)  # the default kills the process at that byte of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError) as caught:
            journal.record(b"x" * 5000) if call == "record" else journal.change(entry, step=1)
        assert str(caught.value).startswith(f"cannot write the journalled batch {tmp_path / torn}: File too large (")
        assert str(caught.value).endswith(" bytes); free some space, or choose another run_dir")
        return 0

    killed = action == signal.SIG_DFL
    assert exit_code_in_a_child(write) == (-signal.SIGXFSZ if killed else 0)
    assert [path.stat().st_size for path in tmp_path.glob(f".{torn}.*.tmp")] == [limit] * killed
    journal = BatchJournal(tmp_path)
    [entry] = journal.pending(0)
    assert (entry.sequence, entry.step, journal.read(entry)) == (1, None, b"first")
    assert files(tmp_path) == of_batches(1)
    assert journal.record(b"again").sequence == 2
