"""A tiny random Qwen2 and a byte-level ChatML tokenizer, built on the spot: no test needs a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer(
    path: str | Path | None = None, *, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 single-byte tokens, then endoftext 256, im_start 257, im_end 258, then ``merges``.

    Without these a text of k UTF-8 bytes is exactly k tokens, and any split of the text encodes alike. ``eos`` is
    ``<|im_end|>``, ``pad`` is ``<|endoftext|>``. Written to ``path`` when given.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words += [*specials, *map("".join, merges)] if merges else []
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    if path is not None:
        tokenizer.save_pretrained(str(path))
    return tokenizer


def build_tiny_model(
    path: str | Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    max_position_embeddings: int = 2048,
) -> Path:
    """Write a randomly initialised Qwen2 and its tokenizer to ``path`` (a Hugging Face model directory) and return it.

    The weights are always the same; the global torch generator is left as it was. About 0.1 M parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = build_tiny_tokenizer(path)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or max(1, heads // 2),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(str(path))
    return Path(path)
