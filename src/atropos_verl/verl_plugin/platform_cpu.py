"""A CPU platform for verl 0.9.1, which ships platforms for accelerators only.

Loaded by verl itself through ``VERL_USE_EXTERNAL_MODULES`` (see ``verl_plugin.activate``).
Remove when verl registers a ``cpu`` platform.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

__all__ = ["PlatformCPU"]


class _CpuDeviceModule(types.ModuleType):
    """``torch.cpu`` plus the accelerator functions verl calls on ``torch.cuda``; memory figures are 0."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _build_device_module() -> types.ModuleType:
    module = _CpuDeviceModule("atropos_verl_torch_cpu")
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, _zero)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize"):
        setattr(module, name, _nothing)
    module.is_available = lambda: False  # type: ignore[attr-defined]
    module.manual_seed = torch.manual_seed  # type: ignore[attr-defined]
    module.manual_seed_all = torch.manual_seed  # type: ignore[attr-defined]
    module.mem_get_info = lambda *_: (0, 0)  # type: ignore[attr-defined]
    module.get_device_name = lambda *_: "CPU"  # type: ignore[attr-defined]
    module.get_rng_state = lambda *_: torch.get_rng_state()  # type: ignore[attr-defined]
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)  # type: ignore[attr-defined]
    return module


_DEVICE_MODULE = _build_device_module()


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):  # type: ignore[misc]
    """One CPU device, gloo for communication."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE_MODULE

    # verl calls these for their effect on an accelerator; a CPU has no device to set, no cache and no profiler.
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        # verl uses the answer as a torch device: ``tensor.to(get_device_id())``.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        del device_index
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        del msg
        yield

    def ray_resource_name(self) -> str:
        # verl's resource check knows GPU and NPU only; ``ray.init(num_gpus=N)`` makes them logical.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
