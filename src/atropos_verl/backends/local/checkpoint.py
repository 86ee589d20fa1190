"""Checkpoints of a local run, in verl's layout, with our own state beside verl's.

::

    run_dir/checkpoints/
      latest_checkpointed_iteration.txt      written last: a checkpoint without it does not exist
      global_step_20/
        actor/                               verl: model, optimizer, extra state of every rank; huggingface/
        atropos.json                         ours: step, policy version, running statistics, totals
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.storage import write_atomic

if TYPE_CHECKING:
    from atropos_verl.backends.local.trainer import AtroposTrainer

__all__ = ["find_checkpoint", "load_checkpoint", "save_checkpoint", "saved_state"]

logger = logging.getLogger(__name__)

_TRACKER = "latest_checkpointed_iteration.txt"
_STATE = "atropos.json"


def save_checkpoint(trainer: AtroposTrainer, extra: dict[str, Any] | None = None) -> Path:
    """Write the trainer's state at its current step; older checkpoints beyond ``max_ckpt_to_keep`` go.

    Raises:
        CheckpointError: the directory cannot be written (it names the path and the cause). The checkpoint before
            stays the newest one.
    """
    root = trainer.run_dir / "checkpoints"
    directory = root / f"global_step_{trainer.step}"
    state = {
        "step": trainer.step,
        "policy_version": trainer.policy_version,
        "moments": trainer.moments.state_dict(),
        "totals": asdict(trainer.totals),
        "model_path": str(trainer.model_path),
        **(extra or {}),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trainer.stack.worker.save_checkpoint(directory / "actor", trainer.step)
        write_atomic(directory / _STATE, json.dumps(state, indent=1), durable=True)
        write_atomic(root / _TRACKER, str(trainer.step), durable=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"cannot write the checkpoint {directory}: {error}") from error
    trainer.batches.discard_through(trainer.step)
    _remove_old(root, trainer.config.trainer.max_ckpt_to_keep)
    return directory


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``resume`` means, or None for a fresh start.

    Raises:
        ConfigError: ``resume`` names something that is not a checkpoint.
    """
    if resume == "disable":
        return None
    if resume != "auto":
        directory = Path(resume).expanduser().absolute()
        if not (directory / _STATE).is_file():
            raise ConfigError(
                f"{directory} is not a checkpoint of this project (no {_STATE}); or auto, disable", "resume"
            )
        return directory
    tracker = run_dir / "checkpoints" / _TRACKER
    if not tracker.is_file():
        return None
    directory = tracker.parent / f"global_step_{tracker.read_text().strip()}"
    if not (directory / _STATE).is_file():
        raise CheckpointError(f"{tracker} points at {directory}, which is not there; resume=disable starts afresh")
    return directory


def saved_state(directory: Path) -> dict[str, Any]:
    """Our own state in a checkpoint: ``step``, ``policy_version``, ``totals`` and more. Raises ``CheckpointError``."""
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {directory / _STATE}: {error}") from error
    return state


def load_checkpoint(trainer: AtroposTrainer, directory: Path) -> dict[str, Any]:
    """Restore model, optimiser, schedule, step, policy version and running statistics. Returns our saved state."""
    state = saved_state(directory)
    trainer.stack.worker.load_checkpoint(directory / "actor")
    trainer.step = int(state["step"])
    trainer.stack.policy.policy_version = int(state["policy_version"])
    trainer.moments.load_state_dict(state["moments"])
    for key, value in state["totals"].items():
        setattr(trainer.totals, key, value)
    return state


def _remove_old(root: Path, keep: int | None) -> None:
    if keep is None:
        return
    found = sorted(root.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    for directory in found[:-keep]:
        shutil.rmtree(directory)
