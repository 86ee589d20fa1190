"""Conversations with the embedded engine, with and without the reuse of keys and values of earlier turns.

    python benchmarks/bench_conversations.py --model smollm2-135m [--dtype float32] [--repeats 1]

``--conversations`` of ``--turns`` turns, all at a time: a common system prompt, then in each turn ``--user`` new tokens
and ``--answer`` sampled ones, which are part of the next prompt. Both sides are one engine of this process, in turn.
Prints JSON: median seconds of each side and their ratio, by the clock and of the processor; tokens prefilled and
reused, tokens that are unique (positions of the tree of all prompts; also without those that a decode step has
computed); the largest difference between a sampled logprob and that of a forward pass over the whole sequence.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the training command; read when torch is imported

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import torch

from atropos_verl.assets import SMOLLM2, smollm2_path
from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.types import Generation, GenerationRequest

Turn = tuple[tuple[int, ...], Generation]
"""A prompt and its answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2-135m, or a directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=96, help="tokens of the system prompt")
    parser.add_argument("--user", type=int, default=32, help="new tokens of a turn")
    parser.add_argument("--answer", type=int, default=24, help="sampled tokens of a turn")
    parser.add_argument(
        "--n", type=int, default=1, help="completions of a turn; the conversation goes on from the first"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path, dtype = smollm2_path() if options.model == SMOLLM2 else options.model, getattr(torch, options.dtype)
    seconds: dict[str, list[float]] = {"reused": [], "computed_again": []}
    processor: dict[str, list[float]] = {"reused": [], "computed_again": []}
    counts: dict[str, Any] = {}
    rows = options.conversations * options.n
    with TransformersEngine.from_pretrained(path, dtype=dtype, max_running=rows) as engine:
        for repeat in range(options.repeats):
            for side, times in seconds.items():
                engine.rebuild()
                if side == "computed_again":
                    engine._runner.cache.prefixes.find = lambda tokens: []  # type: ignore[method-assign]
                    engine._runner.cache.store = lambda contexts: None  # type: ignore[method-assign]
                before, started, used = engine.stats(), time.perf_counter(), time.process_time()
                conversations = asyncio.run(converse(engine, options, seed=repeat))
                times.append(time.perf_counter() - started)
                processor[side].append(time.process_time() - used)
                if side == "reused":
                    stats = engine.stats()
                    counts["prefilled"] = stats.prompt_tokens - before.prompt_tokens
                    counts["reused"] = stats.reused_tokens - before.reused_tokens
                    counts |= unique_tokens(conversations)
                    counts["largest_logprob_difference"] = logprob_difference(engine, conversations)
        counts["prefilled_over_unique"] = counts["prefilled"] / counts["unique"]
        counts["prefilled_over_unique_not_decoded"] = counts["prefilled"] / counts["unique_not_decoded"]
    figures: dict[str, Any] = {}
    for clock, sides in (("seconds", seconds), ("processor_seconds", processor)):
        figures[clock] = medians = {side: statistics.median(times) for side, times in sides.items()}
        figures[f"faster_by_{clock}"] = medians["computed_again"] / medians["reused"]
    print(json.dumps({**vars(options), **figures, **counts}, indent=2))


async def converse(engine: TransformersEngine, options: argparse.Namespace, seed: int) -> list[list[Turn]]:
    numbers = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(engine.vocab_size) for _ in range(count))

    system = tokens(options.system)

    async def conversation(users: list[tuple[int, ...]], seed: int) -> list[Turn]:
        prompt, turns = system, []
        for user in users:
            prompt += user
            settings = {"n": options.n, "max_tokens": options.answer, "ignore_eos": True, "seed": seed}
            [answer, *_] = await engine.agenerate(GenerationRequest(prompt_token_ids=prompt, **settings))
            turns.append((prompt, answer))
            prompt += answer.token_ids
        return turns

    users = [[tokens(options.user) for _ in range(options.turns)] for _ in range(options.conversations)]
    return await asyncio.gather(*(conversation(each, seed) for seed, each in enumerate(users)))


def unique_tokens(conversations: list[list[Turn]]) -> dict[str, int]:
    """Positions of the tree of all prompts, and those of them that no decode step computed."""
    prefixes = {prompt[:end] for turns in conversations for prompt, _ in turns for end in range(1, len(prompt) + 1)}
    decoded = {
        (prompt + answer.token_ids)[:end]
        for turns in conversations
        for prompt, answer in turns
        for end in range(len(prompt) + 1, len(prompt) + len(answer.token_ids))
    }
    return {"unique": len(prefixes), "unique_not_decoded": len(prefixes - decoded)}


def logprob_difference(engine: TransformersEngine, conversations: list[list[Turn]]) -> float:
    largest = 0.0
    for turns in conversations:
        last, answer = turns[-1]
        fresh = engine.compute_logprobs(last + answer.token_ids)
        for prompt, generation in turns:
            known = fresh[len(prompt) - 1 : len(prompt) - 1 + len(generation.logprobs)]
            largest = max(largest, *(abs(a - b) for a, b in zip(generation.logprobs, known, strict=True)))
    return largest


if __name__ == "__main__":
    main()
