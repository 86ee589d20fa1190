"""Losses against numbers worked out by hand and against float64 formulas written independently here."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from atropos_verl.training import lm_head
from atropos_verl.training.lm_head import linear_teacher_kl, linear_token_logprobs
from atropos_verl.training.losses import (
    advantage_weighted_sft_loss,
    clipped_ratio_loss,
    compute_advantage_weighted_sft_loss,
    importance_weights,
    kl_loss,
    reference_kl,
    summarise_importance,
)

NAN = float("nan")


def softmax_logprob(logits: list[float], index: int) -> float:
    """In plain Python, so that it shares nothing with torch."""
    return logits[index] - math.log(sum(math.exp(value) for value in logits))


def test_advantage_weighted_loss_by_hand() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -0.5, -4.0]], requires_grad=True)
    advantages = torch.tensor([[9.0, 2.0, -1.0], [9.0, 1.0, 7.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    output = advantage_weighted_sft_loss(logprobs, advantages, mask)
    # 1·2 + 2·(-1) + 0.5·1 = 0.5, over three trained tokens.
    assert output.loss.item() == pytest.approx(0.5 / 3)
    output.loss.backward()
    # d/d logprob = -advantage / 3 where trained, else 0.
    assert logprobs.grad.tolist() == [pytest.approx([0, -2 / 3, 1 / 3]), pytest.approx([0, -1 / 3, 0])]
    assert output.metrics["logprob_mean"] == pytest.approx((-1 - 2 - 0.5) / 3)
    assert output.metrics["advantage_mean"] == pytest.approx(2 / 3)


def test_micro_batches_with_the_global_count_add_up_to_the_loss_of_the_batch() -> None:
    torch.manual_seed(0)
    logprobs = -torch.rand(4, 6, dtype=torch.float64)
    advantages = torch.randn(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) > 0.4
    mask[:, 0] = False
    count = int(mask.sum())
    whole = advantage_weighted_sft_loss(logprobs, advantages, mask).loss
    parts = [
        advantage_weighted_sft_loss(logprobs[i : i + 1], advantages[i : i + 1], mask[i : i + 1], count).loss
        for i in range(4)
    ]
    reference = -sum(float(logprobs[i, t] * advantages[i, t]) for i in range(4) for t in range(6) if mask[i, t]) / count
    tensor_count = advantage_weighted_sft_loss(logprobs, advantages, mask, torch.tensor(count)).loss
    for found in (whole, sum(parts), tensor_count):
        assert float(found) == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize("given", [None, 0, torch.tensor(0)])
def test_no_trained_token_gives_exactly_zero_and_a_graph(given: int | torch.Tensor | None) -> None:
    logprobs = torch.full((1, 3), NAN, requires_grad=True)
    untrained, rollout = torch.zeros(1, 3), {"rollout_logprobs": logprobs, "tis_cap": 2.0}
    weighted = advantage_weighted_sft_loss(logprobs, torch.full((1, 3), NAN), untrained, given)
    assert weighted.metrics == {"logprob_mean": 0.0, "advantage_mean": 0.0}
    for output in (weighted, clipped_ratio_loss(logprobs, logprobs, logprobs, untrained, **rollout)):
        logprobs.grad = None
        output.loss.backward()
        assert output.loss.item() == 0.0
        assert logprobs.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_nan_at_masked_positions_does_not_leak_and_at_trained_ones_does() -> None:
    logprobs = torch.tensor([[NAN, -1.0, NAN]], requires_grad=True)
    advantages = torch.tensor([[NAN, 2.0, NAN]])
    loss = advantage_weighted_sft_loss(logprobs, advantages, torch.tensor([[0, 1, 0]])).loss
    loss.backward()
    assert loss.item() == 2.0
    assert logprobs.grad.tolist() == [[0.0, -2.0, 0.0]]
    assert math.isnan(advantage_weighted_sft_loss(logprobs, advantages, torch.tensor([[0, 1, 1]])).loss.item())


def test_the_pure_form_equals_the_formula_from_logits() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(2, 4, 5))
    ids = generator.integers(0, 5, size=(2, 4))
    advantages = generator.normal(size=(2, 4))
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 1]])
    total, count = 0.0, 0
    for b in range(2):
        for t in range(1, 4):
            if mask[b, t]:
                total -= softmax_logprob([value / 0.7 for value in logits[b, t - 1]], int(ids[b, t])) * advantages[b, t]
                count += 1
    tensors = [torch.from_numpy(x) for x in (logits, ids, advantages, mask)]
    for temperature in (0.7, torch.tensor([0.7, 0.7], dtype=torch.float64)):
        found = compute_advantage_weighted_sft_loss(*tensors, temperature=temperature)
        assert found.item() == pytest.approx(total / count, rel=1e-12)


def test_the_pure_form_ignores_nan_logits_that_predict_no_trained_token() -> None:
    logits = torch.tensor([[[0.0, 0.0], [NAN, NAN], [NAN, NAN]]], requires_grad=True)
    loss = compute_advantage_weighted_sft_loss(
        logits, torch.tensor([[0, 1, 1]]), torch.tensor([[NAN, 2.0, NAN]]), torch.tensor([[1, 1, 0]])
    )
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    # d(-2·logprob of token 1) / d logits = 2·(softmax - onehot) = [1, -1].
    assert logits.grad[0].tolist() == [pytest.approx([1.0, -1.0]), [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "bounds"),
    [
        (1.1, 2.0, -2.2, ()),  # inside the range: -A·r
        (1.5, 2.0, -2.4, ()),  # above, gain capped: -A·1.2
        (0.5, 2.0, -1.0, ()),  # below with A > 0: not clipped, -A·r
        (0.5, -2.0, 1.6, ()),  # below with A < 0: -A·0.8
        (1.5, -2.0, 3.0, ()),  # above with A < 0: not clipped
        (5.0, -2.0, 6.0, ()),  # dual clip: -A·3
        (1.5, 2.0, -2.6, (0.1, 0.3, 2.0)),
        (0.5, -2.0, 1.8, (0.1, 0.3, 2.0)),
        (5.0, -2.0, 4.0, (0.1, 0.3, 2.0)),
    ],
)
def test_clipped_ratio_by_hand(ratio: float, advantage: float, expected: float, bounds: tuple[float, ...]) -> None:
    new = torch.tensor([[0.0, -2.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.tensor([[0.0, -2.0]], dtype=torch.float64), torch.tensor([[1, 1]])
    named = dict(zip(("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"), bounds, strict=False))
    output = clipped_ratio_loss(new, old, torch.full((1, 2), advantage), mask, **named)
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)
    halved = clipped_ratio_loss(new, old, torch.full((1, 2), advantage), mask, **named, num_loss_tokens=2)
    assert halved.loss.item() == pytest.approx(expected / 2, rel=1e-9)
    assert output.metrics["ratio_mean"] == pytest.approx(ratio)
    assert output.metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))
    output.loss.backward()
    clipped = expected != pytest.approx(-advantage * ratio)
    # Without clipping d(-A·r)/d logprob = -A·r; clipped: 0.
    assert new.grad[0].tolist() == pytest.approx([0.0, 0.0 if clipped else -advantage * ratio])
    dual = ratio == 5.0
    assert output.metrics["clip_fraction_dual"] == float(dual)
    assert output.metrics["clip_fraction"] == float(clipped and not dual)


def test_half_precision_is_summed_in_float32_and_extreme_log_ratios_stay_finite() -> None:
    logprobs = torch.full((1, 4097), -1.0, dtype=torch.bfloat16)
    summed = advantage_weighted_sft_loss(logprobs, torch.ones(1, 4097), torch.ones(1, 4097), num_loss_tokens=1)
    assert (summed.loss.dtype, summed.loss.item()) == (torch.float32, 4096.0)  # in bf16 the sum would stop at 256
    new = torch.tensor([[0.0, 0.0]], requires_grad=True)
    output = clipped_ratio_loss(new, torch.tensor([[0.0, -500.0]]), torch.full((1, 2), -1.0), torch.ones(1, 2))
    output.loss.backward()
    assert output.loss.item() == 3.0
    assert new.grad.isfinite().all()


def rollout_case(seed: int = 0, sequences: int = 5, longest: int = 9) -> dict[str, np.ndarray]:
    """Padded float64 rows: logprobs, rollout logprobs (some missing, one row wholly), advantages, mask."""
    rng = np.random.default_rng(seed)
    shape = (sequences, longest)
    logprobs = -rng.random(shape) * 4
    rollout = logprobs - rng.normal(0, 0.7, shape)
    rollout[rng.random(shape) < 0.2] = NAN
    rollout[1] = NAN
    mask = rng.random(shape) < 0.6
    mask[:, 0] = False
    return {"logprobs": logprobs, "rollout": rollout, "advantages": rng.normal(size=shape), "mask": mask}


def weights_by_hand(c: dict[str, np.ndarray], level: str, cap: float) -> np.ndarray:
    weights = np.ones(c["mask"].shape)
    for b in range(len(weights)):
        logs = {
            t: c["logprobs"][b, t] - c["rollout"][b, t]
            for t in np.flatnonzero(c["mask"][b])
            if not math.isnan(c["rollout"][b, t])
        }
        for t in np.flatnonzero(c["mask"][b]):
            if level == "token" and t in logs:
                weights[b, t] = min(math.exp(logs[t]), cap)
            elif level == "sequence" and logs:
                weights[b, t] = min(math.exp(sum(logs.values())), cap)
    return weights


def as_tensors(c: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    found = {name: torch.tensor(value).to(dtype) for name, value in c.items() if name != "mask"}
    return {**found, "mask": torch.tensor(c["mask"])}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 1e9])
@pytest.mark.parametrize("packed", [False, True])
def test_weights(level: str, cap: float, packed: bool) -> None:
    c = rollout_case()
    t = as_tensors(c)
    args = [t[name].flatten() if packed else t[name] for name in ("logprobs", "rollout", "mask")]
    ids = torch.arange(5).repeat_interleave(9) if packed else None
    weights, figures = importance_weights(*args, level=level, cap=cap, sequence_ids=ids)
    expected = weights_by_hand(c, level, cap)
    np.testing.assert_allclose(weights.view(5, 9).numpy(), expected, rtol=1e-12)
    free = weights_by_hand(c, level, math.inf)
    known = c["mask"] & ~np.isnan(c["rollout"])
    np.testing.assert_array_equal(figures["importance/clipped"].view(5, 9).numpy(), known & (free > cap))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["sft", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_gradients_and_figures(level: str, loss: str, dtype: torch.dtype) -> None:
    c = rollout_case(seed=3)
    t = as_tensors(c, dtype)
    cap = 1.5
    weights = weights_by_hand(c, level, cap)
    tokens = c["mask"].sum()
    logprobs = t["logprobs"].clone().requires_grad_()
    extra = {"rollout_logprobs": t["rollout"], "tis_cap": cap, "importance": level}
    if loss == "sft":
        output = advantage_weighted_sft_loss(logprobs, t["advantages"], t["mask"], **extra)
        expected = -(c["logprobs"] * c["advantages"] * weights)[c["mask"]].sum() / tokens
    else:
        output = clipped_ratio_loss(logprobs, t["logprobs"], t["advantages"], t["mask"], **extra)
        expected = -(c["advantages"] * weights)[c["mask"]].sum() / tokens  # the ratio to itself is 1
    output.loss.backward()
    tight = 1e-10 if dtype == torch.float64 else 1e-5
    assert output.loss.item() == pytest.approx(expected, rel=tight)
    gradient = np.where(c["mask"], -c["advantages"] * weights / tokens, 0.0)
    np.testing.assert_allclose(logprobs.grad, gradient, rtol=max(tight, 1e-7), atol=1e-9)

    known = c["mask"] & ~np.isnan(c["rollout"])
    logs = (c["logprobs"] - c["rollout"])[known]
    used = weights[known]
    figures = summarise_importance(output.metrics)
    by_hand = {
        "ratio_mean": np.exp(logs).mean(),
        "kl_k1": -logs.mean(),
        "kl_k3": (np.exp(logs) - 1 - logs).mean(),
        "log_ratio_max_abs": np.abs(logs).max(),
        "known_logprob_share": known.sum() / tokens,
        "weight_mean": used.mean(),
        "clipped_share": (weights_by_hand(c, level, math.inf)[known] > cap).mean(),
        "effective_sample_size": used.sum() ** 2 / (len(used) * (used**2).sum()),
    }
    for name, value in by_hand.items():
        assert figures[f"off_policy/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert not [name for name in figures if name.startswith("importance/")]


def test_extreme_ratios_stay_finite_and_nothing_known_is_no_figure() -> None:
    logprobs = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    rollout = torch.tensor([[NAN, 0.0, -500.0]])
    mask = torch.tensor([[0, 1, 1]])
    for level in ("token", "sequence"):
        output = advantage_weighted_sft_loss(
            logprobs, torch.ones(1, 3), mask, rollout_logprobs=rollout, tis_cap=1e12, importance=level
        )
        output.loss.backward()
        assert output.loss.isfinite() and logprobs.grad is not None and logprobs.grad.isfinite().all()
    nothing = advantage_weighted_sft_loss(
        logprobs, torch.ones(1, 3), mask, rollout_logprobs=torch.full((1, 3), NAN), tis_cap=2.0
    )
    assert not [name for name in summarise_importance(nothing.metrics) if "off_policy" in name]


def test_a_packed_batch_needs_sequence_ids_and_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="must have the same shape"):
        advantage_weighted_sft_loss(torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1, 3))
    values = torch.zeros(4)
    with pytest.raises(ValueError, match="sequence_ids"):
        importance_weights(values, values, values == 0, level="sequence", cap=2.0)
    with pytest.raises(ValueError, match="shape"):
        importance_weights(values, values[:2], values == 0)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few entries, so that every loop runs several times and ends on an uneven one."""
    monkeypatch.setattr(lm_head, "DIRECT_BYTES", 0)
    monkeypatch.setattr(lm_head, "SLICE_BYTES", {"cpu": 200})
    monkeypatch.setattr(lm_head, "BLOCK", 4)


def head_case(dtype: torch.dtype, rows: int = 7, vocabulary: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "hidden": draw(rows, 6).requires_grad_(),
        "weight": draw(vocabulary, 6).requires_grad_(),
        "bias": draw(vocabulary).requires_grad_(),
        "labels": torch.randint(0, vocabulary, (rows,), generator=generator),
        "temperature": torch.rand(rows, generator=generator) + 0.5,
        "grad": torch.randn(rows, generator=generator, dtype=torch.float64),
    }


def head_of(case: dict[str, torch.Tensor], keep_bytes: int | None) -> torch.Tensor:
    names = ("hidden", "weight", "labels", "temperature", "bias")
    return linear_token_logprobs(*(case[name] for name in names), keep_bytes)


def head_reference(case: dict[str, torch.Tensor]) -> tuple[np.ndarray, ...]:
    """Logprobs and the gradients of sum(grad · logprob) for hidden, weight and bias, by formula in numpy float64."""
    hidden, weight, bias, labels, temperature, grad = (
        case[k].detach().to(torch.float64).numpy() if k != "labels" else case[k].numpy()
        for k in ("hidden", "weight", "bias", "labels", "temperature", "grad")
    )
    logits = (hidden @ weight.T + bias) / temperature[:, None]
    exped = np.exp(logits - logits.max(1, keepdims=True))
    softmax = exped / exped.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    onehot = np.zeros_like(softmax)
    onehot[rows, labels] = 1
    outer = (grad / temperature)[:, None] * (onehot - softmax)
    return np.log(softmax[rows, labels]), outer @ weight, outer.T @ hidden, outer.sum(0)


@pytest.mark.parametrize("keep_bytes", ["direct", None, 1, 300, 10_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_the_head_against_float64(
    request: pytest.FixtureRequest, dtype: torch.dtype, tolerance: float, keep_bytes: Any
) -> None:
    if keep_bytes == "direct":
        keep_bytes = None
    else:
        request.getfixturevalue("tiny_tiles")
    case = head_case(dtype)
    found = head_of(case, keep_bytes)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (found * case["grad"].to(found)).sum().backward()
    expected = head_reference(case)
    gradients = [case[name].grad for name in ("hidden", "weight", "bias")]
    assert {gradient.dtype for gradient in gradients} == {dtype}
    for value, reference in zip((found.detach(), *gradients), expected, strict=True):
        np.testing.assert_allclose(
            value.to(torch.float64).numpy(), reference, rtol=tolerance, atol=tolerance * np.abs(reference).max()
        )


@pytest.mark.usefixtures("tiny_tiles")
def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients() -> None:
    case = head_case(torch.float64)
    inputs = [case["hidden"], case["weight"], case["bias"]]
    logprobs = head_of(case, 300)
    first = torch.autograd.grad(logprobs, inputs, case["grad"], retain_graph=True)
    second = torch.autograd.grad(logprobs, inputs, case["grad"])
    for once, again in zip(first, second, strict=True):
        assert once.tolist() == again.tolist()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.usefixtures("tiny_tiles")
def test_frozen_inputs_get_no_gradient_and_leave_the_others_right(frozen: str) -> None:
    case = head_case(torch.float64)
    case[frozen].requires_grad_(False)
    found = head_of(case, 300)
    (found * case["grad"]).sum().backward()
    for name, reference in zip(("hidden", "weight", "bias"), head_reference(case)[1:], strict=True):
        gradient = case[name].grad
        if name == frozen:
            assert gradient is None
        else:
            np.testing.assert_allclose(gradient.numpy(), reference, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("tiny_tiles")
def test_large_logits_neither_overflow_nor_lose_the_sum() -> None:
    # Logits 1000·[1, 2, …, 6]: the largest has logprob -log(1 + e^-1000 + …) = 0, the smallest 1000 - 6000.
    hidden = torch.tensor([[1000.0]])
    weight = torch.arange(1.0, 7.0)[:, None]
    found = linear_token_logprobs(hidden, weight, torch.tensor([5]), keep_bytes=1)
    assert found.item() == 0.0
    assert linear_token_logprobs(hidden, weight, torch.tensor([0]), keep_bytes=1).item() == -5000.0


def test_no_row_gives_an_empty_result_with_a_graph() -> None:
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    for keep_bytes in (None, 2):
        found = linear_token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), keep_bytes=keep_bytes)
        assert found.shape == (0,)
        found.sum().backward()
        assert weight.grad.abs().sum().item() == 0.0


def test_the_wider_dtype_is_chosen_or_that_of_autocast_as_for_a_linear_layer() -> None:
    case = head_case(torch.float32)
    hidden, weight, labels = case["hidden"], case["weight"], case["labels"]
    found = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    assert found.tolist() == linear_token_logprobs(hidden.bfloat16().float(), weight, labels).tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_logprobs(hidden, weight, labels)
    assert found.tolist() == linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels).tolist()


def teacher_kl_by_hand(case: dict[str, np.ndarray], factors: np.ndarray) -> tuple[np.ndarray, ...]:
    """KL of each row, and gradients of ``factors @ KL`` for hidden, weight and bias: numpy, float64."""
    hidden, weight, bias = (case[name].astype(np.float64) for name in ("hidden", "weight", "bias"))
    logits = hidden @ weight.T + bias
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    kl, by_logits = np.zeros(len(q)), np.zeros_like(q)
    for n, (ids, logprobs) in enumerate(zip(case["ids"], case["logprobs"], strict=True)):
        named = ids[ids >= 0]
        p = np.exp(logprobs[ids >= 0])
        others = np.setdiff1d(np.arange(q.shape[1]), named)
        rest, student_rest = 1 - p.sum() if others.size else 0.0, q[n, others].sum()
        kl[n] = (p * np.log(p / q[n, named])).sum() + (rest * np.log(rest / student_rest) if rest > 0 else 0)
        # d(-log q_i) = q - onehot(i); of the rest, onehot is the share of each in it.
        target = np.zeros(q.shape[1])
        target[named] = p
        target[others] = rest * q[n, others] / student_rest if others.size else 0
        by_logits[n] = factors[n] * (target.sum() * q[n] - target)
    return kl, by_logits @ weight, by_logits.T @ hidden, by_logits.sum(0)


def teacher_case(top: int, rows: int = 9, vocabulary: int = 37) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(top)
    teacher = rng.normal(size=(rows, vocabulary)) * 3
    teacher -= np.log(np.exp(teacher).sum(1, keepdims=True))
    ids = np.argsort(-teacher, 1)[:, :top]
    logprobs = np.take_along_axis(teacher, ids, 1)
    if top > 2:
        ids[::2, -2:], logprobs[::2, -2:] = -1, -np.inf  # rows of another length
    case = {"hidden": rng.normal(size=(rows, 8)), "weight": rng.normal(size=(vocabulary, 8)), "ids": ids}
    return {**case, "bias": rng.normal(size=vocabulary), "logprobs": logprobs}


@pytest.mark.parametrize("top", [1, 5, 37])
@pytest.mark.parametrize("scratch", [1, 3 * 37 * 8, 2**20], ids=["a row", "three rows", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_kl_to_a_teacher_and_its_gradients_against_float64(top: int, scratch: int, dtype: torch.dtype) -> None:
    case = teacher_case(top)
    if dtype == torch.float32:
        case |= {name: case[name].astype(np.float32) for name in ("hidden", "weight", "bias")}
    factors = np.random.default_rng(0).normal(size=len(case["ids"]))
    kl, *gradients = teacher_kl_by_hand(case, factors)
    inputs = {name: torch.from_numpy(case[name]).requires_grad_() for name in ("hidden", "weight", "bias")}
    ids, logprobs = torch.from_numpy(case["ids"]), torch.from_numpy(case["logprobs"])
    found = linear_teacher_kl(inputs["hidden"], inputs["weight"], ids, logprobs, inputs["bias"], scratch)
    assert found.dtype == dtype
    (found * torch.from_numpy(factors).to(dtype)).sum().backward()
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    for expected, own in zip([kl, *gradients], [found.detach(), *(v.grad for v in inputs.values())], strict=True):
        assert np.linalg.norm(own.double().numpy() - expected) <= limit * np.linalg.norm(expected)


def test_the_kl_is_zero_at_the_teacher_itself_and_never_negative_nor_above_that_of_all_ids() -> None:
    case = teacher_case(37)
    case["ids"][:], case["logprobs"][:] = (case["ids"][1], case["logprobs"][1])
    teacher = np.zeros(37)
    teacher[case["ids"][1]] = case["logprobs"][1]
    student = torch.from_numpy(np.vstack([teacher, np.random.default_rng(1).normal(size=(8, 37))]))
    kls = []
    for top in (1, 3, 10, 37):
        ids, logprobs = (torch.from_numpy(case[name][:, :top].copy()) for name in ("ids", "logprobs"))
        kls.append(linear_teacher_kl(student, torch.eye(37, dtype=torch.float64), ids, logprobs))
    for fewer, more in itertools.pairwise(kls):
        assert float(fewer[0].abs()) < 1e-12
        assert (fewer[1:] > 0).all()
        assert (fewer <= more + 1e-12).all()


def test_the_kl_to_a_reference_by_hand_and_the_loss_of_weighted_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, NAN, -3.5], dtype=torch.float64)
    kl = reference_kl(logprobs, reference)
    # r - 1 - log r with log r = 0, 1, no value, -0.5.
    assert kl.tolist() == pytest.approx([0, math.e - 2, 0, math.exp(-0.5) - 0.5])
    weights, mask = torch.tensor([2.0, 2.0, NAN, 0.5], dtype=torch.float64), torch.tensor([1, 1, 1, 1])
    output = kl_loss("ref", kl, weights, mask, 8)
    assert output.loss.item() == pytest.approx((2 * (math.e - 2) + 0.5 * (math.exp(-0.5) - 0.5)) / 8)
    figures = summarise_importance(output.metrics)
    assert figures == pytest.approx({"ref/known": 3 / 4, "ref/kl": (math.e - 2 + math.exp(-0.5) - 0.5) / 3})
    output.loss.backward()
    # d k3 / d logprob = 1 - r.
    assert logprobs.grad.tolist() == pytest.approx([0, 2 * (1 - math.e) / 8, 0, 0.5 * (1 - math.exp(-0.5)) / 8])
