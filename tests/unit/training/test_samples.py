"""From scored groups to samples, with values worked out by hand."""

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import built

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


def advantages(report: SampleReport) -> list[list[float]]:
    return [sample.advantages.tolist() for sample in report.samples]


def reason(bad: dict[str, Any], **changes: Any) -> str:
    """Returns the reason for which ``bad`` was quarantined; the good group beside it must not be touched."""
    report = built(group(), bad, group(), **changes)
    assert len(report.used) == 2
    assert [a for row in advantages(report) for a in row] == pytest.approx([0, 0, A, 0, 0, -A, -A] * 2)
    (quarantined,) = report.quarantined
    with pytest.raises(DataError) as error:
        built(group(), bad, on_bad_group="error", **changes)
    assert str(error.value) == quarantined.reason
    return quarantined.reason


def test_neither_position_0_nor_tool_tokens_between_two_trained_spans_are_trained() -> None:
    tokens = [[1, 2, 3, 4, 5, 6]]
    masks = [[1, 2, -100, -100, 5, 6]]
    (sample,) = built(group(tokens=tokens, masks=masks, scores=[3.0]), estimator="plain").samples
    assert sample.loss_mask.tolist() == [False, True, False, False, True, True]
    assert sample.advantages.tolist() == [0.0, 3.0, 0.0, 0.0, 3.0, 3.0]
    assert sample.token_ids.tolist() == tokens[0]
    assert (sample.token_ids.dtype, sample.loss_mask.dtype, sample.advantages.dtype) == (np.int64, bool, np.float64)


def test_a_sequence_with_nothing_trained_is_a_sample_that_adds_nothing() -> None:
    report = built(group(masks=[[-100] * 3, MASKS[1]]), normalization="batch")
    assert report.samples[0].loss_mask.sum() == 0
    # Only the two tokens of the other sequence are in the statistics; they are equal, so they whiten to 0.
    assert advantages(report) == [[0.0] * 3, [0.0] * 4]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([[1.0, 1.0, -0.5], [1.0, 1.0, -0.25, 0.0]], [[NAN, NAN, -0.5], [NAN, NAN, -0.25, 0.0]]),  # 1.0 is no value
        ([[], [1.0, 1.0, 5e-7, -2.0]], [None, [NAN, NAN, 0.0, -2.0]]),  # of one sequence only, and rounding above zero
        *((absent, [None, None]) for absent in (None, [], {}, [[], []], [None, {}], [[1.0] * 3, [1.0] * 4])),
    ],
)
def test_logprobs(sent: Any, expected: Any) -> None:
    for sample, row in zip(built(group(inference_logprobs=sent)).samples, expected, strict=True):
        np.testing.assert_array_equal(sample.rollout_logprobs, row)


SFT = {"group_overrides": {"sft": True}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"overrides": [{"sft": True}, {}]}, [[0, 0, 1.0], None]),
        ({**SFT, "overrides": [{}, {"sft": False}]}, [[0, 0, 1.0], None]),
        ({**SFT, "advantages": [None, [0.0, 0.0, 3.0, 2.0]]}, [[0, 0, 1.0], [0, 0, 3.0, 2.0]]),
        ({**SFT, "overrides": [{"set_advantage_to_zero": True}, {}]}, [[0] * 3, [0, 0, 1.0, 1.0]]),
        ({"overrides": [{"set_advantage_to_zero": True}, {"set_advantage_to_zero": False}]}, [[0] * 3, None]),
        ({"group_overrides": {"set_advantage_to_zero": True}}, [[0] * 3, [0] * 4]),
    ],
)
def test_an_advantage_of_one_or_zero_is_not_changed(changes: dict[str, Any], expected: list[Any]) -> None:
    """Whatever the score, the group's size, normalisation and clipping; None: as without it."""
    report = built(group(**changes), group(scores=[3.0, 2.0]), normalization="batch", clipping=(-0.5, 0.5))
    assert advantages(report)[:2] == [row or advantages(report)[i] for i, row in enumerate(expected)]
    assert [sample.loss_mask.sum() for sample in report.samples] == [1, 2, 1, 2]
    alone = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [0.0], **SFT}
    assert advantages(built(alone, normalization="batch")) == [[0.0, 1.0]]


@pytest.mark.parametrize("normalization", ["none", "batch", "global"])
@pytest.mark.parametrize("own", [None, [1.0, 2.0, 3.0]])
def test_set_advantage_to_zero_changes_nobody_else(normalization: str, own: list[float] | None) -> None:
    """Nor the baseline of its group: its score counts."""
    plain, zeroed = (
        advantages(built(group(advantages=[own, None], **more), group(scores=[0.0, 2.0]), normalization=normalization))
        for more in ({}, {"overrides": [{"set_advantage_to_zero": True}, {}]})
    )
    assert zeroed == [[0.0] * 3, *plain[1:]] != plain


def test_order_token_level_then_normalise_then_clip() -> None:
    # Trained tokens: A of the first sequence, then 3 and 8 of the second.
    report = built(group(advantages=[None, [0.0, 0.0, 3.0, 8.0]]), normalization="batch", clipping=(-0.5, 1.0))
    values = np.array([A, 3.0, 8.0])
    whitened = (values - values.mean()) / values.std(ddof=1)  # -0.86, -0.25, 1.10
    assert whitened[0] < -0.5 < whitened[1] < 1.0 < whitened[2]
    assert advantages(report) == [[0.0, 0.0, -0.5], pytest.approx([0.0, 0.0, whitened[1], 1.0])]


def test_global_statistics_run_on_and_are_not_touched_by_a_failed_batch() -> None:
    running = RunningMoments()
    made = [{"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [score]} for score in (1.0, 3.0, NAN, 8.0)]
    settings = {"estimator": "plain", "normalization": "global", "running": running, "on_bad_group": "error"}
    built(*made[:2], **settings)
    with pytest.raises(DataError):
        built(made[2], **settings)
    # 1, 3, 8: mean 4, std sqrt(13).
    assert advantages(built(made[3], **settings)) == [pytest.approx([0.0, 4 / math.sqrt(13)])]
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
    report = built(group(**changes), default_temperature=0.9)
    assert [sample.temperature for sample in report.samples] == expected


def test_what_a_sample_says_of_where_it_comes_from() -> None:
    report = built(
        group(generation_params={"policy_version": 4}, overrides=[{"policy_version": 3}, {"policy_version": "x"}]),
        group(generation_params={"policy_version": True}, env_id=6),
    )
    assert [(s.policy_version, s.env_id, s.score, s.sequence_index) for s in report.samples] == [
        (3, None, 1.0, 0),
        (4, None, 0.0, 1),
        (None, 6, 1.0, 0),
        (None, 6, 0.0, 1),
    ]
    assert (len(report.used), report.dropped_overlong, report.truncated) == (2, 0, 0)


def test_overlong_is_dropped_counted_logged_and_counts_in_the_baseline(caplog: pytest.LogCaptureFixture) -> None:
    report = built(group(), max_token_len=3)
    assert (report.dropped_overlong, report.truncated, len(report.used)) == (1, 0, 1)
    assert advantages(report) == [pytest.approx([0, 0, A])]  # with the other's score in the baseline
    assert [score for _, score in report.scores] == [1.0, 0.0]
    assert "1 sequences longer than 3 tokens are left out of training" in caplog.text


def test_overlong_is_truncated() -> None:
    long = group(inference_logprobs=[[], [1.0, 1.0, -0.5, -9.0]], advantages=[[], [0.0, 0.0, 2.0, 5.0]])
    report = built(long, max_token_len=3, overlong="truncate")
    assert (report.dropped_overlong, report.truncated) == (0, 1)
    kept, cut = report.samples
    assert (kept.truncated, cut.truncated) == (False, True)
    assert cut.token_ids.tolist() == [5, 6, 8]
    assert cut.loss_mask.tolist() == [False, False, True]
    assert cut.advantages.tolist() == [0.0, 0.0, 2.0]
    np.testing.assert_array_equal(cut.rollout_logprobs, [NAN, NAN, -0.5])


def test_overlong_is_an_error_beyond_the_exact_bound() -> None:
    assert len(built(group(), max_token_len=4, overlong="error").samples) == 2
    with pytest.raises(DataError, match=r"tokens\[1\] of group [0-9a-f]{16}: 4 tokens, more than max_token_len = 3"):
        built(group(), max_token_len=3, overlong="error")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"advantages": [[0.0, 0.0, 1.0]]}, "advantages: 1 entries, but tokens has 2"),
        ({"inference_logprobs": [[-1.0] * 4, []]}, "inference_logprobs[0]: 4 entries, but tokens[0] has 3"),
        ({"scores": [1e31, 0.0]}, "scores[0] = 1e+31: beyond ±1e+30"),
        ({"advantages": [[], [0.0, 0.0, NAN, 1.0]]}, "advantages[1][2] = nan: must be finite"),
        ({"inference_logprobs": [[1.0, -INF, -1.0], []]}, "inference_logprobs[0][1] = -inf: must be finite"),
        ({"inference_logprobs": [[1.0, 1.0, 0.5], []]}, "inference_logprobs[0][2] = 0.5: a logprob is at most 0"),
        ({"ref_logprobs": [[], [0.5] * 4]}, "ref_logprobs[1][0] = 0.5: a logprob is at most 0"),
        ({"masks": [[-100, -100, 6], MASKS[1]]}, "masks[0][2] = 6: must be -100 (not trained) or the token id 7"),
        ({"masks": [[0, 0, 1], [0, 0, 1, 1]]}, "masks[0][0] = 0: must be -100 (not trained) or the token id 5; a 0/1"),
        ({"tokens": [[5, 6.0, 7], TOKENS[1]]}, "tokens[0][1] = 6.0: expected an integer"),
        ({"group_overrides": {"temperature": NAN}}, "group_overrides.temperature = nan: must be finite"),
        ({"overrides": [{}, {"temperature": True}]}, "overrides[1].temperature = True: must be a number"),
        ({"overrides": [{"set_advantage_to_zero": 1}, {}]}, "overrides[0].set_advantage_to_zero = 1: must be true or"),
        ({"group_overrides": {"sft": "yes"}}, "group_overrides.sft = 'yes': must be true or false"),
        ({"scores": [NAN, 1.0], "images": ["a"]}, "scores[0] = nan: must be finite"),  # before images are looked at
    ],
)
def test_bad_groups_are_quarantined_with_a_reason(changes: dict[str, Any], expected: str) -> None:
    assert reason(group(**changes), vocab_size=9).startswith(expected)
    report = built(group(**changes), vocab_size=9)
    assert (report.samples, report.used, report.scores, built().samples) == ([], [], [], [])


def test_without_a_vocabulary_only_negative_ids_are_refused() -> None:
    assert built(group(tokens=[[5, 6, 10**6], TOKENS[1]], masks=[[-100] * 3, MASKS[1]])).used
    assert reason(group(tokens=[[5, 6, -1], TOKENS[1]])) == "tokens[0][2] = -1: a token id is never negative"


FIELDS = ("tokens", "masks", "scores", "advantages", "inference_logprobs", "overrides", "generation_params", "env_id")
KEYS = ("temperature", "policy_version", "sft", "set_advantage_to_zero", "distill_weight")
NUMBERS = st.integers(-110, 12) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner | NUMBERS, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    st.sampled_from(["none", "batch", "global"]),
    st.sampled_from(["grpo", "rloo", "plain"]),
)
def test_whatever_comes_is_quarantined_or_sound(changes: dict[str, Any], normalization: str, estimator: str) -> None:
    report = built(group(), group(**changes), vocab_size=13, normalization=normalization, estimator=estimator)
    assert len(report.used) + len(report.quarantined) == 2
    assert all(quarantined.reason for quarantined in report.quarantined)
    for sample in report.samples:
        assert np.isfinite(sample.advantages).all()
        assert (sample.advantages[~sample.loss_mask] == 0).all()
        assert ((sample.token_ids >= 0) & (sample.token_ids < 13)).all()
        assert not sample.loss_mask[0]
        assert 0 < sample.temperature < INF
        if sample.rollout_logprobs is not None:
            known = sample.rollout_logprobs[~np.isnan(sample.rollout_logprobs)]
            assert (np.isfinite(known) & (known <= 0)).all()


def test_images_are_refused_by_name_unless_ignored_and_unknown_fields_are_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UnsupportedFieldError, match=r"^images: .*env_id 2.*Set data.ignore_fields=\[images\]"):
        built(group(images=["a.png", None], env_id=2))
    assert built(group(images=["a.png", None]), ignore_fields=("images",)).used
    assert built(*(group(images=absent) for absent in (None, [], {}))).used
    built(group(my_seed=5), group(my_seed=6, my_a=7))
    assert sorted(message[:31] for message in caplog.messages if "no field" in message) == [
        'an environment sends "my_a", wh',
        'an environment sends "my_seed",',
    ]


# Row t is of token t; row 0 is empty. Only tokens 2 (and 3) are trained.
IDS = [[[], [6, 1], [7, 2, 3]], [[], [6], [8], [2, 0]]]
LOGPROBS = [[[], [-0.5, -2], [-0.25, -2, -3]], [[], [-0.1], [-0.2], [-1, -1]]]


def test_a_teachers_values_of_trained_tokens_are_in_the_samples_with_their_weight() -> None:
    taught = group(distill_token_ids=IDS, distill_logprobs=LOGPROBS, overrides=[{}, {"distill_weight": 0}])
    first, second = (sample.teacher for sample in built(taught, distill_weight=0.5).samples)
    assert first.tolist() == [[2, 7, -0.25, 0.5], [2, 2, -2, 0.5], [2, 3, -3, 0.5]]
    assert second.tolist() == [[2, 8, -0.2, 0], [3, 2, -1, 0], [3, 0, -1, 0]]
    weighted = {**taught, "weights": [2.0, 1.0], "group_overrides": {"distill_weight": 3}, "overrides": None}
    report = built(weighted, distill_alone=True)
    assert [sample.teacher[0, 3] for sample in report.samples] == [6, 3]
    assert advantages(report) == [[0] * 3, [0] * 4]
    # Of one sequence only; the other keeps its advantage.
    half = group(distill_token_ids=[None, IDS[1]], distill_logprobs=[[], LOGPROBS[1]])
    assert advantages(built(half, distill_alone=True)) == [pytest.approx([0, 0, A]), [0] * 4]
    cut = built(half, max_token_len=3, overlong="truncate").samples[1].teacher
    assert cut[:, :3].tolist() == [[2, 8, -0.2]]


def test_a_teachers_values_that_are_ignored_are_not_looked_at() -> None:
    bad = group(distill_token_ids=IDS[:1], distill_logprobs=None, ref_logprobs=[[-0.1], [0.5] * 4])
    assert len(built(bad).quarantined) == 1
    unread = built(bad, ignore_fields=("distill_token_ids", "distill_logprobs", "ref_logprobs"))
    assert [(sample.teacher, sample.reference) for sample in unread.samples] == [(None, None)] * 2


def test_reference_logprobs_are_in_the_samples() -> None:
    first, second = built(group(ref_logprobs=[[1.0, -1, 1e-7], [1.0, -3, 1.0, -2]]), ref_weight=0.1).samples
    assert (first.reference.tolist(), second.reference.tolist()) == ([[2, 0, 0.1]], [[3, -2, 0.1]])
    none = built(group(ref_logprobs=[[1.0] * 3, []])).samples
    assert [sample.reference for sample in none] == [None, None]


@pytest.mark.parametrize(
    ("ids", "logprobs", "expected"),
    [
        (IDS, None, "distill_logprobs: 0 entries, but tokens has 2"),
        (IDS[:1], LOGPROBS, "distill_token_ids: 1 entries, but tokens has 2"),
        ([IDS[0], IDS[1][1:]], LOGPROBS, "distill_token_ids[1]: 3 rows, but tokens[1] has 4; row t is of token t"),
        ([[], IDS[1]], LOGPROBS, "distill_token_ids[0]: 0 rows, but tokens[0] has 3"),
        (IDS, [LOGPROBS[0], [[], [-0.1], [], [-1, -1]]], "distill_logprobs[1][2] = []: as many logprobs as"),
        (
            [[*IDS[0][1:], []], IDS[1]],
            [[*LOGPROBS[0][1:], []], LOGPROBS[1]],
            "distill_token_ids[0][0] = [6, 1]: row t is of token t, given those before it, so row 0 is empty; are the",
        ),
        ([IDS[0], [[], [6], [8], [2, 9]]], LOGPROBS, "[1][3] = [2, 9]: outside the vocabulary [0, 9)"),
        ([IDS[0], [[], [6], [8], [2, 2]]], LOGPROBS, "distill_token_ids[1][3] = [2, 2]: an id is there twice"),
        ([IDS[0], [[], [6], [8], [2, -1]]], LOGPROBS, "[1][3][1] = -1: expected an integer of at least 0"),
        ([IDS[0], [[], [6], 8, [2, 0]]], LOGPROBS, "distill_token_ids[1][2] = 8: expected a list"),
        (IDS, [LOGPROBS[0], [[], [-0.1], ["x"], [-1, -1]]], 'distill_logprobs[1][2][0] = "x": expected a number'),
        (IDS, [LOGPROBS[0], [[], [-0.1], [-0.2], [-1, 0.5]]], "[-1.0, 0.5]: a logprob is at most 0; are these prob"),
        (IDS, [LOGPROBS[0], [[], [-0.1], [-0.2], [-0.1, -0.2]]], "the probabilities add up to more than 1"),
    ],
)
def test_a_teachers_values_that_do_not_fit_are_refused_here_and_at_the_door(
    ids: Any, logprobs: Any, expected: str
) -> None:
    bad = group(distill_token_ids=ids, distill_logprobs=logprobs)
    assert expected in reason(bad, vocab_size=9)
    with pytest.raises(Refusal) as refusal:
        check_group(json.dumps({**bad, "env_id": 0}).encode(), vocab_size=9)
    assert expected in refusal.value.message
    assert refusal.value.message.startswith(refusal.value.field)


def test_unknown_override_keys_are_logged_once_per_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(group(overrides=[{"weight": 2}, {"weight": 3}], group_overrides={"prio\x1b[2Jrity\n": 1}), group())
    assert caplog.messages == [
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
        built(group(), **changes)
