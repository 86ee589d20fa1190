"""Tiny embedded engines, and the plain forward passes their answers are checked against."""

import threading
from typing import Any

import pytest
import torch

from atropos_verl.engine.embedded import TransformersEngine
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.types import Generation, GenerationRequest
from support.serving import eventually
from support.tiny_model import build_tiny_tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
"""Two layers with grouped attention heads over the 259 ids of the byte tokenizer, in the words of Hugging Face."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def tiny_causal_lm(*, seed: int = 0, family: str = "qwen2", **overrides: Any) -> Any:
    """A random model. Its weights are drawn wide (0.15 instead of 0.02): greedy tokens vary, logprobs differ."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    settings = TINY | {"tie_word_embeddings": family == "qwen2"} | overrides
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def engine_of(model: Any, **settings: Any) -> TransformersEngine:
    """An engine over ``model``, which it owns from then on. Close it: it is a context manager."""
    return TransformersEngine(model, build_tiny_tokenizer(), **settings)


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (length,), generator=generator).tolist()) for length in lengths]


def request(prompt: tuple[int, ...], **settings: Any) -> GenerationRequest:
    return GenerationRequest(prompt_token_ids=prompt, **settings)


def one(engine: TransformersEngine, prompt: tuple[int, ...], **settings: Any) -> Generation:
    [[generation]] = engine.generate([request(prompt, **settings)], timeout=60.0)
    return generation


def check_greedy(engine: TransformersEngine, model: Any, prompt: tuple[int, ...], steps: int) -> Generation:
    """The greedy completion of ``engine``, which is the one of plain forwards of ``model``."""
    answer = one(engine, prompt, max_tokens=steps, **GREEDY)
    assert answer.token_ids == greedy_oracle(model, prompt, steps)
    return answer


def greedy_oracle(model: Any, prompt: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """``steps`` greedy tokens by running the whole sequence through the model, without any cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def logprob_oracle(model: Any, tokens: tuple[int, ...], temperature: float = 1.0) -> list[float]:
    """float64 log_softmax of one plain forward: logprobs of tokens 1 .. T-1."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return [float(logp[i, token]) for i, token in enumerate(tokens[1:])]


def check_logprobs(
    model: Any, prompt: tuple[int, ...], answer: Generation, temperature: float = 1.0, tolerance: float = 1e-4
) -> None:
    expected = logprob_oracle(model, prompt + answer.token_ids, temperature)[len(prompt) - 1 :]
    assert list(answer.logprobs) == pytest.approx(expected, abs=tolerance)


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    """A model's weights as a trainer hands them over."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


class StepCounter:
    """Counts decode steps of a model, and can hold it before one ("mid-generation")."""

    def __init__(self, model: Any, hold_at: int | None = None) -> None:
        self.model = model
        self._forward = model.forward
        self.steps = 0
        self.hold_at = hold_at
        self.held = threading.Event()
        self.go_on = threading.Event()
        model.forward = self._counted

    def go_on_once_shut(self, gate: RequestGate) -> None:
        """Let the step that is held end when somebody waits for ``gate``."""

        def wait() -> None:
            eventually(lambda: not gate.is_open, "the gate to be shut")
            self.go_on.set()

        threading.Thread(target=wait, daemon=True).start()

    def _counted(self, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            if self.steps == self.hold_at:
                self.held.set()
                assert self.go_on.wait(30.0)
            self.steps += 1
        return self._forward(**kwargs)
