"""Tensors of a device that is not the CPU, and computes on it: what code does with devices, seen without a card.

As a script: a training step's and a rollout's way over such a device. Prints where the processor waits, as JSON.

``FakeTensorMode`` has no values, so it stops at the first step that depends on one (``nonzero``, ``unique``,
``.item()``). Here every value is there, every path is taken, and each place where a GPU would make the processor wait
is noted.
torch's CPU build has no guard for CUDA, so the device is torch's place for backends that are written in Python. It is
there for the rest of the process, and before the package.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()  # type: ignore[assignment,misc]
# (in inference mode operators come whole, and views of tensors of another class cannot be made)
_tensor = torch.tensor


def _tensor_then_move(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """torch's own moves it where no mode sees it."""
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


torch.tensor = _tensor_then_move
_module: Any = backend_registration._DummyBackendModule()
_module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
backend_registration._setup_privateuseone_for_python_backend("lookalike", backend_module=_module)
DEVICE = torch.device("lookalike:0")
_aten = torch.ops.aten
_WAITS = ("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "equal")
"""Operators whose result, or its shape, the processor must know."""
_OURS = ("atropos_verl/", "transformers/masking_utils")


class OnDevice(torch.Tensor):
    """``inner`` [any], which is on the CPU, as a tensor on a GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """torch has none for tensors of another class."""
        assert Lookalike.current is not None
        if self.numel():
            Lookalike.current.note("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor that looks as if on a GPU, outside of the mode")


class Lookalike(TorchDispatchMode):
    """Within it ``device=DEVICE`` and ``.to(DEVICE)`` give look-alikes. Raises ``RuntimeError`` where CUDA would: an
    operator gets tensors of both devices, of which the one on the CPU is no single number."""

    current: "ClassVar[Lookalike | None]" = None

    def __init__(self) -> None:
        super().__init__()
        Lookalike.current = self
        self.waits: Counter[str] = Counter()
        """``operator function`` → how often the processor had to wait there, or a copy was made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, tensors = func._schema.name.removeprefix("aten::"), _tensors((args, kwargs))
        own = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        if func is _aten._fused_sdp_choice.default and own:
            return 0  # the plain formula: the kernels are CUDA's
        target = kwargs.get("device")
        result_on_device = bool(own) if target is None else torch.device(target).type == DEVICE.type
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if own and (name in _WAITS or unsized or (name == "_to_copy" and not result_on_device)):
            self.note("copy to the CPU" if name == "_to_copy" else name)
        elif own and name.startswith(("index", "_index")) and any(t.dtype == torch.bool for t in _tensors(args[1:2])):
            self.note("index by a mask")
        elif result_on_device and name in ("_to_copy", "copy_") and len(own) < len(tensors):
            self.note("copy to the GPU")
        elif own and len(own) < len(tensors):
            odd = [t for t in tensors if not isinstance(t, OnDevice) and (t.dim() or name.startswith("index"))]
            if odd:
                raise RuntimeError(f"{name}: tensors of both devices, {[tuple(t.shape) for t in odd]}")
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if not result_on_device:
            return result
        wrapped = tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not any(part in frame.f_code.co_filename for part in _OURS):
            frame = frame.f_back
        where = "outside" if frame is None else frame.f_code.co_name
        self.waits[f"{what} {where}"] += 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def on_device(model: Any) -> Any:
    """``model`` with look-alikes in the place of its parameters and buffers."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.to(DEVICE).tie_weights()
    return model


from atropos_verl import verl_plugin

verl_plugin.activate("cpu")

from atropos_verl.backends.local.worker import LossFunction
from atropos_verl.config.schema import RunConfig
from atropos_verl.engine.requests import EngineLimits, EngineStats, Ticket
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.scheduler import ContinuousBatch
from atropos_verl.training.losses import compute_advantage_weighted_sft_loss
from atropos_verl.types import GenerationRequest
from atropos_verl.verl_plugin.engines import SelectiveHeadEngine, _head_request, install_packed_attention, packs_exactly
from atropos_verl.verl_plugin.prefix_forest import build_forest
from support.engines import tiny_causal_lm
from support.samples import random_samples

VOCABULARY = 259


class Jagged:
    """What our code reads of a nested tensor; torch's own are always half on the CPU."""

    def __init__(self, values: torch.Tensor, offsets: torch.Tensor) -> None:
        self.values, self.offsets = lambda: values, lambda: offsets


def training(loss: str) -> dict[str, int]:
    """A micro-batch: nested columns, forest, model, selective head, loss and backward."""
    samples = random_samples(6, vocab_size=VOCABULARY)
    function = LossFunction(RunConfig.from_mapping({"loss": {"type": loss}, "off_policy": {"importance": "sequence"}}))
    model = tiny_causal_lm()
    assert install_packed_attention(model)
    engine: Any = SimpleNamespace(module=model, _head_request=None, _autocast_dtype=torch.bfloat16)
    kinds = {"token_ids": torch.int64, "loss_mask": torch.int64}
    kinds |= {"advantages": torch.float32, "rollout_logprobs": torch.float32}
    with Lookalike():
        on_device(model)
        SelectiveHeadEngine._install_head(engine)
        offsets = torch.from_numpy(np.cumsum([0, *map(len, samples)])).to(DEVICE)
        data: dict[str, Any] = {}
        for name, kind in kinds.items():
            values = torch.from_numpy(np.concatenate([getattr(sample, name) for sample in samples])).to(kind)
            data[name] = Jagged(values.to(DEVICE), offsets)
        ids = data["input_ids"] = data.pop("token_ids")
        data |= {"batch_num_tokens": sum(int(s.loss_mask.sum()) for s in samples), "dp_size": 1}
        temperature = torch.tensor([s.temperature for s in samples])
    with Lookalike() as mode:
        forest = build_forest([s.token_ids for s in samples]).to(DEVICE)
        place, first = (torch.from_numpy(array).to(DEVICE) for array in (forest.place, forest.first))
        positions = torch.from_numpy(np.concatenate([np.arange(len(s)) for s in samples])).to(DEVICE)
        request = engine._head_request = _head_request(ids, data["loss_mask"], temperature, None, place)
        row: dict[str, Any] = {"input_ids": ids.values()[first][None], "position_ids": positions[first][None]}
        values = model(**row, packed_row=forest, use_cache=False).logits[0, :, 0][request.repeats]
        packed = values.new_zeros(ids.values().shape[0]).index_copy(0, request.targets, values)
        value, _ = function({"log_probs": Jagged(packed, offsets)}, data)
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
    with Lookalike():
        runner = ModelRunner(on_device(tiny_causal_lm()), max_context_len=100)
    batch = ContinuousBatch(runner, 8, EngineStats())
    limits = EngineLimits(max_context_len=100, vocab_size=VOCABULARY, eos_token_ids=frozenset({258}))
    settings: dict[str, Any] = {"n": 2, "max_tokens": 9, "temperature": 0.7, "top_k": 50, "ignore_eos": True}

    def prefill(*prompts: tuple[int, ...]) -> None:
        requests = [GenerationRequest(prompt_token_ids=prompt, **settings) for prompt in prompts]
        tickets = [Ticket(request, limits, seed=number) for number, request in enumerate(requests)]
        batch.prefill([sequence for ticket in tickets for sequence in ticket.sequences], 0)

    steps: dict[str, Any] = {
        "prefill": lambda: prefill(tuple(range(40)), (1, 2, 3)),
        "prefill behind a stored prefix": lambda: prefill((*range(40), 7, 8)),
        "decode": lambda: batch.decode(0),
        "decode, the same rows": lambda: batch.decode(0),
        "logprobs": lambda: runner.logprobs([1, 2, 3, 4]),
    }
    found = {}
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
    report = {
        "training, weighted": training("advantage_weighted_sft"),
        "training, clipped ratio": training("grpo"),
        "probe": probe(),
        "padded loss": padded_loss(),
        **rollout(),
    }
    report = {name: {what: n for what, n in found.items() if "outside" not in what} for name, found in report.items()}
    report["mixed"] = mixed()
    sys.stdout.write(json.dumps(report, indent=1))
