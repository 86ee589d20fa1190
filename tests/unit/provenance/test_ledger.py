"""The ledger by values: what was written after which ids, what must stay unknown, and what outlives a restart."""

import logging
import random
import resource
import signal
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.ledgers import holding, one, query, wrote
from support.serving import exit_code_in_a_child

from atropos_verl.provenance import ledger as ledger_module
from atropos_verl.provenance.attribution import SequenceQuery, first_difference, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import UNKNOWN_VERSION

Log = pytest.LogCaptureFixture
PROMPT = (5, 6, 7)
U = UNKNOWN_VERSION


def test_versions_logprobs_and_temperature_of_a_completion() -> None:
    made = wrote([8, 9, 10], runs=((3, 2), (5, 1)))
    match = one(holding(PROMPT, made, temperature=0.7), PROMPT, [8, 9, 10])
    assert match.versions.tolist() == [U, U, U, 3, 3, 5]
    np.testing.assert_array_equal(match.logprobs, [np.nan, np.nan, np.nan, -1.0, -1.125, -1.25])
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (1, 0, 0)
    assert match.temperature == 0.7


@pytest.mark.parametrize(
    ("parts", "expected", "unmatched", "differs"),
    [
        pytest.param((PROMPT, [1, 2, 3]), [7, 7, 7], (0, 0), None, id="tail cut off"),
        pytest.param((PROMPT, [1, 2, 3], [4, 5]), [7, 7, 7], (0, 0), None, id="tail not trained"),
        pytest.param(([*PROMPT, 1, 2], [3, 4, 5]), [7, 7, 7], (0, 0), None, id="head not trained"),
        pytest.param(([*PROMPT, 1], [2, 3], [4, 5]), [7, 7], (0, 0), None, id="the middle is trained"),
        pytest.param((PROMPT, [1], [2, 3], [4, 5]), [7, 7, 7], (0, 0), None, id="a hole"),
        pytest.param((PROMPT, [1, 2, 3, 4, 5, 6]), [7] * 5 + [8], (0, 0), None, id="it was continued"),
        pytest.param((PROMPT, [60, 2], [70], [3, 4]), [U, U, 9, 9], (1, 2), None, id="asked again after an edit"),
        pytest.param((PROMPT, [1, 2, 61, 4]), [U] * 4, (1, 4), (5, 3), id="edited in the middle"),
        pytest.param((PROMPT, [61, 2, 3, 4]), [U] * 4, (1, 4), (3, 60), id="another first token"),
        pytest.param(((5, 61, 7), [1, 2, 3, 4]), [U] * 4, (1, 4), (1, 6), id="another prompt"),
        pytest.param((PROMPT, [1, 2, 3, 4, 5, 50]), [7] * 5 + [U], (1, 1), (8, None), id="the environment appended"),
        pytest.param(((8, 8), [1, 2]), [U, U], (1, 2), (0, None), id="generated elsewhere"),
        pytest.param((PROMPT,), [], (0, 0), None, id="nothing is trained"),
    ],
)
def test_what_is_known_of_a_sequence_and_where_it_first_differs(
    parts: tuple[Sequence[int], ...],
    expected: list[int],
    unmatched: tuple[int, int],
    differs: tuple[int, int | None] | None,
) -> None:
    ledger = holding(PROMPT, wrote([1, 2, 3, 4, 5], 7))
    ledger.record((*PROMPT, 1, 2, 3, 4, 5), [wrote([6], 8)])
    ledger.record((*PROMPT, 60, 2, 70), [wrote([3, 4], 9)])
    match, sent = one(ledger, *parts), query(*parts)
    assert match.versions[sent.loss_mask].tolist() == expected
    assert (match.spans, match.unmatched_spans, match.unmatched_tokens) == (len(parts) // 2, *unmatched)
    of_the_first = np.flatnonzero(match.versions == 7)
    assert match.logprobs[of_the_first].tolist() == (-1 - (of_the_first - 3) / 8).tolist()
    np.testing.assert_array_equal(np.isnan(match.logprobs), match.versions == U)
    if differs is not None:
        at, _, known = first_difference(ledger, sent.token_ids, np.ndarray.tolist)
        assert (at, known[at] if 0 < at < len(known) else None) == differs


def test_each_record_is_used_once_but_identical_ones_of_one_version_are_no_question() -> None:
    ledger = holding(PROMPT, *[wrote([1, 2], 3)] * 3)
    for match in look_up(ledger, [query(PROMPT, [1, 2])] * 3):
        assert match.versions[3:].tolist() == [3, 3] and match.ambiguous_spans == 0
    ledger.record(PROMPT, [wrote([1, 2], 4)])
    assert one(ledger, PROMPT, [1, 2]).versions[3:].tolist() == [4, 4]


def test_a_record_that_may_have_been_used_is_not_taken_for_used() -> None:
    """Two of them at two versions, two sequences: neither says which it is, before the other or after it."""
    ledger = holding(PROMPT, wrote([1, 2], 3), wrote([1, 2], 8))
    for _ in range(2):
        match = one(ledger, PROMPT, [1, 2])
        assert match.versions[3:].tolist() == [U, U] and match.ambiguous_spans == 1
    both = look_up(ledger, [query(PROMPT, [1, 2]), query(PROMPT, [1, 2], logprobs=[-1.0, -1.125])])
    assert [m.ambiguous_spans for m in both] == [1, 1]  # their logprobs are the same here, so they tell nothing


def test_what_is_certain_leaves_less_to_the_others_of_a_batch() -> None:
    ledger = holding(PROMPT, *(wrote([1, 2], version, logprob=-1 - version) for version in (3, 8)))
    found = look_up(ledger, [query(PROMPT, [1, 2]), query(PROMPT, [1, 2], logprobs=[-4.0, -4.125])])
    assert [match.versions[3:].tolist() for match in found] == [[8, 8], [3, 3]]


def test_the_rest_of_a_group_tells_identical_completions_apart() -> None:
    """An old request was dropped by the environment; a new one gave three equal completions and one of its own."""
    ledger = holding(PROMPT, *[wrote([1, 2], 0)] * 4)
    ledger.record(PROMPT, [wrote([1, 2], 5)] * 3 + [wrote([1, 3], 5)])
    matches = look_up(ledger, [query(PROMPT, [1, 2])] * 3 + [query(PROMPT, [1, 3])])
    assert [(match.versions[3], match.ambiguous_spans) for match in matches] == [(5, 0)] * 4


def test_what_nothing_tells_apart_is_unknown_and_not_guessed() -> None:
    """The same ids at versions 0 and 5, and one sequence that says nothing of which it is."""
    ledger = holding(PROMPT, wrote([1, 2, 3], runs=((0, 2), (5, 1))))
    ledger.record(PROMPT, [wrote([1, 2, 3], 5)])
    match = one(ledger, PROMPT, [1, 2, 3])
    assert match.versions[3:].tolist() == [U, U, 5]  # of the last token both say the same
    assert match.logprobs[3:].tolist() == [-1.0, -1.125, -1.25]  # here as well
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (1, 0, 1)
    assert match.found.tolist() == [False] * 3 + [True] * 3


def test_a_turn_was_written_before_the_turns_after_it() -> None:
    ledger = holding(PROMPT, wrote([1], 0))
    ledger.record((*PROMPT, 1, 70), [wrote([2], 0)])
    ledger.record(PROMPT, [wrote([1], 4)])  # newer, and in no way part of that sequence
    match = one(ledger, PROMPT, [1], [70], [2])
    assert match.versions[3:].tolist() == [0, U, 0] and match.ambiguous_spans == 0


def test_the_oldest_is_forgotten_first_and_never_mistaken() -> None:
    ledger = Ledger(max_spans=3)
    for i in range(5):
        ledger.record((100 + i,), [wrote([1, 2], i)])
    matches = look_up(ledger, [query((100 + i,), [1, 2]) for i in range(5)])
    assert [match.versions[1] for match in matches] == [U, U, 2, 3, 4]
    ledger.record((110,), [wrote([1], 9)])  # 2 was used before 3 and 4
    assert [one(ledger, (100 + i,), [1, 2]).versions[1] for i in (2, 3, 4)] == [U, 3, 4]
    stats = ledger.stats()
    assert (stats.spans, stats.prompts, stats.recorded_spans, stats.evicted_spans) == (3, 3, 6, 3)


def test_bytes_are_bounded_and_none_is_left_when_all_is_forgotten() -> None:
    ledger = Ledger(max_bytes=200_000)
    for i in range(500):
        ledger.record(range(i % 7 + 1), [wrote([i % 256] * 50, i), wrote([7] * 3, i)])
        assert ledger.stats().bytes <= 200_000
    assert 50 < len(ledger) < 300
    ledger.max_spans = 1
    ledger.record((1,), [wrote([2], 0)])
    assert ledger.stats().spans == ledger.stats().prompts == 1
    tiny = Ledger(max_bytes=10)
    tiny.record(PROMPT, [wrote([1], 0)])
    assert (tiny.stats().bytes, len(tiny)) == (0, 0)


def test_threads_record_and_look_up_at_the_same_time() -> None:
    ledger = Ledger(max_spans=500)

    def work(name: int) -> None:
        for i in range(300):
            ledger.record((name, i), [wrote([i % 50, name], i)])
            assert one(ledger, (name, i), [i % 50, name]).versions[2:].tolist() == [i, i]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(ledger) == 500


def process(directory: Path, resumed_at: int | None = 0, max_bytes: int = 1 << 20) -> closing[Ledger]:
    """The ledger of a process of the run that keeps ``directory``."""
    ledger = Ledger(max_bytes)
    ledger.persist(directory, resumed_at)
    return closing(ledger)


def of(ledger: Ledger, *tokens: int) -> list[int]:
    """The versions of ``tokens``, trained after the prompt."""
    return one(ledger, PROMPT, tokens).versions[3:].tolist()


def test_against_a_list_of_everything_that_was_written_also_after_a_restart(tmp_path: Path) -> None:
    """Random conversations over few tokens, so that prompts and completions repeat; the oracle knows each token. Who
    sends no logprobs is told the same by both processes."""
    rng = random.Random(0)
    made: list[tuple[SequenceQuery, list[int], list[float]]] = []
    with process(tmp_path, None) as before:
        for number in range(300):
            tokens, parts, truth, logprobs = list[int](), list[list[int]](), list[int](), list[float]()
            for _ in range(rng.randint(1, 3)):
                asked, written = (rng.choices(range(4), k=rng.randint(1, most)) for most in (3, 6))
                cut = rng.randint(0, len(written))
                runs = tuple((v, n) for v, n in ((number, cut), (number + 1, len(written) - cut)) if n)
                generation = wrote(written, runs=runs, logprob=-1 - rng.random())
                before.record(tokens + asked, [generation], temperature=rng.choice([0.7, 1.0]))
                tokens += asked + written
                parts += [asked, written]
                truth += [U] * len(asked) + [v for v, n in runs for _ in range(n)]
                logprobs += generation.logprobs
            made.append((query(*parts, group=number, logprobs=logprobs), truth, logprobs))
        for version, rest in ((0, [1, 2]), (5, [1, 3])):
            before.record(PROMPT, [wrote([1, 2], version)] * 3 + [wrote(rest, version)])
    rng.shuffle(made)
    silent = [replace(sent, logprobs=None) for sent, *_ in made]
    silent += [query(PROMPT, answer, group=-1) for answer in ([1, 2], [1, 2], [1, 2], [1, 3])]
    with process(tmp_path, 1000) as after:  # no version is above: nothing was lost
        stats = after.stats()
        assert (stats.spans, stats.restored_spans, stats.recorded_spans) == (len(before), len(before), 0)
        for ledger in (before, after):
            for sent, truth, logprobs in made:
                [match] = look_up(ledger, [sent])
                assert match.versions.tolist() == truth
                np.testing.assert_array_equal(match.logprobs[sent.loss_mask], np.float32(logprobs))
                assert match.unmatched_spans == 0
        for found, expected in zip(look_up(after, silent), look_up(before, silent), strict=True):
            for name in ("found", "versions", "logprobs"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            for name in ("temperature", "spans", "unmatched_spans", "unmatched_tokens", "ambiguous_spans", "records"):
                assert getattr(found, name) == getattr(expected, name), name


def test_two_damaged_databases_are_named_and_nothing_is_taken_in(tmp_path: Path, caplog: Log) -> None:
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
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        caplog.clear()
        with process(tmp_path, 3) as after:
            if len(after) == 4:  # a byte that says nothing about the records, such as a free page's
                assert [of(after, number, 2) for number in range(4)] == [[3, 3]] * 4
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
        assert match.versions[3:].tolist() == [5, 7, 7, 7]
        assert match.logprobs[3:].tolist() == [-1.0, -1.125, -1.25, -1.375]  # as they were sampled
        ledger.record(PROMPT, [wrote([3, 3], 8)])
        assert of(ledger, 3, 3) == [8, 8]
    with process(tmp_path, 6) as ledger:
        assert of(ledger, 1, 2, 3, 4) == [5, 6, 6, 6]
        assert of(ledger, 2, 2) == of(ledger, 3, 3) == [6, 6]
        ledger.record(PROMPT, [wrote([4, 4], 7)])
    with process(tmp_path, 9) as ledger:  # nothing more is lost, and what was lost stays so
        assert of(ledger, 1, 2, 3, 4) == [5, 6, 6, 6]
        assert of(ledger, 4, 4) == [7, 7]


def test_lost_weights_are_not_taken_for_those_that_have_their_number_now(tmp_path: Path) -> None:
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 9, logprob=-1.0)])
        ledger.record(PROMPT, [wrote([3, 2], 9, logprob=-1.0)])
        ledger.record(PROMPT, [wrote([3, 2], 8, logprob=-3.0)])
    with process(tmp_path, 7) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 9, logprob=-2.0)])
        unsure = one(ledger, PROMPT, [1, 2])  # alike, of a lost 9 and of the 9 of now
        assert unsure.versions[3:].tolist() == [U, U]
        [sure] = look_up(ledger, [query(PROMPT, [1, 2], logprobs=[-1.0, -1.125])])
        assert sure.versions[3:].tolist() == [7, 7] and sure.logprobs[3:].tolist() == [-1.0, -1.125]
        both = one(ledger, PROMPT, [3, 2])  # two lost ones: as old, and of different weights
        assert both.versions[3:].tolist() == [7, 7]
        for match in (unsure, both):
            assert match.ambiguous_spans == 1 and np.isnan(match.logprobs).all()


def test_what_was_trained_on_is_not_offered_again(tmp_path: Path) -> None:
    """A settled policy writes the same again: a batch that was trained on has its record, the new one is the new's."""
    with process(tmp_path, None) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 3), wrote([4, 4], 3)])
        trained, looked_up = one(ledger, PROMPT, [1, 2]), one(ledger, PROMPT, [4, 4])
        ledger.consumed(trained.records)
        assert looked_up.records  # of a batch that went back to the API: it will be asked for again
    with process(tmp_path, 3) as ledger:
        ledger.record(PROMPT, [wrote([1, 2], 5), wrote([4, 4], 5)])
        assert of(ledger, 1, 2) == [5, 5]
        assert of(ledger, 4, 4) == [U, U]


def test_what_is_forgotten_is_deleted_on_disk(tmp_path: Path) -> None:
    bound = 1 << 19
    with process(tmp_path, None, bound) as ledger:
        for number in range(1500):
            recorded, _ = ledger.record([number // 8, *range(100)], [wrote([number, *range(40)], number)])
            if number % 500 == 499:
                assert recorded is not None and not recorded.cancel()
                recorded.result()
                with sqlite3.connect(tmp_path / "ledger.sqlite") as reader:
                    count, size = reader.execute("SELECT count(*), sum(length(value)) FROM spans").fetchone()
                assert count == len(ledger) and size < bound
        held = len(ledger)
    with process(tmp_path, 1500, bound) as after:
        assert len(after) == held > 100
        for number in (1500 - held, 1499):
            match = one(after, [number // 8, *range(100)], [number, *range(40)])
            assert match.versions[101:].tolist() == [number] * 41
    for _ in range(4):  # a run that is restarted all the time
        with process(tmp_path, 1500, bound) as again:
            assert len(again) == held


def test_a_prompt_that_less_room_drops_and_takes_in_again_stays_on_disk(tmp_path: Path, caplog: Log) -> None:
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
    for resumed_at in (None, 3):
        with process(tmp_path, resumed_at) as ledger:
            assert len(ledger) == 0


def test_two_processes_cannot_keep_one_log(tmp_path: Path, caplog: Log) -> None:
    with process(tmp_path, None) as first, process(tmp_path, 0) as second:
        assert "is in use by ledger, pid" in caplog.text and "will not survive a restart" in caplog.text
        second.record(PROMPT, [wrote([1, 2], 3)])
        first.record(PROMPT, [wrote([1, 3], 3)])
    with process(tmp_path, 3) as after:
        assert len(after) == 1


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk. Who waits is answered, also where a file cannot be removed."""

    def remove_some(directory: Path) -> None:
        remove(directory)
        raise OSError("read-only file system")

    def fill_up() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("atropos_verl").addHandler(handler)
        with process(tmp_path, None) as ledger:
            ledger_module._remove = remove_some
            for number in range(200):
                recorded, _ = ledger.record(PROMPT, [wrote([number, 2], 3)])
                if recorded is not None:
                    recorded.result(10.0)
            assert all(of(ledger, number, 2) == [3, 3] for number in range(200))
        [said] = [message for message in messages if "After a restart the policy versions" in message]
        assert str(tmp_path) in said
        return 0

    remove = ledger_module._remove
    assert exit_code_in_a_child(fill_up) == 0
    with process(tmp_path, 3) as after:
        assert len(after) == 0


def test_a_prompt_that_only_shares_the_hash_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = lambda ids, offset=0: np.zeros(len(ids) + 1, dtype=np.uint64)  # noqa: E731
    monkeypatch.setattr("atropos_verl.provenance.ledger.prefix_hashes", same)
    with process(tmp_path, None) as before:
        before.record((5, 6), [wrote([1, 2], 0)])
        assert one(before, (7, 8), [1, 2]).versions.tolist() == [U] * 4
        before.record((7, 8), [wrote([1, 2], 1)])
    with process(tmp_path, 1) as after:
        for ledger in (before, after):
            assert one(ledger, (5, 6), [1, 2]).versions.tolist() == [U] * 4  # forgotten for the newer one
            assert one(ledger, (7, 8), [1, 2]).versions.tolist() == [U, U, 1, 1]
