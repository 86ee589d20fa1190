"""verl's extension of vLLM's worker process, made to work on a CPU. vLLM imports it in that process."""

from typing import Any, Self

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from atropos_verl.verl_plugin.shims import keep_linear_weights


class VLLMCpuWorkerExtension(vLLMColocateWorkerExtension):  # type: ignore[misc]
    """verl's extension; its ``__new__`` runs before the model is loaded."""

    def __new__(cls, **kwargs: Any) -> Self:
        keep_linear_weights()
        worker: Self = super().__new__(cls, **kwargs)
        return worker

    def _update_weights(self, weights: list[tuple[str, Any]], peft_config: Any, base_sync_done: bool) -> Any:
        # verl copies out of its shared bucket by ``to(device)``, on a CPU no copy: a tensor that is kept (an adapter's)
        # would keep the bucket from being closed. Remove when verl clones.
        copies = [(name, tensor.clone()) for name, tensor in weights]
        return super()._update_weights(copies, peft_config=peft_config, base_sync_done=base_sync_done)
