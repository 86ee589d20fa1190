"""The embedded engine as a replica: verl's sampling parameters become a request, and an abort reaches every request."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from atropos_verl.backends.ray import replica
from atropos_verl.backends.ray.gateway import to_sampling_params, to_structured
from atropos_verl.backends.ray.replica import TransformersServer, TransformersServerAdapter, to_request
from atropos_verl.engine.protocol import RequestGate
from atropos_verl.errors import GenerationRequestError
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
