"""Losses as pure tensor functions. Imports torch; nothing here knows verl, a trainer or a process group."""

from atropos_verl.training.losses.importance import importance_weights, summarise_importance
from atropos_verl.training.losses.lm_head import linear_token_logprobs
from atropos_verl.training.losses.policy import (
    advantage_weighted_sft_loss,
    clipped_ratio_loss,
    compute_advantage_weighted_sft_loss,
    token_logprobs_from_logits,
)

__all__ = [
    "advantage_weighted_sft_loss",
    "clipped_ratio_loss",
    "compute_advantage_weighted_sft_loss",
    "importance_weights",
    "linear_token_logprobs",
    "summarise_importance",
    "token_logprobs_from_logits",
]
