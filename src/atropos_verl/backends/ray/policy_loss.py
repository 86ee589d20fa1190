"""Our losses under verl's names. Imported by every process that builds the model (``model.external_lib``).

``actor_rollout_ref.actor.policy_loss.loss_mode=advantage_weighted_sft`` selects the loss; ``algorithm.adv_estimator=
plain`` the advantage that is the raw score (``grpo`` and ``rloo`` are verl's own names).
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, agg_loss
from verl.trainer.ppo.core_algos import register_adv_est as _register_adv_est
from verl.trainer.ppo.core_algos import register_policy_loss as _register_policy_loss

from atropos_verl.training.losses import advantage_weighted_sft_loss as _local_loss

__all__ = ["advantage_weighted_sft", "plain"]


def advantage_weighted_sft(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``sum(-logprob · advantage · mask) / sum(mask)`` over the global mini-batch (``token-mean``), or verl's others.

    Args:
        log_prob, advantages, response_mask: [B, R]; entry t of each is of response token t. ``old_log_prob`` has no
            part in it. ``rollout_is_weights`` [B, R]: importance weights of rollout correction, multiplied in.

    Returns:
        The loss [] as verl wants it (scaled by the data-parallel size), and metrics.
    """
    del old_log_prob
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    batch = dict(config.global_batch_info) if config is not None else {}
    tokens = batch.get("batch_num_tokens")
    if loss_agg_mode == "token-mean" and tokens is not None:
        # Flat: verl's column 0 is a response token, which may be trained; ours of a [B, L] sequence never is.
        mask = response_mask.reshape(-1)
        output = _local_loss(log_prob.reshape(-1), weighted.reshape(-1), mask, num_loss_tokens=tokens)
        return output.loss * batch.get("dp_size", 1), {f"actor/{k}": v for k, v in output.metrics.items()}
    loss = agg_loss(loss_mat=-log_prob * weighted, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch)
    return loss, {}


def plain(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The raw score as the advantage of every response token [B, R]."""
    del config
    values = token_level_rewards.sum(dim=-1, keepdim=True) * response_mask
    return values, values


# external_lib is imported once per process, but verl raises on a second registration under another object.
if "advantage_weighted_sft" not in POLICY_LOSS_REGISTRY:
    _register_policy_loss("advantage_weighted_sft")(advantage_weighted_sft)
if "plain" not in ADV_ESTIMATOR_REGISTRY:
    _register_adv_est("plain")(plain)
