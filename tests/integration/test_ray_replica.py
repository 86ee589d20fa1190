"""The ``transformers`` replica on a real Ray, beside a real training worker of verl."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from support import ray_cluster
from support.ray_cluster import Cluster, started_cluster, stats
from support.serving import eventually
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.backends.ray.gateway import ClusterGateway
from atropos_verl.backends.ray.replicas import Replicas
from atropos_verl.config.schema import SyncConfig
from atropos_verl.errors import WeightSyncError
from atropos_verl.gateway.sessions import SessionStore

_TOKENS = list(range(40, 90))
_STANDALONE = [  # what verl's separate_async asks of the configuration; it changes nothing for a colocated replica
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=ray_object_store",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=atropos_verl.backends.ray.weight_transfer",
]
_KEY = "+actor_rollout_ref.rollout.engine_kwargs.transformers.api_key=of-the-replica"

pytestmark = pytest.mark.usefixtures("ray")


@pytest.fixture(scope="module")
def cluster(model_path: Path, ray: None) -> Iterator[Cluster]:
    with started_cluster(model_path, *_STANDALONE, _KEY) as cluster:
        cluster.checkpoints.sleep_replicas()
        cluster.checkpoints.update_weights(0)
        yield cluster


def _replicas(cluster: Cluster, servers: Any = None) -> Replicas:
    servers = servers or cluster.servers
    return Replicas(cluster.workers, [servers], lambda: [servers])


def _replace_one(replicas: Replicas) -> None:
    """Exactly one is replaced, once it is dead: Ray kills an actor a little after it was asked to."""
    eventually(lambda: replicas.replace_dead() == 1, "the dead replica to be replaced", 60.0)


def _gateway(cluster: Cluster, **options: Any) -> ClusterGateway:
    return ClusterGateway(cluster.servers.get_client(), build_tiny_tokenizer(), **options)


def _client(gateway: ClusterGateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url, timeout=120.0)


def _completion(prompt: list[int], **settings: Any) -> dict[str, Any]:
    return {"prompt": {"prompt_token_ids": prompt}, "n": 2, "logprobs": 0, "ignore_eos": True, **settings}


async def _generated(cluster: Cluster, tokens: int) -> None:
    """Wait until the replica has made this many more."""
    start = None
    while True:
        now = (await cluster.server.__ray_call__.remote(stats))["generated_tokens"]
        start = now if start is None else start
        if now - start >= tokens:
            return
        await asyncio.sleep(0.01)


# First, before the module's cluster takes the names of verl's actors.
def test_with_lora_the_base_travels_once_and_then_only_adapters_and_the_engine_follows(model_path: Path) -> None:
    import ray

    settings = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=16"]
    with started_cluster(model_path, *settings) as cluster:
        [address] = cluster.servers.get_addresses()
        pid = address.rpartition(":")[2]  # without a key nothing listens: no port, but a name
        assert psutil.Process(int(pid)).cmdline()[0].startswith("ray::TransformersServer")
        received = [0]
        cluster.call(ray_cluster.count_weights)
        for step in range(3):
            assert cluster.workers.nudge(step, 0.1) == [28]
            if step:
                assert cluster.canary(_TOKENS) > 1e-2
            cluster.checkpoints.sleep_replicas()
            cluster.checkpoints.update_weights(step)
            assert cluster.canary(_TOKENS) < 1e-5
            received.append(cluster.call(ray_cluster.received_bytes))
        # Another server in its place has no base weights either.
        ray.kill(cluster.server)
        _replace_one(_replicas(cluster))
        cluster.checkpoints.update_weights(3)
        assert cluster.canary(_TOKENS) < 1e-5
    base, first, second = (after - before for before, after in pairwise(received))
    # 2 layers, 7 projections with factors A and B: r * (in + out) float32 numbers each, q k v o gate up down
    sizes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert first == second == 2 * 4 * 4 * sum(a + b for a, b in sizes)
    assert base > 2 * first  # rollout.load_format=dummy: the replica had no base weights


def test_the_replica_has_the_trainers_weights_and_the_canary_finds_a_sync_that_was_skipped_or_torn(
    cluster: Cluster,
) -> None:
    canary = _replicas(cluster).canary(SyncConfig(), build_tiny_tokenizer(), exact=True)
    for step in (1, 2):
        cluster.workers.nudge(step, 0.05)
        with pytest.raises(WeightSyncError, match=r"rollout replica 0: after .*atropos\.sync\.canary_threshold=0\.001"):
            canary.check()
        cluster.checkpoints.sleep_replicas()
        assert cluster.call(stats)["weight_bytes"] == 0  # memory really is given back
        cluster.checkpoints.update_weights(step)
        assert max(canary.check(), cluster.canary(_TOKENS)) < 1e-5
        assert cluster.call(stats)["policy_version"] == step
    cluster.call(ray_cluster.zero_one_tensor)
    with pytest.raises(WeightSyncError, match="rollout replica 0: "):
        canary.check()
    cluster.checkpoints.update_weights(3)
    assert canary.check() < 1e-5


async def test_abort_hands_back_what_there_is_with_logprobs_of_the_policy_that_made_it(cluster: Cluster) -> None:
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    prompt = _TOKENS[:8]
    params = {"temperature": 1.0, "logprobs": True, "ignore_eos": True}
    client, own = cluster.servers.get_client(), cluster.servers.get_client(FullyAsyncLLMServerClient)
    plain = asyncio.ensure_future(client.generate("a", prompt_ids=prompt, sampling_params={**params}))
    continued = asyncio.ensure_future(own.generate("b", prompt_ids=prompt, sampling_params={**params}))
    await _generated(cluster, 60)
    await cluster.checkpoints.abort_replicas()
    output = await asyncio.wait_for(plain, 30)
    assert output.stop_reason == "aborted" and 0 < len(output.token_ids) < 192
    expected = await cluster.server.__ray_call__.remote(ray_cluster.logprobs, [*prompt, *output.token_ids])
    assert output.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-5)

    await cluster.checkpoints.abort_replicas(reject_request=True)  # a replica that leaves turns newcomers away
    turned_away = await asyncio.wait_for(client.generate("c", prompt_ids=prompt, sampling_params={**params}), 30)
    assert turned_away.token_ids == [] and turned_away.stop_reason == "aborted"

    await asyncio.to_thread(cluster.step, 4)
    await cluster.checkpoints.resume_generation_replicas()
    whole = await asyncio.wait_for(continued, 60)
    assert len(whole.token_ids) == len(whole.log_probs) == 192
    assert (whole.extra_fields["min_global_steps"], whole.extra_fields["max_global_steps"]) == (3, 4)


def test_its_http_address_answers_like_our_gateway_to_who_has_its_key(cluster: Cluster) -> None:
    [address] = cluster.servers.get_addresses()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "logprobs": True, "model": "m"}
    url, key = f"http://{address}/v1/chat/completions", {"authorization": "Bearer of-the-replica"}
    assert httpx.post(url, json=body, timeout=30.0).status_code == 401
    answer = httpx.post(url, json=body, timeout=30.0, headers=key)
    assert answer.status_code == 200
    assert answer.json()["policy_version"] == cluster.call(stats)["policy_version"]


async def test_requests_and_sessions_outlast_every_kind_of_weight_update(
    cluster: Cluster, model_path: Path, tmp_path: Path
) -> None:
    """Concurrent HTTP requests through the gateway while weights are updated, with sleep, with abort, and live.

    Nothing fails, nothing is short, every token has its logprob, and the logprobs of a run of one policy are those of
    that policy's weights. A session is one row, although the weights were updated between its turns, or within them.
    """
    steps, answers, store = 6, [], SessionStore(tmp_path)
    start = cluster.call(stats)["policy_version"]
    stop = asyncio.Event()
    weights: dict[int, Any] = {start: (await asyncio.to_thread(cluster.workers.weights))[0]}

    async def environment(client: httpx.AsyncClient, number: int) -> None:
        sent = 0
        while not stop.is_set():
            prompt = [number + 1, sent % 250, 7, 8]
            answer = await client.post("/generate", json=_completion(prompt, max_tokens=60))
            assert answer.status_code == 200, answer.text
            answers.append((prompt, answer.json()))
            sent += 1

    async def agent(client: httpx.AsyncClient) -> dict[str, Any]:
        session = (await client.post("/sessions", json={"group": "g"})).json()
        messages: list[dict[str, str]] = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"question {turn}"})
            body = {"messages": messages, "max_tokens": 40, "ignore_eos": True}
            answer = await client.post(f"/s/{session['id']}/v1/chat/completions", json=body)
            messages.append(answer.json()["choices"][0]["message"])
        await client.post(f"/sessions/{session['id']}/reward", json={"reward": 1})
        return dict((await client.get(f"/sessions/{session['id']}/rollout")).json())

    async def update(step: int) -> None:
        kind = step % 3
        if kind == 0:
            await cluster.checkpoints.abort_replicas()
        if kind != 2:
            await cluster.checkpoints.sleep_replicas()
        await asyncio.to_thread(cluster.workers.nudge, step, 0.05)
        await asyncio.to_thread(cluster.checkpoints.update_weights, step)
        if kind == 0:
            await cluster.checkpoints.resume_generation_replicas()

    with _gateway(cluster, sessions=store) as gateway:
        async with _client(gateway) as client:
            clients = [asyncio.ensure_future(environment(client, number)) for number in range(4)]
            conversation = asyncio.ensure_future(agent(client))
            for step in range(start + 1, start + 1 + steps):
                await _generated(cluster, 200)
                await update(step)
                gateway.release(step)
                [weights[step]] = await asyncio.to_thread(cluster.workers.weights)
                assert (await client.get("/health")).json()["policy_version"] == step
            await _generated(cluster, 200)
            stop.set()
            await asyncio.gather(*clients)
            [row] = (await conversation)["rows"]
    store.close()

    assert row["turns"] == [0, 1, 2] and [stop - start for start, stop in row["spans"]] == [40] * 3
    versions = [version for span in row["spans"] for version in row["versions"][slice(*span)]]
    assert versions == sorted(versions) and start <= versions[0] < versions[-1] <= start + steps
    assert all(value <= 0 for span in row["spans"] for value in row["logprobs"][slice(*span)])
    assert len(answers) >= 8
    spans = [tuple(span) for _, answer in answers for span in answer["policy_versions"]]
    assert any(first < last for first, last in spans)  # some were really on their way
    for prompt, answer in answers:
        rows = [[next(iter(place[0].values())) for place in row] for row in answer["logprobs"]]
        assert [len(tokens) for tokens in answer["token_ids"]] == [len(row) for row in rows] == [60, 60]
        first, last = answer["policy_versions"][0]
        policies = {version: weights[version] for version in range(first, last + 1)}
        made_by = _policies(model_path, policies, prompt, answer["token_ids"][0], rows[0])
        assert (made_by[0], made_by[-1]) == (first, last)


def _policies(
    model: Path, weights: dict[int, dict[str, Any]], prompt: list[int], tokens: list[int], logprobs: list[float]
) -> list[int]:
    """Finds the policy that each token's logprob is of: a plain model with its weights gives the same. Fails when none
    does, or when an older policy follows a newer one."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model)
    scores = {}
    for version, state in weights.items():
        plain.load_state_dict(state)
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
        scores[version] = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    made_by = [min(weights)]
    for position, value in enumerate(logprobs):
        fits = [v for v in sorted(weights) if v >= made_by[-1] and abs(scores[v][position] - value) < 1e-4]
        assert fits, f"token {position}: {value} is of none of the policies {sorted(weights)} from {made_by[-1]} on"
        made_by.append(fits[0])
    return made_by[1:]


@pytest.mark.parametrize("death", [ray_cluster.kill, ray_cluster.break_the_engine])
async def test_a_dead_replica_is_replaced_and_the_environments_requests_go_on(cluster: Cluster, death: Any) -> None:
    """The request that was cut is answered whole; what the new server writes is of the newest weights."""
    replicas = _replicas(cluster)
    canary = replicas.canary(SyncConfig(), build_tiny_tokenizer(), exact=True)
    with _gateway(cluster) as gateway:
        async with _client(gateway) as client:
            request = asyncio.ensure_future(client.post("/generate", json=_completion(_TOKENS[:8], max_tokens=180)))
            await _generated(cluster, 60)
            before = cluster.server
            await asyncio.gather(before.__ray_call__.remote(death), return_exceptions=True)
            await asyncio.to_thread(eventually, gateway.lost.is_set, "the dead replica to be found", 60.0)
            await asyncio.to_thread(_replace_one, replicas)
            version = gateway.engine.policy_version + 1
            await asyncio.to_thread(cluster.checkpoints.update_weights, version)
            assert await asyncio.to_thread(canary.check) < 1e-5
            assert not request.done(), "nothing serves before it has the weights"
            await asyncio.to_thread(replicas.admit)
            answer = await request
    assert answer.status_code == 200, answer.text
    assert [len(tokens) for tokens in answer.json()["token_ids"]] == [180, 180]
    assert answer.json()["policy_versions"] == [[version, version]] * 2
    assert cluster.server != before and await asyncio.to_thread(replicas.replace_dead) == 0


async def test_a_client_that_leaves_frees_the_replicas_slots(cluster: Cluster) -> None:
    with _gateway(cluster) as gateway:
        await asyncio.to_thread(cluster.checkpoints.abort_replicas)  # it stays unanswered
        before = await cluster.server.__ray_call__.remote(stats)

        def counted(name: str) -> bool:
            return bool(cluster.call(stats)[name] == before[name] + 3)

        async with _client(gateway) as client:
            asked = asyncio.ensure_future(client.post("/generate", json={"prompt": "abc", "n": 3}))
            await asyncio.to_thread(eventually, lambda: counted("requests"), "the requests to arrive", 60.0)
            asked.cancel()
            await asyncio.to_thread(eventually, lambda: counted("aborted"), "the requests to be let go", 60.0)
        await asyncio.to_thread(cluster.checkpoints.resume_generation_replicas)


def test_a_standalone_replica_gets_the_weights_through_the_object_store(cluster: Cluster) -> None:
    import ray
    from verl.checkpoint_engine.base import CheckpointEngineManager
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.llm_server import LLMServerManager

    standalone = LLMServerManager.create(config=cluster.config, start_rank=1)
    [replica] = standalone.get_replicas()
    config = omega_conf_to_dataclass(cluster.config.actor_rollout_ref.rollout.checkpoint_engine)
    manager = CheckpointEngineManager(config=config, actor_wg=cluster.workers, replicas=[replica])

    def state() -> tuple[int, str]:
        found = cluster.call(stats, server=replica.server_handle)
        return found["policy_version"], found["gate"]

    assert state()[1] == "paused"  # random weights generate nothing
    for step in (100, 101):
        cluster.workers.nudge(step, 0.05)
        assert manager.update_weights(step)["weight_sync/bytes"] > 0
        assert cluster.canary(_TOKENS, replica.server_handle) < 1e-5
        assert state() == (step, "open")
    replicas = _replicas(cluster, standalone)
    for victim in (replica.server_handle, replica.workers[0]):
        ray.kill(victim)
        _replace_one(replicas)
        assert replicas.replace_dead() == 0
        manager.update_weights(102)
        assert cluster.canary(_TOKENS, replica.server_handle) < 1e-5
    for actor in (replica.server_handle, *replica.workers):
        ray.kill(actor)
