"""verl's FSDP engine with an LM head that computes logprobs of trained tokens only, for cpu and cuda.

verl's engine runs the LM head on every position and keeps [tokens, vocabulary] logits for the backward. Most positions
of an Atropos batch are prompt or tool tokens whose logits nobody reads. Here the head is called on the rows that
predict a trained token, in chunks (``losses.linear_token_logprobs``), and returns one logprob per position.

Import this module after ``verl_plugin.activate``; importing it registers the engines in this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from atropos_verl.losses import linear_token_logprobs

__all__ = ["SelectiveHeadEngine"]

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap")
"""Config keys of architectures that change the logits after the head; those take verl's own path."""


@dataclass
class _HeadRequest:
    """What the head is to compute in the next forward."""

    rows: torch.Tensor
    """[N] flat indices into [B * L] of the positions that predict a trained token."""
    labels: torch.Tensor
    """[N] the tokens they predict."""
    temperature: torch.Tensor
    """[N]."""


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cuda", vendor="nvidia")
class SelectiveHeadEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """``model_output["log_probs"]`` as verl lays it out: entry t is the logprob of token t+1; 0 where not asked for."""

    _head_request: _HeadRequest | None = None

    def initialize(self) -> None:
        super().initialize()
        self._selective = self._install_head()

    def _build_fsdp_module(self, module: Any) -> Any:
        # A forward-only engine (reference policy) asks for CPUOffloadPolicy(pin_memory=True), which needs an
        # accelerator. Remove when verl picks the offload policy by platform (verl 0.9.1, transformer_impl.py:462).
        forward_only = self.engine_config.forward_only
        on_cpu = torch.device(_device_name()).type == "cpu"
        if on_cpu:
            self.engine_config.forward_only = False
        try:
            return super()._build_fsdp_module(module)
        finally:
            if on_cpu:
                self.engine_config.forward_only = forward_only

    def _install_head(self) -> bool:
        head = self.module.get_output_embeddings()
        config = self.module.config
        changed = [name for name in _LOGIT_TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)]
        if not isinstance(head, torch.nn.Linear) or changed:
            return False
        full_forward = head.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            request = self._head_request
            if request is None:
                return full_forward(hidden)
            flat = hidden.reshape(-1, hidden.shape[-1])
            logprobs = linear_token_logprobs(
                flat.index_select(0, request.rows), head.weight, request.labels, request.temperature, bias=head.bias
            )
            out = torch.zeros(flat.shape[0], dtype=logprobs.dtype, device=logprobs.device)
            # A copy: FSDP2 warns of a root output that is a view.
            return out.index_copy(0, request.rows, logprobs).view(*hidden.shape[:-1], 1).clone()

        # An instance attribute, not a class patch: only this engine's model is concerned.
        head.forward = forward  # type: ignore[method-assign,assignment]
        return True

    def _wants_selective(self, micro_batch: Any) -> bool:
        needs_logits = ("calculate_entropy", "calculate_sum_pi_squared", "distillation_use_topk", "use_remove_padding")
        return self._selective and not any(tu.get_non_tensor_data(micro_batch, key, False) for key in needs_logits)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        self._head_request = None
        if self._wants_selective(micro_batch):
            self._head_request = _head_request(
                model_inputs["input_ids"], micro_batch["loss_mask"], output_args["temperature"]
            )
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        if self._head_request is None:
            result: dict[str, Any] = super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
            return result
        self._head_request = None
        padded = output.logits.squeeze(-1)  # [B, L]
        input_ids = micro_batch["input_ids"]
        lengths = input_ids.offsets().diff().tolist()
        packed = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
        return {"log_probs": torch.nested.nested_tensor_from_jagged(packed, input_ids.offsets())}


def _device_name() -> Any:
    """verl's current device (a string or an index)."""
    from verl.utils.device import get_device_name

    return get_device_name()


def _head_request(input_ids: torch.Tensor, loss_mask: torch.Tensor, temperature: torch.Tensor) -> _HeadRequest:
    """Rows of the padded ``input_ids`` [B, L] that predict a token whose ``loss_mask`` (nested [B, T_b]) is set."""
    mask = torch.nested.to_padded_tensor(loss_mask.to(torch.int64), padding=0, output_size=tuple(input_ids.shape))
    batch, position = torch.nonzero(mask[:, 1:], as_tuple=True)  # position t predicts token t + 1
    rows = batch * input_ids.shape[1] + position
    return _HeadRequest(
        rows=rows, labels=input_ids[batch, position + 1], temperature=temperature.to(torch.float32)[batch]
    )
