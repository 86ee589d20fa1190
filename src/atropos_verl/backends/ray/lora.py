"""LoRA adapters in the embedded engine: only the adapter travels, the engine holds ``W0 + scaling * B @ A``.

verl sends them under peft's names, such as ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``.
Formula: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; scaling alpha / r, or alpha / sqrt(r)
with rsLoRA (Kalajdzievski, 2023).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from atropos_verl.errors import WeightSyncError

_PREFIX = "base_model.model."
_PATTERNS = ("alpha_pattern", "rank_pattern", "target_parameters", "modules_to_save")
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "bias", *_PATTERNS)
"""peft settings that, where they are set, change the merged weights in ways not implemented here."""
SETTINGS = (*_UNSUPPORTED, "lora_alpha", "use_rslora")
"""What ``LoraMerger`` reads of an adapter's config. The rest may hold objects of peft's own classes."""


class LoraMerger:
    """Keeps the base of every weight an adapter changed, and merges newer adapters into it. ``parameters``: the
    engine's, by name: the base weights, until the first adapter arrives."""

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

        Computed in float32 and rounded once to the engine's dtype. Raises ``WeightSyncError``, which names the setting
        or the weight.
        """
        for key in _UNSUPPORTED:
            if (value := peft_config.get(key)) and value != "none":
                raise WeightSyncError(
                    f"the adapter's {key}={value!r} is not supported by the 'transformers' replica; set "
                    "actor_rollout_ref.model.lora.merge=True to send merged weights instead"
                )
        # An earlier adapter may have changed a weight that this one leaves alone.
        merged = dict(self.base)
        for module, factors in _pairs(adapter).items():
            name = f"{module}.weight"
            parameter = self._parameters.get(name)
            weight = () if parameter is None else tuple(parameter.shape)
            shapes = {half: tuple(factor.shape) for half, factor in factors.items()}
            rank = shapes.get("A", (0,))[0]
            fits = len(weight) == 2 and shapes == {"A": (rank, weight[1]), "B": (weight[0], rank)}
            if parameter is None or not fits:
                raise WeightSyncError(
                    f"the adapter's factors {shapes} do not fit {name!r} of the engine: {weight or None}"
                )
            down, up = factors["A"].float(), factors["B"].float()
            if name not in self.base:
                self.base[name] = parameter.detach().clone()
            base = self.base[name]
            scaling = float(peft_config.get("lora_alpha") or rank)
            scaling /= rank**0.5 if peft_config.get("use_rslora") else rank
            delta = (up.to(base.device) @ down.to(base.device)).mul_(scaling)
            merged[name] = delta.add_(base.float()).to(base.dtype)
        for name, parameter in self._parameters.items():
            yield name, merged.get(name, parameter)


def _pairs(adapter: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """``{module: {"A": [r, in], "B": [out, r]}}``."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter:
        plain = name.removeprefix(_PREFIX).replace(".default.", ".")
        module, _, tail = plain.rpartition(".lora_")
        if not module or tail not in ("A.weight", "B.weight"):
            raise WeightSyncError(f"{name!r} is not a LoRA factor of a linear layer; others are not supported here")
        pairs.setdefault(module, {})[tail[0]] = tensor
    if not pairs:
        raise WeightSyncError("the trainer sent an adapter without any tensor")
    return pairs
