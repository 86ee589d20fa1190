"""The embedded engine as a replica: verl's sampling parameters become a request, an abort reaches every request, an
adapter is merged as peft merges it; what does not fit is refused."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from support.engines import tiny_causal_lm

from atropos_verl.backends.ray import replica
from atropos_verl.backends.ray.gateway import to_sampling_params, to_structured
from atropos_verl.backends.ray.replica import LoraMerger, TransformersServer, TransformersServerAdapter, to_request
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.errors import GenerationRequestError, WeightSyncError
from atropos_verl.types import Constraint, GenerationRequest

_CONFIG = SimpleNamespace(response_length=20, prompt_length=8, ignore_eos=False)


def _request(prompt_len: int = 4, context: int = 64, **params: Any) -> GenerationRequest:
    return to_request(range(prompt_len), params, _CONFIG, context, "id")


@pytest.mark.parametrize(
    ("prompt_len", "context", "params", "expected"),
    [
        (4, 64, {}, 20),
        (12, 64, {}, 16),  # a longer prompt takes from the response, as in verl's vLLM server
        (4, 64, {"max_tokens": 50}, 50),
        (4, 64, {"max_new_tokens": 7}, 7),
        (60, 64, {"max_tokens": 50}, 4),
        (4, 64, {"max_tokens": 0}, 1),
    ],
)
def test_max_tokens_follows_verl(prompt_len: int, context: int, params: dict[str, Any], expected: int) -> None:
    assert _request(prompt_len, context, **params).max_tokens == expected


def test_a_request_survives_the_way_through_verls_words() -> None:
    request = GenerationRequest(
        prompt_token_ids=(1, 2, 3), max_tokens=9, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop=("x", "y"),
        stop_token_ids=(7,), ignore_eos=True, seed=11, prompt_logprobs=2, request_id="id",
    )  # fmt: skip
    params = to_sampling_params(request, 9, index=0, generated=0)
    assert to_request(request.prompt_token_ids, params, _CONFIG, 64, "id") == request
    constraint = Constraint(grammar="start: /x/")
    params |= to_structured(constraint, "transformers")
    assert to_request(request.prompt_token_ids, params, _CONFIG, 64, "id").constraint == constraint


def test_neutral_values_pass_and_others_are_refused_by_name() -> None:
    _request(n=1, repetition_penalty=1.0, presence_penalty=0.0, logprobs=True, skip_special_tokens=False)
    for name, value in {"repetition_penalty": 1.1, "presence_penalty": 0.5, "guided_json": "{}"}.items():
        with pytest.raises(GenerationRequestError, match=name):
            _request(**{name: value})


async def test_a_request_that_had_not_reached_the_engine_is_aborted_as_well() -> None:
    asked: Counter[str] = Counter()

    def abort(key: str) -> None:
        asked[key] += 1
        if asked[key] == 3:  # the engine did not know the request before
            server._running[key].set_result([])

    server = object.__new__(TransformersServer)  # the actor without a model
    server._engine = SimpleNamespace(gate=RequestGate(), abort=abort)
    server._asleep = False
    server._gate_lock = asyncio.Lock()
    server._has_weights = True
    server._running = {key: asyncio.get_running_loop().create_future() for key in ("a", "b")}
    answer = await asyncio.wait_for(server.abort_all_requests(), timeout=60.0)
    assert answer["aborted_count"] == 2
    assert asked == {"a": 3, "b": 3}
    assert not server._engine.gate.is_open


async def test_a_replica_that_nobody_has_started_again_yet_is_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str) -> Any:
        raise ValueError(f"Failed to look up actor with name '{name}'")

    monkeypatch.setattr(replica.ray, "get_actor", get_actor)
    adapter = TransformersServerAdapter.__new__(TransformersServerAdapter)
    bucket = SimpleNamespace(update_weights_bucket_megabytes=1)
    adapter.config = SimpleNamespace(name="transformers", checkpoint_engine=bucket)
    adapter.replica_rank, adapter.server_handle = 3, None
    await adapter.resume(["weights"])
    await adapter.update_weights(iter([("a", torch.zeros(1))]), global_steps=1)
    with pytest.raises(RayActorError, match="transformers_server_3_0"):
        await adapter.release()


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
