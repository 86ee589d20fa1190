"""verl's agent-loop manager whose trajectories come from a trajectory API, not from agent loops of its own.

verl hands it prompts. Of the training partition they are empty slots, which the ``TrajectoryFeed`` fills with whatever
the environments sent; prompts of verl's own validation go to verl's own manager.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from atropos_verl.backends.ray.feed import TrajectoryFeed
from atropos_verl.backends.ray.transfer import Rows

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["AtroposAgentLoopManager", "TransferQueueStore"]

logger = logging.getLogger(__name__)

_PARTITION = "train"


class TransferQueueStore:
    """Slots in TransferQueue. ``tq.init`` must have been called in this process."""

    def running(self, uid: str) -> None:
        tq.kv_put(key=uid, partition_id=_PARTITION, tag={"status": "running"})

    def put(self, uid: str, rows: Rows) -> None:
        tq.kv_batch_put(
            keys=rows.keys, fields=list_of_dict_to_tensordict(rows.fields), tags=rows.tags, partition_id=_PARTITION
        )
        tq.kv_put(key=uid, partition_id=_PARTITION, tag={"status": "finished"})


class AtroposAgentLoopManager:
    """``actor_rollout_ref.rollout.agent.agent_loop_manager_class``. The feed is given by the task runner."""

    feed: TrajectoryFeed | None = None

    def __init__(self, config: Any, **clients: Any) -> None:
        self.config = config
        self._clients = clients
        self._validation: Any = None

    @classmethod
    def create(cls, config: Any, **clients: Any) -> AtroposAgentLoopManager:
        """verl's constructor: ``config``, ``llm_client``, ``teacher_client``, ``reward_loop_worker_handles``."""
        return cls(config, **clients)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Ask for what ``prompts`` stand for; returns at once. verl's contract."""
        # Not get(): that gives the wrapped value, which has no truth.
        is_validation = prompts["validate"] if "validate" in prompts else False  # noqa: SIM401
        if is_validation:
            self._validate(prompts)
            return
        if self.feed is None:
            raise RuntimeError("no trajectory feed: AtroposAgentLoopManager runs in atropos_verl's task runner only")
        step = int(prompts["global_steps"])
        for uid in prompts["uid"]:
            self.feed.request(str(uid), step)

    def _validate(self, prompts: TensorDict) -> None:
        if self._validation is None:
            from verl.trainer.ppo.v1 import AgentLoopManagerTQ

            self._validation = AgentLoopManagerTQ.create(config=self.config, **self._clients)
        self._validation.generate_sequences(prompts)
