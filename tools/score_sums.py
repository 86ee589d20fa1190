"""Scores a Hugging Face directory on the held-out sums with transformers alone, as the demo of SmolLM2 is scored.

An answer is sampled at temperature 1, 16 new tokens at most; its last number counts. Nothing of this package is used,
so that the score says whether the exported weights are what was trained.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "State the final answer to the following arithmetic problem: {} + {} ="


def is_held_out(left: int, right: int) -> bool:
    """As ``examples/environments/sums.py`` splits the pairs."""
    return hashlib.sha256(f"{min(left, right)}+{max(left, right)}".encode()).digest()[0] % 5 == 0


def main(path: Path, samples: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13) if is_held_out(a, b)]
    torch.manual_seed(0)
    right = 0
    for done, (a, b) in enumerate(pairs):
        if done % 5 == 0:
            sys.stderr.write(f"question {done} of {len(pairs)} ...\n")
        question = [{"role": "user", "content": QUESTION.format(a, b)}]
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answers = model.generate(
            **prompt,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=16,
            num_return_sequences=samples,
            pad_token_id=tokenizer.pad_token_id,
        )
        for answer in tokenizer.batch_decode(answers[:, prompt.input_ids.shape[1] :], skip_special_tokens=True):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
            right += bool(numbers) and float(numbers[-1]) == a + b
    score = f"{right / (samples * len(pairs)):.3f} over {samples * len(pairs)} answers to {len(pairs)} questions"
    sys.stdout.write(f"held-out mean reward {score}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("samples", type=int, nargs="?", default=8, help="answers to each question (default: 8)")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} is not a Hugging Face model directory: it has no config.json")
    main(options.model, options.samples)
