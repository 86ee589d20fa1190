"""The ledger over a restart, by values: what is known again, what lost weights count as, damage, bounds, full disks."""

import logging
import os
import random
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.serving import exit_code_in_a_child
from test_ledger import PROMPT, U, one, query, versions, wrote

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import SequenceMatch


@contextmanager
def process(directory: Path, resumed_at: int | None = 0, max_bytes: int = 1 << 20) -> Iterator[Ledger]:
    """The ledger of a process of the run that keeps ``directory``."""
    ledger = Ledger(max_bytes)
    ledger.persist(directory, resumed_at)
    try:
        yield ledger
    finally:
        ledger.close()


def same(found: SequenceMatch, expected: SequenceMatch) -> None:
    np.testing.assert_array_equal(found.found, expected.found)
    np.testing.assert_array_equal(found.versions, expected.versions)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    for name in ("temperature", "spans", "unmatched_spans", "unmatched_tokens", "ambiguous_spans", "records"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_restarted_ledger_answers_as_the_one_before(tmp_path: Path) -> None:
    """Thousands of alike and different completions, several turns, swaps inside; then the same questions to both."""
    rng = random.Random(5)
    queries: list[SequenceQuery] = []
    with process(tmp_path, None) as before:
        for number in range(400):
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            made = []
            for _ in range(rng.randrange(1, 4)):
                tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 5))]
                runs = ((number, 1), (number + 1, len(tokens) - 1)) if len(tokens) > 1 else ()
                made.append(wrote(tokens, number, runs=runs, logprob=-rng.random()))
            before.record(prompt, made, temperature=rng.choice([0.7, 1.0]))
            answer = list(made[0].token_ids)
            before.record([*prompt, *answer, 9], [wrote([1, 2], number)])
            queries.append(query(prompt, answer, [9], [1, 2], group=number))
            sent = list(made[-1].logprobs)
            queries.append(query(prompt, made[-1].token_ids, group=-number - 1, logprobs=sent))
    with process(tmp_path, 1000) as after:  # no version is above: nothing was lost
        stats = after.stats()
        assert (stats.spans, stats.restored_spans, stats.recorded_spans) == (len(before), len(before), 0)
        for found, expected in zip(look_up(after, queries), look_up(before, queries), strict=True):
            same(found, expected)


def killed(directory: Path) -> None:
    """A process that records 50 completions, [n, 8] of version 3, and is killed after the last one is safe."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        ledger = Ledger()
        ledger.persist(directory)
        for number in range(50):
            recorded, _ = ledger.record(PROMPT, [wrote([number, 8], 3)])
            assert recorded is not None
            recorded.result()
            os.write(told, bytes([number]))
        signal.pause()
    seen = b""
    while len(seen) < 50:
        seen += os.read(ready, 50)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready), os.close(told)


def test_kill_9_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    killed(tmp_path)
    with process(tmp_path, 3) as after:
        for number in range(50):
            match = one(after, PROMPT, [number, 8])
            assert versions(match)[3:] == [3, 3] and match.logprobs[3:].tolist() == [-1.0, -1.125]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_two_damaged_databases_are_named_and_nothing_is_taken_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two alike completions half a ledger might know only the wrong one."""
    with process(tmp_path, None) as ledger:
        for number in range(4):
            ledger.record(PROMPT, [wrote([number, 2], 3)])
        ledger.consumed(one(ledger, PROMPT, [0, 2]).records)
    contents = {path: path.read_bytes() for path in tmp_path.glob("ledger*.sqlite")}
    assert len(contents) == 2
    used = [position for position, byte in enumerate(contents[tmp_path / "ledger.sqlite"]) if byte]
    empty = 0
    for position in used[:: max(1, len(used) // 12)]:
        for path, content in contents.items():
            path.write_bytes(content)
            flip(path, position)
        caplog.clear()
        with process(tmp_path, 3) as after:
            if len(after) == 4:  # a byte that says nothing about the records, such as a free page's
                assert [versions(one(after, PROMPT, [number, 2]))[3:] for number in range(4)] == [[3, 3]] * 4
                continue
            empty += 1
            assert len(after) == 0 and one(after, PROMPT, [0, 2]).unmatched_spans == 1
            after.record(PROMPT, [wrote([5], 1)])
        assert str(path) in caplog.text and "The ledger begins empty" in caplog.text
        with process(tmp_path, 3) as again:  # and what comes after it is kept as ever
            assert len(again) == 1
    assert empty > 6


def test_versions_above_the_checkpoint_count_as_the_checkpoint(tmp_path: Path) -> None:
    """The first process reached version 9, the second went on at 7 and reached 8, the third goes on at 6."""
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2, 3, 4], runs=((5, 1), (7, 1), (9, 2)))])
        ledger.record(PROMPT, [wrote([2, 2], 6)])
    with process(tmp_path, 7) as ledger:
        match = one(ledger, PROMPT, [1, 2, 3, 4])
        assert versions(match)[3:] == [5, 7, 7, 7]
        np.testing.assert_array_equal(match.logprobs[3:], [-1.0, -1.125, -1.25, -1.375])  # as they were sampled
        ledger.record(PROMPT, [wrote([3, 3], 8)])
        assert versions(one(ledger, PROMPT, [3, 3]))[3:] == [8, 8]
    with process(tmp_path, 6) as ledger:
        assert versions(one(ledger, PROMPT, [1, 2, 3, 4]))[3:] == [5, 6, 6, 6]
        assert versions(one(ledger, PROMPT, [2, 2]))[3:] == [6, 6]
        assert versions(one(ledger, PROMPT, [3, 3]))[3:] == [6, 6]
        ledger.record(PROMPT, [wrote([4, 4], 7)])
    with process(tmp_path, 9) as ledger:  # nothing more is lost, and what was lost stays so
        assert versions(one(ledger, PROMPT, [1, 2, 3, 4]))[3:] == [5, 6, 6, 6]
        assert versions(one(ledger, PROMPT, [4, 4]))[3:] == [7, 7]


def test_lost_weights_are_not_taken_for_those_that_have_their_number_now(tmp_path: Path) -> None:
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 9, logprob=-1.0)])
        ledger.record(PROMPT, [wrote([3, 2], 9, logprob=-1.0)])
        ledger.record(PROMPT, [wrote([3, 2], 8, logprob=-3.0)])
    with process(tmp_path, 7) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 9, logprob=-2.0)])
        unsure = one(ledger, PROMPT, [1, 2])  # alike, of a lost 9 and of the 9 of now
        assert versions(unsure)[3:] == [U, U] and unsure.ambiguous_spans == 1 and np.isnan(unsure.logprobs).all()
        [sure] = look_up(ledger, [query(PROMPT, [1, 2], logprobs=[-1.0, -1.125])])
        assert versions(sure)[3:] == [7, 7] and sure.logprobs[3:].tolist() == [-1.0, -1.125]
        # two lost ones: as old, and of different weights
        both = one(ledger, PROMPT, [3, 2])
        assert versions(both)[3:] == [7, 7] and both.ambiguous_spans == 1 and np.isnan(both.logprobs).all()


def test_what_was_trained_on_is_not_offered_again(tmp_path: Path) -> None:
    """A settled policy writes the same again: a batch that was trained on has its record, the new one is the new's."""
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 3)])
        ledger.record(PROMPT, [wrote([4, 4], 3)])
        trained, looked_up = one(ledger, PROMPT, [1, 2]), one(ledger, PROMPT, [4, 4])
        ledger.consumed(trained.records)
        assert looked_up.records  # of a batch that went back to the API: it will be asked for again
    with process(tmp_path, 3) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 5)])
        ledger.record(PROMPT, [wrote([4, 4], 5)])
        assert versions(one(ledger, PROMPT, [1, 2]))[3:] == [5, 5]
        assert versions(one(ledger, PROMPT, [4, 4]))[3:] == [U, U]


def test_what_is_forgotten_is_deleted_on_disk(tmp_path: Path) -> None:
    bound = 1 << 19
    sizes = []
    with process(tmp_path, None, bound) as ledger:
        for number in range(1500):
            prompt = [number // 8, *range(100)]
            recorded, _ = ledger.record(prompt, [wrote([number, *range(40)], number)])
            if number % 500 == 499:
                assert recorded is not None and not recorded.cancel()
                recorded.result()
                with sqlite3.connect(tmp_path / "ledger.sqlite") as reader:
                    sizes.append(reader.execute("SELECT count(*), sum(length(value)) FROM spans").fetchone())
        held = len(ledger)
    assert all(size[0] == held and size[1] < bound for size in sizes)
    with process(tmp_path, 1500, bound) as after:
        assert len(after) == held > 100
        for number in (1500 - held, 1499):
            assert versions(one(after, [number // 8, *range(100)], [number, *range(40)]))[101:] == [number] * 41
    for _ in range(4):  # a run that is restarted all the time
        with process(tmp_path, 1500, bound) as again:
            assert len(again) == held


def test_a_prompt_that_less_room_drops_and_takes_in_again_stays_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row was deleted, and the next process took the file for damaged."""
    with process(tmp_path, None) as before:
        for prompt in (PROMPT, [4, 4], PROMPT):
            before.record(prompt, [wrote([1, 2], 0)])
    for _ in range(2):
        with process(tmp_path, max_bytes=2500) as after:
            assert [record.order for record in after.newest(9)] == [3]
    assert caplog.messages == []


def test_a_new_run_takes_nothing_in(tmp_path: Path) -> None:
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 3)])
        with pytest.raises(ValueError, match="before the first record"):
            ledger.persist(tmp_path)
    with process(tmp_path, None) as ledger:
        assert one(ledger, PROMPT, [1, 2]).unmatched_spans == 1
    with process(tmp_path, 3) as ledger:
        assert len(ledger) == 0


def test_two_processes_cannot_keep_one_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with process(tmp_path, None) as first, process(tmp_path, 0) as second:
        assert "is in use by ledger, pid" in caplog.text and "will not survive a restart" in caplog.text
        second.record(PROMPT, [wrote([1, 2], 3)])
        first.record(PROMPT, [wrote([1, 3], 3)])
    with process(tmp_path, 3) as after:
        assert len(after) == 1


def test_a_write_that_fails_answers_whoever_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file cannot be removed: a request waits for this future before it is answered."""

    def refuse(directory: Path) -> None:
        raise OSError("read-only file system")

    with process(tmp_path, None) as ledger:
        assert ledger._store is not None
        ledger._store.close()
        monkeypatch.setattr("atropos_verl.provenance.ledger._remove", refuse)
        recorded, _ = ledger.record(PROMPT, [wrote([1, 2], 3)])
        assert recorded is not None and recorded.result(10.0) is None
        assert one(ledger, PROMPT, [1, 2]).unmatched_spans == 0


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk."""
    assert exit_code_in_a_child(lambda: _fill_up(tmp_path)) == 0
    with process(tmp_path, 3) as after:
        assert len(after) == 0


def _fill_up(directory: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("atropos_verl").addHandler(handler)
    with process(directory, None) as ledger:
        for number in range(200):
            recorded, _ = ledger.record(PROMPT, [wrote([number, 2], 3)])
            if recorded is not None:
                recorded.result()
        known = all(one(ledger, PROMPT, [number, 2]).unmatched_spans == 0 for number in range(200))
    said = [message for message in messages if "After a restart the policy versions" in message]
    return 0 if known and len(said) == 1 and str(directory) in said[0] else 2


def test_two_prompts_of_one_hash_are_not_confused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "atropos_verl.provenance.ledger.prefix_hashes", lambda ids, offset=0: np.zeros(len(ids) + 1, dtype=np.uint64)
    )
    with process(tmp_path, None) as ledger:
        ledger.record((1, 2, 3), [wrote([8], 3)])
        ledger.record((4, 5, 6), [wrote([9], 4)])
    with process(tmp_path, 4) as after:
        assert versions(one(after, (4, 5, 6), [9]))[3:] == [4]
        assert one(after, (1, 2, 3), [9]).unmatched_spans == 1
