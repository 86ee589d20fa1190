"""Recorded batches of the demo model, with everything an environment can put into a group, and what they are worth."""

from __future__ import annotations

from typing import Any

import numpy as np

from atropos_verl.assets import demo_model_path
from atropos_verl.protocol.wire import encode_group

GROUP_SIZE = 4


def recorded_batches(count: int, groups: int, seed: int = 0) -> list[list[bytes]]:
    """``count`` batches of ``groups`` groups of ``GROUP_SIZE`` sequences, as JSON to post.

    In every batch: one group of two turns, one with token-level advantages for two of its sequences, one with a zeroed
    sequence; the rest is plain. The logprobs are the demo model's. The second batch has a group with an id outside
    the vocabulary, to be quarantined; all sequences of the third have the same length.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    vocabulary = int(model.config.vocab_size)
    rng = np.random.default_rng(seed)
    batches = []
    for b in range(count):
        made = []
        for g in range(groups):
            prompt = rng.integers(0, vocabulary, 6).tolist()
            lengths = [7 if b == 2 else int(rng.integers(4, 9)) for _ in range(GROUP_SIZE)]
            tokens = [prompt + rng.integers(0, vocabulary, length).tolist() for length in lengths]
            if b == 1 and g == groups - 1:
                tokens[2][-1] = vocabulary + 5
            made.append(_group(model, tokens, g, rng))
        batches.append(made)
    return batches


def _group(model: Any, tokens: list[list[int]], kind: int, rng: np.random.Generator) -> bytes:
    masks = [[-100] * 6 + row[6:] for row in tokens]
    if kind == 0:  # a tool's answer between two turns
        masks = [[*mask[:7], -100, *mask[8:]] for mask in masks]
    fields: dict[str, Any] = {}
    if kind == 1:
        fields["advantages"] = [rng.normal(size=len(row)).tolist() if i < 2 else None for i, row in enumerate(tokens)]
    if kind == 2:
        fields["overrides"] = [{"set_advantage_to_zero": True}, {}, {}, {}]
    return encode_group(
        tokens=tokens,
        masks=masks,
        scores=rng.normal(size=len(tokens)).tolist(),
        inference_logprobs=[_logprobs(model, row, mask) for row, mask in zip(tokens, masks, strict=True)],
        generation_params={"temperature": 1.0, "policy_version": 0},
        **fields,
    )


def _logprobs(model: Any, row: list[int], mask: list[int]) -> list[float]:
    import torch

    if max(row) >= model.config.vocab_size:
        return [1.0 if m == -100 else -1.0 for m in mask]
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([row])).logits[0], -1)
    return [1.0 if m == -100 else float(table[t - 1, row[t]]) for t, m in enumerate(mask)]
