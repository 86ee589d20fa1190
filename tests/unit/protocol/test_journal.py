"""A batch survives whatever happens after it was fetched: kill -9, a full disk, a resume from an older step."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_verl.errors import CheckpointError
from atropos_verl.protocol.journal import BatchJournal, DamagedBatchError, JournalEntry

SUFFIXES = ("copy.meta.json", "json", "meta.json")
STEP = int(os.environ.get("ATROPOS_DAMAGE_DRILL", "7"))
BODIES = [b'{"batch":[1]}', b'{"batch": [2] }\n', b"\x00\xff not even JSON"]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def record_all(directory: Path) -> tuple[BatchJournal, list[JournalEntry]]:
    journal = BatchJournal(directory)
    return journal, [journal.record(body, {"after_step": i}) for i, body in enumerate(BODIES)]


def test_a_body_is_kept_byte_for_byte_in_a_numbered_file(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path / "run" / "journal")
    assert [entry.sequence for entry in entries] == [1, 2, 3]
    assert [entry.path.name for entry in entries] == [f"batch_00000{i}.json" for i in (1, 2, 3)]
    assert [entry.path.read_bytes() for entry in entries] == BODIES
    assert [journal.read(entry) for entry in entries] == BODIES
    assert entries[1].meta == {"after_step": 1}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_new_process_finds_order_notes_and_steps_and_goes_on_counting(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    assigned = journal.change(entries[0], step=1)
    assert (assigned.step, assigned.sequence) == (1, 1)
    found = BatchJournal(tmp_path).pending(after_step=0)
    assert found == [assigned, *entries[1:]]
    assert BatchJournal(tmp_path).record(b"{}").sequence == 4


@pytest.mark.parametrize(
    ("after_step", "sequences"),
    [
        (0, [1, 2, 3, 4]),  # no checkpoint at all: everything again
        (1, [2, 3, 4]),
        (2, [3, 4]),  # step 3 was trained, and lost with the process
        (3, [4]),  # fetched, and never trained on
        (9, [4]),
    ],
)
def test_pending_is_what_no_durable_step_consumed(tmp_path: Path, after_step: int, sequences: list[int]) -> None:
    journal, entries = record_all(tmp_path)
    for step, entry in enumerate(entries, start=1):
        journal.change(journal.change(entry, step=8 - step), step=step)  # a batch belongs to the step that took it last
    journal.record(b"{}")
    assert [entry.sequence for entry in BatchJournal(tmp_path).pending(after_step)] == sequences


def test_a_durable_checkpoint_lets_its_batches_go(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    journal.change(entries[0], step=1)
    journal.change(entries[1], step=2)
    assert journal.discard_through(0) == 0
    assert journal.discard_through(1) == 1
    assert files(tmp_path) == [f"batch_00000{number}.{suffix}" for number in (2, 3) for suffix in SUFFIXES]
    assert journal.discard_through(2) == 1
    assert [entry.sequence for entry in journal.pending(2)] == [3]  # never trained on: no checkpoint holds it
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
    assert [path.name for path in sorted(kept.glob("*[0-9].json"))] == ["batch_000007.json"]
    assert files(kept) == [f"batch_000007.{suffix}" for suffix in sorted([*SUFFIXES, "ledger.npz"])]


def test_what_a_killed_process_left_half_written_is_removed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, entries = record_all(tmp_path)
    (tmp_path / ".batch_000004.json.0123abcd.tmp").write_bytes(b'{"batch":[{"tok')
    (tmp_path / "batch_000003.meta.json.tmp").write_bytes(b"{")  # by a version before
    for suffix in ("", ".copy"):
        (tmp_path / f"batch_000002{suffix}.meta.json").unlink()  # killed between the batch and its note
    (tmp_path / "batch_000009.meta.json").write_bytes(b"{}")  # killed between deleting a batch and its note
    with caplog.at_level(logging.WARNING, logger="atropos_verl"):
        found = BatchJournal(tmp_path).pending(0)
    assert [(entry.sequence, entry.step) for entry in found] == [(1, None), (2, None), (3, None)]
    assert files(tmp_path) == [
        *(f"batch_000001.{suffix}" for suffix in SUFFIXES),
        "batch_000002.json",
        *(f"batch_000003.{suffix}" for suffix in SUFFIXES),
    ]
    assert [r.getMessage().split(" ")[0] for r in caplog.records] == [
        str(tmp_path / ".batch_000004.json.0123abcd.tmp"), str(tmp_path / "batch_000003.meta.json.tmp"),
    ]  # fmt: skip
    assert BatchJournal(tmp_path).read(entries[1]) == BODIES[1]


def test_notes_of_the_version_before_have_no_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "batch_000001.json").write_bytes(b"body")
    note = {"sequence": 1, "bytes": 4, "step": 3, "meta": {"a": 1}, "lease_id": "x", "acked": True}
    (tmp_path / "batch_000001.meta.json").write_text(json.dumps(note))
    journal = BatchJournal(tmp_path)
    [entry] = journal.pending(2)
    assert (entry.step, entry.meta, entry.lease_id, entry.acked) == (3, {"a": 1}, "x", True)
    assert journal.read(entry) == b"body" and journal.change(entry, step=4).step == 4
    assert not caplog.records


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_byte_of_any_file_is_named_and_costs_that_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
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


def test_a_batch_that_is_gone_and_that_the_api_has_forgotten_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = BatchJournal(tmp_path)
    for number in (1, 2):
        entry = journal.record(b"{}", lease_id=f"lease{number}")
    journal.note_acked(entry)
    for path in (tmp_path / "batch_000001.json", tmp_path / "batch_000002.json"):
        path.unlink()
    assert BatchJournal(tmp_path).pending(0) == [] == list(tmp_path.iterdir())
    assert {record.getMessage().partition(",")[0] for record in caplog.records} == {
        f"{tmp_path / 'batch_000002.json'} is gone"
    }


def test_a_damaged_batch_is_moved_aside_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    entries[1].path.write_bytes(b"?")
    assert journal.set_aside(entries[1]) == tmp_path / "damaged" / "batch_000002.json"
    assert files(tmp_path / "damaged") == [f"batch_000002.{suffix}" for suffix in SUFFIXES]
    assert [entry.sequence for entry in BatchJournal(tmp_path).pending(0)] == [1, 3]


def test_a_body_that_was_changed_or_is_gone_is_not_read(tmp_path: Path) -> None:
    journal, entries = record_all(tmp_path)
    entries[0].path.write_bytes(BODIES[0][:5])
    with pytest.raises(DamagedBatchError, match=r"batch_000001\.json has 5 bytes, but 13 were written"):
        journal.read(entries[0])
    entries[1].path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the journalled batch .*batch_000002\.json: No such file"):
        journal.read(entries[1])
    with pytest.raises(CheckpointError, match=r"no journalled batch .*batch_000002\.json"):
        journal.change(entries[1], step=1)


def test_holding_a_journal_touches_nothing(tmp_path: Path) -> None:
    torn = tmp_path / "batch_000001.json.tmp"
    torn.write_bytes(b"another process is writing this")
    BatchJournal(tmp_path)
    assert torn.exists()
    missing = BatchJournal(tmp_path / "none")
    assert missing.pending(0) == []
    assert missing.discard_through(9) == 0
    assert not (tmp_path / "none").exists()


_JOURNAL = """
import resource, signal, sys
from pathlib import Path
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.errors import CheckpointError
journal = BatchJournal(Path(sys.argv[1]))
"""
_FULL_DISK = """
journal.record(b"fits")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes beyond byte 1000 now fail, as on a full disk
try:
    journal.record(b"x" * 5000)
except CheckpointError as error:
    sys.stdout.write(str(error))
"""


def test_a_full_disk_names_the_file_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _JOURNAL + _FULL_DISK, str(tmp_path)]
    assert subprocess.check_output(command, text=True, timeout=60) == (
        f"cannot write the journalled batch {tmp_path / 'batch_000002.json'}: File too large (5000 bytes); "
        "free some space, or choose another run_dir"
    )
    assert files(tmp_path) == [f"batch_000001.{suffix}" for suffix in SUFFIXES]
    journal = BatchJournal(tmp_path)
    assert [journal.read(entry) for entry in journal.pending(0)] == [b"fits"]


_KILLED_WHILE_WRITING = """
entry = journal.record(b"first")
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel now kills the process at byte LIMIT of a file
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
journal.change(entry, step=1) if sys.argv[3] == "assign" else journal.record(b"x" * 5000)
"""


@pytest.mark.parametrize(("call", "limit", "torn"), [("record", 1000, ".batch_000002.json.*.tmp"),
                                                     ("assign", 10, ".batch_000001.meta.json.*.tmp")])  # fmt: skip
def test_killed_in_the_middle_of_a_write(tmp_path: Path, call: str, limit: int, torn: str) -> None:
    command = [sys.executable, "-c", _JOURNAL + _KILLED_WHILE_WRITING, str(tmp_path), str(limit), call]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGXFSZ
    assert [path.stat().st_size for path in tmp_path.glob(torn)] == [limit]
    journal = BatchJournal(tmp_path)
    (entry,) = journal.pending(0)
    assert (entry.sequence, entry.step, journal.read(entry)) == (1, None, b"first")
    assert files(tmp_path) == [f"batch_000001.{suffix}" for suffix in SUFFIXES]
    assert journal.record(b"again").sequence == 2
