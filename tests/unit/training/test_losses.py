"""Losses against numbers worked out by hand and against float64 formulas written independently here."""

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
from atropos_verl.types import LossOutput

NAN = float("nan")
F64 = torch.float64


def rollout_case(seed: int = 3, sequences: int = 5, longest: int = 9) -> dict[str, np.ndarray]:
    """Float64 rows: logprobs, rollout logprobs (some missing, one row wholly), advantages, mask. What is not trained
    is NaN."""
    rng = np.random.default_rng(seed)
    shape = (sequences, longest)
    logprobs, advantages = -rng.random(shape) * 4, rng.normal(size=shape)
    rollout = logprobs - rng.normal(0, 0.7, shape)
    rollout[rng.random(shape) < 0.2] = NAN
    rollout[1] = NAN
    mask = rng.random(shape) < 0.6
    mask[:, 0] = False
    logprobs[~mask] = advantages[~mask] = NAN
    return {"logprobs": logprobs, "rollout": rollout, "advantages": advantages, "mask": mask}


def weights_by_hand(c: dict[str, np.ndarray], level: str | None, cap: float) -> np.ndarray:
    logs = np.where(c["mask"], c["logprobs"] - c["rollout"], NAN)
    if level == "sequence":  # all its trained tokens have the weight of those that are known
        known = ~np.isnan(logs).all(1, keepdims=True)
        logs = np.where(c["mask"] & known, np.nansum(logs, 1, keepdims=True), NAN)
    return np.where(np.isnan(logs) | (level is None), 1.0, np.minimum(np.exp(logs), cap))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["sft", "grpo"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    ("level", "cap"), [(None, 1.5), ("token", 0.5), ("token", 1.5), ("sequence", 1.5), ("sequence", 1e9)]
)
def test_losses_gradients_and_figures(
    level: str | None, cap: float, loss: str, dtype: torch.dtype, packed: bool
) -> None:
    """Also in micro-batches of one sequence, with the count of all."""
    c = rollout_case()
    weights, mask, tokens = weights_by_hand(c, level, cap), c["mask"], int(c["mask"].sum())
    tight = 1e-10 if dtype == F64 else 1e-5

    def compute(logprobs: torch.Tensor, *rest: torch.Tensor, count: Any = None) -> LossOutput:
        rollout, advantages, loss_mask, ids = rest
        extra: dict[str, Any] = {"num_loss_tokens": count}
        if level is not None:
            extra |= {"rollout_logprobs": rollout, "tis_cap": cap, "importance": level}
            extra |= {"sequence_ids": ids} if packed else {}
        if loss == "sft":
            return advantage_weighted_sft_loss(logprobs, advantages, loss_mask, **extra)
        return clipped_ratio_loss(logprobs, logprobs.detach(), advantages, loss_mask, **extra)

    tensors = [torch.tensor(value).to(dtype if value.dtype == float else torch.bool) for value in c.values()]
    tensors = [tensor.flatten() if packed else tensor for tensor in (*tensors, torch.arange(5)[:, None].expand(5, 9))]
    logprobs = tensors[0] = tensors[0].requires_grad_()
    output = compute(*tensors)
    if loss == "sft":
        expected = -(c["logprobs"] * c["advantages"] * weights)[mask].sum() / tokens
        assert output.metrics["logprob_mean"] == pytest.approx(c["logprobs"][mask].mean())
        assert output.metrics["advantage_mean"] == pytest.approx(c["advantages"][mask].mean())
    else:
        expected = -(c["advantages"] * weights)[mask].sum() / tokens  # the ratio to itself is 1
    parts = zip(*(tensor.split(9 if packed else 1) for tensor in tensors), strict=True)
    count = tokens if packed else torch.tensor(tokens)
    assert output.loss.item() == pytest.approx(expected, rel=tight)
    assert sum(compute(*part, count=count).loss.item() for part in parts) == pytest.approx(expected, rel=tight)
    output.loss.backward()
    gradient = np.where(mask, -c["advantages"] * weights / tokens, 0.0)
    np.testing.assert_allclose(logprobs.grad.view(mask.shape), gradient, rtol=max(tight, 1e-7), atol=1e-9)
    figures = summarise_importance(output.metrics)
    assert not [name for name in figures if name.startswith("importance/")]
    if level is None:
        return
    known = mask & ~np.isnan(c["rollout"])
    logs, used = (c["logprobs"] - c["rollout"])[known], weights[known]
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


def test_a_nan_at_a_trained_position_reaches_the_loss() -> None:
    logprobs, advantages, mask = torch.tensor([NAN, -1.0]), torch.ones(2), torch.ones(2)
    assert math.isnan(advantage_weighted_sft_loss(logprobs, advantages, mask).loss.item())


def test_the_pure_form_equals_the_formula_from_the_logits_that_predict_trained_tokens() -> None:
    generator = np.random.default_rng(3)
    logits, advantages = generator.normal(size=(2, 4, 5)), generator.normal(size=(2, 4))
    ids, mask = generator.integers(0, 5, size=(2, 4)), np.array([[1, 1, 0, 1], [1, 0, 0, 1]])
    predicts = np.roll(mask * [0, 1, 1, 1], -1, axis=1) == 1
    logits[~predicts] = NAN
    total, gradient = 0.0, np.zeros(logits.shape)
    for b, t in np.argwhere(predicts):
        q = np.exp(logits[b, t] / 0.7) / np.exp(logits[b, t] / 0.7).sum()
        token, advantage = ids[b, t + 1], advantages[b, t + 1]
        total -= math.log(q[token]) * advantage
        gradient[b, t] = advantage * (q - np.eye(5)[token]) / 0.7
    tensors = [torch.from_numpy(x) for x in (ids, advantages, mask)]
    for temperature in (0.7, torch.tensor([0.7, 0.7], dtype=F64)):
        given = torch.from_numpy(logits).requires_grad_()
        found = compute_advantage_weighted_sft_loss(given, *tensors, temperature=temperature)
        found.backward()
        assert found.item() == pytest.approx(total / 3, rel=1e-12)
        np.testing.assert_allclose(given.grad, gradient / 3, rtol=1e-12, atol=1e-15)


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
    new = torch.tensor([[0.0, -2.0 + math.log(ratio)]], dtype=F64, requires_grad=True)
    old, mask = torch.tensor([[0.0, -2.0]], dtype=F64), torch.tensor([[1, 1]])
    named = dict(zip(("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"), bounds, strict=False))
    output = clipped_ratio_loss(new, old, torch.full((1, 2), advantage), mask, **named)
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)
    assert output.metrics["ratio_mean"] == pytest.approx(ratio)
    assert output.metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))
    output.loss.backward()
    clipped = expected != pytest.approx(-advantage * ratio)
    # Without clipping d(-A·r)/d logprob = -A·r; clipped: 0.
    assert new.grad[0].tolist() == pytest.approx([0.0, 0.0 if clipped else -advantage * ratio])
    dual = ratio == 5.0
    assert output.metrics["clip_fraction_dual"] == float(dual)
    assert output.metrics["clip_fraction"] == float(clipped and not dual)


def test_half_precision_is_summed_in_float32() -> None:
    logprobs = torch.full((1, 4097), -1.0, dtype=torch.bfloat16)
    summed = advantage_weighted_sft_loss(logprobs, torch.ones(1, 4097), torch.ones(1, 4097), num_loss_tokens=1)
    assert (summed.loss.dtype, summed.loss.item()) == (torch.float32, 4096.0)  # in bf16 the sum would stop at 256


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_stay_finite_and_nothing_known_is_no_figure(level: str) -> None:
    logprobs = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    rollout, mask = torch.tensor([[NAN, 0.0, -500.0]]), torch.tensor([[0, 1, 1]])
    how: dict[str, Any] = {"tis_cap": 1e12, "importance": level}
    weighted = advantage_weighted_sft_loss(logprobs, torch.ones(1, 3), mask, rollout_logprobs=rollout, **how)
    clipped = clipped_ratio_loss(logprobs, rollout, torch.full((1, 3), -1.0), mask)
    for output in (weighted, clipped):
        output.loss.backward()
        assert output.loss.isfinite() and logprobs.grad.isfinite().all()
    assert clipped.loss.item() == pytest.approx((0.8 + 3.0) / 2)
    unknown = torch.full((1, 3), NAN)
    nothing = advantage_weighted_sft_loss(logprobs, torch.ones(1, 3), mask, rollout_logprobs=unknown, **how)
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
    monkeypatch.setattr(lm_head, "SLICE_BYTES", {"cpu": 200})
    monkeypatch.setattr(lm_head, "BLOCK", 4)


def head_case(dtype: torch.dtype, rows: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, ...]:
    """Hidden, weight, bias (with gradients), labels, temperature, and the gradient of each logprob."""
    generator = torch.Generator().manual_seed(5)
    shapes = (rows, 6), (vocabulary, 6), (vocabulary,)
    inputs = [torch.randn(*shape, generator=generator, dtype=F64).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    temperature = torch.rand(rows, generator=generator) + 0.5
    return *inputs, labels, temperature, torch.randn(rows, generator=generator, dtype=F64)


@pytest.mark.parametrize("keep_bytes", ["one tile", None, 1, 300, 10_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_head_against_float64(
    request: pytest.FixtureRequest, dtype: torch.dtype, tolerance: float, keep_bytes: Any
) -> None:
    """Twice through a retained graph, with all three inputs and with one of them frozen."""
    if keep_bytes == "one tile":
        keep_bytes = None
    else:
        request.getfixturevalue("tiny_tiles")
    *inputs, labels, temperature, grad = head_case(dtype)
    hidden, weight, bias = wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logprobs = ((hidden @ weight.T + bias) / temperature[:, None].double()).log_softmax(1)[range(7), labels]
    gradients = torch.autograd.grad(logprobs, wide, grad)
    for frozen in (None, 0, 1, 2):
        given = [tensor.detach() if n == frozen else tensor for n, tensor in enumerate(inputs)]
        found = linear_token_logprobs(*given[:2], labels, temperature, given[2], keep_bytes)
        assert found.dtype == (F64 if dtype == F64 else torch.float32)
        expected = [logprobs.detach(), *(gradient for n, gradient in enumerate(gradients) if n != frozen)]
        for _ in range(2):
            free = [tensor for tensor in given if tensor.requires_grad]
            own = torch.autograd.grad(found, free, grad.to(found), retain_graph=True)
            assert {gradient.dtype for gradient in own} == {dtype}
            for value, reference in zip((found.detach(), *own), expected, strict=True):
                limit = tolerance * float(reference.abs().max())
                torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=limit)


@pytest.mark.usefixtures("tiny_tiles")
def test_large_logits_neither_overflow_nor_lose_the_sum() -> None:
    # Logits 1000·[1, 2, …, 6]: the largest has logprob -log(1 + e^-1000 + …) = 0, the smallest 1000 - 6000.
    hidden, weight = torch.full((2, 1), 1000.0), torch.arange(1.0, 7.0)[:, None]
    assert linear_token_logprobs(hidden, weight, torch.tensor([5, 0]), keep_bytes=1).tolist() == [0.0, -5000.0]


@pytest.mark.parametrize("keep_bytes", [None, 2])
def test_no_row_gives_an_empty_result_with_a_graph(keep_bytes: int | None) -> None:
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    found = linear_token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), keep_bytes=keep_bytes)
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad.tolist() == [[0.0] * 3] * 4


def test_the_wider_dtype_is_chosen_or_that_of_autocast_as_for_a_linear_layer() -> None:
    hidden, weight, _, labels, *_ = head_case(torch.float32)
    found = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    assert found.tolist() == linear_token_logprobs(hidden.bfloat16().float(), weight, labels).tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_logprobs(hidden, weight, labels)
    assert found.tolist() == linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels).tolist()


@pytest.mark.parametrize("top", [1, 5, 37])
@pytest.mark.parametrize("scratch", [1, 3 * 37 * 8, 2**20], ids=["a row", "three rows", "all"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_kl_to_a_teacher_and_its_gradients_against_float64(top: int, scratch: int, dtype: torch.dtype) -> None:
    """Row 0 is of a student that is the teacher."""
    generator = torch.Generator().manual_seed(top)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    wide = [tensor.to(dtype).double().requires_grad_() for tensor in (draw(9, 8), draw(37, 8), draw(37))]
    log_q = (wide[0] @ wide[1].T + wide[2]).log_softmax(1)
    teacher = torch.cat([log_q[:1].detach(), (3 * draw(8, 37)).log_softmax(1)])
    logprobs, ids = teacher.topk(top)
    if top > 2:
        ids[1::2, -2:], logprobs[1::2, -2:] = -1, -torch.inf  # rows of another length
    kls = []
    for row, named, values in zip(log_q, ids, logprobs, strict=True):
        named, values = named[named >= 0], values[named >= 0]
        kls.append((values.exp() * (values - row[named])).sum())
        others = np.setdiff1d(range(37), named)
        if others.size:
            rest = 1 - values.exp().sum()
            kls[-1] = kls[-1] + rest * (rest / row[others].exp().sum()).log()
    expected, factors = torch.stack(kls), draw(9)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in wide]
    found = linear_teacher_kl(*inputs[:2], ids, logprobs, inputs[2], scratch)
    assert found.dtype == dtype and abs(found[0].item()) < (1e-13 if dtype == F64 else 1e-5)
    (found * factors.to(dtype)).sum().backward()
    gradients = torch.autograd.grad(expected, wide, factors)
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    for value, reference in zip([found.detach(), *(v.grad for v in inputs)], [expected, *gradients], strict=True):
        assert (value.double() - reference).norm() <= limit * reference.norm()


def test_the_kl_to_a_reference_by_hand_and_the_loss_of_weighted_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=F64, requires_grad=True)
    kl = reference_kl(logprobs, torch.tensor([-1.0, -1.0, NAN, -3.5], dtype=F64))
    # r - 1 - log r with log r = 0, 1, no value, -0.5.
    assert kl.tolist() == pytest.approx([0, math.e - 2, 0, math.exp(-0.5) - 0.5])
    output = kl_loss("ref", kl, torch.tensor([2.0, 2.0, NAN, 0.5], dtype=F64), torch.ones(4), 8)
    assert output.loss.item() == pytest.approx((2 * (math.e - 2) + 0.5 * (math.exp(-0.5) - 0.5)) / 8)
    figures = summarise_importance(output.metrics)
    assert figures == pytest.approx({"ref/known": 3 / 4, "ref/kl": (math.e - 2 + math.exp(-0.5) - 0.5) / 3})
    output.loss.backward()
    # d k3 / d logprob = 1 - r.
    assert logprobs.grad.tolist() == pytest.approx([0, 2 * (1 - math.e) / 8, 0, 0.5 * (1 - math.exp(-0.5)) / 8])
