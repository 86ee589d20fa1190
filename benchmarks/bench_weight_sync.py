"""Weight sync: bytes/s into the embedded engine, against copying the same tensors one by one (memcpy).

    python benchmarks/bench_weight_sync.py [--hidden 512] [--layers 8] [--vocab 32000] [--rounds 15]

Both sides copy the same float32 tensors in turn. ``sync`` is ``TransformersEngine.update_weights_from_tensor``
(names and shapes checked, every byte copied) as ``AtroposShardingManager`` calls it while the gate is paused;
``sync_after_release`` also takes the engine's weight memory again first, as every training step does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from atropos_verl.assets import demo_model_path
    from atropos_verl.inference.transformers_engine import TransformersEngine

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    model = Qwen2ForCausalLM(config)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source.pop("lm_head.weight")  # tied to the embedding: one tensor, one copy
    target = {name: torch.empty_like(tensor) for name, tensor in source.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.values())
    seconds: dict[str, list[float]] = {"memcpy": [], "sync": [], "sync_after_release": []}
    with TransformersEngine(model, AutoTokenizer.from_pretrained(demo_model_path())) as engine:
        engine.gate.pause()
        for round_number in range(options.rounds + 2):
            started = time.perf_counter()
            for name, tensor in source.items():
                target[name].copy_(tensor)
            copied = time.perf_counter()
            engine.update_weights_from_tensor(source.items(), policy_version=round_number)
            synced = time.perf_counter()
            engine.release_memory_occupation()
            released = time.perf_counter()
            engine.resume_memory_occupation()
            engine.update_weights_from_tensor(source.items(), policy_version=round_number)
            resumed = time.perf_counter()
            if round_number >= 2:  # the first rounds touch fresh pages
                seconds["memcpy"].append(copied - started)
                seconds["sync"].append(synced - copied)
                seconds["sync_after_release"].append(resumed - released)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bytes": size,
        "tensors": len(source),
        "rounds": options.rounds,
        "median_seconds": medians,
        "median_bytes_per_second": {name: size / value for name, value in medians.items()},
        "ratio_to_memcpy": {
            name: statistics.median(m / s for m, s in zip(seconds["memcpy"], seconds[name], strict=True))
            for name in ("sync", "sync_after_release")
        },
    }


if __name__ == "__main__":
    main()
