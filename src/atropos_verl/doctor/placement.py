"""Ray: the placement groups that verl will ask for, against the machines that there are.

Ray waits for ever, in silence, for resources that no node has; so this is looked at before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atropos_verl.doctor.result import Finding, missing, ok

__all__ = ["check_placement"]

_SECTION = "placement"


def check_placement(settings: Mapping[str, Any], *, gpus: int, cores: int) -> list[Finding]:
    """Whether one fresh Ray node on this machine can hold what ``settings`` (verl's ppo_trainer) asks for.

    Args:
        gpus, cores: of this machine.

    A run that attaches to a cluster (``ray_kwargs.ray_init.address``) is judged by its divisions only.
    """
    trainer = _section(settings, "trainer")
    nodes, per_node = int(trainer.get("nnodes") or 1), int(trainer.get("n_gpus_per_node") or 1)
    init = _section(settings, "ray_kwargs", "ray_init")
    findings = [_check_division(settings, nodes * per_node)]
    if init.get("address") is not None:
        findings.append(ok(_SECTION, "nodes", f"{nodes} x {per_node}, on the cluster at {init['address']} (not asked)"))
        return findings
    on_cpu = str(trainer.get("device") or "cuda") == "cpu"
    if nodes > 1:
        todo = (
            "start Ray on every node (ray start --head, ray start --address=…) and set ray_kwargs.ray_init.address=auto"
        )
        findings.append(
            missing(_SECTION, "nodes", f"trainer.nnodes={nodes}, but Ray is started on this machine alone", todo)
        )
    elif on_cpu:
        logical = init.get("num_cpus")
        have, needed = int(logical or cores), per_node + 2
        text = f"{have} logical CPUs for {per_node} worker(s), runner and gateway"
        todo = f"ray_kwargs.ray_init.num_cpus={max(16, needed)}: Ray counts CPUs, it does not pin them"
        findings.append(ok(_SECTION, "bundles", text) if have >= needed else missing(_SECTION, "bundles", text, todo))
    else:
        text = f"one placement group of {per_node} bundles with a GPU each, {gpus} GPUs here"
        todo = "lower trainer.n_gpus_per_node, or trainer.device=cpu"
        findings.append(ok(_SECTION, "bundles", text) if gpus >= per_node else missing(_SECTION, "bundles", text, todo))
    return findings


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


def _section(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    node: Any = settings
    for name in names:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}
