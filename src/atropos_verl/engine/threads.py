"""How many torch threads a decode step is worth, from the size of the model alone: the same in every run."""

from __future__ import annotations

from typing import Any

__all__ = ["WORTH_SEVERAL_THREADS", "engine_threads", "multiply_adds_per_layer"]

WORTH_SEVERAL_THREADS = 40_000_000
"""Multiply-adds per layer of a decode step below which one thread is faster (``benchmarks/bench_engine_threads.py``).

A layer is some ten small parallel regions, each of which wakes the threads and waits for the last of them: with threads
that sleep while they wait, about 0.45 ms per layer. A second thread has to save more than that."""


def multiply_adds_per_layer(config: Any, rows: int) -> int:
    """Multiply-adds of the matrix products of a decode step of ``rows`` sequences, over the number of layers.

    Attention over the cached keys is left out: it reads memory, for which a second thread does little. Of a mixture of
    experts those of one token are counted.

    Args:
        config: of a Hugging Face causal language model.
    """
    text = config.get_text_config(decoder=True)
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    inner = int(getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    weights = layers * (attention + 3 * hidden * inner * experts) + hidden * int(text.vocab_size)
    return rows * weights // layers


def engine_threads(config: Any, rows: int, default: int | None) -> int | None:
    """1 where a full batch of ``rows`` sequences is too little work for several threads, else ``default``."""
    return 1 if multiply_adds_per_layer(config, rows) < WORTH_SEVERAL_THREADS else default
