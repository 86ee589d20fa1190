"""Merged weights against peft's own merge, and what is refused."""

from typing import Any

import pytest
import torch
from support.engines import tiny_causal_lm

from atropos_verl.backends.ray.lora import LoraMerger
from atropos_verl.errors import WeightSyncError


def _adapted(seed: int, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A peft model with a trained-looking adapter, the tensors verl would send, and its config."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(
        task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings)
    )
    model = get_peft_model(tiny_causal_lm(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merged_weights_equal_those_of_peft(settings: dict[str, Any]) -> None:
    engine = tiny_causal_lm()
    base = {name: tensor.detach().clone() for name, tensor in _parameters(engine).items()}
    merger = LoraMerger(_parameters(engine))
    for seed in (0, 1):  # the second adapter replaces the first, it does not add to it
        model, adapter, config = _adapted(seed, **settings)
        merged = dict(merger.merge(adapter.items(), config))
        want = _parameters(model.merge_and_unload())
        assert set(merged) == set(want)
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)
        changed = {name for name in merged if not torch.equal(merged[name], base[name])}
        assert changed == set(merger.base) and changed
        with torch.no_grad():
            for name, tensor in merged.items():
                _parameters(engine)[name].copy_(tensor)


def test_base_weights_from_the_trainer_lose_their_wrapper_and_are_what_the_next_adapter_adds_to() -> None:
    engine = tiny_causal_lm()
    merger = LoraMerger(_parameters(engine))
    _, adapter, config = _adapted(0)
    list(merger.merge(adapter.items(), config))
    other = _parameters(tiny_causal_lm(seed=5))
    wrapped = [(name.replace("_proj.", "_proj.base_layer."), tensor) for name, tensor in other.items()]
    assert [name for name, _ in merger.set_base(wrapped)] == list(other)
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = {key.rsplit(".lora_")[-1][0]: t for key, t in adapter.items() if "layers.0.self_attn.q_proj" in key}
    want = other[name] + 3.0 * factors["B"] @ factors["A"]
    torch.testing.assert_close(dict(merger.merge(adapter.items(), config))[name], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "change", "named"),
    [
        ({"use_dora": True}, dict, "use_dora=True"),
        ({"alpha_pattern": {"q_proj": 3}}, dict, "alpha_pattern"),
        ({}, lambda a: {k: v for k, v in a.items() if not k.endswith("layers.0.self_attn.q_proj.lora_B.weight")}, "q_"),
        ({}, lambda a: {k.replace("layers.1", "layers.7"): v for k, v in a.items()}, r"layers\.7"),
        ({}, lambda a: {k: v[:, :-1] if "lora_A" in k else v for k, v in a.items()}, "factors"),
        ({}, lambda a: {"base_model.model.lm_head.weight": torch.zeros(2)}, "not a LoRA factor"),
        ({}, lambda a: {}, "without any tensor"),
    ],
)
def test_settings_and_adapters_that_do_not_fit_are_refused_by_name(settings: Any, change: Any, named: str) -> None:
    _, adapter, config = _adapted(0, **settings)
    with pytest.raises(WeightSyncError, match=named):
        list(LoraMerger(_parameters(tiny_causal_lm())).merge(change(adapter).items(), config))


def test_an_adapter_of_a_weight_that_is_no_matrix_is_refused_by_name() -> None:
    adapter = {"base_model.model.experts.lora_A.weight": torch.ones(2, 5)}
    adapter["base_model.model.experts.lora_B.weight"] = torch.ones(4, 2)
    for shape in ((4, 4, 5), (4, 3, 5)):
        with pytest.raises(WeightSyncError, match=r"do not fit 'experts\.weight' of the engine: \(4, "):
            list(LoraMerger({"experts.weight": torch.zeros(shape)}).merge(adapter.items(), {}))
