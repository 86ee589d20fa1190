"""Tokens per second: the embedded engine against ``model.generate`` in static batches of the same requests.

    python benchmarks/bench_generation.py [--sequences 64] [--repeats 5] [--manager]
                                          [--vllm PYTHON] [--model smollm2-135m] [--dtype bfloat16] [--profile]

Two loads: all completions equally long, and lengths that vary tenfold (a static batch runs until its longest is done;
the engine fills the slot with the next sequence). Both sides sample at temperature 1 from the same random Qwen2 of
about a million parameters, interleaved in one process, with the threads that the engine has by default. ``--manager``
adds transformers' continuous-batching manager, warmed up beforehand. ``--vllm`` adds vLLM with its prefix cache, in the
interpreter given, a process of its own that is asked in turn; it samples with logprobs as the engine does.
``--model`` takes a real model, and compares the engine with vLLM alone: groups of eight that share a prompt, lengths
that vary tenfold, long prompts, and conversations whose prompts grow. Each repeat has prompts of its own. Prints JSON:
median tokens/s of each side and the ratios. Counted are the tokens asked for.
``--profile`` compares nothing: it prints what a prefill and a decode step of each load spend their time on, and the
weights and cached keys and values that the step reads a second, beside what ``tensor.sum()`` reads.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the training command; read when torch is imported

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atropos_verl.assets import SMOLLM2, smollm2_path
from atropos_verl.engine.runner import engine_threads

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

Load = list[list[tuple[tuple[int, ...], int]]]
"""Rounds of requests made together: prompt, and how many tokens to generate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64, help="rows of a static batch, and KV slots of the engine")
    parser.add_argument("--batches", type=int, default=2, help="static batches' worth of requests in the varied load")
    parser.add_argument("--tokens", type=int, default=128, help="longest completion")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads of every side; default: what the engine chooses")
    parser.add_argument("--manager", action="store_true", help="also measure transformers' continuous batching")
    parser.add_argument("--model", help="smollm2-135m, or a directory; default: a random one of a million parameters")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vLLM (CPU build) installed")
    parser.add_argument("--profile", action="store_true", help="where the engine's time goes, instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model:
        from transformers import AutoModelForCausalLM

        path = smollm2_path() if options.model == SMOLLM2 else options.model
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    else:
        model = build_model().to(dtype)
    cores = len(os.sched_getaffinity(0))
    options.threads = options.threads or engine_threads(model.config, options.sequences, cores) or cores
    torch.set_num_threads(options.threads)
    rows, prompt, tokens = options.sequences, options.prompt, options.tokens
    varied = partial(varied_load, options.batches * rows, prompt, tokens)
    loads: dict[str, Callable[[], Load]] = {
        "grouped": lambda: [[request for request in equal_load(rows // 8, 55, tokens)[0] for _ in range(8)]],
        "lengths_varying_10x": varied,
        "long_prompts": lambda: equal_load(rows // 2, 400, tokens // 2),
        "conversations": lambda: conversations(rows // 2, 4, tokens // 4),
    }
    if not options.model:
        loads = {"equal_lengths": lambda: equal_load(rows, prompt, tokens), "lengths_varying_10x": varied}
    if options.profile:
        print(json.dumps({name: profile(model, load()[0][:rows]) for name, load in loads.items()}, indent=2))
        return
    from support.tiny_model import build_tiny_tokenizer

    from atropos_verl.engine.embedded import TransformersEngine

    with TransformersEngine(copy.deepcopy(model), build_tiny_tokenizer(), max_running=options.sequences) as engine:
        sides: dict[str, Callable[[Load], None]] = {"engine": lambda load: run_engine(engine, load)}
        if not options.model:
            sides["static_generate"] = lambda load: run_static(model, load, options.sequences)
        if options.manager:
            sides["transformers_manager"] = lambda load: run_manager(model, load)
        with ExitStack() as stack:
            if options.vllm:
                sides["vllm"] = stack.enter_context(vllm_side(model, options))
            else:
                print("vLLM: not measured (--vllm PYTHON names an interpreter that has it)", file=sys.stderr)
            results = {name: measure(load, sides, options.repeats) for name, load in loads.items()}
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), **vars(options)} | results, indent=2))


def build_model() -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=256,
        bos_token_id=256,
        eos_token_id=258,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def equal_load(count: int, prompt: int, tokens: int) -> Load:
    return [[(tuple(row), tokens) for row in torch.randint(0, 256, (count, prompt)).tolist()]]


def conversations(count: int, turns: int, tokens: int) -> Load:
    """Prompts of turn after turn: 96 tokens that all share, and 56 more in each turn."""
    [[(system, _)]] = equal_load(1, 96, 0)
    [all_turns] = equal_load(count, 56 * turns, 0)
    return [[(system + turn[: 56 * end], tokens) for turn, _ in all_turns] for end in range(1, turns + 1)]


def varied_load(count: int, prompt: int, tokens: int) -> Load:
    """Completion lengths log-uniform between a tenth of ``tokens`` and ``tokens``."""
    lengths = (tokens * 10 ** -torch.rand(count)).long().clamp(min=1).tolist()
    return [[(p, length) for (p, _), length in zip(equal_load(count, prompt, tokens)[0], lengths, strict=True)]]


def run_engine(engine: Any, load: Load) -> None:
    from atropos_verl.types import GenerationRequest

    for turn in load:
        answers = engine.generate(
            [GenerationRequest(prompt_token_ids=prompt, max_tokens=tokens, ignore_eos=True) for prompt, tokens in turn]
        )
        assert [len(answer.token_ids) for [answer] in answers] == [tokens for _, tokens in turn]


def run_static(model: Any, load: Load, rows: int) -> None:
    [requests] = load
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        ids = torch.tensor([prompt for prompt, _ in batch])
        longest = max(tokens for _, tokens in batch)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=longest,
            min_new_tokens=longest,
            top_k=0,
        )
        assert out.shape == (len(batch), ids.shape[1] + longest)


@contextmanager
def vllm_side(model: Any, options: argparse.Namespace) -> Iterator[Callable[[Load], None]]:
    from support.tiny_model import build_tiny_tokenizer
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        if options.model:
            AutoTokenizer.from_pretrained(model.name_or_path).save_pretrained(directory)
        else:
            build_tiny_tokenizer(directory)
        script = Path(__file__).with_name("vllm_side.py")
        words = [options.vllm, str(script), directory, str(options.sequences), str(options.threads), options.dtype]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, **pipes) as process:  # type: ignore[call-overload]
            try:
                _await(process, "READY")
                yield lambda load: _ask(process, load)
            finally:
                process.stdin.close()


def _ask(process: Any, load: Load) -> None:
    process.stdin.write(json.dumps(load) + "\n")
    process.stdin.flush()
    _await(process, "SECONDS")


def _await(process: Any, word: str) -> None:
    for line in process.stdout:
        if line.startswith(word):
            return
    raise SystemExit(f"vLLM's process ended before it said {word}; is vLLM's CPU build installed there?")


def run_manager(model: Any, load: Load) -> None:
    from transformers import GenerationConfig

    # It takes one length for all: only the load of equal lengths is comparable, the other counts the longest for each.
    [requests] = load
    longest = max(tokens for _, tokens in requests)
    config = GenerationConfig(do_sample=True, max_new_tokens=longest, eos_token_id=-1)
    out = model.generate_batch(
        inputs=[list(prompt) for prompt, _ in requests], generation_config=config, progress_bar=False
    )
    assert all(len(answer.generated_tokens) == longest for answer in out.values())


def measure(make: Callable[[], Load], sides: dict[str, Callable[[Load], None]], repeats: int) -> dict[str, Any]:
    load = make()
    for run in sides.values():
        run(load)  # first calls pay for allocation and kernel choice
    rates: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        load = make()
        tokens = sum(count for turn in load for _, count in turn)
        for name, run in sides.items():
            started, used = time.perf_counter(), time.process_time()
            run(load)
            rates[name].append(tokens / (time.perf_counter() - started))
            busy[name].append(time.process_time() - used)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {f"engine_over_{name}": medians["engine"] / value for name, value in medians.items() if name != "engine"}
    # Of this process: on a shared machine they say more than the clock. Nothing of vLLM's, which is another.
    processor = {name: statistics.median(values) for name, values in busy.items() if name != "vllm"}
    by_processor = {f"engine_over_{name}": value / processor["engine"] for name, value in processor.items()}
    del by_processor["engine_over_engine"]
    figures = {"processor_seconds": processor, "by_processor_seconds": by_processor}
    return {"tokens": tokens, "tokens_per_second": medians, **ratios, **figures}


_KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def profile(model: Any, requests: list[tuple[tuple[int, ...], int]], steps: int = 8) -> dict[str, Any]:
    """A prefill and decode steps of ``requests`` together, in this thread: milliseconds, and shares of them."""
    from atropos_verl.engine import scheduler
    from atropos_verl.engine.requests import EngineLimits, EngineStats, Ticket
    from atropos_verl.engine.runner import ModelRunner
    from atropos_verl.types import GenerationRequest

    model = copy.deepcopy(model)
    runner, sampled = ModelRunner(model, max_context_len=1024), scheduler.sample
    limits = EngineLimits(max_context_len=1024, vocab_size=runner.vocab_size, eos_token_ids=frozenset())

    def sample(*arguments: Any) -> Any:
        with torch.profiler.record_function("sampling"):
            return sampled(*arguments)

    def run(batch: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
        asked = [GenerationRequest(prompt_token_ids=prompt, max_tokens=4 * steps) for prompt, _ in requests]
        newcomers = [sequence for request in asked for sequence in Ticket(request, limits).sequences]
        yield "prefill", lambda: batch.prefill(newcomers, 0)
        yield "decode", lambda: [batch.decode(0) for _ in range(steps)]

    scheduler.sample = sample
    found: dict[str, Any] = {}
    try:
        for watched in (False, False, True):  # the first warms up
            runner.cache.clear()
            batch = scheduler.ContinuousBatch(runner, len(requests), EngineStats())
            for name, phase in run(batch):
                started = time.perf_counter()
                if watched:
                    with torch.profiler.profile() as profiler:
                        phase()
                    found[name]["shares"] = _shares(profiler.key_averages())
                else:
                    phase()
                    seconds = time.perf_counter() - started
                    found[name] = {"milliseconds": 1e3 * seconds / (1 if name == "prefill" else steps)}
    finally:
        scheduler.sample = sampled
    context, whole = sum(len(prompt) for prompt, _ in requests) + len(requests) * (1 + steps / 2), torch.ones(2**28)
    kept = sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in runner.cache._buffers)
    read = (sum(parameter.nbytes for parameter in model.parameters()) + kept * context) / 1e9
    started = time.perf_counter()
    for _ in range(4):
        whole.sum()
    memory = 4 * whole.nbytes / 1e9 / (time.perf_counter() - started)
    rate = read / found["decode"]["milliseconds"] * 1e3
    return found | {"rows": len(requests), "GB read": read, "GB/s": rate, "GB/s of memory": memory}


def _shares(averages: Any) -> dict[str, float]:
    """Of the time of all operators; what Python does between them is in none of it."""
    times = {entry.key: entry.self_cpu_time_total for entry in averages}
    whole = {entry.key: entry.cpu_time_total for entry in averages}
    total = sum(times.values())
    kinds = {kind: sum(times.get(name, 0.0) for name in names) / total for kind, names in _KINDS.items()}
    kinds["sampling"] = whole.get("sampling", 0.0) / total
    return {**kinds, "other": 1 - sum(kinds.values())}


if __name__ == "__main__":
    main()
