"""The ledger by values: what was written after which ids, and what it must not claim to know."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from atropos_verl.provenance.attribution import SequenceQuery, first_difference, look_up
from atropos_verl.provenance.ledger import Ledger, prefix_hashes, trained_spans
from atropos_verl.types import UNKNOWN_VERSION, Generation, SequenceMatch

PROMPT = (5, 6, 7)


def wrote(
    tokens: Sequence[int], version: int = 0, *, runs: tuple[tuple[int, int], ...] = (), logprob: float = -1.0
) -> Generation:
    """A completion whose k-th logprob is ``logprob - k / 8``."""
    return Generation(
        token_ids=tuple(tokens),
        logprobs=tuple(logprob - k / 8 for k in range(len(tokens))),
        finish_reason="stop",
        policy_version_runs=runs or ((version, len(tokens)),),
    )


def query(*parts: Sequence[int], group: int = 0, logprobs: list[float] | None = None) -> SequenceQuery:
    """Parts in turn not trained, trained, not trained, …; ``logprobs`` of the trained tokens in order."""
    tokens = np.array([token for part in parts for token in part], dtype=np.int64)
    mask = np.array([bool(index % 2) for index, part in enumerate(parts) for _ in part])
    sent = None
    if logprobs is not None:
        sent = np.full(len(tokens), np.nan)
        sent[mask] = logprobs
    return SequenceQuery(token_ids=tokens, loss_mask=mask, logprobs=sent, group=group)


def versions(match: SequenceMatch) -> list[int]:
    return [int(v) for v in match.versions]


def holding(prompt: Sequence[int], *made: Generation) -> Ledger:
    """A ledger with the completions of one request."""
    ledger = Ledger()
    ledger.record(prompt, made)
    return ledger


def one(ledger: Ledger, *parts: Sequence[int]) -> SequenceMatch:
    [match] = look_up(ledger, [query(*parts)])
    return match


U = UNKNOWN_VERSION


def test_versions_and_logprobs_of_a_single_turn() -> None:
    ledger = Ledger()
    ledger.record(PROMPT, [wrote([8, 9], 3)], temperature=0.7)
    match = one(ledger, PROMPT, [8, 9])
    assert versions(match) == [U, U, U, 3, 3]
    np.testing.assert_array_equal(match.logprobs, [np.nan, np.nan, np.nan, -1.0, -1.125])
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (1, 0, 0)
    assert match.temperature == 0.7


def test_versions_inside_a_span_that_weights_were_swapped_in() -> None:
    ledger = holding(PROMPT, wrote([1, 2, 3, 4], runs=((2, 1), (3, 2), (5, 1))))
    assert versions(one(ledger, PROMPT, [1, 2, 3, 4]))[3:] == [2, 3, 3, 5]


def test_a_generation_that_was_continued_without_tokens_between() -> None:
    ledger = holding(PROMPT, wrote([1, 2], 0))
    ledger.record((*PROMPT, 1, 2), [wrote([3, 4, 5], 1)])
    match = one(ledger, PROMPT, [1, 2, 3, 4, 5])
    assert versions(match)[3:] == [0, 0, 1, 1, 1]
    assert (match.spans, match.unmatched_spans) == (1, 0)


@pytest.mark.parametrize(
    ("parts", "known"),
    [
        pytest.param((PROMPT, [1, 2, 3]), [7, 7, 7], id="tail cut off"),
        pytest.param((PROMPT, [1, 2, 3], [4, 5]), [7, 7, 7], id="tail not trained"),
        pytest.param(([*PROMPT, 1, 2], [3, 4, 5]), [7, 7, 7], id="head not trained"),
        pytest.param(([*PROMPT, 1], [2, 3], [4, 5]), [7, 7], id="the middle is trained"),
        pytest.param((PROMPT, [1], [2, 3], [4, 5]), [7, 7, 7], id="a hole"),
    ],
)
def test_parts_of_a_completion_are_found(parts: tuple[Sequence[int], ...], known: list[int]) -> None:
    ledger = holding(PROMPT, wrote([1, 2, 3, 4, 5], 7))
    match = one(ledger, *parts)
    mask = query(*parts).loss_mask
    assert match.versions[mask].tolist() == known and match.unmatched_spans == 0
    expected = np.array([-1.0, -1.125, -1.25, -1.375, -1.5])[np.flatnonzero(mask) - 3]
    np.testing.assert_array_equal(match.logprobs[mask], expected)


@pytest.mark.parametrize(
    ("prompt", "trained", "position", "written", "posted"),
    [
        pytest.param(PROMPT, [1, 2, 60, 4], 5, 3, 60, id="edited in the middle"),
        pytest.param(PROMPT, [60, 2, 3, 4], 3, 1, 60, id="another first token"),
        pytest.param((5, 60, 7), [1, 2, 3, 4], 1, 6, 60, id="another prompt"),
    ],
)
def test_edited_text_is_unknown_and_the_first_difference_is_named(
    prompt: tuple[int, ...], trained: list[int], position: int, written: int, posted: int
) -> None:
    ledger = holding(PROMPT, wrote([1, 2, 3, 4], 7))
    match = one(ledger, prompt, trained)
    assert versions(match) == [U] * 7 and np.isnan(match.logprobs).all()
    assert (match.spans, match.unmatched_spans, match.unmatched_tokens) == (1, 1, 4)
    at, sent, known = first_difference(ledger, query(prompt, trained).token_ids, np.ndarray.tolist)
    assert (at, known[at], sent[at]) == (position, written, posted)


def test_tokens_the_environment_appends_are_unknown_and_the_rest_is_not() -> None:
    ledger = holding(PROMPT, wrote([1, 2], 7))
    match = one(ledger, PROMPT, [1, 2, 50])
    assert versions(match)[3:] == [7, 7, U]
    assert (match.unmatched_spans, match.unmatched_tokens) == (1, 1)
    at, _, known = first_difference(ledger, query(PROMPT, [1, 2, 50]).token_ids, np.ndarray.tolist)
    assert at == len(known) == 5


def test_a_turn_after_an_edited_turn_is_found() -> None:
    ledger = holding(PROMPT, wrote([1, 2], 0))
    ledger.record((*PROMPT, 60, 2, 70), [wrote([3, 4], 1)])  # the environment edited 1 into 60 and asked again
    match = one(ledger, PROMPT, [60, 2], [70], [3, 4])
    assert versions(match) == [U, U, U, U, U, U, 1, 1]
    assert (match.spans, match.unmatched_spans, match.unmatched_tokens) == (2, 1, 2)


def test_nothing_is_known_of_what_was_generated_elsewhere() -> None:
    match = one(Ledger(), PROMPT, [1, 2])
    assert versions(match) == [U] * 5 and match.unmatched_spans == 1
    assert first_difference(Ledger(), query(PROMPT, [1, 2]).token_ids, np.ndarray.tolist)[0] == 0
    match = one(Ledger(), PROMPT)  # without trained tokens there is no span
    assert (match.spans, match.unmatched_spans) == (0, 0)
    assert trained_spans(np.array([False, True, True, False, True])) == [(1, 3), (4, 5)]


# identical completions ----------------------------------------------------------------------------------------------


def test_n_identical_completions_of_one_version_are_no_question() -> None:
    ledger = holding(PROMPT, *[wrote([1, 2], 3)] * 3)
    matches = look_up(ledger, [query(PROMPT, [1, 2]) for _ in range(3)])
    assert [versions(m)[3:] for m in matches] == [[3, 3]] * 3
    assert [m.ambiguous_spans for m in matches] == [0] * 3


def test_each_record_is_used_once() -> None:
    ledger = holding(PROMPT, wrote([1, 2], 3))
    assert versions(one(ledger, PROMPT, [1, 2]))[3:] == [3, 3]
    ledger.record(PROMPT, [wrote([1, 2], 4)])
    assert versions(one(ledger, PROMPT, [1, 2]))[3:] == [4, 4]


def test_a_record_that_may_have_been_used_is_not_taken_for_used() -> None:
    """Two of them at two versions, two sequences: neither says which it is, before the other or after it."""
    ledger = Ledger()
    for version in (3, 8):
        ledger.record(PROMPT, [wrote([1, 2], version)])
    for _ in range(2):
        match = one(ledger, PROMPT, [1, 2])
        assert versions(match)[3:] == [U, U] and match.ambiguous_spans == 1
    both = look_up(ledger, [query(PROMPT, [1, 2]), query(PROMPT, [1, 2], logprobs=[-1.0, -1.125])])
    assert [m.ambiguous_spans for m in both] == [1, 1]  # their logprobs are the same here, so they tell nothing


def test_what_is_certain_leaves_less_to_the_others_of_a_batch() -> None:
    ledger = Ledger()
    for version in (3, 8):
        ledger.record(PROMPT, [wrote([1, 2], version, logprob=-1 - version)])
    silent, exact = look_up(ledger, [query(PROMPT, [1, 2]), query(PROMPT, [1, 2], logprobs=[-4.0, -4.125])])
    assert versions(exact)[3:] == [3, 3] and versions(silent)[3:] == [8, 8]


def test_the_rest_of_a_group_tells_identical_completions_apart() -> None:
    """An old request was dropped by the environment; a new one gave three equal completions and one of its own."""
    ledger = holding(PROMPT, *[wrote([1, 2], 0)] * 4)
    ledger.record(PROMPT, [wrote([1, 2], 5)] * 3 + [wrote([1, 3], 5)])
    matches = look_up(ledger, [query(PROMPT, [1, 2]) for _ in range(3)] + [query(PROMPT, [1, 3])])
    assert [int(m.versions[3]) for m in matches] == [5] * 4
    assert [m.ambiguous_spans for m in matches] == [0] * 4


def test_what_nothing_tells_apart_is_unknown_and_not_guessed() -> None:
    """The same ids at versions 0 and 5, and one sequence that says nothing of which it is."""
    ledger = holding(PROMPT, wrote([1, 2, 3], runs=((0, 2), (5, 1))))
    ledger.record(PROMPT, [wrote([1, 2, 3], 5)])
    match = one(ledger, PROMPT, [1, 2, 3])
    assert versions(match)[3:] == [U, U, 5]  # of the last token both say the same
    assert match.logprobs[3:].tolist() == [-1.0, -1.125, -1.25]  # here as well
    assert (match.spans, match.unmatched_spans, match.ambiguous_spans) == (1, 0, 1)
    assert match.found.tolist() == [False] * 3 + [True] * 3


def test_a_turn_was_written_before_the_turns_after_it() -> None:
    ledger = holding(PROMPT, wrote([1], 0))
    ledger.record((*PROMPT, 1, 70), [wrote([2], 0)])
    ledger.record(PROMPT, [wrote([1], 4)])  # newer, and in no way part of that sequence
    [match] = look_up(ledger, [query(PROMPT, [1], [70], [2])])
    assert versions(match) == [U, U, U, 0, U, 0] and match.ambiguous_spans == 0


# bounds -------------------------------------------------------------------------------------------------------------


def test_the_oldest_is_forgotten_first_and_never_mistaken() -> None:
    ledger = Ledger(max_spans=3)
    for i in range(5):
        ledger.record((100 + i,), [wrote([1, 2], i)])
    matches = look_up(ledger, [query((100 + i,), [1, 2]) for i in range(5)])
    assert [int(m.versions[1]) for m in matches] == [U, U, 2, 3, 4]
    ledger.record((110,), [wrote([1], 9)])  # 2 was used before 3 and 4
    matches = look_up(ledger, [query((100 + i,), [1, 2]) for i in (2, 3, 4)])
    assert [int(m.versions[1]) for m in matches] == [U, 3, 4]
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


def test_a_prompt_that_only_shares_the_hash_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from atropos_verl.provenance import ledger as module

    monkeypatch.setattr(module, "prefix_hashes", lambda ids, offset=0: np.zeros(len(ids) + 1, dtype=np.uint64))
    ledger = holding((5, 6), wrote([1, 2], 0))
    assert versions(one(ledger, (7, 8), [1, 2])) == [U] * 4
    ledger.record((7, 8), [wrote([1, 2], 1)])
    assert versions(one(ledger, (5, 6), [1, 2])) == [U] * 4  # forgotten for the newer one
    assert versions(one(ledger, (7, 8), [1, 2])) == [U, U, 1, 1]


def test_hashes_of_prefixes() -> None:
    ids = np.array([3, 1, 4, 1, 5], dtype=np.int32)
    whole = prefix_hashes(ids)
    for p in range(6):
        assert prefix_hashes(ids[:p])[-1] == whole[p]
    joined = (int(whole[2]) + int(prefix_hashes(ids[2:], offset=2)[-1])) % 2**64
    assert joined == int(whole[5])
    assert len({int(prefix_hashes(np.array(p, dtype=np.int32))[-1]) for p in ([1, 2], [2, 1], [1, 1], [1], [0])}) == 5


def test_against_a_list_of_everything_that_was_written() -> None:
    """Random conversations over few tokens, so that prompts and completions repeat; the oracle knows each token."""
    rng = random.Random(0)
    ledger = Ledger()
    made: list[tuple[SequenceQuery, list[int], list[float]]] = []
    for number in range(300):
        tokens, parts, truth, logprobs = list[int](), list[list[int]](), list[int](), list[float]()
        for _ in range(rng.randint(1, 3)):
            asked = [rng.randint(0, 3) for _ in range(rng.randint(1, 3))]
            tokens += asked
            written = [rng.randint(0, 3) for _ in range(rng.randint(1, 6))]
            cut = rng.randint(0, len(written))
            runs = tuple((v, n) for v, n in ((number, cut), (number + 1, len(written) - cut)) if n)
            generation = wrote(written, runs=runs, logprob=-1 - rng.random())
            ledger.record(tokens, [generation])
            tokens += written
            parts += [asked, written]
            truth += [U] * len(asked) + [v for v, n in runs for _ in range(n)]
            logprobs += list(generation.logprobs)
        made.append((query(*parts, group=number, logprobs=logprobs), truth, logprobs))
    rng.shuffle(made)
    for sent, truth, logprobs in made:
        [match] = look_up(ledger, [sent])
        assert versions(match) == truth
        np.testing.assert_array_equal(match.logprobs[sent.loss_mask], np.float32(logprobs))
        assert match.unmatched_spans == 0


def test_threads_record_and_look_up_at_the_same_time() -> None:
    ledger = Ledger(max_spans=500)

    def work(name: int) -> None:
        for i in range(300):
            ledger.record((name, i), [wrote([i % 50, name], i)])
            assert versions(one(ledger, (name, i), [i % 50, name]))[2:] == [i, i]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(ledger) == 500
