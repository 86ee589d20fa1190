"""verl's replicas in a run: a dead one is replaced, and after every weight sync each of them answers the canary.

verl 0.9.1 does neither. Not replaced: a server that hangs (nothing says so), verl's load balancer, and a training
worker, whose end is the run's. docs/internals.md ("Dead replicas") draws the way of a request."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from verl.utils.ray_utils import auto_await
from verl.workers.rollout.replica import RolloutMode

from atropos_verl.config.schema import SyncConfig
from atropos_verl.errors import ConfigError, EngineStoppedError, WeightSyncError
from atropos_verl.training.weight_sync import Canary

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 30.0
"""A living server answers within it, also while it generates; one that does not is taken for busy."""
_CANARY_SECONDS = 300.0
_NAME_RETRIES, _NAME_RETRY = 600, 0.1
"""Ray frees the name of a dead actor a little after its death; seconds between two tries."""
_MOST_STARTS = 3


class ReplicaCanary:
    """``Canary`` of every replica in turn: logprobs of a fixed prompt, by the training workers and by the server."""

    def __init__(self, replicas: "Replicas", ids: list[int], threshold: float) -> None:
        self._replicas, self._ids, self._threshold = replicas, ids, threshold

    def check(self, *, staged: bool = False) -> float:
        """The largest difference. Raises ``WeightSyncError``, which names the replica."""
        del staged  # replicas have one buffer
        trainer = next(row for row in self._replicas.workers.probe_logprobs(self._ids) if row is not None)
        replicas = [replica for manager in self._replicas.serving() for replica in manager.rollout_replicas]
        params = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "prompt_logprobs": 0}
        asked = [
            replica.server_handle.generate.remote(
                request_id=f"canary-{replica.replica_rank}", prompt_ids=self._ids, sampling_params=params
            )
            for replica in replicas
        ]
        worst = 0.0
        for replica, output in zip(replicas, ray.get(asked, timeout=_CANARY_SECONDS), strict=True):
            # verl's layout: entry t is about prompt token t + 1, and the last is padding.
            found = [values[0] for values in output.extra_fields.get("prompt_logprobs", [])[:-1]]
            asks: dict[str, Any] = {"trainer_logprobs": partial(list, trainer), "engine_logprobs": partial(list, found)}
            try:
                worst = max(worst, Canary(**asks, threshold=self._threshold).check())
            except WeightSyncError as error:
                text = str(error).replace("sync.canary", "atropos.sync.canary")
                raise WeightSyncError(f"rollout replica {replica.replica_rank}: {text}") from error
        return worst


class Replicas:
    """The replicas of verl's managers (requests go through the load balancer of the last one), and the training workers
    that send them weights. ``serving``: the managers whose servers are awake. ``note``: is told who died."""

    replaced = 0  # servers that were started in the place of another, in all
    has_newcomers = False  # a server waits for weights and ``admit``

    def __init__(
        self, workers: Any, managers: Sequence[Any], serving: Callable[[], Sequence[Any]], note: Any = logger.warning
    ) -> None:
        self.workers, self.serving, self._managers, self._note = workers, serving, managers, note
        self._balancer = managers[-1].global_load_balancer

    def replace_dead(self) -> int:
        """Start a new server in the place of each dead one; returns how many. They get requests from ``admit`` on."""
        every = [(manager, i) for manager in self._managers for i in range(len(manager.rollout_replicas))]
        asked = [_ask(manager.rollout_replicas[i]) for manager, i in every]
        dead = [place for place, answers in zip(every, asked, strict=True) if not _all_live(answers)]
        for manager, i in dead:
            replica, address = manager.rollout_replicas[i], manager.server_addresses[i]
            self._note(f"rollout replica {replica.replica_rank} ({address}) died; another one is started in its place")
            ray.get(self._balancer.remove_servers.remote([address]))
            self._launch(replica)
            manager.server_handles[i], manager.server_addresses[i] = replica.server_handle, replica.server_address
        if dead:
            self.has_newcomers = True
            self.workers.replica_replaced()
        return len(dead)

    def admit(self) -> None:
        """Let the load balancer know every server that serves; they hold weights."""
        self.has_newcomers = False
        servers = {
            address: handle
            for manager in self.serving()
            for address, handle in zip(manager.server_addresses, manager.server_handles, strict=True)
        }
        for address in ray.get(self._balancer.get_all_servers.remote()):
            servers.pop(address, None)  # adding it again would forget what it is busy with
        if servers:
            ray.get(self._balancer.add_servers.remote(servers))

    @auto_await  # type: ignore[untyped-decorator]
    async def _launch(self, replica: Any) -> None:
        for server in replica.servers:  # of several nodes, one may live
            ray.kill(server)
        replica.servers = []
        is_alone = replica.rollout_mode is RolloutMode.STANDALONE
        if is_alone and not _all_live(_ask(replica)):
            for group in replica.resource_pool.get_placement_groups():
                ray.util.remove_placement_group(group)
            launch = replica.init_standalone
        else:
            if is_alone:
                # verl's worker of a standalone replica keeps the handle of a server that is dead.
                forget = lambda worker: forget_server(worker.server_adapter)  # noqa: E731
                await asyncio.gather(*(worker.__ray_call__.remote(forget) for worker in replica.workers))
            launch = replica.launch_servers
        deaths = retries = 0
        while True:
            replica.servers = []
            try:
                await launch()
                self.replaced += 1
                return
            except ValueError as error:
                retries += 1
                if "already taken" not in str(error) or retries > _NAME_RETRIES:
                    raise
            except RayActorError as error:
                deaths += 1
                self.replaced += 1
                if deaths == _MOST_STARTS:
                    text = f"rollout replica {replica.replica_rank} died {deaths} times while it started: {error}"
                    raise EngineStoppedError(text) from error
            await asyncio.sleep(_NAME_RETRY)

    def canary(self, config: SyncConfig, tokenizer: Any, *, exact: bool) -> Any:
        """A ``ReplicaCanary``, or None, as the settings ask. ``exact``: both sides compute in float32."""
        if not config.canary:
            return None
        ids = list(tokenizer.encode(config.canary_text, add_special_tokens=False))
        if len(ids) < 2:
            raise ConfigError(f"{config.canary_text!r} has fewer than two tokens", "atropos.sync.canary_text")
        threshold = config.canary_threshold or (1e-3 if exact else 0.25)
        return ReplicaCanary(self, ids, threshold)


def _ask(replica: Any) -> list[Any]:
    """A sign of life, to come, of each of its actors. Workers of a colocated replica are the trainer's."""
    workers = replica.workers if replica.rollout_mode is RolloutMode.STANDALONE else []
    return [actor.__ray_call__.remote(bool) for actor in (*replica.servers, *workers)]


def forget_server(adapter: Any) -> None:
    """verl's adapters of vLLM and SGLang, and ours, look for their server when they have none."""
    for name in ("server_handle", "server_actor", "_engine"):
        if hasattr(adapter, name):
            setattr(adapter, name, None)


def _all_live(answers: Sequence[Any]) -> bool:
    try:
        ray.get(list(answers), timeout=_ANSWER_SECONDS)
    except RayActorError:
        return False
    except GetTimeoutError:
        pass
    return True
