"""A tiny random Qwen2 and a byte-level ChatML tokenizer, built on the spot: no test needs a download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
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


def build_tiny_model(path: str | Path, **overrides: Any) -> Path:
    """Write a randomly initialised Qwen2 and its tokenizer to ``path`` (a Hugging Face model directory) and return it.

    ``overrides``: in the words of Hugging Face. The weights are always the same. About 0.1 M parameters.
    """
    from support.engines import tiny_causal_lm

    build_tiny_tokenizer(path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_causal_lm(**{**sizes, "max_position_embeddings": 2048, "initializer_range": 0.02, **overrides})
    model.save_pretrained(str(path))
    return Path(path)


@contextmanager
def kept_by_graph(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """When the block is over: bytes of each storage that graphs made in it keep, those of parameters left out."""
    import torch

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
    sizes.update({key: storage.nbytes() for key, storage in kept.items() if key not in weights})
