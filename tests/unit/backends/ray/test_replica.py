"""The embedded engine as a replica: verl's sampling parameters become a request, an abort reaches every request, and
weights arrive: in buckets, whoever gives up, and an adapter merged as peft merges it. Ray's calls are plain coroutines.
"""

import asyncio
import pickle
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from ray.exceptions import RayActorError
from support.engines import tiny_causal_lm
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.backends.ray import replica
from atropos_verl.backends.ray.gateway import to_sampling_params, to_structured
from atropos_verl.backends.ray.replica import LoraMerger, TransformersServer, TransformersServerAdapter, to_request
from atropos_verl.backends.ray.weight_transfer import WeightBucket, WeightReceiver, iter_buckets, send_weights
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.errors import GenerationRequestError, WeightSyncError
from atropos_verl.types import Constraint, GenerationRequest

_CONFIG = SimpleNamespace(response_length=20, prompt_length=8, ignore_eos=False)


def _request(prompt_len: int = 4, **params: Any) -> GenerationRequest:
    return to_request(range(prompt_len), params, _CONFIG, 64, "id")


@pytest.mark.parametrize(
    ("prompt_len", "params", "expected"),
    [
        (4, {}, 20),
        (12, {}, 16),  # a longer prompt takes from the response, as in verl's vLLM server
        (4, {"max_tokens": 50}, 50),
        (4, {"max_new_tokens": 7}, 7),
        (60, {"max_tokens": 50}, 4),
        (4, {"max_tokens": 0}, 1),
    ],
)
def test_max_tokens_follows_verl(prompt_len: int, params: dict[str, Any], expected: int) -> None:
    assert _request(prompt_len, **params).max_tokens == expected


def test_a_request_survives_the_way_through_verls_words() -> None:
    request = GenerationRequest(
        prompt_token_ids=(1, 2, 3), max_tokens=9, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop=("x", "y"),
        stop_token_ids=(7,), ignore_eos=True, seed=11, prompt_logprobs=2, request_id="id",
        constraint=Constraint(grammar="start: /x/"),
    )  # fmt: skip
    assert request.constraint is not None
    params = to_sampling_params(request, 9, index=0, generated=0) | to_structured(request.constraint, "transformers")
    assert to_request(request.prompt_token_ids, params, _CONFIG, 64, "id") == request


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

    server: Any = object.__new__(TransformersServer)  # the actor without a model
    server._engine = SimpleNamespace(gate=RequestGate(), abort=abort)
    server._asleep, server._has_weights, server._gate_lock = False, True, asyncio.Lock()
    server._running = {key: asyncio.get_running_loop().create_future() for key in ("a", "b")}
    answer = await asyncio.wait_for(server.abort_all_requests(), timeout=60.0)
    assert (answer["aborted_count"], asked) == (2, {"a": 3, "b": 3})
    assert not server._engine.gate.is_open


async def test_a_replica_that_nobody_has_started_again_yet_is_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica.ray, "get_actor", Mock(side_effect=ValueError("Failed to look up actor")))
    adapter = TransformersServerAdapter.__new__(TransformersServerAdapter)
    bucket = SimpleNamespace(update_weights_bucket_megabytes=1)
    adapter.config = SimpleNamespace(name="transformers", checkpoint_engine=bucket)
    adapter.replica_rank, adapter.server_handle = 3, None
    await adapter.resume(["weights"])
    await adapter.update_weights(iter([("a", torch.zeros(1))]), global_steps=1)
    with pytest.raises(RayActorError, match="transformers_server_3_0"):
        await adapter.release()


# -- buckets of weights ------------------------------------------------------------------------------------------------

_WEIGHTS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(24.0).reshape(4, 6).T,
    "large": torch.randn(64, 8),
    "ints": torch.arange(7),
}


def _collect(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def _check_same(found: dict[str, torch.Tensor]) -> None:
    assert [*found] == [*_WEIGHTS]
    torch.testing.assert_close(found, _WEIGHTS, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_a_bucket_is_read_from_read_only_memory_without_a_copy_or_a_warning() -> None:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(WeightBucket.pack(_WEIGHTS.items()), protocol=5, buffer_callback=buffers.append)
    assert len(body) < 2000  # the content travels out of band
    arrived = pickle.loads(body, buffers=[memoryview(bytes(buffer.raw())) for buffer in buffers])
    _check_same(dict(arrived.unpack()))
    for (name, tensor), (*_, array) in zip(arrived.unpack(), arrived.tensors, strict=True):
        if array.nbytes:
            assert not array.flags.writeable
            assert tensor.data_ptr() == array.__array_interface__["data"][0], name


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1, 1, 1]), (150, [4, 1, 1]), (1 << 20, [6])])
async def test_an_update_arrives_whole_in_buckets_as_large_as_allowed(limit: int, sizes: list[int]) -> None:
    found: list[tuple[int, bool]] = []
    receiver = WeightReceiver(_collect)

    async def receive(update: str, bucket: WeightBucket, last: bool) -> None:
        found.append((len(bucket.tensors), last))
        if (arrived := await receiver.receive(update, bucket, last)) is not None:
            _check_same(arrived)

    assert await send_weights(receive, _WEIGHTS.items(), limit) == sum(tensor.nbytes for tensor in _WEIGHTS.values())
    assert found == [*((size, False) for size in sizes[:-1]), (sizes[-1], True)]


async def test_a_refused_tensor_ends_the_update_at_the_sender_which_gathers_all_and_the_next_update_works() -> None:
    refused, gathered = ["scalar"], list[str]()

    def refuse(tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        for name, _ in tensors:
            if name in refused:
                raise WeightSyncError(f"no tensor {name!r} here")
        return 1

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _WEIGHTS.items():
            gathered.append(name)
            yield name, tensor

    receiver = WeightReceiver(refuse)
    with pytest.raises(WeightSyncError, match="no tensor 'scalar'"):
        await send_weights(receiver.receive, gather(), 1)
    assert gathered == [*_WEIGHTS], "every rank takes part in every gather"
    refused.clear()
    await send_weights(receiver.receive, gather(), 1)


async def test_a_sender_that_dies_is_named_after_the_timeout_and_gives_way_to_the_next_update() -> None:
    buckets = [item async for item in iter_buckets(ensure_async_iterator(_WEIGHTS.items()), 1)]
    receiver = WeightReceiver(_collect, timeout=0.05)
    await receiver.receive("dead", *buckets[0])
    with pytest.raises(WeightSyncError, match=r"no weights arrived for 0\.05 s"):
        await receiver._done  # type: ignore[misc]
    with pytest.raises(WeightSyncError, match="no weights arrived"):
        await receiver.receive("dead", *buckets[1])
    receiver = WeightReceiver(_collect, timeout=60.0)
    await receiver.receive("dead", *buckets[0])
    _check_same([await receiver.receive("alive", *part) for part in buckets][-1])


# -- adapters ----------------------------------------------------------------------------------------------------------


def _adapted(seed: int, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A peft model with a trained-looking adapter, the tensors verl would send, and its config."""
    form: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    model = get_peft_model(tiny_causal_lm(), LoraConfig(task_type="CAUSAL_LM", **form))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merged_weights_equal_those_of_peft(settings: dict[str, Any]) -> None:
    engine = _parameters(tiny_causal_lm())
    base = _parameters(tiny_causal_lm())
    merger = LoraMerger(engine)
    for seed in (0, 1):  # the second adapter replaces the first, it does not add to it
        model, adapter, config = _adapted(seed, **settings)
        merged = dict(merger.merge(adapter.items(), config))
        torch.testing.assert_close(merged, _parameters(model.merge_and_unload()), rtol=0, atol=1e-6)
        changed = {name for name in merged if not torch.equal(merged[name], base[name])}
        assert changed == set(merger.base) and changed
        for name, tensor in merged.items():
            engine[name].data.copy_(tensor)


def test_base_weights_from_the_trainer_lose_their_wrapper_and_are_what_the_next_adapter_adds_to() -> None:
    merger = LoraMerger(_parameters(tiny_causal_lm()))
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
    name = "base_model.model.experts.lora_{}.weight"
    adapter = {name.format("A"): torch.ones(2, 5), name.format("B"): torch.ones(4, 2)}
    for shape in ((4, 4, 5), (4, 3, 5)):
        with pytest.raises(WeightSyncError, match=r"do not fit 'experts\.weight' of the engine: \(4, "):
            list(LoraMerger({"experts.weight": torch.zeros(shape)}).merge(adapter.items(), {}))
