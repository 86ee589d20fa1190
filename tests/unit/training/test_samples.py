"""From scored groups to samples, with values worked out by hand."""

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atropos_verl import SampleSettings, build_samples, decode_batch
from atropos_verl.errors import ConfigError, DataError, UnsupportedFieldError
from atropos_verl.protocol.schema import Refusal, check_group
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.types import SampleReport

NAN, INF = float("nan"), float("inf")
# Two answers to the prompt [5, 6]. GRPO over scores 1, 0: ±0.5 / (0.70710678 + 1e-6) = ±0.70710578.
TOKENS = [[5, 6, 7], [5, 6, 8, 2]]
MASKS = [[-100, -100, 7], [-100, -100, 8, 2]]
A = 0.5 / (math.sqrt(0.5) + 1e-6)


def group(**changes: Any) -> dict[str, Any]:
    return {"tokens": TOKENS, "masks": MASKS, "scores": [1.0, 0.0], **changes}


def build(*groups: dict[str, Any], running: RunningMoments | None = None, **changes: Any) -> SampleReport:
    body = json.dumps({"batch": list(groups)}).encode()
    return build_samples(decode_batch(body), SampleSettings(**changes), running=running)


def advantages(report: SampleReport) -> list[list[float]]:
    return [sample.advantages.tolist() for sample in report.samples]


def reason(bad: dict[str, Any], **changes: Any) -> str:
    """Returns the reason for which ``bad`` was quarantined; the good group beside it must not be touched."""
    report = build(group(), bad, group(), **changes)
    assert len(report.used) == 2
    assert [a for row in advantages(report) for a in row] == pytest.approx([0, 0, A, 0, 0, -A, -A] * 2)
    (quarantined,) = report.quarantined
    with pytest.raises(DataError) as error:
        build(group(), bad, on_bad_group="error", **changes)
    assert str(error.value) == quarantined.reason
    return quarantined.reason


def test_neither_position_0_nor_tool_tokens_between_two_trained_spans_are_trained() -> None:
    tokens = [[1, 2, 3, 4, 5, 6]]
    masks = [[1, 2, -100, -100, 5, 6]]
    (sample,) = build(group(tokens=tokens, masks=masks, scores=[3.0]), estimator="plain").samples
    assert sample.loss_mask.tolist() == [False, True, False, False, True, True]
    assert sample.advantages.tolist() == [0.0, 3.0, 0.0, 0.0, 3.0, 3.0]
    assert sample.token_ids.tolist() == tokens[0]
    assert (sample.token_ids.dtype, sample.loss_mask.dtype, sample.advantages.dtype) == (np.int64, bool, np.float64)


def test_a_sequence_with_nothing_trained_is_a_sample_that_adds_nothing() -> None:
    report = build(group(masks=[[-100] * 3, MASKS[1]]), normalization="batch")
    assert report.samples[0].loss_mask.sum() == 0
    # Only the two tokens of the other sequence are in the statistics; they are equal, so they whiten to 0.
    assert advantages(report) == [[0.0] * 3, [0.0] * 4]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([[1.0, 1.0, -0.5], [1.0, 1.0, -0.25, 0.0]], [[NAN, NAN, -0.5], [NAN, NAN, -0.25, 0.0]]),  # 1.0 is no value
        ([[], [1.0, 1.0, 5e-7, -2.0]], [None, [NAN, NAN, 0.0, -2.0]]),  # of one sequence only, and rounding above zero
    ],
)
def test_logprobs(sent: Any, expected: Any) -> None:
    for sample, row in zip(build(group(inference_logprobs=sent)).samples, expected, strict=True):
        np.testing.assert_array_equal(sample.rollout_logprobs, row)


@pytest.mark.parametrize("absent", [None, [], {}, [[], []], [None, {}], [[1.0] * 3, [1.0] * 4]])
def test_absent_logprobs(absent: Any) -> None:
    assert [s.rollout_logprobs for s in build(group(inference_logprobs=absent)).samples] == [None, None]


def test_group_baseline_goes_to_the_trained_tokens() -> None:
    report = build(group())
    assert advantages(report) == [pytest.approx([0, 0, A]), pytest.approx([0, 0, -A, -A])]
    assert [(s.score, s.sequence_index) for s in report.samples] == [(1.0, 0), (0.0, 1)]
    assert (len(report.used), [s for _, s in report.scores], report.dropped_overlong, report.truncated) == (
        1,
        [1.0, 0.0],
        0,
        0,
    )


SFT = {"group_overrides": {"sft": True}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"overrides": [{"sft": True}, {}]}, [[0, 0, 1.0], None]),
        ({**SFT, "overrides": [{}, {"sft": False}]}, [[0, 0, 1.0], None]),
        ({**SFT, "advantages": [None, [0.0, 0.0, 3.0, 2.0]]}, [[0, 0, 1.0], [0, 0, 3.0, 2.0]]),
        ({**SFT, "overrides": [{"set_advantage_to_zero": True}, {}]}, [[0] * 3, [0, 0, 1.0, 1.0]]),
        ({"group_overrides": {"set_advantage_to_zero": True}}, [[0] * 3, [0] * 4]),
    ],
)
def test_sft_is_an_advantage_of_one_that_nothing_changes(changes: dict[str, Any], expected: list[Any]) -> None:
    """Whatever the score, the group's size, normalisation and clipping; None: as without it."""
    settings = {"normalization": "batch", "clipping": (-0.5, 0.5)}
    plain = build(group(**changes), group(scores=[3.0, 2.0]), **settings)
    assert advantages(plain)[:2] == [advantages(plain)[i] if row is None else row for i, row in enumerate(expected)]
    alone = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [0.0], "group_overrides": {"sft": True}}
    assert advantages(build(alone, normalization="batch")) == [[0.0, 1.0]]


def test_order_token_level_then_normalise_then_clip() -> None:
    # Trained tokens: A of the first sequence, then 3 and 8 of the second.
    report = build(group(advantages=[None, [0.0, 0.0, 3.0, 8.0]]), normalization="batch", clipping=(-0.5, 1.0))
    values = [A, 3.0, 8.0]
    mean = sum(values) / 3
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    whitened = [(v - mean) / std for v in values]  # -0.86, -0.25, 1.10
    assert whitened[0] < -0.5 < whitened[1] < 1.0 < whitened[2]
    assert advantages(report) == [[0.0, 0.0, -0.5], pytest.approx([0.0, 0.0, whitened[1], 1.0])]


@pytest.mark.parametrize("normalization", ["none", "batch", "global"])
@pytest.mark.parametrize("own", [[], [1.0, 2.0, 3.0]], ids=["baseline", "token-level"])
def test_set_advantage_to_zero_changes_nobody_else(normalization: str, own: list[float]) -> None:
    overrides = [{"set_advantage_to_zero": True}, {"set_advantage_to_zero": False}]
    both = [group(advantages=[own, []]), group(scores=[0.0, 2.0])]
    zeroed = build({**both[0], "overrides": overrides}, both[1], normalization=normalization)
    plain = build(*both, normalization=normalization)
    assert advantages(zeroed)[0] == [0.0, 0.0, 0.0]
    assert advantages(zeroed)[1:] == advantages(plain)[1:]
    assert zeroed.samples[0].loss_mask.tolist() == [False, False, True]


def test_global_statistics_run_on_and_are_not_touched_by_a_failed_batch() -> None:
    running = RunningMoments()
    one_sequence = {"tokens": [[1, 2]], "masks": [[-100, 2]]}
    settings = {"estimator": "plain", "normalization": "global"}
    build({**one_sequence, "scores": [1.0]}, {**one_sequence, "scores": [3.0]}, running=running, **settings)
    with pytest.raises(DataError):
        build({**one_sequence, "scores": [NAN]}, running=running, on_bad_group="error", **settings)
    report = build({**one_sequence, "scores": [8.0]}, running=running, **settings)
    # 1, 3, 8: mean 4, std sqrt(13).
    assert advantages(report)[0] == pytest.approx([0.0, 4 / math.sqrt(13)])
    assert running.count == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.9, 0.9]),
        ({"group_overrides": {"temperature": 0.6}}, [0.6, 0.6]),
        ({"group_overrides": {"temperature": 0.6}, "generation_params": {"temperature": 0.7}}, [0.7, 0.7]),
        ({"generation_params": {"temperature": 0.7}, "overrides": [{"temperature": 2}, {}]}, [2.0, 0.7]),
        ({"generation_params": {"temperature": None}, "group_overrides": {"temperature": 0.6}}, [0.6, 0.6]),
        ({"generation_params": {"temperature": 0}}, [1.0, 1.0]),  # greedy
        ({"overrides": [{"temperature": 0.0}, {"temperature": 1e-6}]}, [1.0, 1.0]),
    ],
)
def test_temperature_precedence(changes: dict[str, Any], expected: list[float]) -> None:
    report = build(group(**changes), default_temperature=0.9)
    assert [sample.temperature for sample in report.samples] == expected


def test_policy_version_is_taken_where_it_is_an_integer() -> None:
    report = build(
        group(generation_params={"policy_version": 4}, overrides=[{"policy_version": 3}, {"policy_version": "x"}]),
        group(generation_params={"policy_version": True}),
        group(env_id=6),
    )
    assert [s.policy_version for s in report.samples] == [3, 4, None, None, None, None]
    assert [s.env_id for s in report.samples] == [None] * 4 + [6, 6]


def test_overlong_is_dropped_counted_logged_and_counts_in_the_baseline(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = build(group(), max_token_len=3)
    assert (report.dropped_overlong, report.truncated, len(report.used)) == (1, 0, 1)
    assert advantages(report) == [pytest.approx([0, 0, A])]  # with the other's score in the baseline
    assert [score for _, score in report.scores] == [1.0, 0.0]
    assert "1 sequences longer than 3 tokens are left out of training" in caplog.text


def test_overlong_truncated() -> None:
    report = build(
        group(inference_logprobs=[[], [1.0, 1.0, -0.5, -9.0]], advantages=[[], [0.0, 0.0, 2.0, 5.0]]),
        max_token_len=3,
        overlong="truncate",
    )
    assert (report.dropped_overlong, report.truncated) == (0, 1)
    kept, cut = report.samples
    assert (kept.truncated, cut.truncated) == (False, True)
    assert cut.token_ids.tolist() == [5, 6, 8]
    assert cut.loss_mask.tolist() == [False, False, True]
    assert cut.advantages.tolist() == [0.0, 0.0, 2.0]
    np.testing.assert_array_equal(cut.rollout_logprobs, [NAN, NAN, -0.5])


def test_overlong_error_and_the_exact_bound() -> None:
    assert len(build(group(), max_token_len=4, overlong="error").samples) == 2
    with pytest.raises(DataError, match=r"tokens\[1\] of group [0-9a-f]{16}: 4 tokens, more than max_token_len = 3"):
        build(group(), max_token_len=3, overlong="error")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"advantages": [[0.0, 0.0, 1.0]]}, "advantages: 1 entries, but tokens has 2"),
        ({"inference_logprobs": [[-1.0] * 4, []]}, "inference_logprobs[0]: 4 entries, but tokens[0] has 3"),
        ({"scores": [1e31, 0.0]}, "scores[0] = 1e+31: beyond ±1e+30"),
        ({"advantages": [[], [0.0, 0.0, NAN, 1.0]]}, "advantages[1][2] = nan: must be finite"),
        ({"inference_logprobs": [[1.0, -INF, -1.0], []]}, "inference_logprobs[0][1] = -inf: must be finite"),
        ({"inference_logprobs": [[1.0, 1.0, 0.5], []]}, "inference_logprobs[0][2] = 0.5: a logprob is at most 0"),
        ({"masks": [[-100, -100, 6], MASKS[1]]}, "masks[0][2] = 6: must be -100 (not trained) or the token id 7"),
        ({"masks": [[0, 0, 1], [0, 0, 1, 1]]}, "masks[0][0] = 0: must be -100 (not trained) or the token id 5; a 0/1"),
        ({"tokens": [[5, 6.0, 7], TOKENS[1]]}, "tokens[0][1] = 6.0: expected an integer"),
        ({"group_overrides": {"temperature": NAN}}, "group_overrides.temperature = nan: must be finite"),
        ({"overrides": [{}, {"temperature": True}]}, "overrides[1].temperature = True: must be a number"),
        ({"overrides": [{"set_advantage_to_zero": 1}, {}]}, "overrides[0].set_advantage_to_zero = 1: must be true or"),
        ({"group_overrides": {"sft": "yes"}}, "group_overrides.sft = 'yes': must be true or false"),
    ],
)
def test_bad_groups_are_quarantined_with_a_reason(changes: dict[str, Any], expected: str) -> None:
    assert reason(group(**changes), vocab_size=9).startswith(expected)


def test_without_a_vocabulary_only_negative_ids_are_refused() -> None:
    assert build(group(tokens=[[5, 6, 10**6], TOKENS[1]], masks=[[-100] * 3, MASKS[1]])).used
    assert reason(group(tokens=[[5, 6, -1], TOKENS[1]])) == "tokens[0][2] = -1: a token id is never negative"


JUNK = (
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
)
ROW = st.lists(st.integers(-110, 12) | JUNK, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "tokens": st.lists(ROW, max_size=3) | st.just(TOKENS) | JUNK,
            "masks": st.lists(ROW, max_size=3) | st.just(MASKS) | JUNK,
            "scores": st.lists(st.floats() | JUNK, max_size=3) | st.just([1.0, 0.0]),
        },
        optional={
            "advantages": st.lists(st.lists(st.floats() | JUNK, max_size=4), max_size=2) | JUNK,
            "inference_logprobs": st.lists(st.lists(st.floats(max_value=1.0), max_size=4), max_size=2) | JUNK,
            "overrides": st.lists(st.dictionaries(st.just("temperature"), JUNK), max_size=2) | JUNK,
            "generation_params": st.dictionaries(st.sampled_from(["temperature", "policy_version"]), JUNK) | JUNK,
            "env_id": JUNK,
        },
    ),
    st.sampled_from(["none", "batch", "global"]),
    st.sampled_from(["grpo", "rloo", "plain"]),
)
def test_whatever_comes_is_quarantined_or_sound(bad: dict[str, Any], normalization: str, estimator: str) -> None:
    report = build(group(), bad, vocab_size=13, normalization=normalization, estimator=estimator)
    assert len(report.used) + len(report.quarantined) == 2
    assert all(quarantined.reason for quarantined in report.quarantined)
    for sample in report.samples:
        assert np.isfinite(sample.advantages).all()
        assert (sample.advantages[~sample.loss_mask] == 0).all()
        assert ((sample.token_ids >= 0) & (sample.token_ids < 13)).all()
        assert not sample.loss_mask[0]
        assert sample.temperature > 0
        assert math.isfinite(sample.temperature)
        if sample.rollout_logprobs is not None:
            known = sample.rollout_logprobs[~np.isnan(sample.rollout_logprobs)]
            assert np.isfinite(known).all()
            assert (known <= 0).all()


def test_images_are_refused_by_name_unless_ignored_and_unknown_fields_are_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UnsupportedFieldError, match=r"^images: .*env_id 2.*Set data.ignore_fields=\[images\]"):
        build(group(images=["a.png", None], env_id=2))
    report = build(group(images=["a.png", None]), ignore_fields=("images",))
    assert advantages(report) == [pytest.approx([0, 0, A]), pytest.approx([0, 0, -A, -A])]
    for absent in (None, [], {}):
        assert build(group(images=absent)).used
    build(group(my_seed=5), group(my_seed=6, my_a=7))
    assert sorted(record.getMessage()[:31] for record in caplog.records if "no field" in record.getMessage()) == [
        'an environment sends "my_a", wh',
        'an environment sends "my_seed",',
    ]


# Row t is of token t; row 0 is empty. Only tokens 2 (and 3) are trained.
IDS = [[[], [6, 1], [7, 2, 3]], [[], [6], [8], [2, 0]]]
LOGPROBS = [[[], [-0.5, -2], [-0.25, -2, -3]], [[], [-0.1], [-0.2], [-1, -1]]]


def test_a_teachers_values_of_trained_tokens_are_in_the_samples_with_their_weight() -> None:
    taught = group(distill_token_ids=IDS, distill_logprobs=LOGPROBS, overrides=[{}, {"distill_weight": 0}])
    first, second = build(taught, distill_weight=0.5).samples
    assert first.teacher is not None
    assert first.teacher.tolist() == [[2, 7, -0.25, 0.5], [2, 2, -2, 0.5], [2, 3, -3, 0.5]]
    assert second.teacher is not None
    assert second.teacher.tolist() == [[2, 8, -0.2, 0], [3, 2, -1, 0], [3, 0, -1, 0]]
    weighted = {**taught, "weights": [2.0, 1.0], "group_overrides": {"distill_weight": 3}, "overrides": None}
    first, second = build(weighted, distill_alone=True).samples
    assert [float(sample.teacher[0, 3]) for sample in (first, second) if sample.teacher is not None] == [6, 3]
    assert not first.advantages.any()
    assert not second.advantages.any()
    # Of one sequence only; the other keeps its advantage.
    half = {"distill_token_ids": [None, IDS[1]], "distill_logprobs": [[], LOGPROBS[1]]}
    assert advantages(build(group(**half), distill_alone=True)) == [pytest.approx([0, 0, A]), [0] * 4]
    ignored = build(taught, ignore_fields=("distill_token_ids", "distill_logprobs"))
    assert [sample.teacher for sample in ignored.samples] == [None, None]
    bad = group(distill_token_ids=IDS[:1], distill_logprobs=None, ref_logprobs=[[-0.1], [0.5] * 4])
    assert len(build(bad).quarantined) == 1
    unread = build(bad, ignore_fields=("distill_token_ids", "ref_logprobs"))
    assert (len(unread.samples), unread.quarantined) == (2, []), "what is ignored is not looked at"
    (cut,) = build(
        group(**{name: taught[name][1:] for name in (*half, "tokens", "masks", "scores")}),
        max_token_len=3,
        overlong="truncate",
    ).samples
    assert cut.teacher is not None
    assert cut.teacher[:, :3].tolist() == [[2, 8, -0.2]]


def test_reference_logprobs_are_in_the_samples() -> None:
    first, second = build(group(ref_logprobs=[[1.0, -1, 1e-7], [1.0, -3, 1.0, -2]]), ref_weight=0.1).samples
    assert first.reference is not None
    assert first.reference.tolist() == [[2, 0, 0.1]]
    assert second.reference is not None
    assert second.reference.tolist() == [[3, -2, 0.1]]
    none = build(group(ref_logprobs=[[1.0] * 3, []])).samples
    assert [sample.reference for sample in none] == [None, None]
    assert "ref_logprobs[1][0] = 0.5: a logprob is at most 0" in reason(group(ref_logprobs=[[], [0.5] * 4]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logprobs": None}, "distill_logprobs: 0 entries, but tokens has 2"),
        ({"ids": IDS[:1]}, "distill_token_ids: 1 entries, but tokens has 2"),
        ({"ids": [IDS[0], IDS[1][1:]]}, "distill_token_ids[1]: 3 rows, but tokens[1] has 4; row t is of token t"),
        ({"ids": [[], IDS[1]]}, "distill_token_ids[0]: 0 rows, but tokens[0] has 3"),
        ({"logprobs": [LOGPROBS[0], [[], [-0.1], [], [-1, -1]]]}, "distill_logprobs[1][2] = []: as many logprobs as"),
        (
            {"ids": [[*IDS[0][1:], []], IDS[1]], "logprobs": [[*LOGPROBS[0][1:], []], LOGPROBS[1]]},
            "distill_token_ids[0][0] = [6, 1]: row t is of token t, given those before it, so row 0 is empty; are the",
        ),
        ({"ids": [IDS[0], [[], [6], [8], [2, 9]]]}, "distill_token_ids[1][3] = [2, 9]: outside the vocabulary [0, 9)"),
        ({"ids": [IDS[0], [[], [6], [8], [2, 2]]]}, "distill_token_ids[1][3] = [2, 2]: an id is there twice"),
        (
            {"ids": [IDS[0], [[], [6], [8], [2, -1]]]},
            "distill_token_ids[1][3][1] = -1: expected an integer of at least 0",
        ),
        ({"ids": [IDS[0], [[], [6], 8, [2, 0]]]}, "distill_token_ids[1][2] = 8: expected a list"),
        (
            {"logprobs": [LOGPROBS[0], [[], [-0.1], [-0.2], [-1, 0.5]]]},
            "distill_logprobs[1][3] = [-1.0, 0.5]: a logprob is at most 0; are these probabilities?",
        ),
        (
            {"logprobs": [LOGPROBS[0], [[], [-0.1], [-0.2], [-0.1, -0.2]]]},
            "distill_logprobs[1][3] = [-0.1, -0.2]: the probabilities add up to more than 1",
        ),
        ({"logprobs": [LOGPROBS[0], [[], [-0.1], ["x"], [-1, -1]]]}, 'distill_logprobs[1][2][0] = "x": expected a num'),
    ],
)
def test_a_teachers_values_that_do_not_fit_are_refused_with_field_and_index(
    changes: dict[str, Any], expected: str
) -> None:
    given_values = {"ids": IDS, "logprobs": LOGPROBS, **changes}
    bad = group(distill_token_ids=given_values["ids"], distill_logprobs=given_values["logprobs"])
    assert expected in reason(bad, vocab_size=9)
    with pytest.raises(Refusal) as refusal:
        check_group(json.dumps({**bad, "env_id": 0}).encode(), vocab_size=9)
    assert expected in refusal.value.message
    assert refusal.value.field in expected


def test_a_bad_group_is_quarantined_before_its_fields_are_looked_at() -> None:
    report = build(group(scores=[NAN, 1.0], images=["a"]), normalization="batch")
    assert report.quarantined[0].reason == "scores[0] = nan: must be finite"
    assert (report.samples, report.used, report.scores, build().samples) == ([], [], [], [])


def test_unknown_override_keys_are_logged_once_per_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(group(overrides=[{"weight": 2}, {"weight": 3}], group_overrides={"prio\x1b[2Jrity\n": 1}), group())
    assert [record.getMessage() for record in caplog.records] == [
        "group_overrides.prio?[2Jrity? is not known to this trainer and has no effect (1 times in this batch)",
        "overrides[].weight is not known to this trainer and has no effect (2 times in this batch)",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "gae"}, "estimator: 'gae' is none of grpo, rloo, plain"),
        ({"normalization": "layer"}, "normalization: 'layer'"),
        ({"overlong": "keep"}, "overlong: 'keep'"),
        ({"on_bad_group": "drop"}, "on_bad_group: 'drop'"),
        ({"clipping": (1.0, -1.0)}, r"clipping: \[1.0, -1.0\] is not a range"),
        ({"clipping": (NAN, 1.0)}, "clipping"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(group(), **changes)
