"""A loss for ``loss.path``: advantage-weighted, with a floor under the logprobs of bad answers.

The advantage-weighted loss has no lower bound: it can push a token with a negative advantage to probability 0. Here
such a token stops being pushed once its logprob is below ``FLOOR``.
"""

import torch

FLOOR = -10.0
"""In nats: a probability of 0.000045."""


def loss(logprobs, advantages, loss_mask, num_loss_tokens, **_):
    """The mean of ``-logprob · advantage`` over the trained tokens of the global batch."""
    pushed_down = (advantages < 0) & (logprobs < FLOOR)
    trained = loss_mask & ~pushed_down
    terms = torch.where(trained, -logprobs * advantages, torch.zeros_like(logprobs))
    return terms.sum() / num_loss_tokens, {"floored": float((loss_mask & pushed_down).sum())}
