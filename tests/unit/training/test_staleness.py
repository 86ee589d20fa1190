"""A batch with what the ledger knows of it, by values: versions, logprobs, temperature, drops, and what is said."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.conversations import tokenizer_of
from support.tiny_model import build_tiny_tokenizer

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


def group(*completions: list[int], name: str = "g", **fields: Any) -> ScoredGroup:
    tokens = [[*PROMPT, *completion] for completion in completions]
    return ScoredGroup(
        token_ids=tuple(np.array(row) for row in tokens),
        masks=tuple(np.array([-100] * 3 + list(c)) for c in completions),
        scores=np.arange(len(completions), dtype=np.float64),
        env_id=fields.pop("env_id", 0),
        group_id=name,
        **fields,
    )


def ledger_of(
    *written: tuple[list[int], int],
    temperature: float = 1.0,
    kept_in: Path | None = None,
    resumed_at: int | None = None,
) -> Ledger:
    """(completion of the prompt, its version); logprob k is -1 - k / 8."""
    ledger = Ledger()
    if kept_in is not None:
        ledger.persist(kept_in, resumed_at)
    for tokens, version in written:
        generation = Generation(
            token_ids=tuple(tokens),
            logprobs=tuple(-1 - k / 8 for k in range(len(tokens))),
            finish_reason="stop",
            policy_version_runs=((version, len(tokens)),),
        )
        ledger.record(PROMPT, [generation], temperature)
    return ledger


def provenance_of(ledger: Ledger | None, **settings: Any) -> BatchProvenance:
    return BatchProvenance(OffPolicyConfig(**settings), ledger, SampleSettings(vocab_size=100))


def samples(provenance: BatchProvenance, *groups: ScoredGroup, version: int = 9) -> tuple[list[Any], dict[str, Any]]:
    applied = provenance.apply(list(groups), provenance.look_up(groups), version)
    return build_samples(applied.groups, provenance.settings).samples, applied.figures


def test_versions_and_logprobs_reach_the_samples_of_an_environment_that_sends_neither() -> None:
    provenance = provenance_of(ledger_of(([1, 2], 3), ([1, 4], 7)))
    (first, second), figures = samples(provenance, group([1, 2], [1, 4]))
    assert (first.policy_version, second.policy_version) == (3, 7)
    assert first.token_versions.tolist() == [U, U, U, 3, 3]
    np.testing.assert_array_equal(first.rollout_logprobs, [np.nan, np.nan, np.nan, -1, -1.125])
    assert figures["data/unmatched_span_rate"] == figures["env/0/unmatched_span_rate"] == 0.0
    assert figures["data/logprob_mismatch"] is None  # nothing to compare with


def test_the_temperature_of_the_request_is_used_where_the_environment_names_none() -> None:
    provenance = provenance_of(ledger_of(([1, 2], 0), ([1, 4], 0), temperature=0.7))
    found, figures = samples(provenance, group([1, 2], [1, 4]))
    assert [s.temperature for s in found] == [0.7, 0.7] and figures["data/temperature_mismatches"] == 0
    found, figures = samples(provenance, group([1, 2], [1, 4], generation_params={"temperature": 0.5}))
    assert [s.temperature for s in found] == [0.5, 0.5] and figures["data/temperature_mismatches"] == 2


def test_logprobs_that_the_environment_sent_are_compared_and_replaced() -> None:
    provenance = provenance_of(ledger_of(([1, 2], 0), ([1, 4], 0)))
    sent = (np.array([1.0, 1, 1, -1.0, -1.125]), np.array([1.0, 1, 1, -1.5, 1.0]))
    found, figures = samples(provenance, group([1, 2], [1, 4], inference_logprobs=sent))
    assert figures["data/logprob_mismatch"] == pytest.approx(1 / 3)  # one of three that were sent
    assert figures["data/logprob_mismatch_max"] == 0.5
    assert found[1].rollout_logprobs[3:].tolist() == [-1.0, -1.125]


def test_constrained_tokens_carry_no_importance_weight_whatever_the_environment_sends() -> None:
    """The gateway records their logprobs, which are of a masked distribution, as no value."""
    ledger = ledger_of(([1, 2], 3))
    generation = Generation(
        token_ids=(1, 4), logprobs=(NO_LOGPROB,) * 2, finish_reason="stop", policy_version_runs=((3, 2),)
    )
    ledger.record(PROMPT, [generation], 1.0)
    sent = (np.array([1.0, 1, 1, -1.0, -1.125]), np.array([1.0, 1, 1, -0.1, -0.2]))
    found, figures = samples(provenance_of(ledger), group([1, 2], [1, 4], inference_logprobs=sent))
    assert found[1].rollout_logprobs is None and found[1].token_versions.tolist()[3:] == [3, 3]
    assert found[0].rollout_logprobs[3:].tolist() == [-1.0, -1.125]
    assert figures["data/logprob_mismatch"] == 0


def test_unmatched_tokens_are_used_or_dropped() -> None:
    """9 was appended by the environment."""
    ledger = ledger_of(([1, 2], 3))
    sent = (np.array([1.0, 1, 1, 1, 1, -0.25]),)
    (used,), figures = samples(provenance_of(ledger), group([1, 2, 9], inference_logprobs=sent))
    assert used.loss_mask.tolist() == [False] * 3 + [True] * 3 and used.token_versions.tolist()[3:] == [3, 3, U]
    assert used.rollout_logprobs[3:].tolist() == [-1, -1.125, -0.25]
    assert figures["data/unmatched_span_rate"] == 1.0 and figures["data/unmatched_token_rate"] == pytest.approx(1 / 3)
    assert figures["off_policy/dropped_unmatched_tokens"] == 0
    (dropped,), figures = samples(provenance_of(ledger, unmatched="drop"), group([1, 2, 9]))
    assert dropped.loss_mask.tolist() == [False] * 3 + [True, True, False]
    assert figures["off_policy/dropped_unmatched_tokens"] == 1


def test_an_environment_without_a_trained_token_has_rates_of_nothing() -> None:
    """All masked, only position 0, one token: beside an environment with one, and alone."""
    provenance = provenance_of(ledger_of(([1, 2], 3)))
    masked = replace(group([1, 2], env_id=1), masks=(np.full(5, -100),))
    first = replace(masked, masks=(np.array([5, -100, -100, -100, -100]),))
    one = replace(masked, token_ids=(np.array([5]),), masks=(np.array([5]),))
    for others in ([group([1, 2])], []):
        found, figures = samples(provenance, masked, first, one, *others)
        assert [sample.loss_mask.sum() for sample in found] == [0, 0, 0, *(2 for _ in others)]
        assert figures["env/1/unmatched_span_rate"] is None
        assert figures["data/unmatched_token_rate"] == (0.0 if others else None)
        assert all(value is None or math.isfinite(value) for value in figures.values())
        metrics = staleness_metrics(found, 7)
        assert all(value is None or math.isfinite(value) for value in metrics.values())


def test_old_groups_are_left_out_and_unknown_ones_are_not() -> None:
    provenance = provenance_of(ledger_of(([1, 2], 3), ([1, 4], 5), ([2, 2], 6)), max_staleness=2)
    groups = [group([1, 2], [2, 2], name="old"), group([1, 4], name="fresh"), group([50, 51], name="unknown")]
    applied = provenance.apply(groups, provenance.look_up(groups), 7)
    assert [g.group_id for g in applied.groups] == ["fresh", "unknown"]
    assert applied.figures["off_policy/dropped_stale_groups"] == 1
    assert [group_version(g) for g in applied.groups] == [5, None]
    stated = group([50, 51], generation_params={"policy_version": 1})  # nobody wrote that here; it says so itself
    assert provenance.apply([stated], provenance.look_up([stated]), 7).figures["off_policy/dropped_stale_groups"] == 1


def test_staleness_by_hand() -> None:
    provenance = provenance_of(ledger_of(([1, 2], 3), ([1, 4], 7), ([2, 2], 7), ([3, 3, 3], 0)))
    made = {"a": ([1, 2], [1, 4]), "b": ([2, 2],), "c": ([3, 3, 3],), "d": ([8],)}
    found, _ = samples(provenance, *(group(*completions, name=name) for name, completions in made.items()))
    metrics = staleness_metrics(found, 7)
    assert metrics["off_policy/staleness_mean"] == pytest.approx((4 + 0 + 7) / 3)
    assert metrics["off_policy/staleness_max"] == 7
    assert metrics["off_policy/groups_of_unknown_version"] == metrics["off_policy/tokens_of_unknown_version"] == 1
    buckets = {k: v for k, v in metrics.items() if "_at_staleness/" in k}
    assert buckets == {
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


TOKENIZER = build_tiny_tokenizer()


def posted(prompt: str, trained: str, env_id: int = 0, name: str = "g") -> ScoredGroup:
    """A group of one sequence, as an environment that tokenises by itself posts it."""
    before, after = TOKENIZER.encode(prompt), TOKENIZER.encode(trained)
    ids = np.array(before + after)
    mask = np.where(np.arange(len(ids)) < len(before), -100, ids)
    return ScoredGroup(token_ids=(ids,), masks=(mask,), scores=np.array([1.0]), env_id=env_id, group_id=name)


def tokenised(*written: tuple[str, str]) -> BatchProvenance:
    """Of a run whose policy wrote each second text after the first."""
    ledger = Ledger()
    for prompt, text in written:
        ids = tuple(TOKENIZER.encode(text))
        made = Generation(
            token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason="stop", policy_version_runs=((3, len(ids)),)
        )
        ledger.record(TOKENIZER.encode(prompt), [made])
    return BatchProvenance(OffPolicyConfig(), ledger, SampleSettings(), TOKENIZER)


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("written", "tail"), [("yes<|im_end|>", "\n"), ("yes", "<|im_end|>\n"), ("yes<|im_end|>", "")])
def test_what_a_template_adds_behind_a_turn_is_not_trained_and_counts_apart(
    caplog: pytest.LogCaptureFixture, written: str, tail: str
) -> None:
    again = f"{ASKED}{written}{tail}<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    provenance = tokenised((ASKED, written), (again, written))
    whole = posted(ASKED, written + tail)
    second = posted(again, written + tail)
    start, end = len(whole.token_ids[0]), len(second.token_ids[0])
    both = np.concatenate([whole.masks[0], second.masks[0][start:end]])
    two = replace(second, masks=(both,))  # two turns in one sequence
    [made], figures = samples(provenance, two)
    ids = TOKENIZER.encode(written)
    assert made.token_ids[made.loss_mask].tolist() == ids * 2
    assert made.token_versions is not None and set(made.token_versions[made.loss_mask]) == {3}
    assert figures["data/template_tail_tokens"] == 2 * len(TOKENIZER.encode(tail))
    assert figures["data/unmatched_span_rate"] == figures["data/unmatched_token_rate"] == 0.0
    assert not caplog.text


@pytest.mark.parametrize(
    ("trained", "unmatched", "said"),
    [
        (
            "yes<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n",
            1 + 1 + 5 + 4 + 2,
            "yes<|im_end|>' the policy wrote '', and '\\n<|im_start|>user\\nmore<|im_end|>\\n' was posted",
        ),
        ("yep<|im_end|>\n", 5, "ye' the policy wrote 's<|im_end|>', and 'p<|im_end|>\\n' was posted"),
    ],
)
def test_unmatched_tokens_are_named_once_for_each_environment(
    caplog: pytest.LogCaptureFixture, trained: str, unmatched: int, said: str
) -> None:
    """Also after the harmless tail of a template, whose warning used to be the only one."""
    provenance = tokenised((ASKED, "yes<|im_end|>"))
    samples(provenance, posted(ASKED, "yes<|im_end|>\n"))
    for env_id in (0, 0, 1):
        _, figures = samples(provenance, posted(ASKED, trained, env_id, "late"))
        assert figures["data/unmatched_tokens"] == unmatched
    messages = [r.getMessage() for r in caplog.records]
    assert [message[:13] for message in messages] == ["environment 0", "environment 1"]
    assert "Group late, sequence 0, tokens" in messages[0] and "off_policy.unmatched=repair" in messages[0]
    assert said in messages[0]


def test_where_ids_differ_their_ids_are_named_and_what_was_generated_elsewhere_is_said_to_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a tokenizer nothing is text."""
    provenance = provenance_of(ledger_of(([1, 2], 3)))
    samples(provenance, group([1, 9]), replace(group([4]), token_ids=(np.array([90, 91, 92, 4]),), env_id=1))
    edited, elsewhere = [r.getMessage() for r in caplog.records]
    assert "After [5, 6, 7, 1] '[5, 6, 7, 1]' the policy wrote [2] '[2]', and [9] '[9]' was posted" in edited
    assert "Nothing similar is in the ledger" in elsewhere


def retokenised(**settings: Any) -> tuple[BatchProvenance, ScoredGroup, list[int]]:
    """An environment that posts "number" as the tokenizer makes it; the policy wrote it letter by letter."""
    tokenizer = tokenizer_of("bytes")
    prompt, text = tokenizer.encode("ask: "), "number"
    written = [token for letter in text for token in tokenizer.encode(letter)]
    made = Generation(
        token_ids=tuple(written), logprobs=(-0.5,) * 6, finish_reason="stop", policy_version_runs=((3, 6),)
    )
    ledger = Ledger()
    ledger.record(prompt, [made])
    posted = tokenizer.encode(text)
    assert len(posted) < len(written)
    one = ScoredGroup(
        token_ids=(np.array([*prompt, *posted]),),
        masks=(np.array([-100] * len(prompt) + posted),),
        scores=np.array([1.0]),
        env_id=2,
        group_id="text",
    )
    return BatchProvenance(OffPolicyConfig(**settings), ledger, SampleSettings(), tokenizer), one, written


def test_a_sequence_with_a_teachers_values_stays_as_it_is_posted_and_others_of_its_group_are_repaired(
    caplog: pytest.LogCaptureFixture,
) -> None:
    provenance, one, written = retokenised()
    length, start = len(one.token_ids[0]), int((one.masks[0] == -100).sum())
    ids = np.array([[-1]] + [[7]] * (length - 1))
    both = replace(
        one,
        token_ids=one.token_ids * 2,
        masks=one.masks * 2,
        scores=np.array([1.0, 0.0]),
        distill_token_ids=(ids, None),
        distill_logprobs=(np.where(ids < 0, -np.inf, -0.5), None),
    )
    [taught, repaired], figures = samples(provenance, both)
    assert taught.token_ids.tolist() == one.token_ids[0].tolist() and taught.teacher is not None
    assert taught.token_versions is not None and set(taught.token_versions.tolist()) == {-2}
    assert repaired.token_ids[start:].tolist() == written and repaired.teacher is None
    assert (figures["data/spans_with_values"], figures["data/repaired_spans"], figures["data/spans"]) == (1, 1, 2)
    assert "distill_* are of just these ids, so it is not repaired (docs/distillation.md)" in caplog.text


def test_masks_advantages_and_lengths_follow_the_repaired_ids() -> None:
    provenance, one, written = retokenised()
    start = int((one.masks[0] == -100).sum())
    row = np.where(one.masks[0] != -100, 0.25, 9.0)
    [sample], figures = samples(provenance, replace(one, advantages=(row,)))
    assert sample.token_ids.tolist()[start:] == written and sample.loss_mask.sum() == len(written)
    assert sample.advantages[sample.loss_mask].tolist() == [0.25] * len(written)
    assert sample.token_versions[sample.loss_mask].tolist() == [3] * len(written)
    assert sample.rollout_logprobs[sample.loss_mask].tolist() == [-0.5] * len(written)
    assert figures["data/repaired_spans"] == figures["data/spans"] == 1
    assert figures["data/unmatched_span_rate"] == 0.0 and figures["env/2/repaired_span_rate"] == 1.0


@pytest.mark.parametrize("unmatched", ["use", "drop"])
def test_nothing_is_repaired_unless_asked_for(unmatched: str) -> None:
    provenance, one, _ = retokenised(unmatched=unmatched)
    [sample], figures = samples(provenance, one)
    assert sample.token_ids.tolist() == one.token_ids[0].tolist()
    assert figures["data/repaired_spans"] == 0 and figures["data/unmatched_span_rate"] == 1.0
    assert sample.loss_mask.any() == (unmatched == "use")


@pytest.mark.parametrize("field", ["inference_logprobs", "ref_logprobs"])
def test_a_sequence_whose_tokens_have_values_is_not_repaired(field: str) -> None:
    provenance, one, _ = retokenised()
    values = (np.full(len(one.token_ids[0]), -0.5),)
    [[match]] = provenance.look_up([replace(one, **{field: values})])
    assert match is not None and match.repaired is None and match.unmatched_spans == 1


def test_what_was_repaired_is_kept_beside_the_journal() -> None:
    provenance, one, _ = retokenised()
    one = replace(one, advantages=(np.ones(len(one.token_ids[0])),))
    [[match]] = found = provenance.look_up([one])
    again = decode_matches(encode_matches(found), [one])
    assert match is not None and again is not None
    kept = again[0][0]
    assert match.repaired is not None and kept is not None and kept.repaired is not None
    for name in ("token_ids", "loss_mask", "origin"):
        np.testing.assert_array_equal(getattr(kept.repaired, name), getattr(match.repaired, name))
    shorter = replace(one, token_ids=(one.token_ids[0][:-1],))
    assert decode_matches(encode_matches(found), [shorter]) is None


def test_versions_survive_a_restart_beside_the_journal(tmp_path: Path) -> None:
    groups = [group([1, 2], [1, 4]), replace(group([1]), defect="broken"), group([50, 51])]
    journal = BatchJournal(tmp_path)
    entry = journal.record(b"{}")
    before = provenance_of(ledger_of(([1, 2], 3), ([1, 4], 7))).recall(groups, journal, entry)
    again = BatchJournal(tmp_path)
    [pending] = again.pending(0)
    after = provenance_of(Ledger()).recall(groups, again, pending)  # a new process has a new ledger
    for old_row, new_row in zip(before, after, strict=True):
        for old, new in zip(old_row, new_row, strict=True):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                for name in ("found", "versions", "logprobs"):
                    np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
                assert not new.records  # they were of that ledger
                kept = {name: getattr(new, name) for name in ("found", "versions", "logprobs", "records")}
                assert replace(old, **kept) == new
    again.change(pending, step=1)
    again.discard_through(1)
    assert list(tmp_path.iterdir()) == []


def test_a_journalled_batch_of_lost_weights_counts_as_of_the_checkpoint(tmp_path: Path) -> None:
    """Fetched by a process that reached version 9; then one goes on at 6, dies, and one goes on at 8."""
    groups = [group([1, 2], [1, 4])]
    journal = BatchJournal(tmp_path)
    entry = journal.record(b"{}")
    [before] = provenance_of(ledger_of(([1, 2], 5), ([1, 4], 9))).recall(groups, journal, entry)
    for resumed_at in (6, 8):
        provenance = provenance_of(Ledger(), max_staleness=2)
        provenance.resumed_at = resumed_at
        matches = provenance.recall(groups, journal, entry)
        [found] = matches
        assert [match.versions[3:].tolist() for match in found if match] == [[5, 5], [6, 6]]
        np.testing.assert_array_equal([m.logprobs for m in found if m], [m.logprobs for m in before if m])
        samples_of = build_samples(provenance.apply(groups, matches, 7).groups, provenance.settings).samples
        assert staleness_metrics(samples_of, 7)["off_policy/staleness_max"] == 2
        assert provenance.apply(groups, matches, 8).figures["off_policy/dropped_stale_groups"] == 1


def test_a_batch_that_was_trained_on_leaves_its_records_over_a_restart(tmp_path: Path) -> None:
    """Fetched by the first process, trained on by the second; the third meets the same text of newer weights."""
    journal, groups = BatchJournal(tmp_path / "journal"), [group([1, 2])]
    entry = journal.record(b"{}")

    def next_process(resumed_at: int | None, version: int) -> BatchProvenance:
        ledger = ledger_of(([1, 2], version), kept_in=tmp_path / "ledger", resumed_at=resumed_at)
        return provenance_of(ledger)

    first = next_process(None, 3)
    first.recall(groups, journal, entry)
    first.ledger.close()  # type: ignore[union-attr]
    second = provenance_of(ledger_of(kept_in=tmp_path / "ledger", resumed_at=3))
    second.consumed(second.recall(groups, journal, entry))
    second.ledger.close()  # type: ignore[union-attr]
    third = next_process(4, 5)
    [[match]] = third.look_up(groups)
    assert match is not None and match.versions[3:].tolist() == [5, 5]


def test_what_was_kept_is_refused_when_torn_or_of_another_batch() -> None:
    groups = [group([1, 2])]
    content = encode_matches(provenance_of(ledger_of(([1, 2], 3))).look_up(groups))
    assert decode_matches(content, groups) is not None
    assert decode_matches(content[: len(content) // 2], groups) is None
    assert decode_matches(b"", groups) is None
    assert decode_matches(content, [group([1, 2, 3])]) is None
    assert decode_matches(content, [*groups, *groups]) is None
