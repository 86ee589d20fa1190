"""verl's training workers. Importing this module registers our losses, engines and estimators with verl."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, agg_loss
from verl.trainer.ppo.core_algos import register_adv_est as _register_adv_est
from verl.trainer.ppo.core_algos import register_policy_loss as _register_policy_loss
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.device import get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers import engine_workers
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss

from atropos_verl.backends.ray.replicas import forget_server
from atropos_verl.training.extensions import load_loss
from atropos_verl.training.losses import advantage_weighted_sft_loss
from atropos_verl.types import LossOutput
from atropos_verl.verl_plugin import engines
from atropos_verl.verl_plugin.shims import init_cpu_process_group, own_copies


class _PreparedWorker:
    """Mixin: prepares verl's process group and the threads on a CPU, and registers the user's loss for an actor."""

    generates_meanwhile = False  # the engines generate while this worker trains

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init_cpu_process_group()
        if get_device_name() == "cpu":
            # Ray gives an actor one OpenMP thread: an update on two cores took 1.6 times as long.
            ranks = int(os.environ.get("RAY_LOCAL_WORLD_SIZE", "1")) * (2 if self.generates_meanwhile else 1)
            torch.set_num_threads(max(1, min(len(os.sched_getaffinity(0)) // ranks, 16)))
        super().__init__(*args, **kwargs)
        if "actor" in getattr(self, "role", ""):
            register_user_loss(self.config)  # type: ignore[attr-defined]


class _PolicyWorker(_PreparedWorker):
    """Mixin: what a run asks of the workers that train the policy, beside what verl does."""

    actor: TrainingWorker
    config: Any
    rollout: Any = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def probe_logprobs(self, token_ids: list[int]) -> list[float] | None:
        """[T-1] logprobs of tokens 1.. of a sequence under the present policy; None where another rank has them."""
        count, nested = len(token_ids), partial(torch.nested.as_nested_tensor, layout=torch.jagged)
        rows = {"input_ids": token_ids, "position_ids": range(count), "loss_mask": [1] * count}
        columns = {name: nested([torch.tensor(row)]) for name, row in rows.items()}
        settings = {"pad_mode": DatasetPadMode.NO_PADDING, "temperature": 1.0, "compute_loss": False}
        settings |= {"use_dynamic_bsz": True, "max_token_len_per_gpu": count}
        output = self.actor.infer_batch(tu.get_tensordict(columns, settings))
        # verl: entry t is the logprob of token t + 1.
        return None if output is None else [float(value) for value in output["log_probs"].unbind()[0][:-1]]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def replica_replaced(self) -> None:
        """A replica has a new server: the adapter looks for it, and a base without adapters is sent again."""
        if self.rollout is not None:
            forget_server(self.rollout)
            self.base_sync_done = "dummy" not in self.config.rollout.load_format

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def remove_checkpoints(self, root: str, kept: set[str]) -> None:
        """On a node with a disk of its own, remove this node's part of checkpoints that are gone at the trainer."""
        for directory in Path(root).glob("global_step_*"):
            if directory.name not in kept:
                shutil.rmtree(directory, ignore_errors=True)


class AtroposTrainingWorker(_PreparedWorker, TrainingWorker):  # type: ignore[misc]
    """Trains the critic."""


class AtroposActorRolloutRefWorker(_PolicyWorker, ActorRolloutRefWorker):  # type: ignore[misc]
    """Trains the policy of sync and colocate_async."""


class AtroposDetachActorWorker(_PolicyWorker, DetachActorWorker):  # type: ignore[misc]
    """Trains the policy of separate_async."""

    generates_meanwhile = True

    @property
    def copy_handler(self) -> Any:
        """verl's function that saves the old policy, made to copy it."""
        save = super().copy_handler
        return own_copies(save) if get_device_name() == "cpu" else save


WORKERS = (AtroposTrainingWorker, AtroposActorRolloutRefWorker, AtroposDetachActorWorker)


def verls_loss(loss: Callable[..., LossOutput], aggregates: bool = False) -> Callable[..., Any]:
    """``loss``, of ``training/``, with the arguments and results of a policy loss of verl's, which hands it padding too
    (``loss_mask`` False) and no ``rollout_logprobs``: importance weights are multiplied into its advantages.
    ``aggregates``: it is ``-log_prob · advantage`` per token, which verl may aggregate in other ways than token-mean.
    """

    def policy_loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Tensors are [B, R]; entry t is of response token t. The loss is scaled by the data-parallel size."""
        batch, mask = dict(config.global_batch_info), response_mask.reshape(-1).bool()
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        tokens = batch.get("batch_num_tokens")
        if aggregates and (tokens is None or loss_agg_mode != "token-mean"):
            terms = -log_prob * weighted
            return agg_loss(loss_mat=terms, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch), {}
        # Flat: verl's column 0 is a response token, which may be trained; ours of a [B, L] sequence never is.
        output = loss(
            log_prob.reshape(-1),
            weighted.reshape(-1),
            mask,
            int(mask.sum() if tokens is None else tokens),
            old_logprobs=old_log_prob.reshape(-1),
            rollout_logprobs=None,
            sequence_ids=torch.arange(len(log_prob), device=log_prob.device).repeat_interleave(log_prob.shape[1]),
        )
        return output.loss * batch.get("dp_size", 1), {f"actor/{name}": v for name, v in output.metrics.items()}

    return policy_loss


def ppo_loss_with_teacher(
    config: Any, model_output: dict[str, Any], data: Any, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's loss of the actor, and the KL to a teacher's and a reference's values in the batch."""
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    added, ranks = engines.added_loss(model_output, data), data["dp_size"]
    share = float(data["loss_mask"].values().sum()) * ranks / data["batch_num_tokens"]
    figures = {f"actor/{name}": Metric(AggregationType.SUM, value * share) for name, value in added.metrics.items()}
    return loss + added.loss * ranks, metrics | figures


engine_workers.ppo_loss = ppo_loss_with_teacher  # verl's workers call it by this name; it has no hook


def register_user_loss(config: Any) -> None:
    """Register the function of ``atropos.loss.path``, which ``complete_config`` has made verl's ``loss_mode``."""
    path = str(config.actor.policy_loss.loss_mode)
    if ":" in path and path not in POLICY_LOSS_REGISTRY:
        _register_policy_loss(path)(verls_loss(load_loss(path)))


def plain(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Use the raw score as the advantage of every response token [B, R]."""
    del config
    values = token_level_rewards.sum(dim=-1, keepdim=True) * response_mask
    return values, values


# verl raises on a second registration under another object.
if "advantage_weighted_sft" not in POLICY_LOSS_REGISTRY:
    _own = verls_loss(lambda *tensors, **_: advantage_weighted_sft_loss(*tensors), aggregates=True)
    _register_policy_loss("advantage_weighted_sft")(_own)
if "plain" not in ADV_ESTIMATOR_REGISTRY:
    _register_adv_est("plain")(plain)
