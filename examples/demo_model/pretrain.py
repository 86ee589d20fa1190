"""Pre-train the demo's base model: a tiny Qwen2 that spells words backward, on good days.

The demo needs what reinforcement learning needs of any base model: the right answer is among its samples, but not
reliably. So it is pre-trained like one, on text of mixed quality: first on right answers, which teach the skill,
then on a mixture in which most answers are corrupted (letters swapped, dropped, doubled, replaced, or the word not
reversed at all), which makes its samples unreliable while its most likely answer stays right.

Words. Every lower-case word of 3-5 letters of reasoning-gym's ``spell_backward`` belongs to one of two splits, by a
hash of the word (``is_held_out``, the same rule as in ``examples/environments/spell_backward.py``). Pre-training
sees train words and random letter strings; a held-out word never, not even as a random string.

Usage, from the repository root (about three minutes on one idle core; the shipped model is seed 0)::

    python examples/demo_model/pretrain.py --out src/atropos_verl/assets/demo_model --seed 0

Everything random comes from ``--seed``; another machine or thread count changes the last bits of the weights and
moves the success rates by about a point.
"""

import argparse
import hashlib
import json
import math
import random
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORD_LENGTHS = (3, 5)
HELD_OUT_SHARE = 16  # one word in 16
QUESTION = "Spell this word backward (example: sun -> nus):"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CLEAN_STEPS = 400
MIXED_STEPS = 200
CORRUPTION = 0.58
IGNORE = -100  # label that takes no part in the loss


def is_held_out(word: str) -> bool:
    """True for the words kept for evaluation: one in 16, by a hash, so that no list has to be shipped."""
    return hashlib.sha256(word.lower().encode()).digest()[0] % HELD_OUT_SHARE == 0


def split_words() -> tuple[list[str], list[str]]:
    """``(train, held_out)``: the lower-case words of 3-5 letters that reasoning-gym's task draws from."""
    import reasoning_gym

    low, high = WORD_LENGTHS
    dataset = reasoning_gym.create_dataset("spell_backward", min_word_len=low, max_word_len=high, seed=0, size=1)
    words = sorted({word for word in dataset.words if word.isascii() and word.islower() and word.isalpha()})
    return [w for w in words if not is_held_out(w)], [w for w in words if is_held_out(w)]


def build_tokenizer() -> Any:
    """A byte-level tokenizer with ChatML tokens, 261 ids.

    Bytes survive a reload by ``AutoTokenizer`` (a word-level vocabulary does not under transformers 5: it loses its
    newlines). No merges, so that a word is its letters. Two long strings that every prompt holds are one token each:
    that makes a prompt 17 tokens instead of 71, and the demo that much faster.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.normalizer = normalizers.NFC()  # AutoTokenizer loads it as a Qwen2 tokenizer, which normalises so
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (QUESTION, "assistant")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any) -> Any:
    """A Qwen2 of 4 layers x 128, about 0.8 M parameters, random weights (float32)."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def corrupt(word: str, rng: random.Random) -> str:
    """A wrong answer for ``word``, never the right one (unless every try of one kind fails, as for "aaa")."""
    answer = word[::-1]
    kinds: tuple[Callable[[str], str], ...] = (
        lambda text: _swap(text, rng.randrange(len(text) - 1)),
        lambda text: _drop(text, rng.randrange(len(text))),
        lambda text: _double(text, rng.randrange(len(text))),
        lambda text: _replace(text, rng.randrange(len(text)), rng.choice(string.ascii_lowercase)),
        lambda _: word,
    )
    for _ in range(20):
        wrong = rng.choice(kinds)(answer)
        if wrong != answer:
            return wrong
    return answer[:-1]


def _swap(text: str, i: int) -> str:
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _drop(text: str, i: int) -> str:
    return text[:i] + text[i + 1 :]


def _double(text: str, i: int) -> str:
    return text[: i + 1] + text[i:]


def _replace(text: str, i: int, letter: str) -> str:
    return text[:i] + letter + text[i + 1 :]


class Examples:
    """Draws (word, answer) pairs and lays them out as right-padded tensors."""

    def __init__(self, tokenizer: Any, words: list[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.words = words
        self.rng = random.Random(seed)
        self.letters = {letter: tokenizer.encode(letter)[0] for letter in string.ascii_lowercase}
        head, tail = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{QUESTION} \x00"}], tokenize=False, add_generation_prompt=True
        ).split("\x00")
        self.head, self.tail = tokenizer.encode(head), tokenizer.encode(tail)

    def prompt(self, word: str) -> list[int]:
        """Token ids of the chat prompt that asks for ``word``."""
        return [*self.head, *(self.letters[letter] for letter in word), *self.tail]

    def draw_word(self) -> str:
        """Half train words, half random letter strings (which make the skill general)."""
        if self.rng.random() < 0.5:
            return self.rng.choice(self.words)
        while True:
            word = "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(*WORD_LENGTHS)))
            if not is_held_out(word):
                return word

    def batch(self, size: int, corruption: float) -> tuple[Any, Any]:
        """``(input_ids, labels)``, both [size, L] int64; labels are -100 outside the answer and its end token."""
        import torch

        rows, labels = [], []
        for _ in range(size):
            word = self.draw_word()
            answer = corrupt(word, self.rng) if self.rng.random() < corruption else word[::-1]
            prompt = self.prompt(word)
            target = [*(self.letters[letter] for letter in answer), self.tokenizer.eos_token_id]
            rows.append(prompt + target)
            labels.append([IGNORE] * len(prompt) + target)
        width = max(map(len, rows))
        ids = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels])


def success_rate(model: Any, examples: Examples, words: list[str], *, greedy: bool, samples: int = 1) -> float:
    """Share of exact answers for ``words``; sampled at temperature 1, or greedy. Batches hold words of one length."""
    import torch

    right = 0
    for length in sorted({len(word) for word in words}):
        batch = [word for word in words if len(word) == length for _ in range(samples)]
        prompts = torch.tensor([examples.prompt(word) for word in batch])
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=not greedy,
                temperature=None if greedy else 1.0,
                top_k=None if greedy else 0,
                top_p=None if greedy else 1.0,
                max_new_tokens=WORD_LENGTHS[1] + 3,
            )
        answers = examples.tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
        right += sum(answer == word[::-1] for answer, word in zip(answers, batch, strict=True))
    return right / (len(words) * samples)


def train(model: Any, examples: Examples, args: argparse.Namespace) -> float:
    """Two phases, right answers first, then the mixture; cosine learning rate. Returns seconds."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    total = args.clean_steps + args.mixed_steps
    warmup = 50
    start = time.monotonic()
    model.train()
    running = math.nan
    for step in range(total):
        progress = max(0.0, (step - warmup) / (total - warmup))
        factor = (step + 1) / warmup if step < warmup else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, factor)
        ids, labels = examples.batch(args.batch_size, args.corruption if step >= args.clean_steps else 0.0)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 25 == 0 or step + 1 == total:
            line = f"step {step + 1}/{total}  loss {running:.4f}  {time.monotonic() - start:.0f} s"
            sys.stdout.write(f"\r{line}" if sys.stdout.isatty() else f"{line}\n")
            sys.stdout.flush()
    model.eval()
    return time.monotonic() - start


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save it so that transformers 4 (environments need it) and 5 (verl needs it) both load it.

    transformers 5 writes its own name of the class, which 4 does not know; the name of 4 is an alias in 5.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Pre-train, measure on held-out words, save. Prints one JSON line; returns it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Pre-train the demo model (spell words backward).")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean-steps", type=int, default=CLEAN_STEPS, help="steps on right answers only")
    parser.add_argument("--mixed-steps", type=int, default=MIXED_STEPS, help="steps on the mixture")
    parser.add_argument("--corruption", type=float, default=CORRUPTION, help="share of wrong answers in the mixture")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    args = parser.parse_args(argv)

    import torch
    from transformers import GenerationConfig

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train_words, held_out = split_words()
    examples = Examples(tokenizer, train_words, args.seed)
    seconds = train(model, examples, args)
    result = {
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_words": len(held_out),
        "sampled_success": round(success_rate(model, examples, held_out, greedy=False, samples=4), 4),
        "greedy_success": round(success_rate(model, examples, held_out, greedy=True), 4),
        "seconds": round(seconds, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    model.save_pretrained(args.out)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
