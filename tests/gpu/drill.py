"""What is known only on a GPU, in one run of at most six minutes on one card. Nothing is downloaded.

    python tests/gpu/drill.py                            # prints one JSON; progress on standard error
    python tests/gpu/drill.py --device cpu --tiny        # the same sections in seconds, as CI runs them

Needs torch, this package with what it depends on, and this directory ``tests/``. Sections, in the order of what they
are worth: ``loop`` (local backend, random weights of 0.5 B, bf16 over float32 masters, 20 steps on rollouts that the
engine makes and a trajectory API delivers), ``sync`` (weights to the engine and swaps), ``engine`` (tokens per second),
``prefixes`` (shared and whole, with equality), ``lm_head`` (against naive), ``attention`` (packed sdpa against torch's
flash attention), ``tests`` (those marked ``gpu``). A section that fails is reported with its traceback and the others
run; one that the time does not suffice for says so. Exit code 1: a section failed, or a comparison that must hold.
``--out FILE`` has the JSON after every section: a run that is cut off has lost only what it was at.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import numpy as np
import torch

_SIZES = {
    "vocab_size": (151_936, 512),
    "hidden_size": (896, 64),
    "intermediate_size": (4864, 128),
    "num_hidden_layers": (24, 2),
    "num_attention_heads": (14, 4),
    "num_key_value_heads": (2, 2),
    "steps": (20, 20),
    "groups": (16, 4),
    "prompt": (256, 24),
    "answer": (64, 8),
    "new_tokens": (256, 16),
    "head_tokens": (4096, 64),
    "row": (1024, 48),
}
"""On a card (the shape of Qwen2.5-0.5B), and tiny. ``row``: tokens of the longest sequence in ``attention``."""
EXPECTED = {"loop": 120, "sync": 20, "engine": 30, "prefixes": 20, "lm_head": 10, "attention": 10, "tests": 90}
"""Seconds that a section may take; it is left out where fewer remain."""


class Drill:
    def __init__(self, device: str, sizes: dict[str, int], directory: Path) -> None:
        self.device, self.sizes, self.directory = device, sizes, directory
        self.on_cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.failed_comparisons: list[str] = []

    # ------------------------------------------------------------------ measuring

    def done(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def peak(self, into: dict[str, float], name: str) -> Iterator[None]:
        """Most memory during the block, in MB: what torch has allocated on the card; else this process, so far."""
        if self.on_cuda:
            self.done()
            torch.cuda.reset_peak_memory_stats()
        yield
        self.done()
        largest = torch.cuda.max_memory_allocated() if self.on_cuda else _resident()
        into[name] = round(max(into.get(name, 0.0), largest / 1e6), 1)

    def seconds(self, work: Callable[[], Any], repeats: int = 5) -> float:
        """Median, after one that warms up."""
        taken = []
        for _ in range(repeats + 1):
            self.done()
            started = time.perf_counter()
            work()
            self.done()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def must(self, what: str, holds: bool) -> bool:
        if not holds:
            self.failed_comparisons.append(what)
        return holds

    # ------------------------------------------------------------------ sections

    def machine(self) -> dict[str, Any]:
        found: dict[str, Any] = {"device": self.device, "python": sys.version.split()[0], "cores": os.cpu_count()}
        for name in ("torch", "transformers", "verl", "flash-attn", "vllm", "sglang"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        if self.on_cuda:
            card = torch.cuda.get_device_properties(0)
            found |= {"card": card.name, "capability": f"{card.major}.{card.minor}"}
            found["memory_gb"] = card.total_memory / 1e9
        return found

    def make_model(self) -> Path:
        """Random weights and a tokenizer with a word for each id, as a Hugging Face directory."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

        size, path = self.sizes["vocab_size"], self.directory / "model"
        backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        tokenizer.save_pretrained(str(path))
        shape = {name: self.sizes[name] for name in self.sizes if name.startswith("num_") or name.endswith("_size")}
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0}
        config = Qwen2Config(**shape, **ids, max_position_embeddings=4096, tie_word_embeddings=True)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(str(path))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        return path

    def loop(self) -> dict[str, Any]:
        """``AtroposTrainer.rl_training_step``: engine → reward → trajectory API → samples → step → weights, canary."""
        from support.trajectory_server import TrajectoryServer

        from atropos_verl import AtroposTrainer

        model_path, sizes = self.make_model(), self.sizes
        self.server = TrajectoryServer()
        self.server.start()
        config = {
            "atropos": {"api_url": self.server.url},
            "model": {"path": str(model_path), "compute_dtype": "bf16" if self.on_cuda else "fp32"},
            "optim": {"lr": 3e-4 if self.on_cuda else 3e-3},
            "trainer": {"device": self.device},
            "data": {"max_prompt_length": sizes["prompt"]},
            "run_dir": str(self.directory / "run"),
            "steps": sizes["steps"],
            "batch_size": 8 * sizes["groups"],
            "group_size": 8,
            "max_response_length": sizes["answer"],
            "save_freq": -1,
            "inference": {"max_context_len": sizes["prompt"] + max(sizes["answer"], sizes["new_tokens"])},
            "sync": {"canary_text": "w5 w6 w7 w8 w9 w10 w11 w12"},
        }
        trainer = self.trainer = AtroposTrainer.from_config(config, reward_fn=_share_of_even_ids)
        memory, seconds = dict[str, float](), dict[str, list[float]]()
        for owner, name in (
            (trainer.worker, "train"),
            (trainer.engine, "generate"),
            (trainer.sharding_manager, "sync"),
        ):
            self._watch(owner, name, memory, seconds)
        rng = np.random.default_rng(0)
        lines, canaries = [], []
        for step in range(sizes["steps"]):
            prompts = rng.integers(2, sizes["vocab_size"], (sizes["groups"], sizes["prompt"])).tolist()
            lines.append(trainer.rl_training_step(prompts))
            canaries.append(trainer.sharding_manager.last_sync.canary_max_abs_logprob_diff)
            if time.perf_counter() > self.deadline - 60 and step:
                break
        if self.on_cuda:
            memory["torch has reserved"] = round(torch.cuda.max_memory_reserved() / 1e6, 1)
        rewards = [line.metrics["reward/mean"] for line in lines]
        moved = trainer.policy_version == len(lines) and all(line.metrics["actor/grad_norm"] for line in lines)
        finite = all(np.isfinite(line.loss) for line in lines)
        return {
            "parameters": self.parameters,
            "steps": len(lines),
            "trained": self.must("loop: every step trained, with a finite loss", moved and finite),
            "reward, first and last three": [float(np.mean(rewards[:3])), float(np.mean(rewards[-3:]))],
            "canary, largest": max(canaries),
            "median seconds": {name: statistics.median(taken[1:] or taken) for name, taken in seconds.items()},
            "step, median seconds": statistics.median(line.metrics["timing/step"] for line in lines),
            "peak memory by phase, MB": memory,
            "tokens per step": {"trained": lines[-1].metrics["data/trained_tokens"]},
        }

    def _watch(self, owner: Any, name: str, memory: dict[str, float], seconds: dict[str, list[float]]) -> None:
        work = getattr(owner, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.peak(memory, name):
                started = time.perf_counter()
                result = work(*arguments, **keywords)
                self.done()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            return result

        setattr(owner, name, watched)

    def sync(self) -> dict[str, Any]:
        trainer, found = self.trainer, dict[str, Any]()
        trainer.open_rollouts()
        engine = trainer.engine
        copied = engine.update_weights_from_tensor(trainer.named_tensors(), policy_version=0)
        for name, give in (("copy", engine.update_weights_from_tensor), ("stage", engine.stage_weights_from_tensor)):
            taken = self.seconds(lambda give=give: give(trainer.named_tensors()), 3)
            found[f"{name}, GB/s"] = copied / taken / 1e9
        report = trainer.sharding_manager.swap()
        found |= {"bytes": copied, "swap, seconds that generation stood still": report.paused_seconds}
        found["canary after the swap"] = report.canary_max_abs_logprob_diff
        return found | {"canary threshold": trainer.config.canary_threshold}

    def engine(self) -> dict[str, Any]:
        from atropos_verl.types import GenerationRequest

        trainer, sizes, found = self.trainer, self.sizes, dict[str, Any]()
        trainer.open_rollouts()
        rng = np.random.default_rng(1)

        def rate(sequences: int, new_tokens: int) -> float:
            def ask() -> None:
                prompts = rng.integers(2, sizes["vocab_size"], (sequences, sizes["prompt"])).tolist()
                requests = [
                    GenerationRequest(prompt_token_ids=tuple(ids), max_tokens=new_tokens, ignore_eos=True)
                    for ids in prompts
                ]
                trainer.engine.generate(requests, timeout=120.0)

            return sequences / self.seconds(ask, 1)

        new = sizes["new_tokens"]
        for sequences in (1, 64):
            found[f"{sequences} sequences, new tokens per second"] = rate(sequences, new) * new
        found["prefill, tokens per second"] = rate(32, 1) * sizes["prompt"]
        trainer.close_rollouts()
        return found

    def prefixes(self) -> dict[str, Any]:
        """The update and the logprobs of one batch with every shared prefix computed once, and with none."""
        worker = self.trainer.worker
        engine = worker._worker.engine
        engine.lr_scheduler.base_lrs = [0.0] * len(engine.lr_scheduler.base_lrs)  # the same weights for both
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        samples, found = self._samples(), dict[str, Any]()
        logprobs, outputs, memory = list[Any](), list[dict[str, float]](), dict[str, float]()
        for way, shares in (("whole", False), ("shared", True)):
            worker.config = worker.config.with_values(trainer={"share_prefixes": shares})
            logprobs.append(worker.compute_logprobs(samples))
            with self.peak(memory, way):
                outputs.append(worker.train(samples))
            found[way] = {"seconds": self.seconds(lambda: worker.train(samples), 3), "peak, MB": memory[way]}
        apart = max(float(np.abs(whole - shared).max()) for whole, shared in zip(*logprobs, strict=True))
        norms = [output["grad_norm"] for output in outputs]
        found["whole over shared, time"] = found["whole"]["seconds"] / found["shared"]["seconds"]
        found["largest difference of a logprob"], found["gradient norm"] = apart, norms
        found["loss"] = [output["loss"] for output in outputs]
        bound = 0.1 if self.on_cuda else 1e-4  # bf16 has 8 bits, and the logprobs are about -12
        close = apart < bound and abs(norms[0] - norms[1]) < bound * norms[0]
        found["equal"] = self.must("prefixes: shared and whole agree", bool(close))
        found["packs"], found["shares"] = engine._packs, engine._shares
        self.must("prefixes: the engine packs and shares", engine._packs and engine._shares)
        return found

    def _samples(self) -> list[Any]:
        from atropos_verl.types import TrainingSample

        rng, sizes, samples = np.random.default_rng(2), self.sizes, []
        for _ in range(2):
            prompt = rng.integers(2, sizes["vocab_size"], sizes["prompt"])
            for _ in range(8):
                ids = np.concatenate([prompt, rng.integers(2, sizes["vocab_size"], sizes["answer"])])
                mask = np.arange(len(ids)) >= len(prompt)
                advantages = np.where(mask, rng.normal(), 0.0)
                samples.append(TrainingSample(token_ids=ids, loss_mask=mask, advantages=advantages))
        return samples

    def lm_head(self) -> dict[str, Any]:
        """Forward and backward of trained rows, half of all tokens, against logits of every position."""
        from atropos_verl.training import lm_head

        self.close()
        sizes, found = self.sizes, dict[str, Any]()
        options = {"device": self.device, "dtype": self.dtype}
        hidden = torch.randn(sizes["head_tokens"], sizes["hidden_size"], **options)
        weight = torch.randn(sizes["vocab_size"], sizes["hidden_size"], **options) * 0.03
        labels = torch.randint(0, sizes["vocab_size"], (sizes["head_tokens"],), device=self.device)
        rows = torch.arange(0, sizes["head_tokens"], 2, device=self.device)
        factors = torch.randn(len(rows), device=self.device)

        def naive(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return (states @ head.t()).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)[rows]

        def ours(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return lm_head.linear_token_logprobs(states[rows], head, labels[rows])

        def gradients(side: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
            return torch.autograd.grad((side(*leaves) * factors).sum(), leaves)

        exact = gradients(naive, torch.float32)
        for name, side in (("naive", naive), ("ours", ours)):
            memory: dict[str, float] = {}
            before = (torch.cuda.memory_allocated() if self.on_cuda else _resident()) / 1e6
            with self.peak(memory, "MB"):
                result = gradients(side, self.dtype)
            error = [float((a.float() - b).norm() / b.norm()) for a, b in zip(result, exact, strict=True)]
            del result
            taken = self.seconds(lambda side=side: gradients(side, self.dtype))
            found[name] = {"seconds": taken, "MB": round(memory["MB"] - before, 1), "error of gradients": error}
        found["ours / naive, time"] = found["ours"]["seconds"] / found["naive"]["seconds"]
        found["ours / naive, memory"] = found["ours"]["MB"] / max(found["naive"]["MB"], 0.1)
        as_exact = max(found["ours"]["error of gradients"]) < 2 * max(*found["naive"]["error of gradients"], 1e-5)
        found["as exact as naive"] = self.must("lm_head: gradients", as_exact)
        return found

    def attention(self) -> dict[str, Any]:
        """Eight sequences in one row, forward and backward, by our calls of sdpa and by one call of flash attention."""
        from types import SimpleNamespace

        from atropos_verl.verl_plugin.engines import _attention
        from atropos_verl.verl_plugin.prefix_forest import build_forest, joined

        sizes, found = self.sizes, dict[str, Any]()
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        lengths = [sizes["row"] * share // 8 for share in (8, 8, 7, 6, 5, 4, 3, 2)]
        module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False, is_causal=True)

        def inputs(tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
            """Query, key and value, and the gradient of the output."""
            width, options = sizes["hidden_size"] // heads, {"device": self.device, "dtype": self.dtype}
            shapes = [(1, count, tokens, width) for count in (heads, kv_heads, kv_heads)]
            leaves = [torch.randn(*shape, **options, requires_grad=True) for shape in shapes]
            return leaves, torch.randn(1, tokens, heads, width, **options)

        def packed(row: Any, leaves: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = _attention(module, *leaves, None, packed_row=row)[0]
            return output, *torch.autograd.grad(output, leaves, grad)

        def flash(leaves: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            query, *rest = leaves
            wide = [tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in rest]
            parts = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, *wide)]
            output = varlen_attn(*parts, starts, starts, max(lengths), max(lengths), **causal)[None]
            return output, *torch.autograd.grad(output, leaves, grad)

        row, given = joined(lengths), inputs(sum(lengths))
        sides: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {"packed sdpa": lambda: packed(row, *given)}
        if self.on_cuda:
            import inspect

            from torch.nn.attention.varlen import varlen_attn

            starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=self.device)
            named = inspect.signature(varlen_attn).parameters
            causal: dict[str, Any] = {"is_causal": True} if "is_causal" in named else {"window_size": (-1, 0)}
            sides["flash"] = lambda: flash(*given)
        else:
            found["flash"] = "CUDA only"
        results = {name: side() for name, side in sides.items()}
        found |= {name: {"seconds": self.seconds(side)} for name, side in sides.items()}
        if self.on_cuda:
            apart = [float((a - b).float().abs().max()) for a, b in zip(*results.values(), strict=True)]
            found["largest difference: output, gradients"] = apart
            found["packed / flash, time"] = found["packed sdpa"]["seconds"] / found["flash"]["seconds"]
            self.must("attention: packed sdpa and flash agree", max(apart) < 0.1)
        shared, *own = np.random.default_rng(0).integers(0, 9, (17, sizes["row"] // 2))
        forest = build_forest([np.concatenate([shared, rest]) for rest in own])
        given = inputs(len(forest.first))
        forest.to(torch.device(self.device))
        found["16 sequences that share half"] = {
            "distinct tokens": len(forest.first),
            "seconds": self.seconds(lambda: packed(forest, *given), 3),
        }
        return found

    def tests(self) -> dict[str, Any]:
        """Every test marked ``gpu``, in a process of its own: verl keeps one device for the life of a process."""
        environment = {**os.environ, "VERL_PLATFORM": "nvidia" if self.on_cuda else "cpu"}
        command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "-p", "no:cacheprovider"]
        options: dict[str, Any] = {"env": environment, "cwd": TESTS.parent, "capture_output": True, "text": True}
        left = max(20.0, self.deadline - time.perf_counter())
        answer = subprocess.run([*command, str(TESTS / "gpu")], timeout=left, check=False, **options)
        lines = answer.stdout.strip().splitlines()
        self.must("tests marked gpu", answer.returncode == 0)
        return {"exit code": answer.returncode, "last lines": lines[-12:] or answer.stderr.splitlines()[-12:]}

    def close(self) -> None:
        """Ends trainer and server, if they are there, and gives memory back."""
        for name, end in (("trainer", "close"), ("server", "stop")):
            if (part := self.__dict__.pop(name, None)) is not None:
                getattr(part, end)()
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()


def _share_of_even_ids(prompts: list[str], completions: list[str]) -> list[float]:
    """Of the words w0, w1, … those with an even number: nothing that random weights prefer."""
    words = [[int(number) for number in re.findall(r"\d+", text)] for text in completions]
    return [sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1) for numbers in words]


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters")
    parser.add_argument("--seconds", type=float, default=360.0, help="for everything")
    parser.add_argument("--only", help="sections, with commas between them (loop comes before what needs it)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --tiny runs without")
    started, results = time.perf_counter(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="drill-") as directory:
        drill = Drill(options.device, {name: sizes[options.tiny] for name, sizes in _SIZES.items()}, Path(directory))
        drill.deadline = started + options.seconds
        results["machine"] = drill.machine()
        for name, expected in EXPECTED.items():
            if options.only and name not in options.only.split(","):
                continue
            begun = time.perf_counter()
            left = drill.deadline - begun
            if left < (expected if drill.on_cuda else 1.0):
                results[name] = f"left out: {left:.0f} s were left"
                continue
            print(f"{begun - started:6.1f} s  {name}", file=sys.stderr, flush=True)
            try:
                results[name] = getattr(drill, name)()
            except Exception as error:
                results[name] = {"failed": repr(error), "traceback": traceback.format_exc().splitlines()[-12:]}
                drill.failed_comparisons.append(f"{name}: {error!r}")
            results[name]["seconds of this section"] = round(time.perf_counter() - begun, 1)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
        drill.close()
    results |= {"failed": drill.failed_comparisons, "seconds": round(time.perf_counter() - started, 1)}
    print(text := json.dumps(results, indent=1))
    if options.out:
        options.out.write_text(text)
    return 1 if drill.failed_comparisons else 0


if __name__ == "__main__":
    sys.exit(main())
