"""``GET /batch`` bytes → padded training tensors: this package against the plain-Python way of existing recipes.

    python benchmarks/bench_decode.py [--sequences 256] [--max-tokens 4096] [--group-size 8] [--repeats 7]

All sides run in one process, in turn, on the same bytes, and their tensors are compared first. ``ours_binary`` is the
packed wire of our own API (``protocol.wire``) to packed tensors. The floor of JSON is ``msgspec_decode``: msgspec's
untyped decode of the body, which leaves lists of Python numbers. Prints JSON: median processor seconds, ratios, and the
peak of the traced memory (tracemalloc: Python objects and numpy arrays) of a separate run.
"""

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from atropos_verl import SampleSettings, TrainingSample, build_samples, decode_batch
from atropos_verl.protocol.schema import check_group
from atropos_verl.protocol.wire import decode_packed, join_packed, pack_group

VOCABULARY = 151_936
KEYS = ("ids", "mask", "adv", "lp")


def make_body(sequences: int, max_tokens: int, group_size: int) -> bytes:
    """A batch with prompts, answers and inference logprobs, as an upstream API serialises it."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(sequences // group_size):
        tokens = [
            rng.integers(0, VOCABULARY, n).tolist() for n in rng.integers(max_tokens // 3, max_tokens, group_size)
        ]
        prompt = max_tokens // 8
        groups.append(
            {
                "tokens": tokens,
                "masks": [[-100] * prompt + row[prompt:] for row in tokens],
                "scores": rng.random(group_size).tolist(),
                "advantages": None,
                "ref_logprobs": None,
                "messages": None,
                "generation_params": None,
                "inference_logprobs": [
                    [1.0] * prompt + (-rng.exponential(size=len(row) - prompt)).tolist() for row in tokens
                ],
                "overrides": None,
                "group_overrides": None,
                "images": None,
                "env_id": 0,
                "distill_token_ids": None,
                "distill_logprobs": None,
            }
        )
    return json.dumps({"batch": groups}, separators=(",", ":")).encode()


def padded(samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
    """Samples as right-padded tensors [B, L]."""
    shape = (len(samples), max(len(sample) for sample in samples))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    advantages, logprobs = np.zeros(shape, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    for row, sample in enumerate(samples):
        end = len(sample)
        ids[row, :end], mask[row, :end], advantages[row, :end] = sample.token_ids, sample.loss_mask, sample.advantages
        if sample.rollout_logprobs is not None:
            logprobs[row, :end] = sample.rollout_logprobs
    return {key: torch.from_numpy(v) for key, v in zip(KEYS, (ids, mask, advantages, logprobs), strict=True)}


def packed(samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
    """Samples end to end [N], as the trainer's jagged tensors hold them."""
    logprobs = [np.full(len(s), np.nan) if s.rollout_logprobs is None else s.rollout_logprobs for s in samples]
    columns = (
        np.concatenate([s.token_ids for s in samples]),
        np.concatenate([s.loss_mask for s in samples]),
        np.concatenate([s.advantages for s in samples], dtype=np.float32),
        np.concatenate(logprobs, dtype=np.float32),
    )
    return {key: torch.from_numpy(v) for key, v in zip(KEYS, columns, strict=True)}


def ours(body: bytes) -> dict[str, torch.Tensor]:
    return padded(build_samples(decode_batch(body), SampleSettings(vocab_size=VOCABULARY)).samples)


def ours_packed(body: bytes) -> dict[str, torch.Tensor]:
    return packed(build_samples(decode_batch(body), SampleSettings(vocab_size=VOCABULARY)).samples)


def ours_binary(body: bytes) -> dict[str, torch.Tensor]:
    groups = decode_packed(body)
    return packed(build_samples(groups, SampleSettings(vocab_size=VOCABULARY)).samples)


def to_binary(body: bytes) -> bytes:
    """The same batch as our API sends it to a trainer that asks for the packed wire."""
    groups = json.loads(body)["batch"]
    packed = [pack_group(check_group(json.dumps(group).encode())) for group in groups]
    return b"".join(join_packed(packed))


def plain(body: bytes) -> dict[str, torch.Tensor]:
    """json.loads, then lists padded token by token. No validation; otherwise the same result."""
    groups = json.loads(body)["batch"]
    width = max(len(row) for group in groups for row in group["tokens"])
    ids, masks, advantages, logprobs = [], [], [], []
    for group in groups:
        scores = torch.tensor(group["scores"], dtype=torch.float64)
        weights = ((scores - scores.mean()) / (scores.std() + 1e-6)).tolist()
        for row, mask, logprob, weight in zip(
            group["tokens"], group["masks"], group["inference_logprobs"], weights, strict=True
        ):
            pad = width - len(row)
            trained = [t > 0 and m != -100 for t, m in enumerate(mask)]
            ids.append(row + [0] * pad)
            masks.append(trained + [False] * pad)
            advantages.append([weight if on else 0.0 for on in trained] + [0.0] * pad)
            logprobs.append([float("nan") if v == 1.0 else v for v in logprob] + [float("nan")] * pad)
    return {
        "ids": torch.tensor(ids),
        "mask": torch.tensor(masks),
        "adv": torch.tensor(advantages, dtype=torch.float32),
        "lp": torch.tensor(logprobs, dtype=torch.float32),
    }


def peak_bytes(function: Callable[[bytes], Any], body: bytes) -> int:
    tracemalloc.start()
    result = function(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    body = make_body(arguments.sequences, arguments.max_tokens, arguments.group_size)
    binary = to_binary(body)
    for key, value in ours_packed(body).items():
        torch.testing.assert_close(ours_binary(binary)[key], value, equal_nan=True, rtol=1e-5, atol=1e-6)
    sides: dict[str, Callable[[bytes], Any]] = {
        "plain": plain,
        "ours_padded": ours,
        "ours_packed": ours_packed,
        "ours_decode_only": decode_batch,
        "ours_binary": lambda _: ours_binary(binary),
        "msgspec_decode": msgspec.json.decode,
    }
    reference, found = plain(body), ours(body)
    for key, value in reference.items():
        torch.testing.assert_close(found[key], value, equal_nan=True, rtol=1e-5, atol=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, function in sides.items():
            started = time.process_time()
            result = function(body)
            seconds[name].append(time.process_time() - started)
            del result
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_bytes(function, body) for name, function in sides.items()}
    report = {
        "sequences": arguments.sequences,
        "tokens": sum(len(row) for group in json.loads(body)["batch"] for row in group["tokens"]),
        "body_bytes": len(body),
        "median_processor_seconds": median,
        "min_processor_seconds": {name: min(values) for name, values in seconds.items()},
        "peak_traced_bytes": peaks,
        "speedup_padded": median["plain"] / median["ours_padded"],
        "speedup_packed": median["plain"] / median["ours_packed"],
        "speedup_binary": median["plain"] / median["ours_binary"],
        "padded_over_msgspec_decode": median["ours_padded"] / median["msgspec_decode"],
        "packed_over_msgspec_decode": median["ours_packed"] / median["msgspec_decode"],
        "memory_ratio_padded": peaks["plain"] / peaks["ours_padded"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
