"""Tensors of a device that is not the CPU, and computes on it: what code does with devices, seen without a card.

``FakeTensorMode`` has no values, so it stops at the first step that depends on one (``nonzero``, ``unique``,
``.item()``). Here every value is there, every path is taken, and each place where a GPU would make the processor wait
is noted.
torch's CPU build has no guard for CUDA, so the device is torch's place for backends that are written in Python. It is
there for the rest of the process: import this in a process of its own, before the package.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

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
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout
        )
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *_: Any) -> "OnDevice":
        return OnDevice(parts["inner"])

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
        """``operator file:function`` → how often the processor had to wait there, or a copy was made."""

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
        where = "outside" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        self.waits[f"{what} {where}"] += 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` with look-alikes in the place of its parameters and buffers."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = torch.nn.Parameter(parameter.detach().to(DEVICE), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    return module
