"""A batch with what the ledger knows of it, by values: versions, logprobs, temperature, drops, and what is said."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.conversations import tokenizer_of
from support.ledgers import holding, wrote

from atropos_verl.config.schema import OffPolicyConfig
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.training.samples import build_samples
from atropos_verl.training.staleness import (
    BatchProvenance,
    decode_matches,
    encode_matches,
    group_version,
    staleness_metrics,
)
from atropos_verl.types import NO_LOGPROB, UNKNOWN_VERSION, Generation, SampleSettings, ScoredGroup

PROMPT = [5, 6, 7]
U = UNKNOWN_VERSION
TOKENIZER = tokenizer_of("bytes")
encode = TOKENIZER.encode


def sequences_after(prompt: Sequence[int], *completions: Sequence[int], **fields: Any) -> ScoredGroup:
    return ScoredGroup(
        token_ids=tuple(np.array([*prompt, *completion]) for completion in completions),
        masks=tuple(np.array([-100] * len(prompt) + list(completion)) for completion in completions),
        scores=np.arange(len(completions), dtype=np.float64),
        **{"env_id": 0, "group_id": "g", **fields},
    )


def group(*completions: list[int], **fields: Any) -> ScoredGroup:
    return sequences_after(PROMPT, *completions, **fields)


def provenance_of(ledger: Ledger | None, tokenizer: Any = None, **settings: Any) -> BatchProvenance:
    vocab_size = 100 if tokenizer is None else None
    return BatchProvenance(OffPolicyConfig(**settings), ledger, SampleSettings(vocab_size=vocab_size), tokenizer)


def samples(provenance: BatchProvenance, *groups: ScoredGroup, version: int = 9) -> tuple[list[Any], dict[str, Any]]:
    applied = provenance.apply(list(groups), provenance.look_up(groups), version)
    return build_samples(applied.groups, provenance.settings).samples, applied.figures


@pytest.mark.parametrize(
    ("second", "sent", "logprobs", "mismatch"),
    [
        (wrote([1, 4], 7), None, [-1.0, -1.125], (None, None)),  # nothing to compare with
        (wrote([1, 4], 7), [-1.5, 1.0], [-1.0, -1.125], (1 / 3, 0.5)),  # one of three that were sent
        # Of constrained tokens the gateway records no value: theirs is of a masked distribution.
        (replace(wrote([1, 4], 7), logprobs=(NO_LOGPROB,) * 2), [-0.1, -0.2], None, (0, 0)),
    ],
)
def test_versions_and_logprobs_of_the_ledger_replace_what_the_environment_sends(
    second: Generation, sent: list[float] | None, logprobs: list[float] | None, mismatch: tuple[float | None, ...]
) -> None:
    values = sent and (np.array([1.0, 1, 1, -1.0, -1.125]), np.array([1.0, 1, 1, *sent]))
    provenance = provenance_of(holding(PROMPT, wrote([1, 2], 3), second))
    found, figures = samples(provenance, group([1, 2], [1, 4], inference_logprobs=values))
    assert [sample.policy_version for sample in found] == [3, 7]
    assert [sample.token_versions.tolist() for sample in found] == [[U, U, U, 3, 3], [U, U, U, 7, 7]]
    for sample, row in zip(found, ([-1.0, -1.125], logprobs), strict=True):
        np.testing.assert_array_equal(sample.rollout_logprobs, row and [np.nan, np.nan, np.nan, *row])
    assert figures["data/unmatched_span_rate"] == figures["env/0/unmatched_span_rate"] == 0.0
    assert (figures["data/logprob_mismatch"], figures["data/logprob_mismatch_max"]) == pytest.approx(mismatch)


@pytest.mark.parametrize(("named", "used", "mismatches"), [({}, 0.7, 0), ({"temperature": 0.5}, 0.5, 2)])
def test_the_temperature_of_the_request_is_used_where_the_environment_names_none(
    named: dict[str, float], used: float, mismatches: int
) -> None:
    provenance = provenance_of(holding(PROMPT, wrote([1, 2]), wrote([1, 4]), temperature=0.7))
    found, figures = samples(provenance, group([1, 2], [1, 4], generation_params=named))
    assert [sample.temperature for sample in found] == [used] * 2
    assert figures["data/temperature_mismatches"] == mismatches


@pytest.mark.parametrize(("unmatched", "trained"), [("use", [True, True, True]), ("drop", [True, True, False])])
def test_unmatched_tokens_are_used_or_dropped(unmatched: str, trained: list[bool]) -> None:
    """9 was appended by the environment."""
    provenance = provenance_of(holding(PROMPT, wrote([1, 2], 3)), unmatched=unmatched)
    sent = (np.array([1.0, 1, 1, 1, 1, -0.25]),)
    [sample], figures = samples(provenance, group([1, 2, 9], inference_logprobs=sent))
    assert sample.loss_mask.tolist() == [False] * 3 + trained
    assert sample.token_versions.tolist()[3:] == [3, 3, U]
    assert sample.rollout_logprobs[3:].tolist() == [-1, -1.125, -0.25]
    assert figures["data/unmatched_span_rate"] == 1.0 and figures["data/unmatched_token_rate"] == pytest.approx(1 / 3)
    assert figures["off_policy/dropped_unmatched_tokens"] == trained.count(False)


@pytest.mark.parametrize("others", [0, 1])
def test_an_environment_without_a_trained_token_has_rates_of_nothing(others: int) -> None:
    """All masked, only position 0, one token: beside an environment with one, and alone."""
    masked = group([1, 2], env_id=1)
    bare = [replace(masked, masks=(np.array([first, *[-100] * 4]),)) for first in (-100, 5)]
    bare.append(replace(masked, token_ids=(np.array([5]),), masks=(np.array([5]),)))
    found, figures = samples(provenance_of(holding(PROMPT, wrote([1, 2], 3))), *bare, *[group([1, 2])] * others)
    assert [sample.loss_mask.sum() for sample in found] == [0, 0, 0, *[2] * others]
    rates = figures["env/1/unmatched_span_rate"], figures["data/unmatched_token_rate"]
    assert rates == (None, 0.0 if others else None)
    for value in (figures | staleness_metrics(found, 7)).values():
        assert value is None or np.isfinite(value)


def test_old_groups_are_left_out_and_unknown_ones_are_not() -> None:
    ledger = holding(PROMPT, wrote([1, 2], 3), wrote([1, 4], 5), wrote([2, 2], 6))
    provenance = provenance_of(ledger, max_staleness=2)
    old, fresh, unknown = group([1, 2], [2, 2], group_id="old"), group([1, 4]), group([50, 51])
    stated = group([50, 51], generation_params={"policy_version": 1})  # nobody wrote that here; it says so itself
    groups = [old, fresh, unknown, stated]
    applied = provenance.apply(groups, provenance.look_up(groups), 7)
    assert applied.kept == [1, 2] and [group_version(g) for g in applied.groups] == [5, None]
    assert applied.figures["off_policy/dropped_stale_groups"] == 2


def test_staleness_by_hand() -> None:
    provenance = provenance_of(holding(PROMPT, wrote([1, 2], 3), wrote([1, 4], 7), wrote([2, 2], 7), wrote([3, 3, 3])))
    made = {"a": ([1, 2], [1, 4]), "b": ([2, 2],), "c": ([3, 3, 3],), "d": ([8],)}
    found, _ = samples(provenance, *(group(*completions, group_id=name) for name, completions in made.items()))
    metrics = staleness_metrics(found, 7)
    assert metrics.pop("off_policy/staleness_mean") == pytest.approx((4 + 0 + 7) / 3)
    assert metrics == {
        "off_policy/staleness_max": 7,
        "off_policy/groups_of_unknown_version": 1,
        "off_policy/tokens_of_unknown_version": 1,
        "off_policy/groups_at_staleness/0": 1,
        "off_policy/groups_at_staleness/4": 1,
        "off_policy/groups_at_staleness/7": 1,
        "off_policy/tokens_at_staleness/0": 4,
        "off_policy/tokens_at_staleness/4": 2,
        "off_policy/tokens_at_staleness/7": 3,
    }
    late = staleness_metrics(found, 100)
    assert late["off_policy/staleness_max"] == 100 and late["off_policy/groups_at_staleness/8"] == 3
    assert staleness_metrics([], 3)["off_policy/staleness_mean"] is None


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def posted(prompt: str, trained: str, **fields: Any) -> ScoredGroup:
    """A group of one sequence, as an environment that tokenises by itself posts it."""
    return sequences_after(encode(prompt), encode(trained), **fields)


@pytest.mark.parametrize(("written", "tail"), [("yes<|im_end|>", "\n"), ("yes", "<|im_end|>\n"), ("yes<|im_end|>", "")])
def test_what_a_template_adds_behind_a_turn_is_not_trained_and_counts_apart(
    caplog: pytest.LogCaptureFixture, written: str, tail: str
) -> None:
    again = f"{ASKED}{written}{tail}<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    ids = encode(written)
    ledger = holding(encode(ASKED), wrote(ids, 3))
    ledger.record(encode(again), [wrote(ids, 3)])
    first, second = posted(ASKED, written + tail), posted(again, written + tail)
    masks = np.concatenate([first.masks[0], second.masks[0][len(first.masks[0]) :]])  # two turns in one sequence
    [made], figures = samples(provenance_of(ledger, TOKENIZER), replace(second, masks=(masks,)))
    assert made.token_ids[made.loss_mask].tolist() == ids * 2
    assert set(made.token_versions[made.loss_mask]) == {3}
    assert figures["data/template_tail_tokens"] == 2 * len(encode(tail))
    assert figures["data/unmatched_span_rate"] == figures["data/unmatched_token_rate"] == 0.0
    assert not caplog.text


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (
            "yes<|im_end|>",
            "\n<|im_start|>user\nmore<|im_end|>\n",
            "yes<|im_end|>' the policy wrote '', and '\\n<|im_start|>user\\nmore<|im_end|>\\n' was posted",
        ),
        ("", "yep<|im_end|>\n", "ye' the policy wrote 's<|im_end|>', and 'p<|im_end|>\\n' was posted"),
    ],
)
def test_unmatched_tokens_are_named_once_for_each_environment(
    caplog: pytest.LogCaptureFixture, own: str, others: str, said: str
) -> None:
    """Also after the harmless tail of a template, whose warning used to be the only one."""
    provenance = provenance_of(holding(encode(ASKED), wrote(encode("yes<|im_end|>"))), TOKENIZER)
    samples(provenance, posted(ASKED, "yes<|im_end|>\n"))
    for env_id in (0, 0, 1):
        _, figures = samples(provenance, posted(ASKED, own + others, env_id=env_id, group_id="late"))
        assert figures["data/unmatched_tokens"] == len(encode(others))
    assert [message[:13] for message in caplog.messages] == ["environment 0", "environment 1"]
    for part in ("Group late, sequence 0, tokens", "off_policy.unmatched=repair", said):
        assert part in caplog.messages[0]


def test_where_ids_differ_their_ids_are_named_and_what_was_generated_elsewhere_is_said_to_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a tokenizer nothing is text."""
    provenance = provenance_of(holding(PROMPT, wrote([1, 2], 3)))
    samples(provenance, group([1, 9]), sequences_after([90, 91, 92], [4], env_id=1))
    edited, elsewhere = caplog.messages
    assert "After [5, 6, 7, 1] '[5, 6, 7, 1]' the policy wrote [2] '[2]', and [9] '[9]' was posted" in edited
    assert "Nothing similar is in the ledger" in elsewhere


START = len(encode("ask: "))
WRITTEN = [token for letter in "number" for token in encode(letter)]


def retokenised(**settings: Any) -> tuple[BatchProvenance, ScoredGroup]:
    """An environment that posts "number" as the tokenizer makes it; the policy wrote it letter by letter."""
    assert len(encode("number")) < len(WRITTEN)
    ledger = holding(encode("ask: "), wrote(WRITTEN, 3))
    return provenance_of(ledger, TOKENIZER, **settings), posted("ask: ", "number", env_id=2)


def test_a_sequence_with_a_teachers_values_stays_as_it_is_posted_and_others_of_its_group_are_repaired(
    caplog: pytest.LogCaptureFixture,
) -> None:
    provenance, one = retokenised()
    ids = np.array([[-1]] + [[7]] * (len(one.token_ids[0]) - 1))
    teacher = {"distill_token_ids": (ids, None), "distill_logprobs": (np.where(ids < 0, -np.inf, -0.5), None)}
    two = sequences_after(encode("ask: "), *[encode("number")] * 2, **teacher)
    [taught, repaired], figures = samples(provenance, two)
    assert taught.token_ids.tolist() == one.token_ids[0].tolist() and len(taught.teacher) == len(encode("number"))
    assert set(taught.token_versions.tolist()) == {-2}
    assert repaired.token_ids[START:].tolist() == WRITTEN and repaired.teacher is None
    assert (figures["data/spans_with_values"], figures["data/repaired_spans"], figures["data/spans"]) == (1, 1, 2)
    assert "distill_* are of just these ids, so it is not repaired (docs/distillation.md)" in caplog.text


def test_masks_advantages_and_lengths_follow_the_repaired_ids() -> None:
    provenance, one = retokenised()
    row = np.where(one.masks[0] != -100, 0.25, 9.0)
    [sample], figures = samples(provenance, replace(one, advantages=(row,)))
    assert sample.token_ids.tolist()[START:] == WRITTEN
    assert sample.loss_mask.tolist() == [False] * START + [True] * len(WRITTEN)
    assert sample.advantages[START:].tolist() == [0.25] * len(WRITTEN)
    assert sample.token_versions[START:].tolist() == [3] * len(WRITTEN)
    assert sample.rollout_logprobs[START:].tolist() == list(wrote(WRITTEN).logprobs)
    assert figures["data/repaired_spans"] == figures["data/spans"] == 1
    assert figures["data/unmatched_span_rate"] == 0.0 and figures["env/2/repaired_span_rate"] == 1.0


@pytest.mark.parametrize(
    ("unmatched", "field"),
    [("use", None), ("drop", None), ("repair", "inference_logprobs"), ("repair", "ref_logprobs")],
)
def test_nothing_is_repaired_unless_asked_for_and_no_tokens_that_have_values(unmatched: str, field: str | None) -> None:
    provenance, one = retokenised(unmatched=unmatched)
    values = {} if field is None else {field: (np.full(len(one.token_ids[0]), -0.5),)}
    [sample], figures = samples(provenance, replace(one, **values))
    assert sample.token_ids.tolist() == one.token_ids[0].tolist()
    assert figures["data/repaired_spans"] == 0 and figures["data/unmatched_span_rate"] == 1.0
    assert sample.loss_mask.any() == (unmatched != "drop")


def test_what_was_found_is_kept_beside_the_journal_for_the_next_process(tmp_path: Path) -> None:
    provenance, one = retokenised()
    provenance.ledger.record(PROMPT, [wrote([1, 2], 3), wrote([1, 4], 7)])
    one = replace(one, advantages=(np.ones(len(one.token_ids[0])),))
    groups = [group([1, 2], [1, 4]), replace(group([1]), defect="broken"), group([50, 51]), one]
    entry = BatchJournal(tmp_path).record(b"{}")
    before = provenance.recall(groups, BatchJournal(tmp_path), entry)
    again = BatchJournal(tmp_path)
    [pending] = again.pending(0)
    after = provenance_of(Ledger()).recall(groups, again, pending)  # a new process has a new ledger
    assert before[1] == after[1] == [None]
    pairs = [(old, new) for at in (0, 2, 3) for old, new in zip(before[at], after[at], strict=True)]
    for old, new in pairs:
        for name in ("found", "versions", "logprobs"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
        assert not new.records  # they were of that ledger
        kept = {name: getattr(new, name) for name in ("found", "versions", "logprobs", "records", "repaired")}
        assert replace(old, **kept) == new
    for name in ("token_ids", "loss_mask", "origin"):
        np.testing.assert_array_equal(getattr(pairs[-1][0].repaired, name), getattr(pairs[-1][1].repaired, name))
    again.change(pending, step=1)
    again.discard_through(1)
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_is_refused_when_torn_or_of_another_batch() -> None:
    provenance, one = retokenised()
    groups = [group([1, 2]), one]
    content = encode_matches(provenance.look_up(groups))
    assert decode_matches(content, groups) is not None
    shorter = replace(one, token_ids=(one.token_ids[0][:-1],))
    for others in ([group([1, 2, 3]), one], [group([1, 2]), shorter], [*groups, *groups]):
        assert decode_matches(content, others) is None
    for torn in (content[: len(content) // 2], b""):
        assert decode_matches(torn, groups) is None


def test_a_journalled_batch_of_lost_weights_counts_as_of_the_checkpoint(tmp_path: Path) -> None:
    """Fetched by a process that reached version 9; then one goes on at 6, dies, and one goes on at 8."""
    groups = [group([1, 2], [1, 4])]
    journal = BatchJournal(tmp_path)
    entry = journal.record(b"{}")
    provenance_of(holding(PROMPT, wrote([1, 2], 5), wrote([1, 4], 9))).recall(groups, journal, entry)
    for resumed_at in (6, 8):
        provenance = provenance_of(Ledger(), max_staleness=2)
        provenance.resumed_at = resumed_at
        [found] = matches = provenance.recall(groups, journal, entry)
        assert [match.versions[3:].tolist() for match in found] == [[5, 5], [6, 6]]
        assert [match.logprobs[3:].tolist() for match in found] == [[-1.0, -1.125]] * 2
        made = build_samples(provenance.apply(groups, matches, 7).groups, provenance.settings).samples
        assert staleness_metrics(made, 7)["off_policy/staleness_max"] == 2
        assert provenance.apply(groups, matches, 8).figures["off_policy/dropped_stale_groups"] == 1


def test_a_batch_that_was_trained_on_leaves_its_records_over_a_restart(tmp_path: Path) -> None:
    """Fetched by the first process, trained on by the second; the third meets the same text of newer weights."""
    journal, groups = BatchJournal(tmp_path / "journal"), [group([1, 2])]
    entry = journal.record(b"{}")
    for resumed_at, version in ((None, 3), (3, None), (4, 5)):
        ledger = Ledger()
        ledger.persist(tmp_path / "ledger", resumed_at)
        if version is not None:
            ledger.record(PROMPT, [wrote([1, 2], version)])
        provenance = provenance_of(ledger)
        if version != 5:
            matches = provenance.recall(groups, journal, entry)
        if version is None:
            provenance.consumed(matches)
        ledger.close()
    [[match]] = provenance.look_up(groups)
    assert match.versions[3:].tolist() == [5, 5]
