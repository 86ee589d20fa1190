"""Scores a Hugging Face directory on the held-out sums with transformers alone, as the demo of SmolLM2 is scored.

``python tools/score_sums.py MODEL_DIR [SAMPLES]``: SAMPLES answers to each question (8), sampled at temperature 1, 16
new tokens at most; the last number of an answer counts. Nothing of this package is used, so that the score says whether
the exported weights are what was trained.
"""

import hashlib
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "State the final answer to the following arithmetic problem: {} + {} ="


def is_held_out(left: int, right: int) -> bool:
    """As ``examples/environments/sums.py`` splits the pairs."""
    return hashlib.sha256(f"{min(left, right)}+{max(left, right)}".encode()).digest()[0] % 5 == 0


def main(path: str, samples: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13) if is_held_out(a, b)]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION.format(*pair)}], add_generation_prompt=True, tokenize=False
        )
        for pair in pairs
    ]
    torch.manual_seed(0)
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    answers = model.generate(
        **prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=16,
        num_return_sequences=samples,
        pad_token_id=tokenizer.pad_token_id,
    )
    right = 0
    for number, ids in enumerate(answers):
        text = tokenizer.decode(ids[prompts.input_ids.shape[1] :], skip_special_tokens=True)
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        right += bool(numbers) and float(numbers[-1]) == sum(pairs[number // samples])
    score = f"{right / len(answers):.3f} over {len(answers)} answers to {len(pairs)} questions"
    sys.stdout.write(f"held-out mean reward {score}\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 8)
