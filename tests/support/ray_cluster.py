"""verl's workers and replicas on a real, small Ray: what a trainer builds around its loop, without the loop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from atropos_verl import verl_plugin
from support.serving import eventually

_TESTS = Path(__file__).resolve().parents[1]


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of its own for this process; logical GPUs only. Nothing of it is left afterwards."""
    environment = verl_plugin.ray_environment("cpu") | {
        "VERL_LOGGING_LEVEL": "WARN",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "RAY_DEDUP_LOGS": "0",
    }
    os.environ.update(environment)
    import ray

    # verl loads it when it is imported, which another test of this process may have done before.
    import atropos_verl.verl_plugin.plugin  # noqa: F401

    ray.init(
        num_cpus=8,
        num_gpus=4,
        include_dashboard=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": environment},
        log_to_driver=bool(os.environ.get("RAY_TEST_LOGS")),
    )
    try:
        yield
    finally:
        ray.shutdown()


def compose(model: Path, *overrides: str) -> Any:
    """verl's own ``ppo_trainer`` configuration for a tiny float32 model on CPU."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    settings = [
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "algorithm.adv_estimator=grpo",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=192",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.rollout.name=transformers",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.enforce_eager=True",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return hydra_compose("ppo_trainer", [*settings, *overrides])


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
                for parameter in trained:
                    local = parameter.to_local()
                    local.add_(torch.randn(local.shape, generator=generator), alpha=scale)
            return len(trained)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
            """[T-1] logprobs of tokens 1.. by one plain forward of the trained model."""
            with torch.no_grad():
                logits = self.actor.engine.module(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
            logp = torch.log_softmax(logits.double(), dim=-1)
            return [float(logp[i, token]) for i, token in enumerate(token_ids[1:])]

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

        self.config = config
        self._pool = pool = RayResourcePool([1], use_gpu=True, max_colocate_count=3)
        cls = RayClassWithInitArgs(
            cls=ray.remote(worker_class()), config=config.actor_rollout_ref, role="actor_rollout"
        )
        self.workers = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls, device_name="cpu")
        self.workers.init_model()
        self.servers = LLMServerManager.create(config=config, worker_group=self.workers)
        engine_config = omega_conf_to_dataclass(config.actor_rollout_ref.rollout.checkpoint_engine)
        engine_config.backend = "naive"
        self.checkpoints = CheckpointEngineManager(
            config=engine_config, actor_wg=self.workers, replicas=self.servers.get_replicas()
        )

    @property
    def server(self) -> Any:
        """The first replica's actor."""
        return self.servers.get_replicas()[0].server_handle

    def close(self) -> None:
        """End its actors and give their resources back to the Ray session."""
        import ray

        for actor in (*self.workers.workers, *(r.server_handle for r in self.servers.get_replicas())):
            ray.kill(actor)
        # verl finds its actors by name, so the next cluster needs the same names.
        eventually(lambda: not any("_server_" in name for name in ray.util.list_named_actors()), "free names", 60.0)
        for group in self._pool.get_placement_groups():
            ray.util.remove_placement_group(group)

    def step(self, step: int, scale: float = 0.05) -> None:
        """As verl's synchronous trainer ends a step."""
        self.checkpoints.sleep_replicas()
        self.workers.nudge(step, scale)
        self.checkpoints.update_weights(step)

    def canary(self, token_ids: list[int], server: Any = None) -> float:
        """Largest difference of a logprob between trainer and replica (None: the first)."""
        [trainer] = self.workers.trainer_logprobs(token_ids)
        engine = self.call(logprobs, token_ids, server=server)
        return max(abs(a - b) for a, b in zip(trainer, engine, strict=True))

    def call(self, function: Callable[..., Any], *arguments: Any, server: Any = None) -> Any:
        """Calls a function of this module in a server's process (None: the first)."""
        import ray

        return ray.get((server or self.server).__ray_call__.remote(function, *arguments))


# Called in a server's process, through __ray_call__.


def stats(server: Any) -> dict[str, Any]:
    found, engine = server._engine.stats(), server._engine
    known = {"policy_version": engine.policy_version, "gate": engine.gate.state}
    return {name: getattr(found, name) for name in found.__slots__} | known


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
    """A ``Cluster`` whose actors are gone afterwards (the Ray session stays)."""
    cluster = Cluster(compose(model, *overrides))
    try:
        yield cluster
    finally:
        cluster.close()
