"""A training step's and a rollout's way over a device, on look-alikes. Prints where the processor waits, as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.lookalike import DEVICE, Lookalike, OnDevice, on_device  # isort: skip  # before the package

import numpy as np
import torch

from atropos_verl import verl_plugin

verl_plugin.activate("cpu")

from atropos_verl.backends.local.worker import LossFunction
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.requests import EngineStats
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.scheduler import ContinuousBatch
from atropos_verl.training import lm_head
from atropos_verl.training.losses import compute_advantage_weighted_sft_loss
from atropos_verl.verl_plugin.engines import (
    SelectiveHeadEngine,
    _head_request,
    install_packed_attention,
    packs_exactly,
)
from atropos_verl.verl_plugin.prefix_forest import build_forest
from support.engines import tiny_causal_lm
from support.samples import random_samples

VOCABULARY = 259


class Jagged:
    """What our code reads of a nested tensor; torch's own are always half on the CPU."""

    def __init__(self, values: torch.Tensor, offsets: torch.Tensor) -> None:
        self.values, self.offsets = lambda: values, lambda: offsets


def training(loss: dict[str, Any], *, keep: bool) -> dict[str, int]:
    """A micro-batch: nested columns, forest, model, selective head, loss and backward. ``keep``: the head does not use
    the plain formula."""
    lm_head.DIRECT_BYTES = 0 if keep else 2**20
    samples = random_samples(6, vocab_size=VOCABULARY)
    config = RunConfig.from_mapping({"loss": loss, "off_policy": {"importance": "sequence"}})
    model = tiny_causal_lm()
    assert install_packed_attention(model)
    with Lookalike():
        on_device(model)
    engine: Any = SimpleNamespace(module=model, _head_request=None)
    SelectiveHeadEngine._install_head(engine)

    def jagged(rows: list[Any], dtype: torch.dtype) -> Jagged:
        lengths = np.cumsum([0, *map(len, rows)])
        values = torch.from_numpy(np.concatenate(rows)).to(dtype).to(DEVICE)
        return Jagged(values, torch.from_numpy(lengths).to(DEVICE))

    with Lookalike():
        data: dict[str, Any] = {
            "input_ids": jagged([s.token_ids for s in samples], torch.int64),
            "loss_mask": jagged([s.loss_mask for s in samples], torch.int64),
            "advantages": jagged([s.advantages for s in samples], torch.float32),
            "rollout_logprobs": jagged([s.rollout_logprobs for s in samples], torch.float32),
            "batch_num_tokens": sum(int(s.loss_mask.sum()) for s in samples),
            "dp_size": 1,
        }
        temperature = torch.tensor([s.temperature for s in samples])
    with Lookalike() as mode:
        forest = build_forest([s.token_ids for s in samples]).to(DEVICE)
        place, first = (torch.from_numpy(array).to(DEVICE) for array in (forest.place, forest.first))
        ids = data["input_ids"]
        positions = torch.from_numpy(np.concatenate([np.arange(len(s)) for s in samples])).to(DEVICE)
        request = engine._head_request = _head_request(ids, data["loss_mask"], temperature, None, place)
        output = model(
            input_ids=ids.values()[first][None], position_ids=positions[first][None], packed_row=forest, use_cache=False
        )
        values = output.logits[0, :, 0][request.repeats]
        packed = values.new_zeros(ids.values().shape[0]).index_copy(0, request.targets, values)
        logprobs = Jagged(packed, ids.offsets())
        function = LossFunction(config)
        value, _ = function({"log_probs": logprobs}, data)
        value.backward()
        function.finish()
    assert all(isinstance(parameter.grad, OnDevice) for parameter in model.parameters())
    return dict(mode.waits)


def probe() -> dict[str, int]:
    """What the first micro-batch of a run computes: does the model pack?"""
    model = tiny_causal_lm()
    assert install_packed_attention(model)
    with Lookalike() as mode:
        assert packs_exactly(on_device(model), DEVICE, share=True)
    return dict(mode.waits)


def padded_loss() -> dict[str, int]:
    """``AtroposTrainer.compute_advantage_weighted_sft_loss`` from the logits on."""
    with Lookalike() as mode:
        logits = torch.randn(2, 5, VOCABULARY).to(DEVICE)
        ids, mask = (torch.ones(2, 5, dtype=torch.int64).to(DEVICE) for _ in range(2))
        advantages, temperature = torch.ones(2, 5).to(DEVICE), torch.ones(2)
        loss = compute_advantage_weighted_sft_loss(logits, ids, advantages, mask, temperature)
    assert isinstance(loss, OnDevice)
    return dict(mode.waits)


def rollout() -> dict[str, dict[str, int]]:
    """The embedded engine: prefill, prefill behind a stored prefix, decode, logprobs of a prompt."""
    from atropos_verl.engine.requests import EngineLimits, Ticket
    from atropos_verl.types import GenerationRequest

    model, found = tiny_causal_lm(), dict[str, dict[str, int]]()
    with Lookalike():
        runner = ModelRunner(on_device(model), max_context_len=100)
    batch = ContinuousBatch(runner, 8, EngineStats())
    limits = EngineLimits(max_context_len=100, vocab_size=VOCABULARY, eos_token_ids=frozenset({258}))

    def sequences(*prompts: tuple[int, ...]) -> list[Any]:
        settings: dict[str, Any] = {"n": 2, "max_tokens": 9, "temperature": 0.7, "top_k": 50, "ignore_eos": True}
        tickets = [
            Ticket(GenerationRequest(prompt_token_ids=prompt, **settings), limits, seed=number)
            for number, prompt in enumerate(prompts)
        ]
        return [sequence for ticket in tickets for sequence in ticket.sequences]

    steps: dict[str, Any] = {
        "prefill": lambda: batch.prefill(sequences(tuple(range(40)), (1, 2, 3)), 0),
        "prefill behind a stored prefix": lambda: batch.prefill(sequences((*range(40), 7, 8)), 0),
        "decode": lambda: batch.decode(0),
        "decode, the same rows": lambda: batch.decode(0),
        "logprobs": lambda: runner.logprobs([1, 2, 3, 4]),
    }
    for name, step in steps.items():
        with Lookalike() as mode:
            step()
        found[name] = dict(mode.waits)
    return found


def mixed() -> str:
    """What is said where code adds tensors of two devices."""
    with Lookalike():
        here, there = torch.ones(3), torch.ones(3).to(DEVICE)
        assert isinstance(there + torch.tensor(1.0), OnDevice)  # a number may be anywhere, as with CUDA
        try:
            return str(here + there)
        except RuntimeError as error:
            return str(error)


if __name__ == "__main__":
    sft, grpo = {"type": "advantage_weighted_sft"}, {"type": "grpo"}
    report = {
        "training, weighted": training(sft, keep=False),
        "training, clipped ratio": training(grpo, keep=True),
        "probe": probe(),
        "padded loss": padded_loss(),
        **rollout(),
    }
    report = {name: {what: n for what, n in found.items() if "outside" not in what} for name, found in report.items()}
    report["mixed"] = mixed()
    sys.stdout.write(json.dumps(report, indent=1))
