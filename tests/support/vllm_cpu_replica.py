"""The classes of ``support.vllm_cpu``, for the processes that use them. vLLM needs a C++ compiler (it compiles kernels
when it starts) and a model with a head size of 32 or more."""

import dataclasses
from typing import Any, Self

import ray
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from atropos_verl.backends.ray.weight_transfer import standalone_worker


class VLLMCpuHttpServer(vLLMHttpServer):  # type: ignore[misc]
    """verl's server actor. ``rollout.engine_kwargs.vllm`` reaches vLLM as ever."""

    def _init_config(self, config: Any) -> Any:
        # There is no memory to swap out on a CPU: vLLM refuses to start in sleep mode.
        return dataclasses.replace(super()._init_config(config), enable_sleep_mode=False)

    def _get_worker_extension_cls(self) -> str:
        return "support.vllm_cpu_replica.VLLMCpuWorkerExtension"

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


class VLLMCpuWorkerExtension(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl's extension of vLLM's worker process; its ``__new__`` runs before the model is loaded."""

    def __new__(cls, **kwargs: Any) -> Self:
        # vLLM packs every Linear weight after loading and leaves an empty parameter: a second load fails in the worker,
        # and the sender waits for ever. Remove when vLLM keeps both on CPU.
        from torch.nn.functional import linear
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)
        worker: Self = super().__new__(cls, **kwargs)
        return worker

    def _update_weights(self, weights: list[tuple[str, Any]], peft_config: Any, base_sync_done: bool) -> Any:
        # verl copies out of its shared bucket by ``to(device)``, on a CPU no copy: a tensor that is kept (an adapter's)
        # would keep the bucket from being closed. Remove when verl clones.
        copies = [(name, tensor.clone()) for name, tensor in weights]
        return super()._update_weights(copies, peft_config=peft_config, base_sync_done=base_sync_done)
