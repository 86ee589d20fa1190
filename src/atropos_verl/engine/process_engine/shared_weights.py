"""Two buffers of weights that both processes have mapped: one generates, the trainer writes the other.

The memory has no name in any file system: it is gone when both processes are, however they ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atropos_verl.engine.process_engine.messages import TensorPlace
from atropos_verl.engine.weights import WeightStore, tensors_of

__all__ = ["SharedBuffer", "SharedWeightStore", "plan", "store_over"]

_ALIGNMENT = 64
"""Bytes: what torch's own allocator gives, so that kernels take the same paths."""


def plan(model: torch.nn.Module) -> tuple[list[TensorPlace], int]:
    """Places for every parameter and persistent buffer of ``model``, each tensor once, and the bytes of it all."""
    parameters, buffers = tensors_of(model)
    places: dict[int, TensorPlace] = {}
    offset = 0
    for name, tensor in [*parameters.items(), *buffers.items()]:
        place = places.get(id(tensor))
        if place is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = places[id(tensor)] = TensorPlace([], name in parameters, list(tensor.shape), dtype, offset)
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        place.names.append(name)
    return list(places.values()), max(offset, 1)


class SharedBuffer:
    """One buffer, mapped: ``tensors`` are views of it, in the order of ``places``.

    Args:
        descriptor: of the file, which is made as long as it has to be.
    """

    def __init__(self, descriptor: int, places: Sequence[TensorPlace], nbytes: int) -> None:
        if os.fstat(descriptor).st_size < nbytes:
            os.ftruncate(descriptor, nbytes)
        self._memory = mmap.mmap(descriptor, nbytes)
        self.tensors = [self._view(place) for place in places]

    def _view(self, place: TensorPlace) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, place.dtype)
        count = 1
        for size in place.shape:
            count *= size
        if count == 0:
            return torch.empty(place.shape, dtype=dtype)
        # Made outside inference mode, or nobody could write to it outside of it.
        with torch.inference_mode(False):
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=place.offset).view(place.shape)

    def give_back(self) -> None:
        """Return the pages to the system; what is read afterwards is zeros, what is written takes pages again."""
        if hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):  # a file system that cannot: the pages stay, which is no fault
                self._memory.madvise(mmap.MADV_REMOVE)


def store_over(buffer: SharedBuffer, places: Sequence[TensorPlace]) -> WeightStore:
    """The trainer's side of one buffer: checks names and shapes, and copies."""
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    for place, tensor in zip(places, buffer.tensors, strict=True):
        (parameters if place.is_parameter else buffers).update(dict.fromkeys(place.names, tensor))
    return WeightStore(parameters, buffers)


class SharedWeightStore(WeightStore):
    """The engine's side: a model whose tensors are views of one of two shared buffers.

    Args:
        model: its weights are copied into the first buffer, which it then uses; their own memory is freed.
    """

    def __init__(self, model: torch.nn.Module, buffers: Sequence[SharedBuffer]) -> None:
        parameters, persistent = tensors_of(model)
        unique = list({id(tensor): tensor for tensor in [*parameters.values(), *persistent.values()]}.values())
        self._order = {id(tensor): index for index, tensor in enumerate(unique)}
        self._shared = list(buffers)
        with torch.inference_mode(False), torch.no_grad():
            for tensor, view in zip(unique, self.serving.tensors, strict=True):
                view.copy_(tensor)
                tensor.data = view
        super().__init__(parameters, persistent)

    @property
    def serving(self) -> SharedBuffer:
        """The one that generates."""
        return self._shared[0]

    @property
    def spare(self) -> SharedBuffer:
        """The one that the trainer may write at any time."""
        return self._shared[1]

    def spare_tensors(self) -> Mapping[int, torch.Tensor]:
        """What a copy of the model is to use instead, by ``id`` of the model's own tensors."""
        found: dict[int, torch.Tensor] = {}
        for parameter in self._unique():
            view = self.spare.tensors[self._order[id(parameter)]]
            found[id(parameter)] = torch.nn.Parameter(view, requires_grad=parameter.requires_grad)
        for tensor in self._buffers.values():
            found[id(tensor)] = self.spare.tensors[self._order[id(tensor)]]
        return found

    def exchange(self, other: WeightStore) -> None:
        """See ``WeightStore``; the buffers change their roles."""
        super().exchange(other)
        self._shared.reverse()

    def release(self) -> None:
        """See ``WeightStore``."""
        super().release()
        self.serving.give_back()

    def _new_storage(self, parameter: torch.Tensor) -> Any:
        return self.serving.tensors[self._order[id(parameter)]]
