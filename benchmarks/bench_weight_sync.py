"""Weight sync: bytes/s into the embedded engine, against copying the same tensors one by one (memcpy).

    python benchmarks/bench_weight_sync.py [--hidden 512] [--layers 8] [--vocab 32000] [--rounds 15]

Both sides copy the same float32 tensors in turn. ``sync`` is ``TransformersEngine.update_weights_from_tensor``
(names and shapes checked, every byte copied) as ``AtroposShardingManager`` calls it while the gate is paused;
``sync_after_release`` also takes the engine's weight memory again first, as every training step of ``mode=sync`` does;
``stage`` fills the second buffer, as every step of ``mode=overlap`` does.

Then ``--sequences`` sequences are generated without end while ``AtroposShardingManager.swap`` puts weights in, as in
``mode=overlap``, with their KV kept and with it computed anew. Floor of ``stage`` under that load: memcpy under it, in
turn. Floor of the pause: ``usual_gap``, what lies between two steps anyway. ``gap`` is the time around a swap in which
no forward pass ran, compared with one decode step; ``next_token_delay`` is by how much the first token after the swap
came later than one decode step after the last one before it (computing KV anew is work, not a pause).
"""

import argparse
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=16, help="in generation while weights are swapped")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    model = _model(options)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source.pop("lm_head.weight")  # tied to the embedding: one tensor, one copy
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.values())
    return {
        "bytes": size,
        "tensors": len(source),
        "rounds": options.rounds,
        "torch_threads": torch.get_num_threads(),
        "at_rest": _at_rest(lambda: _engine(model), source, options.rounds, size),
        "while_generating": {
            kept: _while_generating(_model(options), source, options, size, keep_kv=kept == "kv_kept")
            for kept in ("kv_kept", "kv_recomputed")
        },
    }


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

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
    return Qwen2ForCausalLM(config)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from atropos_verl.assets import demo_model_path

    return AutoTokenizer.from_pretrained(demo_model_path())


def _engine(model: Any, **settings: Any) -> Any:
    from atropos_verl.engine.embedded import TransformersEngine

    return TransformersEngine(model, _tokenizer(), **settings)


def _at_rest(make: Callable[[], Any], source: dict[str, Any], rounds: int, size: int) -> dict[str, Any]:
    import torch

    target = {name: torch.empty_like(tensor) for name, tensor in source.items()}
    seconds: dict[str, list[float]] = {"memcpy": [], "sync": [], "sync_after_release": [], "stage": []}
    with make() as engine:
        engine.gate.pause()
        for round_number in range(rounds + 2):
            engine.stage_weights_from_tensor(source.items())  # makes the buffer, if it is not there
            started = time.perf_counter()
            _copy(source, target)
            copied = time.perf_counter()
            engine.update_weights_from_tensor(source.items(), policy_version=round_number)
            synced = time.perf_counter()
            engine.stage_weights_from_tensor(source.items())
            staged = time.perf_counter()
            engine.release_memory_occupation()
            released = time.perf_counter()
            engine.resume_memory_occupation()
            engine.update_weights_from_tensor(source.items(), policy_version=round_number)
            resumed = time.perf_counter()
            if round_number >= 2:  # the first rounds touch fresh pages
                seconds["memcpy"].append(copied - started)
                seconds["sync"].append(synced - copied)
                seconds["stage"].append(staged - synced)
                seconds["sync_after_release"].append(resumed - released)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_seconds": medians,
        "median_bytes_per_second": {name: size / value for name, value in medians.items()},
        "ratio_to_memcpy": {
            name: statistics.median(m / s for m, s in zip(seconds["memcpy"], values, strict=True))
            for name, values in seconds.items()
            if name != "memcpy"
        },
    }


class _Forwards:
    """Times at which the model's forward passes began and ended."""

    def __init__(self, model: Any) -> None:
        self._forward = model.forward
        self.log: list[tuple[float, float, bool]] = []
        model.forward = self._timed

    def _timed(self, **arguments: Any) -> Any:
        started = time.perf_counter()
        result = self._forward(**arguments)
        self.log.append((started, time.perf_counter(), arguments["input_ids"].shape[1] == 1))
        return result


def _while_generating(
    model: Any, source: dict[str, Any], options: argparse.Namespace, size: int, *, keep_kv: bool
) -> dict[str, Any]:
    import torch

    from atropos_verl.training.weight_sync import AtroposShardingManager
    from atropos_verl.types import GenerationRequest

    target = {name: torch.empty_like(tensor) for name, tensor in source.items()}
    floor, stage, swaps = [], [], []
    # Half the threads for each side, as in mode=overlap.
    threads = torch.get_num_threads()
    engine_threads = max(1, threads // 2)
    with _engine(model, keep_kv=keep_kv, num_threads=engine_threads) as engine, ThreadPoolExecutor(1) as pool:
        torch.set_num_threads(max(1, threads - engine_threads))
        weights = _Source(source)
        manager = AtroposShardingManager(engine, weights, gate=engine.gate)
        engine.stage_weights_from_tensor(source.items())
        forwards = _Forwards(model)
        stop = threading.Event()

        def generate() -> None:
            request = GenerationRequest(
                prompt_token_ids=tuple(range(3, 35)), n=options.sequences, max_tokens=200, ignore_eos=True
            )
            while not stop.is_set():
                engine.generate([request])

        busy = pool.submit(generate)
        try:
            while len(forwards.log) < 20:
                time.sleep(0.01)
            for round_number in range(options.rounds):
                started = time.perf_counter()
                _copy(source, target)
                copied = time.perf_counter()
                weights.policy_version = round_number + 1
                report = manager.swap()
                swapped = time.perf_counter()
                floor.append(copied - started)
                stage.append(report.seconds - (report.paused_seconds or 0.0))
                swaps.append((swapped - (report.paused_seconds or 0.0), swapped, report.paused_seconds or 0.0))
                time.sleep(0.2)
        finally:
            stop.set()
            busy.result()
            torch.set_num_threads(threads)
    return {
        "stage_seconds": statistics.median(stage),
        "memcpy_seconds": statistics.median(floor),
        "stage_ratio_to_memcpy": statistics.median(m / s for m, s in zip(floor, stage, strict=True)),
        "stage_bytes_per_second": size / statistics.median(stage),
        "paused_seconds": statistics.median(paused for _, _, paused in swaps),
        **_around(forwards.log, [(begin, end) for begin, end, _ in swaps]),
    }


def _around(log: list[tuple[float, float, bool]], swaps: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, in seconds, of what the forward passes say about the moments of the swaps."""
    steps = [end - start for start, end, decode in log if decode]
    between = [b[0] - a[1] for a, b in itertools.pairwise(log) if a[2] and b[2]]
    step, usual = statistics.median(steps), statistics.median(between)
    gaps, delays = [], []
    for begin, end in swaps:
        after = next((i for i, (start, _, _) in enumerate(log) if start >= end - 1e-9), None)
        if not after:
            continue
        gaps.append(log[after][0] - max(log[after - 1][1], begin))
        decoded = next((stop for _, stop, decode in log[after:] if decode), None)
        if decoded is not None:
            delays.append(decoded - log[after - 1][1] - usual - step)
    gap = statistics.median(gaps)
    return {
        "decode_step_seconds": step,
        "usual_gap_seconds": usual,
        "gap_seconds": gap,
        "gap_in_decode_steps": gap / step,
        "largest_gap_in_decode_steps": max(gaps) / step,
        "next_token_delay_in_decode_steps": statistics.median(delays) / step,
        "swaps": len(gaps),
    }


class _Source:
    """The trainer's side."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors
        self.policy_version = 0

    def named_tensors(self) -> Any:
        return self._tensors.items()


def _copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


if __name__ == "__main__":
    main()
