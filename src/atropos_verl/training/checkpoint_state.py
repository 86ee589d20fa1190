"""Our state beside verl's checkpoints, for both backends.

::

    run_dir/checkpoints/
      latest_checkpointed_iteration.txt      written last: a checkpoint without it does not exist
      global_step_20/
        actor/                               verl: model, optimizer, extra state of every rank; huggingface/
        atropos.json                         ours: step, policy version, running statistics, totals
    run_dir/journal/                         batches, with their leases, that no checkpoint covers yet
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.storage import write_atomic
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.step import RunTotals

_TRACKER = "latest_checkpointed_iteration.txt"
_STATE = "atropos.json"


@dataclass
class RunState:
    """State that a resumed run needs besides verl's own."""

    step: int = 0
    policy_version: int = 0
    """Optimiser steps since the run began, resumes included."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    totals: RunTotals = field(default_factory=RunTotals)
    held_out: dict[str, float | None] = field(default_factory=dict)
    """Scores of the held-out evaluations so far (``HeldOut.scores``)."""

    def save(self, directory: Path, **notes: Any) -> None:
        """Writes ``directory/atropos.json``, with ``notes`` for readers. Raises ``CheckpointError``."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomic(directory / _STATE, json.dumps({**asdict(self), **notes}, indent=1), durable=True)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {directory}: {error}") from error

    def restore(self, directory: Path) -> None:
        """Reads ``directory/atropos.json``. Raises ``CheckpointError`` when it is missing or damaged."""
        try:
            saved: dict[str, Any] = json.loads((directory / _STATE).read_text())
            self.step, self.policy_version = int(saved["step"]), int(saved["policy_version"])
            self.moments.load_state_dict(saved["moments"])
            self.totals.load(saved["totals"])
            self.held_out.update(saved.get("held_out") or {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"cannot read {directory / _STATE}: {error}; a checkpoint of verl alone does not say which batches "
                "were trained. Choose another checkpoint directory, or disable resuming"
            ) from error


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``resume`` means, or None for a fresh start. Raises ``ConfigError`` when it is none."""
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
        raise CheckpointError(f"{tracker} points at {directory}, which does not exist; resume=disable starts a new run")
    return directory


def saved_step(run_dir: Path, resume: str) -> int:
    """The step that a run goes on from; 0 for a fresh start. Raises as ``find_checkpoint`` and ``RunState.restore``."""
    state = RunState()
    directory = find_checkpoint(run_dir, resume)
    if directory is not None:
        state.restore(directory)
    return state.step


def finish_checkpoint(directory: Path, step: int, keep: int | None) -> None:
    """Declares ``directory`` the newest checkpoint and removes those beyond the newest ``keep`` (None: none).

    Raises ``CheckpointError`` when it cannot be written; the checkpoint before stays the newest one.
    """
    root = directory.parent
    try:
        write_atomic(root / _TRACKER, str(step), durable=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {directory}: {error}") from error
    if keep is not None:
        found = sorted(root.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
        for old in found[:-keep]:
            shutil.rmtree(old)
