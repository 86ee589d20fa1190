"""The advantage-weighted and the clipped-ratio policy loss, and truncated importance weights for both.

Shapes: ``B`` sequences, ``L`` padded length, ``V`` vocabulary; ``[...]`` means ``[B, L]`` or packed ``[N]``.

Both losses are sums over trained tokens divided by one count. That count may be given (``num_loss_tokens``), so that
micro-batches and data-parallel ranks add up to the mean over the global batch. Values at positions that are not trained
never reach a sum: they may be NaN. A NaN at a trained position does reach the loss, on purpose. Formulas and sources of
the importance weights: docs/internals.md.
"""

from collections.abc import Mapping

import torch

from atropos_verl.types import LossOutput

LOG_RATIO_BOUND = 20.0
"""exp is taken of log ratios within ±20 only (verl's bound): beyond, float32 gradients are not usable."""
PREFIX = "importance/"
LARGEST = f"{PREFIX}log_ratio_max_abs"
"""The one figure that is a maximum, not a mean."""


def advantage_weighted_sft_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    num_loss_tokens: int | float | torch.Tensor | None = None,
    *,
    rollout_logprobs: torch.Tensor | None = None,
    tis_cap: float | None = None,
    importance: str = "token",
    sequence_ids: torch.Tensor | None = None,
) -> LossOutput:
    """``sum(-logprob · advantage · w · mask) / sum(mask)``, with w = 1 unless ``tis_cap`` is given.

    No lower bound: with a negative advantage the loss falls without end as the token's probability goes to 0, so a long
    run on much negative data can diverge. The clipped-ratio loss (``loss.type=grpo``) is bounded.

    Args:
        logprobs, advantages: [...]; entry t is of token t. The logprobs have a graph.
        loss_mask: [...]; not 0 = trained. In ``[B, L]`` column 0 never is. A packed [N] mask must itself leave out the
            first token of each sequence (``build_samples`` does).
        num_loss_tokens: the denominator, trained tokens of the global batch. None: those of this mask.
        rollout_logprobs: [...] of the policy that sampled; NaN = no value. They also give the ``importance/*`` means.
        tis_cap, importance, sequence_ids: ``importance_weights`` w of these logprobs over them; None: w = 1.

    Returns ``loss`` [] float32 or float64, exactly 0, with gradients of 0, without a trained token; ``metrics`` are
    means over this call's trained tokens. Raises ``ValueError`` when the shapes differ."""
    mask = _trained(loss_mask, logprobs, advantages)
    logprobs = _masked(_at_least_float32(logprobs), mask)
    weights = _masked(advantages.detach().to(logprobs), mask)
    figures = {"logprob_mean": logprobs.detach(), "advantage_mean": weights}
    importances, measured = importance_weights(
        logprobs, rollout_logprobs, mask, level=importance, cap=tis_cap, sequence_ids=sequence_ids
    )
    loss = -(logprobs * weights * importances).sum() / _denominator(mask, num_loss_tokens)
    return LossOutput(loss=loss, metrics=_means(figures | measured, mask))


def compute_advantage_weighted_sft_loss(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    num_loss_tokens: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """``advantage_weighted_sft_loss`` from a causal model's logits [B, L, V]: token t is predicted from t - 1. Only
    rows that predict a trained token are touched, so logits elsewhere may be anything, and their gradient is 0.
    ``temperature`` is one number or [B]."""
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit input_ids {tuple(input_ids.shape)}")
    mask = _trained(loss_mask, input_ids, advantages)
    batch, position = torch.nonzero(mask, as_tuple=True)
    rows = _at_least_float32(logits[batch, position - 1])  # [N, V]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(rows).expand(logits.shape[0])[batch, None]
    rows = rows / temperature
    logprobs = rows.gather(-1, input_ids[batch, position, None]).squeeze(-1) - rows.logsumexp(-1)
    trained = advantages[batch, position], mask[batch, position]
    return advantage_weighted_sft_loss(logprobs, *trained, num_loss_tokens).loss


def clipped_ratio_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    rollout_logprobs: torch.Tensor | None = None,
    tis_cap: float | None = None,
    importance: str = "token",
    sequence_ids: torch.Tensor | None = None,
    num_loss_tokens: int | float | torch.Tensor | None = None,
) -> LossOutput:
    """PPO's clipped objective with dual clip, mean over trained tokens; what GRPO trains with.

    With ``r = exp(clamp(logprob - old, ±20))``::

        clipped = max(-A·r, -A·clamp(r, 1 - low, 1 + high))
        loss_t  = min(clipped, -A·c) where A < 0, else clipped          (dual clip, arXiv 1912.09729)
        loss    = sum(loss_t · w · mask) / num_loss_tokens

    as verl 0.9.1 (``core_algos.compute_policy_loss_vanilla``, token-mean). ``w`` is the truncated importance weight of
    ``old`` over the rollout policy (``importance_weights``), without gradient, which corrects for rollouts of older
    weights and for an engine whose logprobs are not the trainer's; 1 where ``rollout_logprobs`` or ``tis_cap`` is None.

    Args:
        old_logprobs: [...] of the policy before this batch's updates. The others: as ``advantage_weighted_sft_loss``.

    ``metrics``, means over this call's trained tokens: ``ratio_mean``, ``clip_fraction`` (clipped above or below),
    ``clip_fraction_dual``, ``approx_kl`` (Schulman's k3, ``r - 1 - log r``, of old to new); with rollout logprobs also
    ``importance/*``. Raises ``ValueError`` when the shapes differ."""
    mask = _trained(loss_mask, logprobs, old_logprobs, advantages)
    logprobs = _masked(_at_least_float32(logprobs), mask)
    old = _masked(old_logprobs.detach().to(logprobs), mask)
    advantages = _masked(advantages.detach().to(logprobs), mask)
    log_ratio = (logprobs - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    clipped = torch.maximum(plain, bounded)
    dual = -advantages * clip_ratio_c
    losses = torch.where(advantages < 0, torch.minimum(dual, clipped), clipped)
    figures = {
        "ratio_mean": ratio,
        "clip_fraction": (bounded > plain).to(ratio),
        "clip_fraction_dual": ((clipped > dual) & (advantages < 0)).to(ratio),
        "approx_kl": ratio - 1 - log_ratio,
    }
    weights, measured = importance_weights(
        old, rollout_logprobs, mask, level=importance, cap=tis_cap, sequence_ids=sequence_ids
    )
    loss = _masked(losses * weights, mask).sum() / _denominator(mask, num_loss_tokens)
    return LossOutput(loss=loss, metrics=_means(figures | measured, mask))


def kl_loss(
    name: str,
    kl: torch.Tensor,
    weights: torch.Tensor,
    loss_mask: torch.Tensor,
    num_loss_tokens: int | float | torch.Tensor | None = None,
) -> LossOutput:
    """``sum(weight · kl · mask) / num_loss_tokens``, to be added to the loss of the policy. ``kl`` [...] in nats, with
    a graph; ``weights`` [...], NaN where ``kl`` has no value. ``metrics``: ``NAME/kl`` and ``NAME/known`` (the share of
    the trained tokens), for ``summarise_importance``."""
    mask = _trained(loss_mask, kl, weights)
    applies = mask & ~weights.isnan()
    kl = _masked(_at_least_float32(kl), applies)
    loss = (kl * _masked(weights.to(kl), applies)).sum() / _denominator(mask, num_loss_tokens)
    return LossOutput(loss=loss, metrics=_means({f"{name}/kl": kl, f"{name}/known": applies.to(kl)}, mask))


def reference_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[...] Schulman's k3 estimate of KL(policy ‖ reference), ``r - 1 - log r`` with r the reference's probability over
    the policy's (verl's ``low_var_kl``, without its bound of 10); 0 where ``reference`` [...] is NaN."""
    log_ratio = torch.where(reference.isnan(), 0.0, reference.to(logprobs) - logprobs)
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp() - 1 - log_ratio


def _trained(loss_mask: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    for other in others:
        if other.shape != loss_mask.shape:
            raise ValueError(f"loss_mask {tuple(loss_mask.shape)} and {tuple(other.shape)} must have the same shape")
    mask = loss_mask != 0
    if mask.dim() == 2 and mask.shape[1]:
        mask = mask.clone()
        mask[:, 0] = False
    return mask


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Not a product: NaN times 0 is NaN.
    return torch.where(mask, values, torch.zeros_like(values))


def _denominator(mask: torch.Tensor, num_loss_tokens: int | float | torch.Tensor | None) -> torch.Tensor | float:
    count = mask.sum() if num_loss_tokens is None else num_loss_tokens  # a number stays one: no copy to the device
    return count.to(mask.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(float(count), 1.0)


def _means(figures: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, float]:
    """Mean of each over the trained tokens (0 without any), fetched from the device in one go. ``LARGEST`` stays."""
    count = mask.sum().clamp(min=1)
    means = {k: v.detach() if k == LARGEST else _masked(v.detach(), mask).sum() / count for k, v in figures.items()}
    return dict(zip(figures, torch.stack(list(means.values())).tolist(), strict=True))


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def importance_weights(
    old: torch.Tensor,
    rollout: torch.Tensor | None,
    mask: torch.Tensor,
    *,
    level: str = "token",
    cap: float | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
    """Weights [...], without gradient, 1 where not trained; and figures for ``_means``: [...], ``LARGEST`` []. ``old``
    [...] are the trainer's logprobs before the update, ``rollout`` [...] those of the policy that sampled (NaN: no
    value; None: the weight is 1, without figures), ``mask`` [...] bool. ``level``: ``token`` or ``sequence``, for which
    packed [N] tensors need ``sequence_ids`` [N] int64. ``cap`` is above 0; None: the weight is 1, and the figures of
    weights are absent. Raises ``ValueError`` when shapes differ, or ``sequence_ids`` are missing."""
    if rollout is None:
        return 1.0, {}
    if rollout.shape != old.shape:
        raise ValueError(f"rollout_logprobs {tuple(rollout.shape)} must have the shape of logprobs {tuple(old.shape)}")
    old, rollout = old.detach(), rollout.detach().to(old)
    known = mask & ~rollout.isnan()
    log_ratio = _masked(old - rollout, known)
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = bounded.exp()
    figures = {
        "known": known.to(ratio),
        "ratio": _masked(ratio, known),
        "kl_k1": -log_ratio,
        "kl_k3": _masked(ratio - 1 - bounded, known),
        "log_ratio_max_abs": log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(()),
    }
    weights: torch.Tensor | float = 1.0
    if cap is not None:
        applies = known
        if level == "sequence":
            log_ratio, applies = _per_sequence(log_ratio, known, mask, sequence_ids)
            ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        # Where nothing is known the weight is 1, also with a cap below 1.
        weights = torch.where(applies, ratio.clamp(max=cap), torch.ones_like(ratio))
        applied = _masked(weights, known)
        clipped = (known & (ratio > cap)).to(ratio)
        figures |= {"weight": applied, "weight_squared": applied.square(), "clipped": clipped}
    return weights, {f"{PREFIX}{name}": value for name, value in figures.items()}


def summarise_importance(means: Mapping[str, float]) -> dict[str, float]:
    """Means over trained tokens → the figures that are reported; those of other names are left as they are, but that
    ``distill/kl`` and ``ref/kl`` become means over the tokens that have one, and are left out where none has.

    The figures are over the tokens whose rollout logprob is known, ``off_policy/known_logprob_share`` of the trained
    ones. ``ratio_mean`` is of the untruncated token ratios, 1 in expectation under the rollout policy. ``kl_k1`` and
    ``kl_k3`` estimate KL(rollout ‖ trainer) from the rollout policy's samples (Schulman, "Approximating KL divergence",
    2020): k1 = -log r, unbiased and of high variance, k3 = r - 1 - log r, unbiased and never negative.
    ``effective_sample_size`` is mean(w)² / mean(w²), in (0, 1] (Kish 1965, over the number of tokens)."""
    rest = {name: value for name, value in means.items() if not name.startswith(PREFIX)}
    for name in ("distill", "ref"):
        share, kl = rest.pop(f"{name}/known", 0.0), rest.pop(f"{name}/kl", 0.0)
        rest |= {f"{name}/known": share, f"{name}/kl": kl / share} if share else {}
    own = {name.removeprefix(PREFIX): value for name, value in means.items() if name.startswith(PREFIX)}
    known = own.get("known", 0.0)
    if not known:
        return rest
    found = {"known_logprob_share": known, "log_ratio_max_abs": own["log_ratio_max_abs"]}
    means_of = {"ratio_mean": "ratio", "kl_k1": "kl_k1", "kl_k3": "kl_k3"}
    if "weight" in own:
        means_of |= {"weight_mean": "weight", "clipped_share": "clipped"}
        squared = own["weight_squared"] / known
        found["effective_sample_size"] = (own["weight"] / known) ** 2 / squared if squared else 0.0
    found |= {name: own[of] / known for name, of in means_of.items()}
    return rest | {f"off_policy/{name}": value for name, value in found.items()}


def _per_sequence(
    log_ratio: torch.Tensor, known: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of each token's sequence [...], and the trained tokens of sequences of which anything is known [...]."""
    if log_ratio.dim() == 2 and sequence_ids is None:
        return log_ratio.sum(-1, keepdim=True).expand_as(log_ratio), mask & known.any(-1, keepdim=True)
    if sequence_ids is None:
        raise ValueError("importance 'sequence' of a packed batch needs sequence_ids")
    ids = sequence_ids.to(log_ratio.device).flatten()
    count = int(ids.max()) + 1 if ids.numel() else 0
    sums = log_ratio.new_zeros(count).index_add_(0, ids, log_ratio.flatten())
    seen = log_ratio.new_zeros(count).index_add_(0, ids, known.flatten().to(log_ratio))
    return sums[ids].view_as(log_ratio), mask & (seen[ids] > 0).view_as(mask)
