"""The loss verl's engine calls for each micro-batch, over our pure functions.

verl averages gradients over data-parallel ranks, so a micro-batch's loss is its sum, over the tokens of the *global*
batch, times the number of ranks: the sum over micro-batches and the mean over ranks then give the global mean.
"""

from __future__ import annotations

from typing import Any

import torch

from atropos_verl.config.schema import LossConfig
from atropos_verl.training.extensions import load_loss
from atropos_verl.training.losses.importance import LARGEST, summarise_importance
from atropos_verl.training.losses.policy import advantage_weighted_sft_loss, clipped_ratio_loss
from atropos_verl.types import LossOutput

__all__ = ["LossFunction"]


class LossFunction:
    """``(model_output, data, dp_group) -> (loss, metrics)`` as verl's engine wants it.

    ``kind`` is ``advantage_weighted_sft``, ``grpo``, or ``path`` (the user's function, ``loss.path``). Metrics are
    gathered between ``start()`` and ``finish()`` rather than through verl's return value, whose lists are joined over
    ranks and micro-batches without weights.
    """

    def __init__(self, kind: str, config: LossConfig, importance: str | None = None, cap: float = 2.0) -> None:
        self.kind = kind if config.path is None else "path"
        self._user_loss = None if config.path is None else load_loss(config.path)
        self.config = config
        self._importance = importance
        self._cap = cap
        self._sums: dict[str, float] = {}
        self._weight = self._largest = 0.0

    def start(self) -> None:
        """Forget the metrics of the batch before."""
        self._sums, self._weight, self._largest = {}, 0.0, 0.0

    def finish(self) -> dict[str, float]:
        """Mean of each metric over this rank's trained tokens."""
        means = {key: value / max(self._weight, 1.0) for key, value in self._sums.items()}
        return summarise_importance({**means, LARGEST: self._largest})

    def __call__(
        self, model_output: dict[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        del dp_group
        logprobs = _at_their_tokens(model_output["log_probs"].values(), data["input_ids"].offsets())
        mask = data["loss_mask"].values().bool()
        output = self._loss(logprobs, data, mask, int(data["batch_num_tokens"]))
        tokens = float(mask.sum())
        self._weight += tokens
        self._largest = max(self._largest, output.metrics.pop(LARGEST, 0.0))
        for key, value in output.metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + value * tokens
        return output.loss * int(data["dp_size"]), {}

    def _loss(self, logprobs: torch.Tensor, data: Any, mask: torch.Tensor, num_loss_tokens: int) -> LossOutput:
        advantages = data["advantages"].values()
        columns = set(data.keys())
        offsets = data["input_ids"].offsets()
        rollout: dict[str, Any] = {
            "rollout_logprobs": data["rollout_logprobs"].values() if "rollout_logprobs" in columns else None,
            "tis_cap": self._cap if self._importance else None,
            "importance": self._importance or "token",
            "sequence_ids": torch.repeat_interleave(
                torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()
            ),
        }
        old = data["old_logprobs"].values() if "old_logprobs" in columns else None
        if self._user_loss is not None:
            known = {name: rollout[name] for name in ("rollout_logprobs", "sequence_ids")}
            return self._user_loss(logprobs, advantages, mask, num_loss_tokens, old_logprobs=old, **known)
        if self.kind == "advantage_weighted_sft":
            return advantage_weighted_sft_loss(logprobs, advantages, mask, num_loss_tokens=num_loss_tokens, **rollout)
        config = self.config
        return clipped_ratio_loss(
            logprobs,
            logprobs.detach() if old is None else old,
            advantages,
            mask,
            clip_ratio_low=config.clip_ratio_low,
            clip_ratio_high=config.clip_ratio_high,
            clip_ratio_c=config.clip_ratio_c,
            num_loss_tokens=num_loss_tokens,
            **rollout,
        )


def _at_their_tokens(logprobs: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """verl's packed logprobs, whose entry t belongs to token t + 1, moved so that entry t belongs to token t.

    The first token of every sequence, which nothing predicts, gets 0.
    """
    first = torch.zeros_like(logprobs, dtype=torch.bool)
    first[offsets[:-1]] = True
    return torch.roll(logprobs, shifts=1, dims=0).masked_fill(first, 0.0)
