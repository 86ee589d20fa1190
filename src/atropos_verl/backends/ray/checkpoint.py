"""Our state beside verl's checkpoints.

::

    run_dir/checkpoints/
      latest_checkpointed_iteration.txt    verl's; written last
      global_step_20/
        actor/ …                           verl's
        atropos.json                       running statistics and counters
    run_dir/journal/                       batches, with their leases, that no checkpoint covers yet
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atropos_verl.backends.ray.step_batches import Slot
from atropos_verl.errors import CheckpointError
from atropos_verl.storage import write_atomic
from atropos_verl.training.advantages import RunningMoments

__all__ = ["ClusterState", "load_state", "save_state"]

_STATE = "atropos.json"


@dataclass
class ClusterState:
    """What a resumed run needs besides verl's own."""

    moments: RunningMoments = field(default_factory=RunningMoments)
    totals: dict[str, int] = field(default_factory=dict)
    """Sums of ``Slot.counts`` over the run."""

    def count(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            for name, number in slot.counts.items():
                self.totals[name] = self.totals.get(name, 0) + number


def save_state(directory: Path, state: ClusterState, step: int) -> None:
    """Write ``atropos.json``. Raises ``CheckpointError``."""
    body = {"step": step, "policy_version": step, "moments": state.moments.state_dict(), "totals": state.totals}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / _STATE, json.dumps(body, indent=1), durable=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory / _STATE}: {error.strerror}") from error


def load_state(directory: Path) -> ClusterState:
    """Read ``atropos.json``. Raises ``CheckpointError`` when it is missing or damaged."""
    state = ClusterState()
    try:
        body = json.loads((directory / _STATE).read_text())
        state.moments.load_state_dict(body["moments"])
        state.totals = {str(name): int(number) for name, number in body["totals"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {directory / _STATE}: {error}; a checkpoint of verl alone does not say which batches were "
            "trained. Point trainer.default_local_dir elsewhere, or trainer.resume_mode=disable"
        ) from error
    return state
