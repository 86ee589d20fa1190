"""LoRA adapters in the embedded engine: only the adapter travels, the engine holds ``W0 + scaling * B @ A``.

verl sends them under peft's names: ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` is the factor A
of ``model.layers.0.self_attn.q_proj.weight``.
Formula: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; scaling alpha / r, or alpha / sqrt(r)
with rsLoRA (Kalajdzievski, 2023).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from atropos_verl.errors import WeightSyncError

_PREFIX = "base_model.model."
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_dora", "fan_in_fan_out"), (None, False)),
    "bias": (None, "none"),
    **dict.fromkeys(("alpha_pattern", "rank_pattern", "target_parameters", "modules_to_save"), (None, {}, [], ())),
}
"""peft settings whose values other than these would change the merged weights in ways not implemented here."""
SETTINGS = (*_UNSUPPORTED, "lora_alpha", "use_rslora")
"""What ``LoraMerger`` reads of an adapter's config. The rest may hold objects of peft's own classes."""


class LoraMerger:
    """Keeps the base of every weight an adapter changed, and merges newer adapters into it.

    Args:
        parameters: the engine's parameters by name: the base weights, until the first adapter arrives.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self.base: dict[str, torch.Tensor] = {}
        """The weights that an adapter has changed so far, without it."""

    def set_base(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take base weights from the trainer (``load_format=dummy``); ``.base_layer`` is removed from the names."""
        for name, tensor in tensors:
            plain = name.replace(".base_layer.", ".")
            if plain in self.base:
                self.base[plain] = tensor.detach().clone()
            yield plain, tensor

    def merge(
        self, adapter: Iterable[tuple[str, torch.Tensor]], peft_config: Mapping[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of the engine: merged where the adapter changes it, itself where not.

        Computed in float32 and rounded once to the engine's dtype.

        Raises:
            WeightSyncError: naming a peft setting, a tensor that is no LoRA factor, a factor without its other half,
                or a weight that the engine does not have or that has another shape.
        """
        for key, neutral in _UNSUPPORTED.items():
            if peft_config.get(key) not in neutral:
                raise WeightSyncError(
                    f"the adapter's {key}={peft_config[key]!r} is not supported by the 'transformers' replica; set "
                    "actor_rollout_ref.model.lora.merge=True to send merged weights instead"
                )
        # An earlier adapter may have changed a weight that this one leaves alone.
        merged = dict(self.base)
        for module, factors in _pairs(adapter).items():
            name = f"{module}.weight"
            parameter = self._parameters.get(name)
            if parameter is None:
                raise WeightSyncError(f"the adapter changes {name!r}, which the engine's model does not have")
            if set(factors) != {"lora_A", "lora_B"}:
                raise WeightSyncError(f"the adapter of {name!r} has only {', '.join(factors)}")
            down, up = factors["lora_A"].float(), factors["lora_B"].float()
            if (up.shape[0], down.shape[1]) != tuple(parameter.shape) or up.shape[1] != down.shape[0]:
                raise WeightSyncError(
                    f"the adapter of {name!r} has factors {tuple(up.shape)} and {tuple(down.shape)}; the weight is "
                    f"{tuple(parameter.shape)}"
                )
            if name not in self.base:
                self.base[name] = parameter.detach().clone()
            base, rank = self.base[name], down.shape[0]
            scaling = float(peft_config.get("lora_alpha") or rank)
            scaling /= rank**0.5 if peft_config.get("use_rslora") else rank
            delta = (up.to(base.device) @ down.to(base.device)).mul_(scaling)
            merged[name] = delta.add_(base.float()).to(base.dtype)
        for name, parameter in self._parameters.items():
            yield name, merged.get(name, parameter)


def _pairs(adapter: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """``{module: {"lora_A": [r, in], "lora_B": [out, r]}}``."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter:
        plain = name.removeprefix(_PREFIX).replace(".default.", ".")
        module, _, tail = plain.rpartition(".lora_")
        if not module or tail not in ("A.weight", "B.weight"):
            raise WeightSyncError(f"{name!r} is not a LoRA factor of a linear layer; others are not supported here")
        pairs.setdefault(module, {})[f"lora_{tail[0]}"] = tensor
    if not pairs:
        raise WeightSyncError("the trainer sent an adapter without any tensor")
    return pairs
