"""The engine over verl's replicas, against a client that aborts at given tokens; the embedded engine as a replica."""

import asyncio
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from ray.exceptions import RayActorError
from support.engines import tiny_causal_lm
from support.tiny_model import build_tiny_tokenizer
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from atropos_verl.backends.ray import gateway, replica
from atropos_verl.backends.ray.gateway import AttemptClient, ReplicaEngine, to_sampling_params, to_structured
from atropos_verl.backends.ray.replica import LoraMerger, TransformersServer, TransformersServerAdapter, to_request
from atropos_verl.backends.ray.weight_transfer import WeightBucket, WeightReceiver, iter_buckets, send_weights
from atropos_verl.engine.protocol import GenerationEngine, RequestGate
from atropos_verl.engine.requests import EngineLimits
from atropos_verl.errors import EngineError, EngineStoppedError, GenerationRequestError, WeightSyncError
from atropos_verl.types import UNKNOWN_VERSION, Constraint, Generation, GenerationRequest

_EOS = 258


@dataclass
class _Replica:
    """Writes ``script`` (the completion it would give), and is aborted after so many tokens of it in all.

    Its weights are of step ``10 * (aborts so far)``. Logprobs name the position and the version, so that each value
    in the answer can be traced: ``-(position + version / 1000)``.
    """

    script: list[int]
    abort_at: list[int] = field(default_factory=list)
    change: Callable[[Any], None] = lambda output: None
    """Applied to every answer before it is returned."""
    calls: list[dict[str, Any]] = field(default_factory=list)

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.calls.append({"request_id": request_id, "prompt_ids": list(prompt_ids), **sampling_params})
        await asyncio.sleep(0)
        done = len(prompt_ids) - 3
        version = 10 * sum(at <= done for at in self.abort_at)
        limit = min(len(self.script), done + sampling_params["max_tokens"])
        end = min([limit, *(at for at in self.abort_at if at > done)])
        extra: dict[str, Any] = dict.fromkeys(("min_global_steps", "max_global_steps", "global_steps"), version)
        extra["asked"] = sampling_params.get("prompt_logprobs")
        if end == limit:
            extra["finish_reason"] = "stop" if end == len(self.script) else "length"
        output = TokenOutput(
            token_ids=self.script[done:end],
            log_probs=[-(position + version / 1000) for position in range(done, end)],
            stop_reason="completed" if end == limit else "aborted",
            extra_fields=extra,
        )
        self.change(output)
        return output


def _engine(replica: Any) -> ReplicaEngine:
    limits = EngineLimits(max_context_len=64, vocab_size=259, eos_token_ids=frozenset({_EOS}))
    return ReplicaEngine(replica, build_tiny_tokenizer(), limits)


def _request(**settings: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt_token_ids": (1, 2, 3), "max_tokens": 40} | settings))


async def _one(engine: ReplicaEngine, **settings: Any) -> Generation:
    [generation] = await engine.agenerate(_request(**settings))
    return generation


@pytest.mark.parametrize("abort_at", [[], [1], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 7]])
async def test_an_aborted_answer_goes_on_from_its_tokens_and_loses_nothing(abort_at: list[int]) -> None:
    script = [*range(20, 29), _EOS]
    replica = _Replica(script, abort_at)
    engine = _engine(replica)
    answer = await _one(engine)
    assert list(answer.token_ids) == script and answer.finish_reason == "stop"
    versions = [10 * sum(at <= position for at in abort_at) for position in range(10)]
    assert answer.logprobs == pytest.approx([-(i + v / 1000) for i, v in enumerate(versions)])
    assert answer.policy_versions == (versions[0], versions[-1])
    assert answer.policy_version_runs == tuple((v, len(list(run))) for v, run in groupby(versions))
    assert isinstance(engine, GenerationEngine)
    assert engine.policy_version == versions[-1]
    starts = [0, *abort_at]
    assert [call["prompt_ids"] for call in replica.calls] == [[1, 2, 3, *script[:start]] for start in starts]
    assert [call["max_tokens"] for call in replica.calls] == [40 - start for start in starts]
    assert all(call["logprobs"] is True for call in replica.calls)


@pytest.mark.parametrize("change", [lambda output: None, lambda output: output.extra_fields.pop("finish_reason", None)])
@pytest.mark.parametrize(
    ("script", "max_tokens", "settings", "reason"),
    [
        (list(range(30)), 12, {}, "length"),
        ([5, 6, _EOS], 12, {}, "stop"),
        ([5, 6, _EOS], 3, {}, "stop"),
        ([5, 6, 7], 3, {"stop_token_ids": (7,)}, "stop"),
        (list(range(100)), None, {}, "length"),
    ],
)
async def test_finish_reason_is_known_whether_or_not_the_replica_says_it(
    change: Callable[[Any], None], script: list[int], max_tokens: int | None, settings: dict[str, Any], reason: str
) -> None:
    for abort_at in ([], [2]):
        answer = await _one(_engine(_Replica(script, abort_at, change)), max_tokens=max_tokens, **settings)
        assert answer.finish_reason == reason
        assert len(answer.token_ids) == min(len(script), max_tokens or 61)


async def test_an_abort_at_the_very_last_token_allowed_ends_with_length() -> None:
    replica = _Replica(list(range(30)), change=lambda output: setattr(output, "stop_reason", "aborted"))
    answer = await _one(_engine(replica), max_tokens=5)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5 and len(replica.calls) == 1


@pytest.mark.parametrize("cut", range(1, 16))
async def test_a_stop_string_cut_in_two_by_an_abort_still_stops(cut: int) -> None:
    # A replica sees the tokens of its own attempt only, so this one never finds the string itself.
    text = "abc</answer>xyz and more"
    replica = _Replica(list(build_tiny_tokenizer()(text).input_ids), [cut])
    answer = await _one(_engine(replica), stop=("</answer>",))
    if 3 <= cut < 12:
        assert build_tiny_tokenizer().decode(answer.token_ids) == "abc</answer>"
        assert answer.finish_reason == "stop" and len(answer.logprobs) == len(answer.token_ids)
    else:  # whole inside one attempt: the replica's business
        assert len(answer.token_ids) == len(text)


@pytest.mark.parametrize("kind", [None, EngineError, EngineStoppedError])
async def test_a_request_outlasts_replicas_that_turn_it_away_fail_or_die_and_goes_on_from_its_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception] | None
) -> None:
    monkeypatch.setattr(gateway, "_NO_SERVER_RETRY", 0.0)
    monkeypatch.setattr(gateway, "_TURNED_AWAY_WAIT", (0.0, 0.0))

    def fail(output: Any) -> None:
        if 2 <= len(replica.calls) <= 8:
            if kind is not None:
                raise kind("killed")
            output.token_ids, output.log_probs, output.stop_reason = [], None, "aborted"

    replica = _Replica([5, 6, 7, _EOS], [2], change=fail)
    assert (await _one(_engine(replica))).token_ids == (5, 6, 7, _EOS)
    assert [call["prompt_ids"] for call in replica.calls] == [[1, 2, 3], *[[1, 2, 3, 5, 6]] * 8]


async def test_a_dead_load_balancer_is_told_to_the_trainer_and_the_request_refused() -> None:
    client = AttemptClient(config=None, load_balancer_handle=None)
    client._acquire_server = AsyncMock(side_effect=RayActorError)
    with pytest.raises(EngineStoppedError, match="load balancer is gone"):
        await client.generate("a", prompt_ids=[1], sampling_params={})
    assert client.lost.is_set()


async def test_n_completions_are_separate_requests_with_random_streams_of_their_own() -> None:
    replica = _Replica([5, 6, 7, _EOS], [2])
    generations = await _engine(replica).agenerate(_request(n=3, seed=1))
    assert [g.token_ids for g in generations] == [(5, 6, 7, _EOS)] * 3
    assert len({call["request_id"] for call in replica.calls}) == 3
    assert len({call["seed"] for call in replica.calls}) == 6  # a continuation must not repeat the numbers


async def test_streaming_hands_over_attempt_by_attempt_and_ends_each_completion_once() -> None:
    deltas = [delta async for delta in _engine(_Replica([5, 6, 7, _EOS], [1, 3])).astream(_request(n=2))]
    for index in (0, 1):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.token_ids for delta in mine] == [(5,), (6, 7), (_EOS,)]
        assert [delta.finish_reason for delta in mine] == [None, None, "stop"]
        assert [len(delta.logprobs) for delta in mine] == [1, 2, 1]
        assert [delta.policy_version for delta in mine] == [0, 10, 20]


@pytest.mark.parametrize(
    ("tokens", "runs"), [(1, ((4, 1),)), (2, ((3, 1), (4, 1))), (5, ((3, 1), (UNKNOWN_VERSION, 3), (4, 1)))]
)
async def test_a_replica_that_knows_only_first_and_last_policy_is_not_credited_with_more(
    tokens: int, runs: tuple[tuple[int, int], ...]
) -> None:
    spans = {"min_global_steps": 3, "max_global_steps": 4}
    answer = await _one(_engine(_Replica([7] * tokens, change=lambda output: output.extra_fields.update(spans))))
    assert answer.policy_version_runs == runs


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_breaks_every_replica_ends_with_the_cause_and_cancels_the_rest(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(gateway, "_NO_SERVER_RETRY", 0.0)

    def break_the_second(_: Any) -> None:
        if replica.calls[-1]["request_id"].endswith("-1"):
            raise EngineError("the replica broke")

    replica = _Replica([5] * 30, [*range(1, 30)], change=break_the_second)
    engine = _engine(replica)
    with pytest.raises(EngineStoppedError, match="failed 8 times at this request, the last time: the replica broke"):
        if stream:
            _ = [delta async for delta in engine.astream(_request(n=2))]
        else:
            await engine.agenerate(_request(n=2))
    assert len(asyncio.all_tasks()) == 1


async def test_cancelling_reaches_the_client() -> None:
    asked, answer = asyncio.Event(), asyncio.get_running_loop().create_future()
    client = Mock(generate=lambda *_, **__: asked.set() or answer)
    task = asyncio.ensure_future(_engine(client).agenerate(_request()))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled()


async def test_what_no_replica_can_do_and_tokens_without_logprobs_are_refused_by_name() -> None:
    replica = _Replica([5, _EOS], change=lambda output: setattr(output, "log_probs", None))
    with pytest.raises(GenerationRequestError, match="64 tokens; the context holds 64"):
        await _one(_engine(replica), prompt_token_ids=(1,) * 64)
    with pytest.raises(GenerationRequestError, match="top_logprobs"):
        await _one(_engine(replica), top_logprobs=2)
    assert replica.calls == []
    with pytest.raises(EngineError, match="2 tokens with 0 logprobs"):
        await _one(_engine(replica))


async def test_prompt_logprobs_hold_the_prompts_own_token_beside_the_best() -> None:
    def score(output: Any) -> None:
        own = output.extra_fields["asked"] == 0
        rows = [[2], [3], [0]] if own else [[9, 8], [3, 9], [0, 0]]
        values = [[-5.0], [-0.5], [0.0]] if own else [[-1.0, -2.0], [-0.5, -3.0], [0.0, 0.0]]
        output.extra_fields |= {"prompt_ids": rows, "prompt_logprobs": values}

    own, best = [await _one(_engine(_Replica([_EOS], change=score)), prompt_logprobs=k) for k in (0, 2)]
    assert own.prompt_logprobs == (None, {2: -5.0}, {3: -0.5})
    assert best.prompt_logprobs == (None, {2: -5.0, 9: -1.0, 8: -2.0}, {3: -0.5, 9: -3.0})


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_aborted_constrained_answer_begins_again(streamed: bool) -> None:
    """What a replica samples after an abort would be held to the grammar from its beginning."""
    replica = _Replica([20, 21, 22, _EOS], abort_at=[2])
    replica.change = lambda output: replica.abort_at.clear()
    request = _request(constraint=(constraint := Constraint(grammar="start: /.*/")))
    parts: Any = [delta async for delta in _engine(replica).astream(request)] if streamed else None
    parts = parts or await _engine(replica).agenerate(request)
    assert [token for part in parts for token in part.token_ids] == [20, 21, 22, _EOS]
    assert [(call["prompt_ids"], call["constraint"]) for call in replica.calls] == [([1, 2, 3], constraint)] * 2


def test_what_kind_of_replica_enforces_what() -> None:
    schema = Constraint(grammar='start: %json {"type": "object"}', json_schema='{"type": "object"}')
    calls = Constraint(grammar="start: /x/", param="tool_choice")
    assert to_structured(schema, "sglang") == {"json_schema": schema.json_schema}
    for kind, constraint in (("sglang", calls), ("trtllm", schema)):
        with pytest.raises(GenerationRequestError, match=kind) as caught:
            to_structured(constraint, kind)
        assert caught.value.param == constraint.param


_CONFIG = SimpleNamespace(response_length=20, prompt_length=8, ignore_eos=False)


def _to_request(prompt_len: int = 4, **params: Any) -> GenerationRequest:
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
    assert _to_request(prompt_len, **params).max_tokens == expected


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
    _to_request(n=1, repetition_penalty=1.0, presence_penalty=0.0, logprobs=True, skip_special_tokens=False)
    for name, value in {"repetition_penalty": 1.1, "presence_penalty": 0.5, "guided_json": "{}"}.items():
        with pytest.raises(GenerationRequestError, match=name):
            _to_request(**{name: value})


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
    look_up = Mock(side_effect=ValueError("Failed to look up actor"))
    monkeypatch.setattr(replica.ray, "get_actor", look_up)
    adapter = TransformersServerAdapter.__new__(TransformersServerAdapter)
    bucket = SimpleNamespace(update_weights_bucket_megabytes=1)
    adapter.config = SimpleNamespace(name="transformers", checkpoint_engine=bucket)
    adapter.replica_rank, adapter.server_handle = 3, None
    await adapter.resume(["weights"])
    await adapter.update_weights(iter([("a", torch.zeros(1))]), global_steps=1)
    with pytest.raises(RayActorError, match="Failed to look up actor"):
        await adapter.release()
    assert {call.args for call in look_up.mock_calls} == {("transformers_server_3_0",)}


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
