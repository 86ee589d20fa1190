"""Truncated importance weights of rollouts that another policy wrote, and how far that policy is away.

With ``log r_t = old_t - rollout_t``, the log ratio of the trainer's to the rollout policy's probability of token t::

    token:     w_t = min(exp(log r_t), cap)                     (TIS; Ionides 2008, and for token-level policy gradients
                                                                 "Your efficient RL framework secretly brings you
                                                                 off-policy RL training", Yao et al. 2025)
    sequence:  w_t = min(exp(sum over the sequence of log r), cap)      one weight for all tokens of a sequence

The token form has little variance and a bias where earlier tokens of a sequence differ; the sequence form has no bias
below the cap, and its variance grows with length. Log ratios are taken within ±20, as in verl 0.9.1
(``rollout_corr_helper.py``), of which these are the two truncated forms. Tokens without a rollout logprob (NaN) have
ratio 1 and count in no figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["LOG_RATIO_BOUND", "importance_figures", "importance_weights", "summarise_importance"]

LOG_RATIO_BOUND = 20.0
"""exp is taken of log ratios within ±20 only (verl's bound): beyond, float32 gradients are not usable."""
PREFIX = "importance/"
LARGEST = f"{PREFIX}log_ratio_max_abs"
"""The one figure that is a maximum, not a mean."""


def importance_weights(
    old: torch.Tensor,
    rollout: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str = "token",
    cap: float = 2.0,
    sequence_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [...], without gradient, 1 where not trained; and where they were truncated [...].

    Args:
        old: [...] the trainer's logprobs before the update. rollout: [...] of the policy that sampled; NaN = no value.
        mask: [...] bool, trained.
        level: ``token`` or ``sequence``.
        cap: above 0.
        sequence_ids: [...] int64, needed for ``level="sequence"`` of packed [N] tensors; [B, L] has its rows.

    Raises:
        ValueError: shapes differ, or ``sequence_ids`` are missing.
    """
    log_ratio, known = _log_ratio(old, rollout, mask)
    applies = known
    if level == "sequence":
        log_ratio, applies = _per_sequence(log_ratio, known, mask, sequence_ids)
    weights = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    truncated = applies & (weights > cap)
    # Where nothing is known the weight is 1, also with a cap below 1.
    return torch.where(applies, weights.clamp(max=cap), torch.ones_like(weights)), truncated


def importance_figures(
    old: torch.Tensor,
    rollout: torch.Tensor,
    mask: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Per-token figures [...] whose means over trained tokens ``summarise_importance`` reads; and one maximum, []."""
    log_ratio, known = _log_ratio(old, rollout, mask)
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = bounded.exp()
    zero = torch.zeros_like(ratio)
    figures = {
        "known": known.to(ratio),
        "ratio": torch.where(known, ratio, zero),
        "kl_k1": -log_ratio,
        "kl_k3": torch.where(known, ratio - 1 - bounded, zero),
    }
    if weights is not None:
        applied = torch.where(known, weights[0], zero)
        truncated = (weights[1] & known).to(ratio)
        figures |= {"weight": applied, "weight_squared": applied.square(), "clipped": truncated}
    found = {f"{PREFIX}{name}": value for name, value in figures.items()}
    return {**found, LARGEST: log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(())}


def summarise_importance(means: Mapping[str, float]) -> dict[str, float]:
    """Means over trained tokens → the figures that are reported.

    Returns:
        What is not of this module unchanged, and, where any rollout logprob is known, over those tokens:
        ``off_policy/ratio_mean`` (of the untruncated token ratios; 1 in expectation under the rollout policy),
        ``off_policy/kl_k1`` and ``off_policy/kl_k3``: estimates of KL(rollout ‖ trainer) from the rollout policy's
        samples, Schulman's ("Approximating KL divergence", 2020) k1 = -log r, unbiased and of high variance, and
        k3 = r - 1 - log r, unbiased and never negative. ``off_policy/log_ratio_max_abs``,
        ``off_policy/known_logprob_share`` (of the trained tokens), and with weights ``off_policy/weight_mean``,
        ``off_policy/clipped_share`` and ``off_policy/effective_sample_size`` = mean(w)² / mean(w²), in (0, 1] (Kish
        1965, over the number of tokens).
    """
    rest = {name: value for name, value in means.items() if not name.startswith(PREFIX)}
    own = {name.removeprefix(PREFIX): value for name, value in means.items() if name.startswith(PREFIX)}
    known = own.get("known", 0.0)
    if not known:
        return rest
    rest["off_policy/known_logprob_share"] = known
    rest["off_policy/ratio_mean"] = own["ratio"] / known
    rest["off_policy/kl_k1"] = own["kl_k1"] / known
    rest["off_policy/kl_k3"] = own["kl_k3"] / known
    rest["off_policy/log_ratio_max_abs"] = own["log_ratio_max_abs"]
    if "weight" in own:
        rest["off_policy/weight_mean"] = own["weight"] / known
        rest["off_policy/clipped_share"] = own["clipped"] / known
        squared = own["weight_squared"] / known
        rest["off_policy/effective_sample_size"] = rest["off_policy/weight_mean"] ** 2 / squared if squared else 0.0
    return rest


def _log_ratio(old: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log ratios [...], 0 where not known, and where they are known [...]."""
    if rollout.shape != old.shape:
        raise ValueError(f"rollout_logprobs {tuple(rollout.shape)} must have the shape of logprobs {tuple(old.shape)}")
    old = old.detach()
    rollout = rollout.detach().to(old)
    known = mask & ~rollout.isnan()
    return torch.where(known, old - rollout, torch.zeros_like(old)), known


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
