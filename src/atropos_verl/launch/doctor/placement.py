"""Ray: the placement groups that verl will ask for, against the machines that there are.

verl itself compares GPUs, after a minute of imports. CPUs nobody compares: every process's bundle asks for three of
them (verl 0.9.1, ``ResourcePoolManager.max_colocate_count``), and Ray waits for ever, in silence, for what no node has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atropos_verl.config.findings import Finding, missing, ok

__all__ = ["check_placement"]

_SECTION = "placement"
_CPUS_PER_WORKER = 3


def check_placement(settings: Mapping[str, Any], *, gpus: int, cores: int) -> list[Finding]:
    """Whether one fresh Ray node on this machine can hold what ``settings`` (verl's ppo_trainer) asks for.

    Args:
        gpus, cores: of this machine.

    A run that attaches to a cluster (``ray_kwargs.ray_init.address``) is judged by its divisions only.
    """
    trainer = _section(settings, "trainer")
    nodes, per_node = int(trainer.get("nnodes") or 1), int(trainer.get("n_gpus_per_node") or 1)
    init = _section(settings, "ray_kwargs", "ray_init")
    findings = [_check_division(settings, nodes * per_node), *_check_micro_batches(settings, nodes * per_node)]
    if init.get("address") is not None:
        findings.append(ok(_SECTION, "nodes", f"{nodes} x {per_node}, on the cluster at {init['address']} (not asked)"))
        return findings
    if nodes > 1:
        todo = (
            "start Ray on every node (ray start --head, ray start --address=...), then ray_kwargs.ray_init.address=auto"
        )
        text = f"trainer.nnodes={nodes}, but Ray is started on this machine alone"
        return [*findings, missing(_SECTION, "nodes", text, todo)]
    workers = per_node + _standalone(settings)
    findings.append(_check_cpus(settings, init, workers, cores))
    if str(trainer.get("device") or "cuda") != "cpu":
        text = f"{workers} processes with a GPU each, {gpus} GPUs here"
        todo = "lower trainer.n_gpus_per_node (and actor_rollout_ref.rollout.nnodes), or trainer.device=cpu"
        findings.append(ok(_SECTION, "GPUs", text) if gpus >= workers else missing(_SECTION, "GPUs", text, todo))
    return findings


def _check_cpus(settings: Mapping[str, Any], init: Mapping[str, Any], workers: int, cores: int) -> Finding:
    storage = _section(settings, "transfer_queue", "backend", "SimpleStorage").get("num_data_storage_units")
    # The runner, TransferQueue's controller and its storage; agents and replicas ask for none.
    needed = _CPUS_PER_WORKER * workers + 2 + int(storage or 1)
    have = int(init.get("num_cpus") or cores)
    text = f"{needed} CPUs for {workers} processes ({_CPUS_PER_WORKER} each), runner and queue; Ray counts {have}"
    todo = f"ray_kwargs.ray_init.num_cpus={needed} or more: Ray counts CPUs, it does not pin them"
    return ok(_SECTION, "CPUs", text) if have >= needed else missing(_SECTION, "CPUs", text, todo)


def _standalone(settings: Mapping[str, Any]) -> int:
    """Processes of rollout replicas that share no GPU with the trainer."""
    if _section(settings, "trainer", "v1").get("trainer_mode") != "separate_async":
        return 0
    rollout = _section(settings, "actor_rollout_ref", "rollout")
    return int(rollout.get("nnodes") or 0) * int(rollout.get("n_gpus_per_node") or 0)


def _check_division(settings: Mapping[str, Any], world: int) -> Finding:
    rollout = _section(settings, "actor_rollout_ref", "rollout")
    tensor, pipeline = (int(rollout.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    size = tensor * pipeline
    text = f"{world} processes, rollout replicas of {size}"
    if world % size:
        todo = "n_gpus_per_node x nnodes must be a multiple of rollout.tensor_model_parallel_size x pipeline_…"
        return missing(_SECTION, "replicas", text, todo)
    per_step = int(_section(settings, "data").get("train_batch_size") or 0) * int(rollout.get("n") or 1)
    if per_step % world:
        todo = "data.train_batch_size x actor_rollout_ref.rollout.n must be a multiple of the number of processes"
        return missing(_SECTION, "replicas", f"{text}; {per_step} sequences a step do not divide by {world}", todo)
    return ok(_SECTION, "replicas", text)


def _check_micro_batches(settings: Mapping[str, Any], world: int) -> list[Finding]:
    """Without dynamic batches verl splits each process's share of a mini-batch into equal micro-batches."""
    actor = _section(settings, "actor_rollout_ref", "actor")
    rollout = _section(settings, "actor_rollout_ref", "rollout")
    size = actor.get("ppo_micro_batch_size_per_gpu")
    if actor.get("use_dynamic_bsz", True) or not size:
        return []
    groups = int(actor.get("ppo_mini_batch_size") or _section(settings, "data").get("train_batch_size") or 0)
    share = groups * int(rollout.get("n") or 1) / world
    text = f"{share:g} sequences of a mini-batch per process, micro-batches of {size}"
    if share % int(size):
        todo = (
            "choose an actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu that divides them, or use_dynamic_bsz=true"
        )
        return [missing(_SECTION, "micro-batches", text, todo)]
    return [ok(_SECTION, "micro-batches", text)]


def _section(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    node: Any = settings
    for name in names:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}
