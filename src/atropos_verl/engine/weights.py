"""The engine's copy of the weights: checked, copied in place, released, allocated again, packed for its products."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping

import torch

from atropos_verl.errors import WeightSyncError

_WORTH_PACKING = 2**16  # elements of a matrix below which a product costs less than the call of the packed one
_PACKED_FOR = 32  # rows for which the layout is chosen; from 1 to 2,048 others are at most a few per cent better


class PackedLinear(torch.nn.Linear):
    """A linear layer on a CPU that multiplies with a copy of its weight in oneDNN's layout: docs/performance.md.

    The copy, as large as the weight, is made by the first call after the weight has changed. With gradients it is an
    ordinary layer."""

    _packed: torch.Tensor | None = None
    _packed_from: tuple[int, int] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        linear = torch.ops.mkldnn._linear_pointwise.default
        product: torch.Tensor = linear(input, self.packed(), self.bias, "none", [], "")
        return product

    def packed(self) -> torch.Tensor:
        """The copy, of the weight as it is now."""
        source = self.weight.data_ptr(), self.weight._version
        if self._packed is None or self._packed_from != source:
            with torch.inference_mode():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _PACKED_FOR)
            self._packed_from = source
        return self._packed

    def take(self, packed: torch.Tensor | None) -> None:
        """``packed`` is the copy of the weight as it is now; None: drop it."""
        self._packed, self._packed_from = packed, (self.weight.data_ptr(), self.weight._version)

    def __getstate__(self) -> dict[str, object]:
        """What a copy of the layer is made from: without the packed weight, which cannot be copied."""
        return self.__dict__ | {"_packed": None}


def pack_linear_layers(model: torch.nn.Module) -> list[PackedLinear]:
    """Make the linear layers of a model on a CPU ``PackedLinear``, where that is faster; returns them."""
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for layer in (layer for layer in model.modules() if type(layer) is torch.nn.Linear):
            weight = layer.weight
            packable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
            if packable and weight.numel() >= _WORTH_PACKING:
                layer.__class__ = PackedLinear
    return [layer for layer in model.modules() if isinstance(layer, PackedLinear)]


class WeightStore:
    """Parameters of a model by Hugging Face name; tied ones are one tensor under several names. ``ready``: they may be
    used. Not after they were released, nor after an update that failed half-way, until a full update."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._packed = pack_linear_layers(model)
        state = model.state_dict(keep_vars=True)
        self._tensors: dict[str, torch.Tensor] = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        """Parameters, and persistent buffers."""
        # Of a tied parameter the first name stands for it in messages.
        self._unique = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._unique.items()}
        self.ready = self.resident = True

    @property
    def nbytes(self) -> int:
        """Bytes of parameter storage and packed copies held now."""
        copies = sum(layer.weight.nbytes for layer in self._packed if layer._packed is not None)
        return copies + sum(parameter.nbytes for parameter in self._unique.values())

    def update(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Copy new values into every parameter; returns bytes copied.

        Every parameter must be given, a tied one under any or all of its names; persistent buffers may be. Values are
        cast to the engine's dtype and device. Raises ``WeightSyncError``: released, or naming a tensor that is unknown,
        given twice, of another shape, or missing."""
        if not self.resident:
            raise WeightSyncError("the weights' memory is released: call resume_memory_occupation() first")
        pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        copied, given, tensors = 0, dict[str, torch.Tensor](), iter(pairs)
        try:
            for name, tensor in tensors:
                target = given[name] = self._target(name, tensor, given)
                self.ready = False
                with torch.inference_mode(False), torch.no_grad():
                    target.copy_(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
                copied += target.nbytes
        except Exception:
            for _ in tensors:  # each may be gathered from several ranks, which all take part
                pass
            raise
        covered = {id(target) for target in given.values()}
        if missing := [name for name, parameter in self._unique.items() if id(parameter) not in covered]:
            what = f"{len(missing)} of {len(self._unique)} tensors are missing, first {missing[0]!r}"
            raise WeightSyncError(f"weight update: {what}")
        self.ready = True
        return copied

    def exchange(self, other: WeightStore) -> None:
        """Change values with another store of the same model, which is not ready afterwards. Nothing is copied:
        storages change hands."""
        packed = [layer.packed() for layer in other._packed]
        distinct = ({id(tensor): tensor for tensor in store._tensors.values()} for store in (self, other))
        with torch.inference_mode(False), torch.no_grad():
            for mine, theirs in zip(*(part.values() for part in distinct), strict=True):
                mine.data, theirs.data = theirs.data, mine.data
        for layer, idle, copy in zip(self._packed, other._packed, packed, strict=True):
            layer.take(copy)
            idle.take(None)
        self.ready, other.ready = True, False

    def release(self) -> None:
        """Give the storage of every parameter back. Idempotent."""
        self._set_storage(dict.fromkeys(self._shapes, torch.Size((0,))))
        self.resident = self.ready = False

    def allocate(self) -> None:
        """Take storage again, its content undefined until ``update``. Nothing to do when it was never released."""
        if not self.resident:
            self._set_storage(self._shapes)
            self.resident = True

    def _set_storage(self, shapes: Mapping[str, torch.Size]) -> None:
        # inference_mode(False): a tensor made inside inference mode could not be written to by anyone else later.
        for layer in self._packed:
            layer.take(None)
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self._unique.items():
                parameter.data = torch.empty(shapes[name], dtype=parameter.dtype, device=parameter.device)

    def _target(self, name: str, tensor: torch.Tensor, given: Container[str]) -> torch.Tensor:
        target = self._tensors.get(name)
        if target is None:
            near = difflib.get_close_matches(name, self._tensors, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise WeightSyncError(f"weight update: the engine's model has no tensor {name!r}{hint}")
        if name in given:
            raise WeightSyncError(f"weight update: {name!r} was given twice")
        if tuple(tensor.shape) != tuple(target.shape):
            raise WeightSyncError(
                f"weight update: {name!r} has shape {tuple(tensor.shape)}, the engine's model {tuple(target.shape)}; "
                "trainer and engine must load the same model, and sharded tensors must be gathered first"
            )
        return target
