"""verl's workers and replicas on a real, small Ray: what a trainer builds around its loop, without the loop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from atropos_verl import verl_plugin
from atropos_verl.config.composition import SHIPPED
from atropos_verl.config.verl_keys import compose_config
from atropos_verl.verl_plugin.shims import start_ray
from support.engines import logprob_oracle
from support.serving import eventually

_TESTS = str(Path(__file__).resolve().parents[1])


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of its own for this process; logical GPUs only. Nothing of it is left afterwards."""
    path = os.pathsep.join(filter(None, [_TESTS, os.environ.get("PYTHONPATH")]))
    environment = {"VERL_LOGGING_LEVEL": "WARN", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    os.environ.update(environment := verl_plugin.ray_environment("cpu") | environment)
    import ray

    # verl loads it when it is imported, which another test of this process may have done before.
    import atropos_verl.verl_plugin.plugin  # noqa: F401

    options = {"include_dashboard": False, "log_to_driver": bool(os.environ.get("RAY_TEST_LOGS"))}
    memory, variables = 200 << 20, {"env_vars": environment}
    start_ray(num_cpus=8, num_gpus=4, object_store_memory=memory, runtime_env=variables, **options)
    try:
        yield
    finally:
        ray.shutdown()


def compose(model: Path, *overrides: str) -> Any:
    """The shipped configuration of the demo on Ray, with a tiny model and buckets of 1 MB."""
    words = [
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=192",
    ]
    return compose_config([*words, *overrides], SHIPPED, "ray_cpu_demo")


def worker_class() -> type:
    """Our training worker, with two methods for tests: change the policy, and say what it thinks of a sequence."""
    from verl.single_controller.base.decorator import Dispatch, register

    from atropos_verl.backends.ray.workers import AtroposActorRolloutRefWorker

    class ProbedWorker(AtroposActorRolloutRefWorker):  # type: ignore[misc]
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def nudge(self, seed: int, scale: float) -> int:
            """Add noise to every trained parameter, as an optimiser step would; returns how many."""
            generator = torch.Generator().manual_seed(seed)
            trained = [p for p in self.actor.engine.module.parameters() if p.requires_grad]
            with torch.no_grad():
                for local in (parameter.to_local() for parameter in trained):
                    local.add_(torch.randn(local.shape, generator=generator), alpha=scale)
            return len(trained)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
            """[T-1] logprobs of tokens 1.. by one plain forward of the trained model."""
            return logprob_oracle(self.actor.engine.module, token_ids)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def weights(self) -> dict[str, torch.Tensor]:
            """A copy of the trained weights by name."""
            return {name: t.full_tensor().clone() for name, t in self.actor.engine.module.state_dict().items()}

    return ProbedWorker


class Cluster:
    """One training worker group, its replicas, and verl's managers for both."""

    def __init__(self, config: Any) -> None:
        import ray
        from verl.checkpoint_engine.base import CheckpointEngineManager
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.rollout.llm_server import LLMServerManager

        self.config, own = config, config.actor_rollout_ref
        self.pool = RayResourcePool([1], use_gpu=True, max_colocate_count=3)
        cls = RayClassWithInitArgs(cls=ray.remote(worker_class()), config=own, role="actor_rollout")
        self.workers = RayWorkerGroup(resource_pool=self.pool, ray_cls_with_init=cls, device_name="cpu")
        self.workers.init_model()
        self.servers = LLMServerManager.create(config=config, worker_group=self.workers)
        engine, replicas = omega_conf_to_dataclass(own.rollout.checkpoint_engine), self.servers.get_replicas()
        engine.backend = "naive"
        self.checkpoints = CheckpointEngineManager(config=engine, actor_wg=self.workers, replicas=replicas)

    @property
    def server(self) -> Any:
        """The first replica's actor."""
        return self.servers.get_replicas()[0].server_handle

    def step(self, step: int, scale: float = 0.05) -> None:
        """As verl's synchronous trainer ends a step."""
        self.checkpoints.sleep_replicas()
        self.workers.nudge(step, scale)
        self.checkpoints.update_weights(step)

    def canary(self, token_ids: list[int], server: Any = None) -> float:
        """Largest difference of a logprob between trainer and replica (None: the first)."""
        [trainer] = self.workers.trainer_logprobs(token_ids)
        return max(abs(a - b) for a, b in zip(trainer, self.call(logprobs, token_ids, server=server), strict=True))

    def call(self, function: Callable[..., Any], *arguments: Any, server: Any = None) -> Any:
        """Calls a function of this module in a server's process (None: the first)."""
        import ray

        return ray.get((server or self.server).__ray_call__.remote(function, *arguments))


# Called in a server's process, through __ray_call__.


def stats(server: Any) -> dict[str, Any]:
    engine = server._engine
    return asdict(engine.stats()) | {"policy_version": engine.policy_version, "gate": engine.gate.state}


def logprobs(server: Any, token_ids: list[int]) -> list[float]:
    return list(server._engine.compute_logprobs(token_ids))


def count_weights(server: Any) -> None:
    receive, server.received = server._receiver.receive, 0

    async def counted(update: str, bucket: Any, last: bool) -> Any:
        server.received += bucket.nbytes
        return await receive(update, bucket, last)

    server._receiver.receive = counted


def received_bytes(server: Any) -> int:
    return int(server.received)


def kill(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_the_engine(server: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    server._engine.model.forward = fail


def zero_one_tensor(server: Any) -> None:
    server._engine.model.get_parameter("model.layers.1.mlp.down_proj.weight").data.zero_()


@contextmanager
def started_cluster(model: Path, *overrides: str) -> Iterator[Cluster]:
    """A ``Cluster`` whose actors are gone afterwards, and their resources given back (the Ray session stays)."""
    import ray

    cluster = Cluster(compose(model, *overrides))
    try:
        yield cluster
    finally:
        for actor in (*cluster.workers.workers, *(r.server_handle for r in cluster.servers.get_replicas())):
            ray.kill(actor)
        # verl finds its actors by name, so the next cluster needs the same names.
        eventually(lambda: not any("_server_" in name for name in ray.util.list_named_actors()), "free names", 60.0)
        for group in cluster.pool.get_placement_groups():
            ray.util.remove_placement_group(group)
