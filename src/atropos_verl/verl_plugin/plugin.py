"""What verl 0.9.1 has to be told in every process: a CPU platform, and the rollout name ``transformers``.

verl loads this module through ``VERL_USE_EXTERNAL_MODULES``. (It swallows faults of entry points.)
Remove the platform when verl registers ``cpu``: it ships platforms for accelerators only.
"""

import contextlib
import functools
import pkgutil
import types
from collections.abc import Callable
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.replica import RolloutReplicaRegistry


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class _CpuDeviceModule(types.ModuleType):
    """``torch.cpu`` plus the accelerator functions verl calls on ``torch.cuda``; memory figures are 0."""

    max_memory_allocated = max_memory_reserved = memory_allocated = memory_reserved = _always(0)
    empty_cache = ipc_collect = reset_peak_memory_stats = set_device = synchronize = _always(None)
    is_available = _always(False)
    mem_get_info = _always((0, 0))
    get_device_name = _always("CPU")
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):  # type: ignore[misc]
    """One CPU device, gloo for communication."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuDeviceModule("atropos_verl_torch_cpu")

    # verl calls these for their effect on an accelerator; a CPU has no device to set, no cache and no profiler.
    set_device = synchronize = set_allocator_settings = empty_cache = _always(None)
    profiler_start = profiler_stop = cudart = _always(None)
    nvtx_range = _always(contextlib.nullcontext())

    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    is_available = _always(True)
    current_device = _always("cpu")  # verl uses it as a torch device: ``tensor.to(get_device_id())``
    device_count = _always(1)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CUDA_VISIBLE_DEVICES")
    # verl's resource check knows GPU and NPU only; ``ray.init(num_gpus=N)`` makes them logical.
    ray_resource_name = _always("GPU")
    ray_noset_envvars = _always([])
    is_ipc_supported = _always(False)


def register_rollout(name: str, replica: str, adapter: str) -> None:
    """``rollout.name`` → dotted names, imported when used, of the replica's class and of the workers' adapter."""
    RolloutReplicaRegistry.register(name, functools.partial(pkgutil.resolve_name, replica))
    # verl 0.9.1 has no function to register an adapter (workers/rollout/base.py); its table is all there is.
    rollout_base._ROLLOUT_REGISTRY[(name, "async")] = adapter


_OURS = "atropos_verl.backends.ray.replica.Transformers"
register_rollout("transformers", f"{_OURS}Replica", f"{_OURS}ServerAdapter")
