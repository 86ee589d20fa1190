"""The advantage-weighted and the clipped-ratio policy loss.

Shapes: ``B`` sequences, ``L`` padded length, ``V`` vocabulary; ``[...]`` means ``[B, L]`` or packed ``[N]``.

Both losses are sums over trained tokens divided by one count. That count may be given (``num_loss_tokens``), so that
micro-batches and data-parallel ranks add up to the mean over the global batch. Values at positions that are not trained
never reach a sum: they may be NaN. A NaN at a trained position does reach the loss, on purpose.
"""

from __future__ import annotations

import torch

from atropos_verl.training.losses.importance import LARGEST, LOG_RATIO_BOUND, importance_figures, importance_weights
from atropos_verl.types import LossOutput

__all__ = [
    "advantage_weighted_sft_loss",
    "clipped_ratio_loss",
    "compute_advantage_weighted_sft_loss",
]


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
        logprobs: [...] with a graph; entry t is the logprob of token t.
        advantages: [...].
        loss_mask: [...]; not 0 = trained. In ``[B, L]`` column 0 is never trained, whatever the mask says. A packed
            [N] mask must itself leave out the first token of each sequence (``build_samples`` does).
        num_loss_tokens: the denominator, trained tokens of the global batch. None: those of this mask.
        rollout_logprobs: [...] of the policy that sampled; NaN = no value. With them the ``importance/*`` means are
            measured (``losses.importance``).
        tis_cap: cap of the truncated importance weights w of trainer (these logprobs, without gradient) over rollout
            policy; None: w = 1. importance, sequence_ids: see ``importance_weights``.

    Returns:
        ``loss`` [] float32 or float64. No trained token: exactly 0, with a graph whose gradients are 0.
        ``metrics``: means over this call's trained tokens.

    Raises:
        ValueError: the shapes differ.
    """
    mask = _trained(loss_mask, logprobs, advantages)
    logprobs = _masked(_at_least_float32(logprobs), mask)
    weights = _masked(advantages.detach().to(logprobs), mask)
    figures = {"logprob_mean": logprobs.detach(), "advantage_mean": weights}
    if rollout_logprobs is not None:
        importances, measured = _importance(
            logprobs.detach(), rollout_logprobs, mask, importance, tis_cap, sequence_ids
        )
        figures |= measured
        if importances is not None:
            weights = weights * importances
    loss = -(logprobs * weights).sum() / _denominator(mask, num_loss_tokens)
    return LossOutput(loss=loss, metrics=_means(figures, mask))


def compute_advantage_weighted_sft_loss(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    num_loss_tokens: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """``advantage_weighted_sft_loss`` from a causal model's logits [B, L, V]: token t is predicted from t - 1.

    Only rows that predict a trained token are touched, so logits elsewhere may be anything, and their gradient is 0.

    Args:
        input_ids, advantages, loss_mask: [B, L]; position 0 is never trained.
        temperature: the sampling temperature, one number or [B].
    """
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit input_ids {tuple(input_ids.shape)}")
    mask = _trained(loss_mask, input_ids, advantages)
    batch, position = torch.nonzero(mask, as_tuple=True)
    rows = _at_least_float32(logits[batch, position - 1])  # [N, V]
    if isinstance(temperature, torch.Tensor):
        rows = rows / temperature.to(rows).expand(logits.shape[0])[batch, None]
    elif temperature != 1.0:
        rows = rows / temperature
    chosen = rows.gather(-1, input_ids[batch, position, None]).squeeze(-1)
    logprobs = chosen - rows.logsumexp(-1)
    weights = advantages.detach()[batch, position].to(logprobs)
    return -(logprobs * weights).sum() / _denominator(mask, num_loss_tokens)


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
        logprobs: [...] with a graph. old_logprobs: [...] of the policy before this batch's updates.
        advantages, loss_mask, num_loss_tokens: as ``advantage_weighted_sft_loss``.
        rollout_logprobs: [...] of the engine that sampled; NaN = no value.

    Returns:
        ``metrics``, means over this call's trained tokens: ``ratio_mean``, ``clip_fraction`` (clipped above or below),
        ``clip_fraction_dual``, ``approx_kl`` (Schulman's k3, ``r - 1 - log r``, of old to new); with rollout logprobs
        also ``importance/*`` (``losses.importance``).

    Raises:
        ValueError: the shapes differ.
    """
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
    if rollout_logprobs is not None:
        weights, measured = _importance(old, rollout_logprobs, mask, importance, tis_cap, sequence_ids)
        figures |= measured
        if weights is not None:
            losses = losses * weights
    loss = _masked(losses, mask).sum() / _denominator(mask, num_loss_tokens)
    return LossOutput(loss=loss, metrics=_means(figures, mask))


# ---------------------------------------------------------------------- parts


def _importance(
    old: torch.Tensor,
    rollout: torch.Tensor,
    mask: torch.Tensor,
    level: str,
    cap: float | None,
    sequence_ids: torch.Tensor | None,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Weights [...] (None without a cap), and figures for ``_means``."""
    if cap is None:
        return None, importance_figures(old, rollout, mask)
    weights = importance_weights(old, rollout, mask, level=level, cap=cap, sequence_ids=sequence_ids)
    return weights[0], importance_figures(old, rollout, mask, weights)


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
    if num_loss_tokens is None:
        return mask.sum().clamp(min=1)
    if isinstance(num_loss_tokens, torch.Tensor):
        return num_loss_tokens.to(mask.device).clamp(min=1)
    return max(float(num_loss_tokens), 1.0)


def _means(figures: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, float]:
    """Mean of each over the trained tokens (0 without any), fetched from the device in one go. ``LARGEST`` stays."""
    count = mask.sum().clamp(min=1)
    values = torch.stack(
        [
            value.detach() if name == LARGEST else _masked(value.detach(), mask).sum() / count
            for name, value in figures.items()
        ]
    ).tolist()
    return dict(zip(figures, values, strict=True))


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
