"""The shipped model: loads by the standard classes, keeps every byte, and is as good and as bad as documented."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.examples import load_example

from atropos_verl.assets import demo_model_path

MAX_ASSET_BYTES = 4_000_000


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    return load_example("demo_model/pretrain.py")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    torch.set_num_threads(threads)


def test_assets_are_small_and_readable_by_all() -> None:
    files = [path for path in demo_model_path().rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"README.md", "chat_template.jinja", "model.safetensors", "tokenizer.json"}
    assert names >= {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in files) <= MAX_ASSET_BYTES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_model_is_a_standard_qwen2_of_under_a_million_parameters(model: Any, tokenizer: Any) -> None:
    import torch

    config = model.config
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 128, 261)
    # Per layer: q and o 128 x 128, k and v 128 x 64, biases 128 + 64 + 64, MLP 3 x 128 x 384, two norms of 128;
    # then the tied embedding 261 x 128 and the last norm.
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 256 + 3 * 128 * 384 + 2 * 128
    assert sum(p.numel() for p in model.parameters()) == 4 * layer + 261 * 128 + 128 == 822_016
    assert next(model.parameters()).dtype is torch.float32
    assert len(tokenizer) == config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 258


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "\n",
        "line one\r\n\tline  two \n\n",
        "héllo wörld — 日本語 🙂",
        "<|im_start|>user\nSpell this word backward (example: sun -> nus): neon<|im_end|>\n",
        "an assistant's answer",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 261


def test_the_tokenizer_is_named_as_both_transformers_4_and_5_know_it(pretrain: ModuleType, tmp_path: Path) -> None:
    """transformers 5 saves ``TokenizersBackend``, which transformers 4, and so every environment, cannot load."""
    shipped = json.loads((demo_model_path() / "tokenizer_config.json").read_text())
    assert shipped["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in shipped
    pretrain.save_tokenizer(pretrain.build_tokenizer(), tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (demo_model_path() / name).read_bytes(), name


def test_chat_prompt_is_chatml_and_a_word_is_its_letters(pretrain: ModuleType, tokenizer: Any) -> None:
    question = "Spell this word backward (example: sun -> nus): neon"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt))
    newline, space = "Ċ", "Ġ"
    assert tokens == [
        *("<|im_start|>", "u", "s", "e", "r", newline),
        *("Spell this word backward (example: sun -> nus):", space, "n", "e", "o", "n", "<|im_end|>", newline),
        *("<|im_start|>", "assistant", newline),
    ]
    examples = pretrain.Examples(tokenizer, ["neon"], seed=0)
    assert examples.prompt("neon") == tokenizer.encode(prompt)


def test_success_on_held_out_words_is_as_documented(pretrain: ModuleType, model: Any, tokenizer: Any) -> None:
    import torch

    train, held_out = pretrain.split_words()
    examples = pretrain.Examples(tokenizer, train, seed=0)
    words = random.Random(7).sample(held_out, 64)
    assert pretrain.success_rate(model, examples, words, greedy=True) >= 0.9
    torch.manual_seed(0)
    sampled = pretrain.success_rate(model, examples, words, greedy=False, samples=8)
    assert 0.15 <= sampled <= 0.45


def test_a_short_pretraining_runs_and_saves_a_loadable_model(
    pretrain: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train, held_out = pretrain.split_words()
    monkeypatch.setattr(pretrain, "split_words", lambda: (train, held_out[:20]))
    threads = torch.get_num_threads()
    settings = ["--seed", "5", "--clean-steps", "2", "--mixed-steps", "1", "--batch-size", "8", "--threads", "1"]
    try:
        result = pretrain.main(["--out", str(tmp_path), *settings])
    finally:
        torch.set_num_threads(threads)
    assert "step 3/3" in capsys.readouterr().out
    assert (result["parameters"], result["greedy_success"]) == (822_016, 0.0)  # three steps teach nothing
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters()) == 822_016
    assert AutoTokenizer.from_pretrained(tmp_path).decode([257]) == "<|im_start|>"


def test_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atropos_verl.assets as assets

    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"demo_model/model\.safetensors; make it with"):
        assets.demo_model_path()
